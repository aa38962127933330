import dataclasses
import json

import datasets
import pytest

from lizard_jax.config import DataConfig
from lizard_jax.data.loader import Loader
from lizard_jax.data.records import alpaca_document, documents
from lizard_jax.data.text import tokenize
from lizard_jax.errors import UserError
from tests.data.toy import EOS, MARKED_TEMPLATE, TEMPLATE, VOCAB_SIZE, character_tokenizer, write

ALPACA = {"instruction": "Add {input}", "input": "1 and 1", "output": "2"}
CHAT = {
    "messages": [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yo"},
        {"role": "user", "content": "yo?"},
        {"role": "assistant", "content": " fine"},
    ]
}


def read(path, tokenizer=None, **options):
    return list(documents(DataConfig(path=str(path), **options), tokenizer or character_tokenizer(template=TEMPLATE)))


def texts(path, **options):
    return [document.text for document in read(path, **options)]


def answers(document, tokenizer):
    """The decoded runs of scored tokens."""
    text = tokenize([document], tokenizer, source="here", vocab_size=VOCAB_SIZE, answer_only=True)
    runs, before = [], False
    for token, scored in zip(text.tokens.tolist(), text.scored.tolist(), strict=True):
        if scored and not before:
            runs.append([])
        if scored:
            runs[-1].append(token)
        before = scored
    return ["".join(tokenizer.convert_ids_to_tokens(run)) for run in runs]


# ------------------------------------------------------------------------------------------------ formats


def test_text_splits_at_the_separator(tmp_path):
    path = write(tmp_path / "a.txt", "\nonce\nupon\n<|endoftext|>\na time\n<|endoftext|>\n\n<|endoftext|>the end")
    assert texts(path) == ["once\nupon", "a time", "the end"]
    assert texts(write(tmp_path / "b.txt", "one\n\ntwo\n\n\n"), separator="\\n\\n") == ["one", "two"]
    assert texts(write(tmp_path / "c.txt", "one <|endoftext|> two"), separator="") == ["one <|endoftext|> two"]


def test_a_separator_across_two_reads_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr("lizard_jax.data.records._CHUNK", 5)
    path = write(tmp_path / "a.txt", "<|endoftext|>".join(["one", "twenty", "three hundred"]))
    assert texts(path) == ["one", "twenty", "three hundred"]


def test_alpaca_answers_are_scored_exactly_with_eos():
    tokenizer = character_tokenizer()
    document = alpaca_document(ALPACA, "here")
    assert "### Instruction:\nAdd {input}\n\n### Input:\n1 and 1\n\n### Response:\n2" in document.text
    assert answers(document, tokenizer) == ["2</s>"]
    for empty in ({**ALPACA, "input": ""}, {"instruction": "Add", "output": "2"}):
        document = alpaca_document(empty, "here")
        assert "### Input" not in document.text
        assert answers(document, tokenizer) == ["2</s>"]


@pytest.mark.parametrize("template", [TEMPLATE, MARKED_TEMPLATE])
def test_chat_answers_are_scored_exactly(tmp_path, template):
    tokenizer = character_tokenizer(template=template)
    path = write(tmp_path / "chat.jsonl", json.dumps(CHAT) + "\n")
    (document,) = read(path, tokenizer, answer_only=True)
    assert document.text == "<s>user:hi<turn>\nassistant:yo<turn>\nuser:yo?<turn>\nassistant: fine<turn>\n"
    assert answers(document, tokenizer) == ["yo<turn>", " fine<turn>"]
    text = tokenize([document], tokenizer, source="here", vocab_size=VOCAB_SIZE)
    assert text.tokens.tolist() == tokenizer(document.text, add_special_tokens=False)["input_ids"]
    assert text.tokens.tolist() == tokenizer.apply_chat_template(CHAT["messages"], return_dict=True)["input_ids"]


def test_a_chat_whose_turns_close_with_nothing_gets_eos(tmp_path):
    bare = "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '\\n' }}{% endfor %}"
    bare += "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    tokenizer = character_tokenizer(template=bare)
    (document,) = read(write(tmp_path / "chat.jsonl", json.dumps(CHAT)), tokenizer, answer_only=True)
    text = tokenize([document], tokenizer, source="here", vocab_size=VOCAB_SIZE)
    assert text.tokens[-1] == EOS
    assert answers(document, tokenizer) == ["yo", " fine", "</s>"]


def test_a_template_that_rewrites_earlier_turns(tmp_path):
    # Only the last turn keeps the words before '#', as templates do that hide earlier reasoning.
    forgetful = (
        "{% for m in messages %}{{ m['role'] + ':' }}"
        "{{ m['content'] if loop.last or m['role'] != 'assistant' else m['content'].split('#')[-1] }}<turn>"
        "{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    tokenizer = character_tokenizer(template=forgetful)
    chat = {"messages": [*CHAT["messages"][:3], {"role": "assistant", "content": "so#fine"}]}
    path = write(tmp_path / "chat.jsonl", json.dumps(chat))
    (document,) = read(path, tokenizer, answer_only=True)
    assert answers(document, tokenizer) == ["yo<turn>", "so#fine<turn>"]
    chat["messages"][1]["content"] = "well#yo"
    path = write(tmp_path / "chat.jsonl", json.dumps(chat))
    (document,) = read(path, tokenizer, answer_only=True)
    assert answers(document, tokenizer) == ["yo<turn>", "so#fine<turn>"]


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".txt", ""])
@pytest.mark.parametrize("array", [False, True])
def test_auto_looks_at_the_content(tmp_path, suffix, array):
    def path(record):
        text = json.dumps([record, record], indent=1) if array else json.dumps(record) + "\n\n" + json.dumps(record)
        return write(tmp_path / f"data{suffix}", text)

    assert [d.open_end for d in read(path(ALPACA))] == [True, True]
    assert [d.text[:8] for d in read(path(CHAT))] == ["<s>user:"] * 2
    assert texts(path({"text": "plain"})) == ["plain", "plain"]
    assert texts(path({"body": "plain"}), text_column="body") == ["plain", "plain"]


