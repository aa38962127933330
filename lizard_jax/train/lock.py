"""One process at a time trains in a stage directory."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lizard_jax.errors import UserError


@contextmanager
def alone(stage_dir: Path) -> Iterator[None]:
    """Holds the directory itself locked, which ends with the process however that ends, and leaves no file.

    A file system that has no locks is taken as it is.

    Raises:
        UserError: another process holds it.
    """
    handle = os.open(stage_dir, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            os.close(handle)
            raise UserError(
                f"another run is training in {stage_dir}; wait for its end, or name another --out"
            ) from None
    try:
        yield
    finally:
        os.close(handle)
