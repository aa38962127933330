"""Passkeys, associative recall and RULER's tasks: the sets, their exact lengths, and scores that mean what they say."""

import argparse
import itertools
import json
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lizard_jax.config import DataConfig
from lizard_jax.convert.load import load_hf
from lizard_jax.data.haystack import FORMS, Measure, filler
from lizard_jax.data.passkey import PasskeySet, training_lines
from lizard_jax.data.records import documents
from lizard_jax.data.text import Document, load_tokenizer, tokenize
from lizard_jax.embedded import teacher_path
from lizard_jax.errors import UserError
from lizard_jax.eval import __main__ as command
from lizard_jax.eval import passkey, recall, retrieval, ruler

LENGTH = {"babyllama": 520, "embedded": 320}


CHAT = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}bot: {% endif %}"
)


@pytest.fixture(params=["babyllama", "embedded"])
def measure(request) -> Measure:
    """Counts with a tokenizer of characters that begins with ▁, and with one of byte-level BPE."""
    told = request.param == "babyllama"
    tokenizer = load_tokenizer(request.getfixturevalue("shared_data") / "babyllama" if told else teacher_path())
    tokenizer.chat_template = CHAT
    return Measure(tokenizer)


@pytest.fixture(scope="module")
def embedded() -> Measure:
    return Measure(load_tokenizer(teacher_path()))


@jax.tree_util.register_pytree_node_class
class Script:
    """A model that knows its lines: behind token t of the n-th row it was ever given comes ``lines[n][t + 1]``."""

    def __init__(self, lines, vocab_size=1024):
        width = max(map(len, lines)) + 1
        self.lines = np.array([[*line, *[0] * (width - len(line))] for line in lines], np.float32)
        self.config = SimpleNamespace(hidden_size=1, vocab_size=vocab_size)
        self.embed = SimpleNamespace(embedding=np.zeros((1, 1), np.float32))
        self.row = 0

    def tree_flatten(self):
        return (), self

    @classmethod
    def tree_unflatten(cls, script, _):
        return script

    def init_state(self, batch, max_length):
        # The evaluations fill up their last batch.
        rows = np.minimum(self.row + np.arange(batch), len(self.lines) - 1)
        self.row += batch
        return jnp.zeros(batch, jnp.int32), jnp.asarray(self.lines[rows])

    def extend_hidden(self, tokens, state, lengths):
        seen, lines = state
        at = seen[:, None] + jnp.arange(1, tokens.shape[1] + 1)
        hidden = jnp.take_along_axis(lines, jnp.minimum(at, lines.shape[1] - 1), axis=1)
        return hidden[..., None], (seen + lengths, lines)

    def extend(self, tokens, state, lengths):
        hidden, state = self.extend_hidden(tokens, state, lengths)
        return self.logits(hidden), state

    def logits(self, hidden):
        return -jnp.square(hidden - jnp.arange(self.config.vocab_size, dtype=jnp.float32))


def scripts(measure, texts):
    """A model that writes these texts, and one that goes on with one and the same token."""
    end = measure.tokenizer.eos_token_id
    right = [[*measure.prompt(text), end] for text in texts]
    return Script(right), Script([[5] * 2000])


# ------------------------------------------------------------------------------------------------------ the sets


@pytest.mark.parametrize("form", FORMS)
def test_passkeys_take_exactly_the_length_and_their_tokens(measure, form):
    size = LENGTH["babyllama"] if measure.characters < 1.5 else LENGTH["embedded"]
    made = [PasskeySet(measure, size + extra, form=form)[7 * extra] for extra in range(12)]
    told = tokenize([one.document for one in made], measure.tokenizer, source="test", vocab_size=2000, answer_only=True)
    assert told.lengths.tolist() == [size + extra for extra in range(12)]
    assert told.scored is not None
    for one, start, count in zip(made, told.starts, told.lengths, strict=True):
        # Less EOS, the space of the plain form, or both.
        answer = int(told.scored[start : start + count].sum()) - (2 if form == "chat" else 1)
        assert 5 <= answer <= 8
        assert len(set(one.keys)) == 5
        assert one.answer in one.keys
        positions = [one.document.text.index(f" is {key}.") for key in one.keys]
        assert positions == sorted(positions)
        # What the model is asked with is what it was trained on, up to the answer.
        assert told.tokens[start : start + len(measure.prompt(one.prompt))].tolist() == measure.prompt(one.prompt)


def test_an_example_is_a_function_of_seed_and_index(embedded):
    def build(**changes):
        return PasskeySet(Measure(embedded.tokenizer), 320, **changes)

    once, again = build(), build()
    backwards = [again[index] for index in reversed(range(6))][::-1]
    assert [once[index] for index in range(6)] == backwards
    answers = {build(seed=seed, training=training)[0].document.text for seed in (0, 1) for training in (True, False)}
    assert len(answers) == 4


