"""One call for every kind of model directory."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from lizard_jax.models.llama import Llama

    class TextModel(Llama):
        """A model that knows its tokenizer: what ``load`` returns."""

        source: str

        def generate(self, prompt: str | Sequence[str], **options: Any) -> str | list[str]: ...


def load(
    path: str | Path, *, dtype: Any = None, teacher: str | Path | None = None, mesh: "Mesh | None" = None
) -> "TextModel":
    """The model at ``path``, to call, to train and to write text with (``model.generate("Once")``).

    Args:
        path: an HF checkpoint directory or hub id, a Flax directory of ``convert.py hf2flax``, or a run's stage
            directory (``runs/NAME/stage2``).
        dtype: of the base weights and activations; None keeps what is stored.
        teacher: of a stage directory, where its teacher lies now, if not where it was.
        mesh: of ``sharding.make_mesh``, to spread the weights over; trace inside
            ``partition.over(sharding.kernel_partition(mesh))``, so that kernels run on it too.

    Raises:
        UserError: there is no model there, or it is damaged or not supported.
    """
    from lizard_jax.convert.files import locate
    from lizard_jax.convert.flax_dir import load_flax
    from lizard_jax.convert.load import load_hf
    from lizard_jax.convert.origin import is_flax_dir
    from lizard_jax.convert.params import cast_base

    directory = Path(path).expanduser()
    source = str(directory)
    if (directory / "run.json").is_file():
        from lizard_jax.train.run import load_run

        model, found = load_run(directory, teacher=teacher, mesh=mesh)
        source = str(found)
    elif is_flax_dir(directory):
        model = load_flax(directory, mesh=mesh)
    else:
        # From here on the place itself: tokenizer and generation config are read beside the weights.
        source = str(locate(path))
        model, dtype = load_hf(source, dtype=dtype, mesh=mesh), None
    model = model if dtype is None else cast_base(model, dtype)
    model.__class__ = _with_text(type(model))
    model.source = source  # type: ignore[attr-defined]
    return model  # type: ignore[return-value]


@functools.cache
def _with_text(model: type) -> type:
    from lizard_jax.generate.simple import generate

    return type(model.__name__, (model,), {"generate": generate, "__doc__": model.__doc__, "__module__": __name__})
