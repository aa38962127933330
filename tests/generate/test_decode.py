"""Batches, chunks and kept states against plain runs: greedy, token for token."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from lizard_jax.config import PRESETS, ModelConfig
from lizard_jax.errors import UserError
from lizard_jax.generate import conversation, decode
from lizard_jax.generate.conversation import Conversation
from lizard_jax.generate.sampling import Sampling
from lizard_jax.models import build
from tests.jitted import logits

CONFIG = ModelConfig("llama", 61, 16, 24, 2, 4, 2, 8, 64)
GREEDY = Sampling()
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, 61, size).tolist() for size in (1, 5, 17, 40)]
BLOCK = 7
NEW = 1 + 2 * BLOCK  # the first comes with the prompt; all blocks are compiled once


@pytest.fixture(scope="module", params=[None, "lizard", "lizard_paper"])
def model(request):
    attention = None if request.param is None else dataclasses.replace(PRESETS[request.param], window=6, chunk=4)

    @jax.jit
    def made():
        built = build(dataclasses.replace(CONFIG, attention=attention), rngs=nnx.Rngs(0))
        # Start values of 0.02 would leave every logit near a tie.
        return jax.tree.map(lambda x: x * 8 if x.ndim == 2 else x, built)

    return made()


def write(model, prompts, new=NEW, size=16, sampling=GREEDY, stops=()):
    """Tokens written for each prompt, and the carry."""
    state = model.init_state(len(prompts), decode.capacity([len(prompt) for prompt in prompts], new, size))
    said, state = decode.prefill(model, prompts, state, size=size)
    carry = decode.start(said, state, prompts, sampling, stops=stops)
    out = [[int(token)] for token in np.asarray(carry.token)]
    while max(map(len, out)) < new and bool(carry.alive.any()):
        block, carry = decode.write(model, carry, min(BLOCK, new - max(map(len, out))), sampling, stops=stops)
        for row, tokens in enumerate(out):
            tokens += [int(token) for token in block[:, row] if token >= 0]
    return out, carry


def test_a_batch_is_its_prompts_alone(model):
    together, _ = write(model, PROMPTS)
    assert together == [write(model, [prompt])[0][0] for prompt in PROMPTS]
    # As the model itself says it, without any state.
    prompt, said = PROMPTS[2], together[2]
    told = np.asarray(logits(model, np.asarray([prompt + said], np.int32)))[0]
    assert np.argmax(told[len(prompt) - 1 : -1], axis=-1).tolist() == said


def test_chunks_of_a_prompt_are_one(model):
    whole, _ = write(model, PROMPTS[-1:], size=128)
    for size in (16, 64):
        assert write(model, PROMPTS[-1:], size=size)[0] == whole


def test_a_draw_is_the_same_alone_and_in_a_batch(model):
    sampling = Sampling(temperature=1.0, top_k=20, top_p=0.95, min_p=0.01, repetition_penalty=1.2, seed=3)
    together, _ = write(model, PROMPTS[:2], sampling=sampling)
    assert write(model, PROMPTS[:1], sampling=sampling)[0][0] == together[0]
    assert together != write(model, PROMPTS[:2], sampling=dataclasses.replace(sampling, seed=4))[0]


def test_a_row_that_has_ended_waits_for_the_others(model):
    plain, _ = write(model, PROMPTS[:3])
    stop = plain[0][5]
    ended, carry = write(model, PROMPTS[:3], stops=(stop,))
    for before, after in zip(plain, ended, strict=True):
        assert after == before[: before.index(stop) + 1 if stop in before else None]
    assert not bool(carry.alive[0])


def test_a_kept_state_goes_on_as_if_never_stopped(model, tmp_path):
    prompt, more = PROMPTS[2], PROMPTS[1]
    first, carry = write(model, [prompt], 10)
    kept = Conversation(carry.state, (int(carry.token[0]),), 10)
    size = conversation.save(tmp_path / "state", kept, model)
    assert size == (tmp_path / "state").stat().st_size
    loaded = conversation.load(tmp_path / "state", model)
    said = [*loaded.pending, *more]
    state = decode.with_room(loaded.state, [len(said)], 6, size=16)
    logits, state = decode.prefill(model, [said], state, size=16)
    carry = decode.start(logits, state, [said], GREEDY, written=loaded.written)
    block, _ = decode.write(model, carry, 5, GREEDY)
    after = [int(carry_token) for carry_token in [np.asarray(logits).argmax(), *block[:, 0]]]
    assert after == write(model, [prompt + first[0] + more], 6)[0][0]


def test_the_state_of_another_model_is_refused(model, tmp_path):
    _, carry = write(model, PROMPTS[:1], 4)
    conversation.save(tmp_path / "state", Conversation(carry.state, (1,), 4), model)
    other = jax.tree.map(lambda x: x + 1, model)
    with pytest.raises(UserError, match="is the state of another model"):
        conversation.load(tmp_path / "state", other)
    (tmp_path / "state").write_bytes(b"what")
    with pytest.raises(UserError, match="is no saved state, or a damaged one"):
        conversation.load(tmp_path / "state", model)
    with pytest.raises(UserError, match="no saved state at"):
        conversation.load(tmp_path / "nothing", model)


def test_memory_does_not_grow(model):
    """Bytes on the device after 10 tokens and after 400 are the same; so is the state."""
    prompts = PROMPTS[:2]
    state = model.init_state(2, 512)
    logits, state = decode.prefill(model, prompts, state, size=16)
    carry = decode.start(logits, state, prompts, GREEDY)
    held = []
    for _ in range(13):
        _, carry = decode.write(model, carry, decode.BLOCK, GREEDY)
        held.append(sum(array.nbytes for array in jax.live_arrays()))
    assert len(set(held)) == 1
    assert carry.written.tolist() == [13 * decode.BLOCK + 1] * 2


@pytest.mark.parametrize(
    ("lengths", "size"), [([1], 16), ([16], 16), ([17], 16), ([3, 40], 16), ([70], 64), ([600], 512)]
)
def test_chunks_cover_what_is_there(lengths, size):
    end = 0
    for start, width in decode.chunks(lengths, size):
        assert start == end
        assert width <= size
        end = start + width
    assert max(lengths) <= end < max(lengths) + size
