"""From a path, a URL or a hub name to documents: plain text, Alpaca records and chats.

Every source first becomes rows, each a text or a JSON-like object with a place to name in an error; a row then becomes
a document. What ``format=auto`` decides, it decides by the first row: ``messages`` makes a chat, ``instruction`` and
``output`` an Alpaca record, anything else plain text.
"""

import contextlib
import dataclasses
import json
import logging
import re
import tempfile
from collections.abc import Generator
from itertools import chain
from pathlib import Path
from typing import Any

from lizard_jax.config import DataConfig
from lizard_jax.data import remote
from lizard_jax.data.chat import chat_document
from lizard_jax.data.text import Document
from lizard_jax.errors import UserError, first_line

Row = tuple[str, Any]
"""Where a row stands, and the row."""

JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
SUFFIXES = (".txt", ".text", ".md", *JSON_SUFFIXES, ".parquet")
"""The files of a directory that are read, subdirectories included, in the order of their paths."""

BESIDE = re.compile(r"(readme|licen[sc]e|notice|copying|citation|changelog|contributing)\b", re.IGNORECASE)
"""Names of files that describe a data set."""

_CHUNK = 1 << 20
_JSON_START = re.compile(r'\s*(\[\s*)?\{\s*"')
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(:[\w.-]+)?")

# The published prompts of the Alpaca format, with and without an input; records mean nothing apart from them.
_ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n"
    "### Response:\n"
)
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


def documents(config: DataConfig, tokenizer: Any) -> Generator[Document]:
    """The documents of ``config.path``, read as they are needed; what lies at a URL is brought here until then.

    Raises:
        UserError: the path or the name leads nowhere, or a file, line or record is not what the format says.
    """
    with contextlib.closing(_rows(config)) as rows:
        first = next(rows, None)
        if first is None:
            raise UserError(f"{config.path} is empty")
        kind = _kind(first[1], config)
        for where, row in chain([first], rows):
            if kind == "text":
                text = row if isinstance(row, str) else _field(row, config.text_column, where, "a text")
                if text.strip():
                    yield Document(text)
            elif kind == "alpaca":
                yield alpaca_document(row, where)
            else:
                yield chat_document(row, where, tokenizer, answers=config.answer_only, date=config.date)


def alpaca_document(row: Any, where: str) -> Document:
    """An Alpaca record as prompt and answer; ``input`` may be empty or absent.

    Raises:
        UserError: not an object, or ``instruction`` or ``output`` is missing or not a string.
    """
    instruction, answer = (_field(row, key, where, "an Alpaca record") for key in ("instruction", "output"))
    context = _field(row, "input", where, "an Alpaca record") if row.get("input") else ""
    prompt = (_ALPACA_INPUT if context else _ALPACA).format(instruction=instruction, input=context)
    text = prompt + answer
    return Document(text, answers=((len(prompt), len(text)),), open_end=True)


def _field(row: Any, key: str, where: str, what: str) -> str:
    if not isinstance(row, dict):
        raise UserError(f"{where} is not {what}: expected an object, found {type(row).__name__}")
    if key not in row:
        raise UserError(f"{where} is not {what}: it lacks {key!r} (its keys: {', '.join(map(str, row)) or 'none'})")
    if not isinstance(row[key], str):
        raise UserError(f"{where} is not {what}: {key!r} must be a string, not {type(row[key]).__name__}")
    return row[key]


def _kind(row: Any, config: DataConfig) -> str:
    if config.format != "auto":
        return config.format
    if isinstance(row, dict):
        if "messages" in row:
            return "chat"
        if "instruction" in row and "output" in row:
            return "alpaca"
        if config.text_column not in row:
            raise UserError(
                f"cannot tell the format of {config.path}: its first record has the keys "
                f"{', '.join(map(str, row)) or 'none'}; expected messages (chat), instruction and output (Alpaca), or "
                f"the data.text_column {config.text_column!r}"
            )
    return "text"


# ------------------------------------------------------------------------------------------------ sources


def _rows(config: DataConfig) -> Generator[Row]:
    if remote.is_url(config.path):
        return _remote_rows(config)
    path = Path(config.path).expanduser()
    if path.is_file():
        return _file_rows(path, config)
    if path.is_dir():
        return _directory_rows(path, config)
    # ``data/tests`` beside a directory ``data`` is a mistyped path, not somebody's dataset.
    inside = "/" in config.path and path.parent.is_dir()
    if inside or not _HUB_NAME.fullmatch(config.path) or path.suffix in SUFFIXES:
        raise UserError(f"no data at {config.path}: there is no such file or directory")
    return _hub_rows(config)


def _remote_rows(config: DataConfig) -> Generator[Row]:
    url = config.path.rstrip("/")
    with tempfile.TemporaryDirectory(prefix="lizard-data-") as folder:
        here = str(remote.bring(config.path, Path(folder), _is_data))
        try:
            for where, row in _rows(dataclasses.replace(config, path=here)):
                yield where.replace(here, url), row
        except UserError as error:
            raise UserError(str(error).replace(here, url)) from None


