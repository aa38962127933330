import dataclasses
import itertools

import chex
import jax
import numpy as np
import pytest

from lizard_jax.config import DataConfig
from lizard_jax.data.loader import Batch, Loader, held_out_texts
from lizard_jax.data.text import load_tokenizer
from lizard_jax.errors import UserError
from tests.data.toy import BOS, VOCAB_SIZE, character_tokenizer, write

DOCUMENTS = ["".join(chr(97 + (i * 7 + j) % 26) for j in range(5 + i % 11)) + f"{i:03d}" for i in range(60)]


@pytest.fixture
def config(tmp_path):
    path = write(tmp_path / "text.txt", "<|endoftext|>".join(DOCUMENTS))
    return DataConfig(path=path, sequence_length=16, batch_size=4, held_out=0.2, held_out_tokens=1000)


def load(config, **changes):
    processes = {key: changes.pop(key) for key in ("process_index", "process_count") if key in changes}
    return Loader(dataclasses.replace(config, **changes), character_tokenizer(), vocab_size=VOCAB_SIZE, **processes)


def rows(batches):
    """Every sequence as its T+1 tokens."""
    return [
        [*inputs.tolist(), int(target)]
        for batch in batches
        for inputs, target in zip(batch.inputs, batch.targets[:, -1], strict=True)
    ]


def documents_of(batches):
    """The documents whose whole text can be read in some sequence, by the three digits that end each."""
    tokenizer = character_tokenizer()
    text = "|".join(tokenizer.decode(row).replace(" ", "") for row in rows(batches))
    return {name for name in DOCUMENTS if name in text}


def test_batches_are_a_function_of_seed_and_step_alone(config):
    one, two = load(config), load(config)
    forward = [one.batch(s) for s in range(12)]
    backward = [two.batch(s) for s in reversed(range(12))][::-1]
    chex.assert_trees_all_equal(forward, backward)
    other = load(config, seed=1)
    assert any((a.inputs != other.batch(s).inputs).any() for s, a in enumerate(forward))


def test_held_out_texts_are_those_that_validation_reads(config):
    tokenizer = character_tokenizer()
    texts = held_out_texts(config, tokenizer, vocab_size=VOCAB_SIZE)
    ids = [token for text in texts for token in [BOS, *tokenizer.encode(text, add_special_tokens=False)]]
    read = [token for row in rows(load(config).held_out()) for token in row[:-1]]
    assert set(texts) < set(DOCUMENTS)
    assert len(texts) == 12
    assert read[: len(ids) - 1] == ids[:-1]


def test_shapes_and_dtypes(config):
    loader = load(config)
    for batch in (loader.batch(0), *loader.held_out()):
        chex.assert_shape(jax.tree.leaves(batch), (4, 16))
        chex.assert_type([batch.inputs, batch.targets, batch.segment_ids], np.int32)
        chex.assert_type(batch.loss_mask, np.float32)
    assert isinstance(jax.tree.map(lambda x: x, batch), Batch)


def test_targets_are_the_inputs_one_on(config):
    batch = load(config).batch(3)
    np.testing.assert_array_equal(batch.inputs[:, 1:], batch.targets[:, :-1])


def test_each_epoch_reads_every_training_token_in_a_new_order(config):
    loader = load(config, batch_size=1)
    per_epoch = (loader.num_tokens - 1) // 16
    epochs = [[loader.batch(e * per_epoch + s) for s in range(per_epoch)] for e in range(2)]
    counts = [np.bincount(np.concatenate([b.targets.ravel() for b in epoch]), minlength=VOCAB_SIZE) for epoch in epochs]
    # The two epochs may differ in the one token that opens them and in what is left over at their ends.
    assert np.abs(counts[0] - counts[1]).sum() <= 2 * 17
    assert rows(epochs[0]) != rows(epochs[1])
    starts = sorted(tuple(row) for row in rows(epochs[0]))
    assert len(set(starts)) == per_epoch


def test_a_batch_runs_on_into_the_next_epoch(config):
    single, whole = load(config, batch_size=1), load(config)
    per_epoch = (single.num_tokens - 1) // 16
    assert per_epoch % 4
    step = per_epoch // 4
    expected = rows(single.batch(step * 4 + i) for i in range(4))
    assert rows([whole.batch(step)]) == expected


def test_borders_are_exact(config):
    loader = load(config)
    for batch in (*map(loader.batch, range(8)), *loader.held_out()):
        for inputs, targets, segments, mask in zip(*jax.tree.leaves(batch), strict=True):
            # Every document opens with BOS and only there, so BOS in the inputs tells where a segment begins.
            real = segments > 0
            expected = 1 + np.cumsum(np.where(np.arange(16) > 0, inputs == BOS, False))
            np.testing.assert_array_equal(segments[real], expected[real])
            np.testing.assert_array_equal(mask, (real & (targets != BOS)).astype(np.float32))


