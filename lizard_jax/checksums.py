"""Whether files on disk are those that were written."""

import hashlib
from pathlib import Path


def sums(directory: Path) -> dict[str, str]:
    """SHA-256 of every file below a directory, by its path in it."""
    out = {}
    for file in sorted(directory.rglob("*")):
        if file.is_file():
            with file.open("rb") as content:
                out[file.relative_to(directory).as_posix()] = hashlib.file_digest(content, "sha256").hexdigest()
    return out


def difference(directory: Path, written: dict[str, str]) -> str | None:
    """What is not as it was written, in words; None where all is.

    Files that came later count for nothing.
    """
    there = sums(directory)
    for name, mark in written.items():
        if name not in there:
            return f"{name} is missing"
        if there[name] != mark:
            return f"{name} is not as it was written"
    return None