def _directory_rows(path: Path, config: DataConfig) -> Generator[Row]:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        yield from _saved_rows(path, config)
        return
    files = sorted(file for file in path.rglob("*") if file.is_file() and _is_data(file.relative_to(path)))
    if not files:
        raise UserError(f"the directory {path} holds no data: none of its files ends in {', '.join(SUFFIXES)}")
    for file in files:
        yield from _file_rows(file, config)


def _is_data(path: Path) -> bool:
    """Whether a file of a directory is data, and none of what lies beside data."""
    if any(part.startswith(".") for part in path.parts) or path.suffix.lower() not in SUFFIXES:
        return False
    return not (BESIDE.match(path.name) or path.name in ("dataset_infos.json", "dataset_info.json"))


def _file_rows(path: Path, config: DataConfig) -> Generator[Row]:
    try:
        if path.suffix.lower() == ".parquet":
            yield from _parquet_rows(path)
            return
        with path.open(encoding="utf-8-sig") as file:
            head = file.read(4096)
        named = path.suffix.lower() in JSON_SUFFIXES
        if config.format in ("alpaca", "chat") or named or (config.format == "auto" and _JSON_START.match(head)):
            yield from _line_rows(path) if _has_lines(path, head) else _whole_rows(path)
        else:
            yield from _text_rows(path, config.separator)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error.reason}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None


def _text_rows(path: Path, separator: str) -> Generator[Row]:
    r"""The pieces between separators, without the line ends around them. ``\n`` in the separator is a line end."""
    separator = separator.replace("\\n", "\n").replace("\\t", "\t")
    rest, count = "", 0
    with path.open(encoding="utf-8-sig") as file:
        # Only whole pieces leave the buffer, so a separator across two chunks is found.
        while chunk := file.read(_CHUNK):
            pieces = (rest + chunk).split(separator) if separator else [rest + chunk]
            rest = pieces.pop()
            for piece in pieces:
                count += 1
                if text := piece.strip("\r\n"):
                    yield f"{path}, document {count}", text
    if text := rest.strip("\r\n"):
        yield f"{path}, document {count + 1}", text


def _line_rows(path: Path) -> Generator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield f"{path}, line {number}", json.loads(line)
                except json.JSONDecodeError as error:
                    raise UserError(f"malformed JSON in {path}, line {number}: {error.msg}") from None


def _has_lines(path: Path, head: str) -> bool:
    """Whether each line is a record of its own; else the file is one value, an array or an object of several lines."""
    if head.lstrip().startswith("["):
        return False
    with path.open(encoding="utf-8-sig") as file:
        line = next((line for line in file if line.strip()), "")
        if not line:
            return True  # nothing at all: no rows
        try:
            first = json.loads(line)
        except ValueError:
            # A first line that is only the beginning of an object; a damaged record ends where it stands.
            return line.rstrip().endswith("}") and line.count("{") <= line.count("}")
        return not _holds_records(first) or any(other.strip() for other in file)


def _holds_records(value: Any) -> bool:
    """Whether an object is no record but a wrapper: its one list of objects is the data."""
    return isinstance(value, dict) and isinstance(value.get("data"), list)


def _whole_rows(path: Path) -> Generator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        try:
            records = json.load(file)
        except json.JSONDecodeError as error:
            raise UserError(f"malformed JSON in {path}, line {error.lineno}: {error.msg}") from None
    if isinstance(records, dict):
        records = records["data"] if _holds_records(records) else [records]
    for number, record in enumerate(records, 1):
        yield f"{path}, record {number}", record


def _parquet_rows(path: Path) -> Generator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", row
    except pyarrow.ArrowException as error:
        raise UserError(f"cannot read {path} as parquet: {str(error).splitlines()[0]}") from None


def _saved_rows(path: Path, config: DataConfig) -> Generator[Row]:
    """A directory that ``datasets`` wrote with ``save_to_disk``."""
    import datasets

    try:
        data = datasets.load_from_disk(str(path))
    except Exception as error:  # datasets raises what its readers tripped over
        raise UserError(f"cannot read the dataset saved in {path}: {first_line(error)}") from None
    if isinstance(data, datasets.DatasetDict):
        if config.split not in data:
            raise UserError(f"the dataset in {path} has no split {config.split!r}; it has {', '.join(map(str, data))}")
        data = data[config.split]
    return _numbered(data, str(path))


def _hub_rows(config: DataConfig) -> Generator[Row]:
    import datasets

    name, _, subset = config.path.partition(":")
    # The client reports each of its retries; the error below says it once.
    log = logging.getLogger("huggingface_hub")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        data = datasets.load_dataset(name, subset or None, split=config.split)
    except Exception as error:  # the hub client raises a different kind for every way of not being reached
        raise UserError(
            f"{config.path} is no file here, and its split {config.split!r} could not be loaded from the datasets hub "
            f"({first_line(error)}); name a local file or directory, or NAME:SUBSET for a dataset with subsets"
        ) from None
    finally:
        log.setLevel(level)
    return _numbered(data, config.path)


def _numbered(data: Any, name: str) -> Generator[Row]:
    return ((f"{name}, row {number}", row) for number, row in enumerate(data, 1))
