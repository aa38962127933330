"""Files that appear whole or not at all, also where the power fails."""

import errno
import math
import os
import tempfile
from pathlib import Path
from typing import Any


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all: beside its place, then renamed.

    A link is followed. What is no regular file, such as a device or a pipe, is written to and stays what it is.

    Raises:
        OSError: it cannot be written; ``filename`` says what.
    """
    data = content.encode(errors="backslashreplace") if isinstance(content, str) else content
    path = path.resolve()
    if path.exists() and not path.is_file():
        path.write_bytes(data)
        return
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
        sync(path.parent)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:
            # A full disk is noticed where no name is at hand.
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def sync(path: Path) -> None:
    """Bring a file's content, or a directory's names, to the disk itself."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that has no such thing for directories
            raise
    finally:
        os.close(handle)


def sync_tree(directory: Path) -> None:
    """Bring all that lies in a directory to the disk itself, and then its own name."""
    for folder, _, files in directory.walk(top_down=False):
        for name in files:
            sync(folder / name)
        sync(folder)
    sync(directory.parent)


def finite(tree: Any) -> Any:
    """The same lists and dicts with None for every float that is NaN or infinite, which JSON has no word for."""
    if isinstance(tree, dict):
        return {key: finite(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
