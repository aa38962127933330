"""The one exception a user is meant to read, what a full disk looks like, and what other libraries' errors say."""

import errno

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DISK_WORDS = ("no space left", "file too large", "quota exceeded", "resource_exhausted")


class UserError(Exception):
    """Bad input, told in one line: what was wrong, where, and what to do about it.

    Command-line entry points print the message to stderr as ``error: …`` and exit with code 2.
    """


def disk_full(error: BaseException | None) -> bool:
    """Whether an error, or what lies behind it, says that no more can be written; Orbax wraps it in several layers."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _DISK:
            return True
        if any(word in str(error).lower() for word in _DISK_WORDS):
            return True
        inner = error.exceptions[0] if isinstance(error, BaseExceptionGroup) else None
        error = inner or error.__cause__ or error.__context__
    return False


def first_line(error: Exception) -> str:
    """What another library's error says, in one line; its kind where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
