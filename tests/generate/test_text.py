"""What is drawn and what is shown: filters, characters of several tokens, stop strings."""

import jax.numpy as jnp
import numpy as np
import pytest

from lizard_jax.data.text import load_tokenizer
from lizard_jax.embedded import __file__ as embedded
from lizard_jax.errors import UserError
from lizard_jax.generate.sampling import Sampling, draw, filtered
from lizard_jax.generate.text import Detokenizer, Stopper

LOGITS = np.log(np.array([[0.5, 0.25, 0.125, 0.0625, 0.0625]], np.float32))


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, [1, 1, 1, 1, 1]),
        ({"top_k": 2}, [1, 1, 0, 0, 0]),
        ({"top_k": 9}, [1, 1, 1, 1, 1]),
        ({"top_p": 0.5}, [1, 0, 0, 0, 0]),
        ({"top_p": 0.6}, [1, 1, 0, 0, 0]),
        ({"top_p": 0.001}, [1, 0, 0, 0, 0]),
        ({"min_p": 0.2}, [1, 1, 1, 0, 0]),
        ({"min_p": 1.0}, [1, 0, 0, 0, 0]),
        ({"temperature": 2.0, "min_p": 0.4}, [1, 1, 1, 0, 0]),
    ],
)
def test_filters(options, kept):
    out = filtered(jnp.asarray(LOGITS), Sampling(**{"temperature": 1.0, **options}))
    np.testing.assert_array_equal(np.isfinite(out[0]), np.array(kept, bool))


def test_draws_follow_the_probabilities():
    rows = jnp.arange(4000, dtype=jnp.int32)
    logits = jnp.broadcast_to(jnp.asarray(LOGITS), (4000, 5))
    tokens = np.asarray(draw(logits, None, rows, rows, Sampling(temperature=1.0)))
    np.testing.assert_allclose(np.bincount(tokens, minlength=5) / 4000, np.exp(LOGITS[0]), atol=0.03)
    assert set(np.asarray(draw(logits, None, rows, rows, Sampling())).tolist()) == {0}


def test_the_repetition_penalty_touches_what_was_seen():
    seen = jnp.asarray([[True, False, False, False, False]])
    row = jnp.zeros(1, jnp.int32)
    logits = jnp.asarray([[2.0, 1.5, 0.0, -1.0, -1.0]])
    assert draw(logits, seen, row, row, Sampling(repetition_penalty=1.2))[0] == 0
    assert draw(logits, seen, row, row, Sampling(repetition_penalty=1.4))[0] == 1
    # A negative logit moves down as well.
    logits = jnp.asarray([[-1.0, -1.1, -9.0, -9.0, -9.0]])
    assert draw(logits, seen, row, row, Sampling(repetition_penalty=1.4))[0] == 1


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1}, {"top_k": -1}, {"top_p": 0.0}, {"min_p": 2}, {"repetition_penalty": 0}, {"seed": -1}]
)
def test_a_value_out_of_range_is_told(wrong):
    with pytest.raises(UserError, match=rf"{next(iter(wrong))} is .*, must be"):
        Sampling(**wrong)


@pytest.mark.parametrize("text", ["def main():\n    return 'Grüße, 世界 🦎'\n", " leading and  double", "é🦎"])
@pytest.mark.parametrize("step", [1, 2, 5])
def test_text_comes_piece_by_piece_and_whole(text, step):
    tokenizer = load_tokenizer(embedded.replace("__init__.py", "teacher"))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    stream = Detokenizer(tokenizer)
    pieces = [stream.add(ids[i : i + step]) for i in range(0, len(ids), step)]
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) + stream.rest() == tokenizer.decode(ids)


@pytest.mark.parametrize("step", [1, 3, 100])
def test_a_stop_string_ends_the_text_before_itself(step):
    text = "one two END three"
    stopper = Stopper(["END", "never"])
    shown = "".join(stopper.add(text[i : i + step]) for i in range(0, len(text), step))
    assert (shown, stopper.stopped, stopper.rest()) == ("one two ", True, "")
    stopper = Stopper(["END"])
    shown = "".join(stopper.add(piece) for piece in ["one E", "N", "d two EN"])
    assert (shown, stopper.stopped, stopper.rest()) == ("one ENd two ", False, "EN")