def test_a_chat_is_asked_through_the_template(measure):
    one = PasskeySet(measure, 700 if measure.characters < 1.5 else 320, form="chat")[0]
    assert one.prompt.startswith("user: ")
    asked, opening = one.prompt.rsplit("\nbot: ", 1)
    name = opening.removesuffix("'s passkey is")
    assert asked.endswith(f"What is {name}'s passkey?")
    assert one.document.text == f"{one.prompt} {one.answer}"
    measure.tokenizer.chat_template = None
    with pytest.raises(UserError, match="has no chat template; give another --form"):
        PasskeySet(measure, 700, form="chat")[0]


def test_a_text_of_ones_own_hides_the_needles(embedded, tmp_path):
    told = [f"This is the {word} of many sentences,\nnone of which means much." for word in "abcdefghijkl"]
    file = tmp_path / "book.txt"
    file.write_text(" ".join(["Short.", *told[:6], "In 1984 a number spoilt this one for us.", *told[6:]]))
    kept = filler(file)
    assert kept == tuple(" ".join(one.split()) for one in told)
    texts = {PasskeySet(Measure(embedded.tokenizer, kept), 700, form="plain")[index].prompt for index in range(6)}
    for text in texts:
        order = [kept.index(whole) for part in text.split(".") if (whole := part.strip() + ".") in kept]
        assert len(order) > 20
        assert all((b - a) % 12 == 1 for a, b in itertools.pairwise(order))
    assert len({text[:20] for text in texts}) > 1
    file.write_text("Too short. To hide anything.")
    with pytest.raises(UserError, match="the filler has 0 sentences"):
        filler(file)
    with pytest.raises(UserError, match=r"cannot read the filler .*: No such file"):
        filler(tmp_path / "none.txt")


def test_depths_are_asked_for_in_turn(embedded):
    asked = PasskeySet(embedded, 2000, form="plain", depths=4)
    for index in range(8):
        low = index % 4 / 4
        assert low - 0.05 < asked[index].depth < low + 0.3


@pytest.mark.parametrize("task", ruler.TASKS)
def test_tasks_take_exactly_the_length_and_hold_their_answer(measure, task):
    size = 900 if measure.characters < 1.5 else 500
    for form in FORMS:
        one, again = (ruler.example(task, measure, length=size, seed=3, index=2, form=form) for _ in range(2))
        assert one == again
        assert one != ruler.example(task, measure, length=size, seed=3, index=3, form=form)
        assert measure.length(one.document) == size
        assert all(word in one.prompt for word in one.expected)
        assert ruler.score(one.document.text[len(one.prompt) :], one.expected) == 1.0
        assert len(one.expected) == (1 if task in ("single", "multikey") else 4)


def test_a_chain_is_told_in_order(embedded):
    one = ruler.example("tracking", embedded, length=700, seed=0, index=0)
    for before, name in zip(one.expected, one.expected[1:], strict=False):
        assert one.prompt.index(f"Let {before} be") < one.prompt.index(f"Let {name} be {before}.")


def test_recall_asks_each_pair_once_behind_all_pairs():
    tokens = np.arange(3, 105)
    for length, pairs in ((300, 16), (65, 16), (400, 50)):
        row, places, values = recall.sequence([1], tokens, length=length, pairs=pairs, seed=1, index=4)
        assert len(row) == length
        table = dict(row[1 : 1 + 2 * pairs].reshape(-1, 2).tolist())
        assert sorted(table.values()) == sorted(values.tolist())
        assert places[0] > 2 * pairs
        assert places[-1] < length - 1
        assert {int(row[at]): int(row[at + 1]) for at in places} == table
        known = {*table, *table.values()}
        rest = np.delete(row, [*range(1 + 2 * pairs), *places, *(places + 1)])
        assert not known & set(rest.tolist())
    assert (row == recall.sequence([1], tokens, length=400, pairs=50, seed=1, index=4)[0]).all()


def test_training_records_are_read_back_with_their_answers(embedded, tmp_path):
    file = tmp_path / "passkeys.jsonl"
    told = argparse.Namespace(
        checkpoint=str(teacher_path()), lengths=[320, 400], samples=5, form="alpaca", seed=2, batch=1, depths=10,
        keys=3, key_tokens="6", write=str(file), out=None, filler=None,
    )  # fmt: skip
    passkey.run(told)
    sets = [PasskeySet(embedded, length, 3, (6, 6), seed=2, training=True) for length in (320, 400)]
    assert file.read_text() == "".join(training_lines(sets, 5))
    text = tokenize(
        documents(DataConfig(path=str(file), answer_only=True), embedded.tokenizer), embedded.tokenizer,
        source=str(file), vocab_size=1024, answer_only=True,
    )  # fmt: skip
    assert text.lengths.tolist() == [320, 400, 320, 400, 320]
    assert text.scored is not None
    assert text.scored.sum() == 5 * (6 + 1)
    assert [path.name for path in tmp_path.iterdir()] == ["passkeys.jsonl"]


