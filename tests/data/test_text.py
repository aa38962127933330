import numpy as np
import pytest

from lizard_jax.data.text import Document, affixes, load_tokenizer, tokenize
from lizard_jax.errors import UserError
from tests.data.toy import BOS, EOS, VOCAB_SIZE, character_tokenizer


def encode(documents, tokenizer=None, **options):
    options = {"source": "here", "vocab_size": VOCAB_SIZE} | options
    return tokenize(documents, tokenizer or character_tokenizer(), **options)


def ids(text: str) -> list[int]:
    return character_tokenizer()(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(("bos", "eos"), [(True, False), (False, False), (True, True)])
def test_affixes_are_the_tokenizers_own(bos, eos):
    assert affixes(character_tokenizer(bos=bos, eos=eos)) == ([BOS] * bos, [EOS] * eos)


def test_documents_lie_end_to_end_with_one_bos_each():
    text = encode([Document("ab"), Document("<s>cde"), Document("f")])
    assert text.tokens.tolist() == [BOS, *ids("ab"), BOS, *ids("cde"), BOS, *ids("f")]
    assert text.starts.tolist() == [0, 3, 7]
    assert text.lengths.tolist() == [3, 4, 2]
    assert text.tokens.dtype == np.int32
    assert text.scored is None


def test_eos_ends_answers_always_and_plain_text_on_request_and_never_twice():
    answer = Document("ab", answers=((1, 2),), open_end=True)
    assert encode([answer]).tokens.tolist() == [BOS, *ids("ab"), EOS]
    assert encode([Document("ab")]).tokens.tolist() == [BOS, *ids("ab")]
    assert encode([Document("ab")], eos=True).tokens.tolist() == [BOS, *ids("ab"), EOS]
    both = character_tokenizer(eos=True)
    assert encode([answer, Document("ab")], both, eos=True).tokens.tolist() == 2 * [BOS, *ids("ab"), EOS]


def test_scored_marks_the_answer_and_its_eos():
    text = encode([Document("abcde", answers=((2, 5),), open_end=True)], answer_only=True)
    assert text.scored is not None
    assert text.scored.tolist() == [False, False, False, True, True, True, True]


def test_a_token_across_the_start_of_an_answer_is_the_answers(shared_data):
    # babyllama puts a space piece before the text, so its tokens are not the characters one to one.
    tokenizer = load_tokenizer(shared_data / "babyllama")
    text = encode([Document("one two", answers=((4, 7),))], tokenizer, answer_only=True, vocab_size=105)
    assert text.scored is not None
    assert tokenizer.convert_ids_to_tokens(text.tokens[text.scored].tolist()) == ["t", "w", "o"]


def test_too_short_documents_are_left_out():
    text = encode([Document("a"), Document("bc"), Document("d"), Document("ef")], character_tokenizer(bos=False))
    assert text.lengths.tolist() == [2, 2]
    assert text.origin.tolist() == [1, 3]


def test_many_documents_come_out_in_order():
    texts = [f"{i} " * (1 + i % 7) for i in range(3000)]
    text = encode([Document(t) for t in texts])
    assert len(text.lengths) == 3000
    for i in (0, 1023, 1024, 2999):
        piece = text.tokens[text.starts[i] : text.starts[i] + text.lengths[i]]
        assert piece.tolist() == [BOS, *ids(texts[i])]


@pytest.mark.parametrize(
    ("documents", "options", "message"),
    [
        ([], {}, "here holds no documents"),
        ([Document("a")], {"tokenizer": character_tokenizer(bos=False)}, "every document of here is shorter than two"),
        ([Document("a\n")], {"vocab_size": 50}, rf"token id {VOCAB_SIZE - 1} .* vocabulary has 50 entries"),
        ([Document("ab")], {"answer_only": True}, "answer_only=true needs Alpaca or chat records"),
    ],
)
def test_what_cannot_be_tokenized_is_told_in_one_line(documents, options, message):
    with pytest.raises(UserError, match=message) as error:
        encode(documents, **options)
    assert "\n" not in str(error.value)


def test_tokenizer_json_is_taken_as_it_stands(shared_data):
    tokenizer = load_tokenizer(shared_data / "babyllama")
    # AutoTokenizer of transformers 5 drops the line end; the file's own pipeline makes it <unk>, as in training.
    assert tokenizer.unk_token_id in tokenizer("a.\nB")["input_ids"]
    assert tokenizer.name_or_path == str(shared_data / "babyllama")


def test_load_tokenizer_tells_what_is_wrong(tmp_path):
    with pytest.raises(UserError, match="not a directory"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(UserError, match="no tokenizer that transformers can load"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model":')
    with pytest.raises(UserError, match="no tokenizer that transformers can load") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)
