"""Text that every Python 3.12 carries: the standard library's sources and its language reference.

The sources come with their docstrings, and ``pydoc_data.topics`` holds the reference manual as plain text. The lists
below say exactly what is read; tests, generated tables (``encodings``, ``html.entities``, ``locale``) and packages that
distributions split off (``tkinter``, ``idlelib``, ``lib2to3``, ``ensurepip``) are left out.

Patch releases edit a few files, so the text is not the same everywhere: of 3.12.10's lines, 1.4% of the training text
and 0.3% of the held-out text are not in 3.12.1's, which the teacher saw. Take numbers as good to that. A listed module
that is missing is skipped; below ``LEAST_SHARE`` of them (a zipped or source-less Python) there is nothing sound to
train on, and the user is told so.
"""

import ast
import sysconfig
from pathlib import Path
from typing import Literal

from lizard_jax.errors import UserError

Split = Literal["train", "held_out"]

LEAST_SHARE = 0.8
"""The smallest share of the listed modules that must be found."""

TRAIN_MODULES: tuple[str, ...] = (
    "__future__", "_aix_support", "_collections_abc", "_compression", "_markupbase", "_osx_support", "_py_abc",
    "_pydatetime", "_pydecimal", "_pyio", "_pylong", "_sitebuiltins", "_strptime", "_threading_local", "_weakrefset",
    "abc", "aifc", "argparse", "ast", "base64", "bdb", "bisect", "bz2", "cProfile", "cgi", "cgitb", "chunk", "cmd",
    "code", "codecs", "codeop", "compileall", "configparser", "contextvars", "copy", "copyreg", "crypt", "dataclasses",
    "datetime", "decimal", "dis", "doctest", "enum", "filecmp", "fileinput", "fnmatch", "ftplib", "functools",
    "genericpath", "getopt", "getpass", "glob", "gzip", "hashlib", "hmac", "imaplib", "imghdr", "inspect", "io",
    "ipaddress", "keyword", "linecache", "lzma", "mailbox", "mailcap", "mimetypes", "modulefinder", "netrc", "nntplib",
    "ntpath", "nturl2path", "numbers", "opcode", "operator", "optparse", "os", "pathlib", "pdb", "pickle",
    "pickletools", "pipes", "pkgutil", "platform", "plistlib", "poplib", "posixpath", "pprint", "profile", "pstats",
    "pty", "py_compile", "pyclbr", "pydoc", "quopri", "random", "reprlib", "rlcompleter", "runpy", "secrets",
    "selectors", "shelve", "shutil", "signal", "site", "smtplib", "sndhdr", "socket", "socketserver", "ssl", "stat",
    "struct", "subprocess", "sunau", "symtable", "sysconfig", "tabnanny", "tarfile", "telnetlib", "threading",
    "timeit", "token", "tokenize", "trace", "traceback", "tracemalloc", "tty", "turtle", "types", "typing", "uu",
    "uuid", "warnings", "weakref", "webbrowser", "xdrlib", "zipimport",
)  # fmt: skip
"""Top-level modules to train on."""

TRAIN_PACKAGES: tuple[str, ...] = (
    "asyncio", "collections", "concurrent", "ctypes", "curses", "dbm", "email", "http", "importlib", "logging",
    "multiprocessing", "re", "sqlite3", "unittest", "urllib", "venv", "wsgiref", "xml", "xmlrpc", "zipfile", "zoneinfo",
)  # fmt: skip
"""Packages to train on, with every module below them."""

HELD_OUT_MODULES: tuple[str, ...] = (
    "calendar", "colorsys", "contextlib", "csv", "difflib", "fractions", "gettext", "graphlib", "heapq", "html.parser",
    "json.__init__", "json.decoder", "json.encoder", "json.scanner", "json.tool", "queue", "sched", "shlex",
    "statistics", "string", "tempfile", "textwrap", "tomllib.__init__", "tomllib._parser", "wave", "zipapp",
)  # fmt: skip
"""Modules never trained on; the validation text."""


def documents(split: Split) -> list[str]:
    """The text of one split: a document per source file, and in ``train`` one per topic of the reference manual.

    The order is that of the lists, with the files of a package sorted by path, so it is the same on every machine.

    Raises:
        UserError: this Python carries too few of the listed sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    if split == "held_out":
        found = _read(root, HELD_OUT_MODULES)
        listed = len(HELD_OUT_MODULES)
        texts = list(found.values())
    else:
        found = _read(root, TRAIN_MODULES)
        packages = [_package(root, name) for name in TRAIN_PACKAGES]
        listed = len(TRAIN_MODULES) + len(TRAIN_PACKAGES)
        texts = [*found.values(), *(text for files in packages for text in files), *_topics(root)]
        found |= {name: "" for name, files in zip(TRAIN_PACKAGES, packages, strict=True) if files}
    if len(found) < LEAST_SHARE * listed:
        raise UserError(
            f"this Python carries only {len(found)} of the {listed} standard-library sources the embedded {split} text "
            f"is made of (looked in {root}); use a full Python 3.12, or name a text with --data"
        )
    return texts


def _read(root: Path, modules: tuple[str, ...]) -> dict[str, str]:
    texts = {name: _source(root.joinpath(*name.split(".")).with_suffix(".py")) for name in modules}
    return {name: text for name, text in texts.items() if text}


def _package(root: Path, name: str) -> list[str]:
    paths = [path.relative_to(root) for path in (root / name).rglob("*.py")]
    kept = sorted(path.as_posix() for path in paths if not {"test", "tests"} & set(path.parts))
    return [text for path in kept if (text := _source(root / path))]


def _source(path: Path) -> str:
    """A source file's text with unix line ends; empty where it is missing or unreadable."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _topics(root: Path) -> list[str]:
    """The reference manual's topics: the values of the dict that ``pydoc_data/topics.py`` assigns."""
    source = _source(root / "pydoc_data" / "topics.py")
    if not source:
        return []
    table = next(node.value for node in ast.parse(source).body if isinstance(node, ast.Assign))
    return list(ast.literal_eval(table).values())
