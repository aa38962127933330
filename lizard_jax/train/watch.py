"""What else may watch a run: a trace of some steps for a profiler, and a page on Weights & Biases."""

import importlib
import importlib.util
import secrets
from pathlib import Path
from typing import Any

import jax

from lizard_jax.atomic import write_atomic
from lizard_jax.errors import UserError


class Profile:
    """A trace of ``steps`` steps in ``STAGE/profile``, from the second step of the process on, for the first compiles.

    TensorBoard's profile plugin, XProf and Perfetto read it.
    """

    def __init__(self, stage_dir: Path, start: int, steps: int) -> None:
        self._place, self._first, self._last = stage_dir / "profile", start + 1, start + steps
        self._traces = False

    def begin(self, index: int) -> None:
        """Before step ``index``, counted from 0."""
        if index == self._first and self._last >= self._first:
            jax.profiler.start_trace(self._place)
            self._traces = True

    def end(self, index: int, result: Any) -> None:
        """After step ``index`` was started, whose ``result`` is waited for where it is the last."""
        if self._traces and index == self._last:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        """Write what was traced, also where the run ends early."""
        if self._traces:
            self._traces = False
            jax.profiler.stop_trace()


def check_wandb(project: str) -> None:
    """Refuse a ``project`` where wandb is not installed.

    Raises:
        UserError: so it is.
    """
    if project and importlib.util.find_spec("wandb") is None:
        raise UserError("--wandb needs the package wandb: uv run --with wandb train.py …, or leave it out")


def wandb_run(project: str, stage_dir: Path, settings: dict[str, Any]) -> Any:
    """A run of Weights & Biases to log to, the same one when a run is gone on with; None without a ``project``.

    Raises:
        UserError: wandb is not installed, or refuses.
    """
    check_wandb(project)
    if not project:
        return None
    wandb: Any = importlib.import_module("wandb")
    file = stage_dir / "wandb_id"
    if not file.is_file():
        write_atomic(file, secrets.token_hex(8))
    name = "/".join(stage_dir.parts[-2:])
    try:
        return wandb.init(project=project, id=file.read_text(), name=name, resume="allow", config=settings)
    except Exception as error:  # whatever its servers, keys and settings make it raise
        raise UserError(f"--wandb {project}: {' '.join(str(error).split())}") from None
