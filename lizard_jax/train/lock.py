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
    """Holds the directory's lock, which ends with the process however that ends.

    A file system that has no locks is taken as it is.

    Raises:
        UserError: another process holds it.
    """
    with (stage_dir / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                yield
                return
            file.seek(0)
            raise UserError(
                f"another run (process {file.read().strip() or 'unknown'}) is training in {stage_dir}; wait for it, or "
                "name another --out"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield
