"""Letters of one call are one size, in arguments and results, in the packages' own functions as in any."""

import jax.numpy as jnp
import pytest
from jaxtyping import Array, Float, Int, TypeCheckError, jaxtyped

from lizard_jax.nn.rope import rotate
from tests.axes import check


@jaxtyped(typechecker=check)
def padded(x: Float[Array, "B T"], more: Int[Array, " B"] | None = None) -> Float[Array, "B T+1"]:
    return jnp.zeros((2, 4)) if more is None else x


def test_what_fits_passes_and_what_does_not_is_told():
    x = jnp.zeros((2, 3))
    assert padded(x).shape == (2, 4)
    for wrong in ((x[0],), (x.astype(jnp.int32),), (x, jnp.zeros((2,), jnp.int32)), (x, jnp.zeros((3,), jnp.int32))):
        with pytest.raises(TypeCheckError):
            padded(*wrong)


def test_the_packages_are_watched():
    x, angles = jnp.zeros((1, 5, 2, 8)), jnp.zeros((1, 5, 4))
    assert rotate(x, angles, angles).shape == x.shape
    with pytest.raises(TypeCheckError, match="cos"):  # one position for all would broadcast
        rotate(x, angles[:, :1], angles[:, :1])
