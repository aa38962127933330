"""What a command calls itself."""

import sys


def program(otherwise: str) -> str:
    """``lizard NAME`` where the command was called so, for its help and its errors."""
    return sys.argv[0] if sys.argv[0].startswith("lizard ") else otherwise