def test_without_the_segment_mask_borders_are_scored(config):
    masked, open_ = load(config), load(config, segment_mask=False)
    a, b = masked.batch(0), open_.batch(0)
    np.testing.assert_array_equal(a.inputs, b.inputs)
    np.testing.assert_array_equal(b.segment_ids, np.ones((4, 16)))
    np.testing.assert_array_equal(b.loss_mask, np.ones((4, 16)))
    assert a.loss_mask.sum() < b.loss_mask.sum()


def test_held_out_documents_are_never_trained_on(config):
    loader = load(config, batch_size=1, sequence_length=24)
    steps = (loader.num_tokens - 1) // 24
    train = documents_of(map(loader.batch, range(3 * steps)))
    held = documents_of(loader.held_out())
    assert len(train) > 20
    assert len(held) > 3
    assert not train & held
    assert loader.num_documents == 48


def test_held_out_is_fixed_and_padded(config):
    loader = load(config)
    chex.assert_trees_all_equal(loader.held_out(), loader.held_out())
    chex.assert_trees_all_equal(loader.held_out(), load(config, seed=5).held_out())
    last = loader.held_out()[-1]
    padding = last.segment_ids == 0
    assert padding.any()
    assert (last.loss_mask[padding] == 0).all()


@pytest.mark.parametrize("most", [1, 15, 16, 17, 64, 65])
def test_at_most_held_out_tokens_are_scored(config, most):
    batches = load(config, held_out_tokens=most, segment_mask=False).held_out()
    assert sum(batch.loss_mask.sum() for batch in batches) == most
    assert len(batches) == -(-most // 64)


def test_slices_of_two_processes_make_the_whole(config):
    whole = load(config)
    halves = [load(config, process_index=i, process_count=2) for i in range(2)]
    for step in range(12):
        joined = jax.tree.map(lambda *x: np.concatenate(x), *(half.batch(step) for half in halves))
        chex.assert_trees_all_equal(joined, whole.batch(step))
    for parts, batch in zip(zip(*(half.held_out() for half in halves), strict=True), whole.held_out(), strict=True):
        chex.assert_trees_all_equal(jax.tree.map(lambda *x: np.concatenate(x), *parts), batch)
    assert halves[0].fingerprint == whole.fingerprint


def test_the_fingerprint_knows_content_and_settings(config, tmp_path):
    prints = [load(config).fingerprint, load(config).fingerprint]
    assert len(set(prints)) == 1
    changes = (
        {"seed": 1}, {"batch_size": 8}, {"sequence_length": 8}, {"held_out": 0.1}, {"held_out_tokens": 999},
        {"segment_mask": False}, {"text_eos": True},
        {"path": write(tmp_path / "other.txt", "<|endoftext|>".join([*DOCUMENTS[:-1], "xyz"]))},
    )  # fmt: skip
    prints += [load(config, **change).fingerprint for change in changes]
    assert len(set(prints)) == 1 + len(changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence_length": 5000}, r"fewer than one sequence of 5000"),
        ({"sequence_length": 0}, "sequence_length=0 must be at least 1"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"held_out": 0.0}, "held_out=0.0 must lie between 0 and 1"),
        ({"held_out": 1.0}, "held_out=1.0 must lie between 0 and 1"),
        ({"held_out": 0.999}, "has 60 documents, and data.held_out=0.999 leaves none to train on"),
        ({"separator": "#"}, r"has 1 document, .* data.separator"),
        ({"seed": -1}, "seed=-1 must not be negative"),
        ({"process_count": 3}, "batch_size=4 does not divide among 3 processes"),
    ],
)
def test_settings_that_cannot_work(config, changes, message):
    with pytest.raises(UserError, match=message) as error:
        load(config, **changes)
    assert "\n" not in str(error.value)


def test_one_held_out_document_at_least(config):
    loader = load(config, held_out=0.001)
    assert loader.num_documents == 59
    assert loader.held_out()


@pytest.mark.parametrize(
    ("name", "answer_only", "tokens"), [("tinystories.txt", False, 2_000_000), ("alpaca.json", True, 2_400_000)]
)
def test_real_text_through_the_babyllama_tokenizer(shared_data, name, answer_only, tokens):
    tokenizer = load_tokenizer(shared_data / "babyllama")
    config = DataConfig(path=str(shared_data / name), sequence_length=256, answer_only=answer_only)
    loader = Loader(config, tokenizer, vocab_size=105)
    assert loader.num_tokens > tokens
    batch = loader.batch(0)
    scored = batch.loss_mask.sum(axis=1)
    assert (batch.inputs == tokenizer.bos_token_id).any()
    ends = (batch.targets == tokenizer.eos_token_id) & (batch.loss_mask > 0)
    if answer_only:
        # What is scored reads as answers: runs of scored targets end with EOS, and prompts are not among them.
        assert ends.any()
        assert 0.2 < batch.loss_mask.mean() < 0.9
        runs = [list(run) for key, run in itertools.groupby(zip(batch.loss_mask[0], batch.targets[0], strict=True),
                                                            key=lambda pair: pair[0]) if key]  # fmt: skip
        assert all("Instruction:" not in tokenizer.decode([token for _, token in run]) for run in runs)
    else:
        assert not ends.any()
        assert (scored > 250).all()
