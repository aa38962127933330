"""A student without any training: the teacher's weights, its window with real first tokens, and a measured start."""

from pathlib import Path

from jax.typing import DTypeLike

from lizard_jax.config import DataConfig, LizardConfig
from lizard_jax.convert.files import locate
from lizard_jax.convert.load import load_hf
from lizard_jax.convert.params import Progress, silent
from lizard_jax.data.loader import Loader
from lizard_jax.data.text import load_tokenizer
from lizard_jax.errors import UserError
from lizard_jax.models.llama import Llama
from lizard_jax.train.start import TOKENS, Start, measure_start, measures


def linearize(
    source: str | Path,
    attention: LizardConfig,
    data: DataConfig,
    *,
    dtype: DTypeLike | None = None,
    progress: Progress = silent,
) -> tuple[Llama, Start | None]:
    """The teacher in ``source`` with Lizard attention, as stage 1 starts from it, and what its start was measured as.

    Args:
        data: the text that gates and β are measured on, read with the teacher's tokenizer. Attention that has nothing
            to measure reads none, and gets None.
        dtype: of the base weights; None keeps each tensor's stored dtype.

    Raises:
        UserError: no such checkpoint or text, or a checkpoint that is linearized already.
    """
    directory = locate(source)
    model = load_hf(directory, attention=attention, dtype=dtype, progress=progress)
    if not measures(attention):
        return model, None
    if data.sequence_length <= attention.window:
        raise UserError(
            f"texts of {data.sequence_length} tokens never leave the window of {attention.window}, so there is no "
            "memory to measure; give a longer --sequence-length or a smaller --window"
        )
    loader = Loader(data, load_tokenizer(directory), vocab_size=model.config.vocab_size)
    return model, measure_start(model, loader.first(TOKENS))
