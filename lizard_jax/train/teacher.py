"""The teacher of a run: where it lies, what tells it from another, and how it is found again when it has moved."""

import hashlib
import os
from pathlib import Path
from typing import Any

from lizard_jax.convert.files import teacher_dir
from lizard_jax.errors import UserError

_BLOCK, _BLOCKS = 1 << 20, 64


def fingerprint(directory: Path) -> str:
    """A hash of a checkpoint: its config, and each weight file's name, size, header and 64 blocks spread over it.

    Files under 64 MiB are hashed whole, so a 16 GB teacher takes a moment and a small one is known exactly.
    """
    digest = hashlib.sha256()
    weights = [*directory.glob("*.safetensors"), *directory.glob("pytorch_model*.bin")]
    for path in (directory / "config.json", *sorted(weights)):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for index in range(_BLOCKS):
                file.seek(max(index * _BLOCK, (size - _BLOCK) * index // (_BLOCKS - 1)))
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()


def whereabouts(name: str, stage_dir: Path) -> dict[str, str]:
    """What a run keeps of where its teacher lies: a name that holds anywhere, or both its places.

    ``path`` is ``embedded``, a hub id or an absolute path; ``relative`` leads from the stage's directory to a local
    teacher, for runs that move together with it.
    """
    directory = Path(name).expanduser()
    if name == "embedded" or not directory.is_dir():
        return {"path": name}
    resolved = directory.resolve()
    return {"path": str(resolved), "relative": os.path.relpath(resolved, stage_dir.resolve())}


def find_teacher(stage_dir: Path, record: dict[str, Any], given: str | None = None) -> Path:
    """The teacher that a run was trained with, wherever it lies now.

    Args:
        record: the run's ``run.json``.
        given: a directory or hub id to take it from, instead of where the run says it was.

    Raises:
        UserError: there is none, or only others.
    """
    kept, mark = record["teacher"], record["teacher"]["fingerprint"]
    names = [given] if given is not None else [kept["path"], record["config"]["teacher"]]
    if given is None and "relative" in kept:
        names.insert(1, str(stage_dir / kept["relative"]))
    found, reason = [], None
    for name in dict.fromkeys(names):
        try:
            directory = teacher_dir(name)
            if record["config"]["stage"] == 0 or fingerprint(directory) == mark:
                return directory
            found.append(directory)
        except (UserError, OSError) as error:
            reason = reason or error
    if found:
        raise UserError(
            f"the teacher in {found[0]} is not the one {stage_dir} was trained with; put that one back, or name it "
            "with --teacher"
        )
    if given is not None and isinstance(reason, UserError):
        raise reason
    raise UserError(f"the teacher that {stage_dir} was trained with is not at {kept['path']}; name it with --teacher")