def test_auto_leaves_prose_alone(tmp_path):
    assert texts(write(tmp_path / "a.txt", "[Music] a song<|endoftext|>{curly} prose")) == [
        "[Music] a song",
        "{curly} prose",
    ]


def test_parquet_and_saved_datasets_and_directories(tmp_path):
    data = datasets.Dataset.from_list([{"text": "one"}, {"text": ""}, {"text": "two"}])
    (tmp_path / "d").mkdir()
    data.to_parquet(str(tmp_path / "d" / "b.parquet"))
    write(tmp_path / "d" / "a.txt", "zero")
    write(tmp_path / "d" / "ignored.bin", "no")
    assert texts(tmp_path / "d" / "b.parquet") == ["one", "two"]
    assert texts(tmp_path / "d") == ["zero", "one", "two"]
    datasets.DatasetDict({"train": data}).save_to_disk(str(tmp_path / "saved"))
    assert texts(tmp_path / "saved") == ["one", "two"]
    with pytest.raises(UserError, match="has no split 'test'; it has train"):
        texts(tmp_path / "saved", split="test")


# ------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("a.txt", "", {}, "a.txt is empty"),
        ("a.json", "", {}, "a.json is empty"),
        ("a.json", "[]", {}, "a.json is empty"),
        ("a.jsonl", '{"text": "a"}\n\n{"text": oops}\n', {}, r"malformed JSON in .*a.jsonl, line 3: "),
        ("a.json", '[{"text": "a"},\n{"text"}]', {}, r"malformed JSON in .*a.json, line 2: "),
        ("a.jsonl", "3\n", {}, r"line 1 is not a text: expected an object, found int"),
        ("a.json", '[{"foo": 1}]', {}, "its first record has the keys foo; expected messages"),
        ("a.json", '[{"foo": 1}]', {"format": "alpaca"}, r"record 1 is not an Alpaca record: it lacks 'instruction'"),
        ("a.json", '[{"instruction": "a", "output": 1}]', {}, "'output' must be a string, not int"),
        ("a.jsonl", '{"instruction": "", "output": ""}\n{"output": ""}', {}, "line 2 is not an Alpaca .* lacks 'instr"),
        ("a.json", '[{"text": "a"}]', {"format": "chat"}, "record 1 is not a chat: it lacks a non-empty list"),
        ("a.json", '[{"messages": []}]', {}, "record 1 is not a chat: it lacks a non-empty list"),
        ("a.json", '[{"messages": [{"role": "user"}]}]', {}, "message 1 lacks a string 'role' or 'content'"),
        ("a.json", '[{"messages": [{"role": "user", "content": "a"}]}]', {"answer_only": True}, "no assistant message"),
        ("a.parquet", "no", {}, "cannot read .*a.parquet as parquet"),
    ],
)
def test_bad_records_are_told_with_their_place(tmp_path, name, content, options, message):
    with pytest.raises(UserError, match=message) as error:
        read(write(tmp_path / name, content), **options)
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_what_is_no_text_is_told(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"a.txt is not UTF-8 text: "):
        read(tmp_path / "a.txt")


def test_paths_and_names_that_lead_nowhere(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"no data at .*absent.txt: there is no such file"):
        read(tmp_path / "absent.txt")
    with pytest.raises(UserError, match=r"no data at absent.json: there is no such file"):
        read("absent.json")
    with pytest.raises(UserError, match=r"no data at .*/nope: there is no such file"):
        read(tmp_path / "nope")
    monkeypatch.chdir(tmp_path.parent)
    with pytest.raises(UserError, match=r"no data at .*/nope: there is no such file"):
        read(f"{tmp_path.name}/nope")
    with pytest.raises(UserError, match=r"none of its files ends in .txt"):
        read(tmp_path)
    with pytest.raises(
        UserError, match=r"somebody/nothing is no file here, .*datasets hub .*; name a local file"
    ) as error:
        read("somebody/nothing")
    assert "\n" not in str(error.value)


def test_a_chat_needs_a_template(tmp_path):
    path = write(tmp_path / "chat.jsonl", json.dumps(CHAT))
    with pytest.raises(UserError, match="has no chat template"):
        read(path, character_tokenizer())
    refusing = character_tokenizer(template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(UserError, match=r"the chat template refuses .*line 1: roles must alternate"):
        read(path, refusing)


def test_answer_only_batches_from_a_file(tmp_path):
    records = [{"instruction": f"say {i}", "output": f"{i}{i}"} for i in range(20)]
    path = write(tmp_path / "a.json", json.dumps(records))
    config = DataConfig(path=path, sequence_length=64, batch_size=2, held_out=0.1, answer_only=True)
    tokenizer = character_tokenizer()
    batch = Loader(config, tokenizer, vocab_size=VOCAB_SIZE).batch(0)
    scored = "".join(tokenizer.convert_ids_to_tokens(batch.targets[batch.loss_mask > 0].tolist()))
    assert set(scored.replace("</s>", "")) <= set("0123456789")
    whole = dataclasses.replace(config, answer_only=False)
    full = Loader(whole, tokenizer, vocab_size=VOCAB_SIZE).batch(0)
    assert (full.inputs == batch.inputs).all()
    assert full.loss_mask.sum() > batch.loss_mask.sum()
