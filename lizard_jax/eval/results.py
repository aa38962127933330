"""What an evaluation leaves behind: ``result.json`` and pictures, each whole or not at all."""

import argparse
import io
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lizard_jax.atomic import finite, write_atomic
from lizard_jax.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def prepare(out: str | None) -> Path | None:
    """The directory that results go to, made and found writable before any work is done.

    Raises:
        UserError: it cannot be.
    """
    if out is None:
        return None
    out_dir = Path(out).expanduser()
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write results to {out_dir}: {error.strerror or error}") from None
    if not os.access(out_dir, os.W_OK | os.X_OK):
        raise UserError(f"cannot write results to {out_dir}: it cannot be written")
    return out_dir


def write(
    out_dir: Path, args: argparse.Namespace, result: dict[str, Any], pictures: "dict[str, Figure]", **files: str
) -> None:
    """Writes pictures and files by their names, and last ``result.json``, which also says how it was made."""
    import jax

    from lizard_jax.train.report import versions

    for name, figure in pictures.items():
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=110)
        write_atomic(out_dir / name, png.getvalue())
    for name, content in files.items():
        write_atomic(out_dir / name, content)
    made = {
        "settings": {name: value for name, value in vars(args).items() if name != "out"},
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "versions": versions(),
    }
    content = json.dumps(finite(result | made), indent=2, ensure_ascii=False, allow_nan=False)
    write_atomic(out_dir / "result.json", content + "\n")
