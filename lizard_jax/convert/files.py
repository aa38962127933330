"""Files beside the weights: finding a checkpoint, carrying its tokenizer and licence, appearing whole or not at all."""

import json
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lizard_jax import orbax_noise
from lizard_jax.atomic import sync, sync_tree
from lizard_jax.embedded import teacher_path
from lizard_jax.errors import UserError, disk_full

CARRIED = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.jinja",
    "additional_chat_templates/*.jinja",
    "chat_template.json",
    "tekken.json",
    "LICEN[SC]E*",
    "COPYING*",
    "NOTICE*",
    "USE_POLICY*",
    "README*",
)
WEIGHTS = ("model*.safetensors", "model.safetensors.index.json")
TORCH_WEIGHTS = ("pytorch_model*.bin", "pytorch_model.bin.index.json")


def teacher_dir(name: str) -> Path:
    """The directory of a teacher: the embedded one, a directory, or a hub id's snapshot.

    Raises:
        UserError: there is none.
    """
    return teacher_path() if name == "embedded" else locate(name)


def locate(src: str | Path) -> Path:
    """The directory ``src`` names, or the local snapshot of the hub id it is.

    A hub snapshot is fetched where it is not cached: safetensors where the repository has them, ``.bin`` elsewhere.

    Raises:
        UserError: no such directory, or the hub has no such repository or cannot be reached.
    """
    path = Path(src).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise UserError(f"{src} is a file; name the checkpoint's directory")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(src)):
        raise UserError(f"{src} does not exist; name a checkpoint's directory or a hub id such as owner/name")
    from huggingface_hub import snapshot_download

    def fetch(*weights: str) -> Path:
        wanted = ["config.json", "lizard.safetensors", "adapter/*", "adapter_config.json", *CARRIED, *weights]
        return Path(snapshot_download(str(src), allow_patterns=wanted, ignore_patterns=["original/*", "consolidated*"]))

    try:
        found = fetch(*WEIGHTS)
        return found if any(found.glob(WEIGHTS[0])) else fetch(*TORCH_WEIGHTS)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{src} is no directory here and could not be fetched from the hub: {reason}") from error


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        UserError: the file is missing or holds none.
    """
    if file.exists() and not file.is_file():
        raise UserError(f"{file} is no regular file")
    try:
        out = json.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise UserError(f"{file.parent} is not a checkpoint: it has no {file.name}") from error
    except RecursionError:
        raise UserError(f"{file} cannot be read as JSON: it is nested too deep") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(out, dict):
        raise UserError(f"{file} holds no JSON object")
    return out


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Writes an object the way transformers lays out its JSON files."""
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def carry(source: Path, target: Path) -> None:
    """Copies tokenizer, generation config, licence and readme files that lie at the top of ``source``.

    Raises:
        UserError: one is a link to a file elsewhere, which is not the checkpoint's to give away.
    """
    whole = source.resolve()
    # A snapshot of the hub's cache is links to its repository's blobs.
    home = whole.parent.parent if whole.parent.name == "snapshots" else whole
    for pattern in CARRIED:
        for file in sorted(source.glob(pattern)):
            if file.is_file():
                if not (real := file.resolve()).is_relative_to(home):
                    raise UserError(f"{file} is a link to {real}, outside the checkpoint; copy that file there")
                copied = target / file.relative_to(source)
                copied.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copied)


@contextmanager
def disk_errors(target: str | Path) -> Iterator[None]:
    """Tells of a full disk in one line, whichever library met it.

    Raises:
        UserError: it was full.
    """
    try:
        with orbax_noise.failing_quietly():
            yield
    except (OSError, ValueError, RuntimeError, ExceptionGroup) as error:
        if disk_full(error):
            raise UserError(f"cannot write {target}: no space left on the disk") from error
        raise


def refuse_existing(target: str | Path) -> None:
    """Stops before work is done for a place that is taken.

    Raises:
        UserError: ``target`` exists and is not an empty directory.
    """
    path = Path(target).expanduser()
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{target} exists and is not empty; remove it or name another directory")


@contextmanager
def appearing(target: str | Path, *, size: int = 0) -> Iterator[Path]:
    """A directory to write into that becomes ``target`` when the block ends, and vanishes if it fails.

    Args:
        size: bytes that will be written, as far as known; asked of the disk beforehand.

    Raises:
        UserError: ``target`` exists and is not an empty directory, or cannot be written (a full disk, no permission).
    """
    refuse_existing(target)
    path = Path(target).expanduser()
    staging = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
        if free < size:
            raise UserError(f"cannot write {target}: it takes {size / 1e9:.3f} GB and {free / 1e9:.3f} GB are free")
        staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        staging.chmod(0o755)
        yield staging
        sync_tree(staging)
        staging.replace(path)
        sync(path.parent)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        if staging is not None:
            _remove(staging)


def _remove(directory: Path) -> None:
    gone = 0
    for _ in range(100):
        shutil.rmtree(directory, ignore_errors=True)
        gone = 0 if directory.exists() else gone + 1
        if gone == 2:
            return
        time.sleep(0.05)  # a thread of Orbax may still be writing, and make it again