# ------------------------------------------------------------------------------------------------------ the scores


def test_passkeys_from_an_oracle_and_from_a_constant(embedded):
    sets = [PasskeySet(embedded, length, depths=3) for length in (300, 640)]
    texts = [examples[index].document.text for examples in sets for index in range(6)]
    end = (embedded.tokenizer.eos_token_id,)
    oracle, constant = scripts(embedded, texts)
    told = passkey.measure(oracle, sets, samples=2, batch=3, eos=end)
    assert told["accuracy"] == 1.0
    assert [(cell["length"], cell["accuracy"]) for cell in told["cells"]] == [(300, 1.0)] * 3 + [(640, 1.0)] * 3
    assert passkey.measure(constant, sets, samples=2, batch=4, eos=end)["accuracy"] == 0.0


def test_an_answer_that_goes_on_is_wrong():
    assert passkey.correct("48213", "48213")
    assert passkey.correct(" 48213.\nMore", "48213")
    for wrong in ("482137", "4821", "The 48213", "", "x48213"):
        assert not passkey.correct(wrong, "48213")
    assert ruler.score("1234567, 22 and 3333333.", ["1234567", "3333333"]) == 1.0
    assert ruler.score("12345678 3333333", ["1234567", "3333333"]) == 0.5


def test_tasks_from_an_oracle_and_from_a_constant(embedded):
    tasks = list(ruler.TASKS)
    made = [ruler.example(task, embedded, length=560, seed=0, index=i) for task in tasks for i in range(2)]
    oracle, constant = scripts(embedded, [one.document.text for one in made])
    end = (embedded.tokenizer.eos_token_id,)
    for model, score in ((oracle, 1.0), (constant, 0.0)):
        told = ruler.measure(model, embedded, tasks=tasks, lengths=[560], samples=2, batch=2, eos=end)
        assert [cell["score"] for cell in told["cells"]] == [score] * 5


class Forced:
    """A model that foresees every token of the text it is given, but those at ``wrong``."""

    def __init__(self, wrong=(), vocab_size=1024):
        self.wrong = wrong
        self.config = SimpleNamespace(vocab_size=vocab_size)

    def hidden(self, tokens):
        following = jnp.roll(tokens, -1, axis=1)
        for at in self.wrong:
            following = following.at[:, at - 1].add(1)
        return following[..., None].astype(jnp.float32)

    def logits(self, hidden):
        return -jnp.square(hidden - jnp.arange(self.config.vocab_size, dtype=jnp.float32))


jax.tree_util.register_pytree_node(Forced, lambda model: ((), model), lambda model, _: model)


def test_teacher_forced_a_string_counts_with_every_token(embedded):
    made = ruler.example("multiquery", embedded, length=640, seed=0, index=0, needles=2)
    ((start, _),) = made.document.answers
    documents, expected = [made.document] * 3, [made.expected] * 3
    assert retrieval.likeliest(Forced(), embedded, documents, expected, batch=2) == [1.0] * 3
    text = made.document.text
    first = text.index(made.expected[0], start)
    span = embedded.covering(text, first, first + 7)
    for place, share in ((span[0], 0.5), (span[-1], 0.5), (span[0] - 100, 1.0)):
        assert retrieval.likeliest(Forced([place]), embedded, documents[:1], expected[:1]) == [share]


def test_teacher_forced_agrees_with_what_the_model_writes(embedded):
    """A text ended with the model's own greedy continuation is foreseen, with any other word it is not."""
    model = load_hf(teacher_path())
    prompt = "def main(argv):\n    parser = argparse."
    (written,) = retrieval.continuations(model, embedded.tokenizer, [embedded.prompt(prompt)], [12])
    word = re.match(r"\w+", written)[0]
    assert embedded.prompt(prompt + word) == [*embedded.prompt(prompt), *embedded.ids(word)]
    for answer, share in ((word, 1.0), ("Xylophone", 0.0)):
        document = Document(prompt + answer, answers=((len(prompt), len(prompt) + len(answer)),))
        assert retrieval.likeliest(model, embedded, [document], [[answer]]) == [share]


def test_teacher_forced_sets_score_like_written_ones(embedded):
    sets = [PasskeySet(embedded, 300, depths=3)]
    told = passkey.measure(Forced(), sets, samples=2, batch=4, teacher_forced=True)
    assert told["accuracy"] == 1.0
    assert all(one["right"] and "continuation" not in one for one in told["shown"])
    found = ruler.measure(Forced(), embedded, tasks=["tracking"], lengths=[560], samples=2, teacher_forced=True)
    assert found["score"] == 1.0


