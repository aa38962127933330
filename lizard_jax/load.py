"""One call for every kind of model directory."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lizard_jax.models.llama import Llama


def load(path: str | Path, *, dtype: Any = None) -> "Llama":
    """The model at ``path``, to call and to train.

    Args:
        path: an HF checkpoint directory or hub id, a Flax directory of ``convert.py hf2flax``, or a run's stage
            directory (``runs/NAME/stage2``).
        dtype: of the base weights and activations; None keeps what is stored.

    Raises:
        UserError: there is no model there, or it is damaged or not supported.
    """
    from lizard_jax.convert.flax_dir import load_flax
    from lizard_jax.convert.load import load_hf
    from lizard_jax.convert.origin import is_flax_dir
    from lizard_jax.convert.params import cast_base

    directory = Path(path).expanduser()
    if (directory / "run.json").is_file():
        from lizard_jax.train.run import load_run

        model, _ = load_run(directory)
    elif is_flax_dir(directory):
        model = load_flax(directory)
    else:
        return load_hf(path, dtype=dtype)
    return model if dtype is None else cast_base(model, dtype)