def test_recall_from_an_oracle_and_from_a_constant():
    tokens = np.arange(3, 105)
    rows = [
        recall.sequence([1], tokens, length=length, pairs=pairs, seed=0, index=index)[0]
        for length in (64, 600) for pairs in (4, 8) for index in range(4)
    ]  # fmt: skip
    settings = {"lengths": [64, 600], "pairs": [4, 8], "samples": 4, "batch": 4}
    told = recall.measure(Script(rows, 105), [1], tokens, **settings)
    assert told["accuracy"] == told["among_values"] == 1.0
    assert told["queries"] == 2 * (4 + 8) * 4
    constant = recall.measure(Script([[1] * 700], 105), [1], tokens, **settings)
    assert constant["accuracy"] == 0.0
    # Of the values it takes the one nearest to its token: one of them, the same for all queries of a row.
    assert constant["among_values"] == pytest.approx((4 + 4) / (4 * (4 + 8)))


def test_recall_reads_what_the_forward_reads(embedded):
    """Hidden states gathered chunk by chunk against the logits of one forward, softmax layers and their cache."""
    model = load_hf(teacher_path())
    tokens = recall.ordinary(embedded.tokenizer)
    made = [recall.sequence([0], tokens, length=530, pairs=5, seed=0, index=index) for index in range(2)]
    rows, places, values = (np.stack(parts) for parts in zip(*made, strict=True))
    likeliest, among = recall.predictions(model, rows, places, values)
    logits = np.asarray(jax.jit(lambda model, rows: model(rows))(model, jnp.asarray(rows)))
    asked = np.take_along_axis(logits, places[..., None], axis=1)
    assert (likeliest == asked.argmax(-1)).all()
    own = np.take_along_axis(asked, np.broadcast_to(values[:, None], (2, 5, 5)), axis=-1)
    assert (among == np.take_along_axis(values, own.argmax(-1), axis=1)).all()


# ---------------------------------------------------------------------------------------------------- the commands


@pytest.mark.parametrize(
    ("flags", "picture"),
    [
        (["passkey", "--lengths", "300", "--depths", "2", "--samples", "1"], "passkey.png"),
        (["recall", "--lengths", "64", "--pairs", "2", "--samples", "2"], "recall.png"),
        (["ruler", "--lengths", "300", "--tasks", "single", "--samples", "2"], "ruler.png"),
        (["passkey", "--lengths", "300", "--depths", "2", "--samples", "1", "--teacher-forced"], "passkey.png"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_command_leaves_table_picture_and_result(flags, picture, tmp_path, capsys):
    assert command.main([flags[0], str(teacher_path()), *flags[1:], "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    name, number = out.strip().splitlines()[-1].split()[0].split("=")
    result = json.loads((tmp_path / "result.json").read_text())
    assert result[name] == pytest.approx(float(number), abs=1e-6)
    assert result["settings"]["seed"] == 0
    assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([picture, "result.json"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["passkey", "--lengths", "60"], "a length of 60 tokens is too short: the question and 5 hidden sentences"),
        (["passkey", "--keys", "99"], "99 passkeys cannot be hidden"),
        (["passkey", "--keys", "20", "--key-tokens", "1"], "20 different passkeys of 1 to 1 tokens cannot be made"),
        (["passkey", "--key-tokens", "8-5"], "passkeys of 8 to 5 tokens cannot be made"),
        (["passkey", "--key-tokens", "some"], "--key-tokens is 'some'"),
        (["passkey", "--samples", "0"], "--samples is 0, must be at least 1"),
        (["passkey", "--seed", "-1"], "--seed is -1, must be at least 0"),
        (["passkey", "--form", "plain", "--write", "x.jsonl"], "--write makes Alpaca records"),
        (["passkey", "--samples", "1", "--write", "nowhere/x.jsonl"], "cannot write nowhere/x.jsonl"),
        (["recall", "--lengths", "20", "--pairs", "5"], "a length of 20 tokens is too short for 5 pairs; take 21"),
        (["recall", "--lengths", "8000", "--pairs", "600"], "has not 1201 for 600 pairs"),
        (["ruler", "--lengths", "2000", "90"], "a length of 90 tokens is too short"),
        (["ruler", "--needles", "500"], "--needles is 500, must be at most 200"),
    ],
)
def test_what_cannot_be_made_is_one_line(flags, words, capsys):
    assert command.main([flags[0], str(teacher_path()), *flags[1:]]) == 2
    message = capsys.readouterr().err.strip().splitlines()
    assert len(message) == 1
    assert message[0].startswith("error: ")
    assert words in message[0]


def test_tokens_that_the_model_lacks_are_refused():
    retrieval.fits(10, [[9], [3, 4]])
    with pytest.raises(UserError, match="token id 11, but the model's vocabulary has 10 entries"):
        retrieval.fits(10, [[9], [3, 11]])
