"""What a run tells: ``metrics.jsonl``, TensorBoard events, and a progress bar (or plain lines) on stderr."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from lizard_jax.atomic import write_atomic
from lizard_jax.program import hidden

# It would load torch where that is installed, for seconds, to know tensors when it sees them.
with hidden("torch"):
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
    from tensorboardX.summary import scalar

PLAIN_SECONDS = 10.0


def read_metrics(path: Path, until: int) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl`` up to a step; a last line cut short by a kill is left out."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if entry["step"] <= until:
            lines.append(entry)
    return lines


class MetricsLog:
    """Appends one JSON object a step, and one a validation, and mirrors the numbers to TensorBoard, and to a page of
    Weights & Biases where there is one.

    On resume the lines after the restored step are dropped, since those steps are run again. Only the process that
    ``writes`` touches files; all keep the history. Writing is synchronous: a full disk raises here, in the loop.
    """

    def __init__(self, stage_dir: Path, start: int, writes: bool, page: Any = None) -> None:
        self._page = page  # a run of Weights & Biases, or None
        path = stage_dir / "metrics.jsonl"
        self.history = read_metrics(path, start)
        self._file: TextIO | None = None
        self._events: EventsWriter | None = None
        if writes:
            write_atomic(path, "".join(json.dumps(entry) + "\n" for entry in self.history))
            self._file = path.open("a")
            self._events = EventsWriter(str(stage_dir / "events"), filename_suffix=f".{os.getpid()}")
            # TensorBoard forgets what an earlier process wrote from this step on.
            session = SessionLog(status=SessionLog.START)
            self._events.write_event(Event(wall_time=time.time(), step=start + 1, session_log=session))

    def write(self, entry: dict[str, Any]) -> None:
        """Append one entry; it has a ``step``, and numbers, lists of numbers or one level of those."""
        self.history.append(entry)
        if self._file is None or self._events is None:
            return
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()
        if self._page is not None:
            self._page.log(dict(_scalars(entry)), step=entry["step"])
        for name, value in _scalars(entry):
            event = Event(wall_time=time.time(), step=entry["step"], summary=scalar(name, value))
            self._events.write_event(event)

    def flush(self) -> None:
        """Bring both files to the disk's view."""
        if self._file is not None and self._events is not None:
            os.fsync(self._file.fileno())
            self._events.flush()

    def close(self) -> None:
        """Close both files."""
        if self._file is not None and self._events is not None:
            self._file.close()
            self._events.close()
        if self._page is not None:
            self._page.finish()


def _scalars(entry: dict[str, Any], group: str = "train") -> list[tuple[str, float]]:
    out: list[tuple[str, float]] = []
    for name, value in entry.items():
        if isinstance(value, dict):
            out += _scalars(value, name)
        elif isinstance(value, list):
            out += [(f"{group}_{name}/{index}", item) for index, item in enumerate(value)]
        elif name != "step":
            out.append((f"{group}/{name}", value))
    return out


def clock(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    minutes, rest = divmod(round(max(seconds, 0.0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def count(number: float) -> str:
    """``950``, ``12.3k``, ``4.5M``."""
    for scale, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= scale:
            return f"{number / scale:.3g}{unit}"
    return f"{number:.0f}"


class ProgressLine:
    """Loss, tokens/s and time left on stderr: a bar on a terminal, else a line every ten seconds and at the end."""

    def __init__(self, stage: int, start: int, total: int, shows: bool) -> None:
        self._stage, self._total, self._shows = stage, total, shows
        self._last = time.monotonic()
        self._bar: Progress | None = None
        if shows and sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("stage {task.fields[stage]}"),
                BarColumn(),
                TextColumn("{task.completed:.0f}/{task.total:.0f}  {task.fields[status]}"),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task("", total=total, completed=start, stage=stage, status="starting")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, step: int, loss: float, tokens_per_second: float, seconds_left: float) -> None:
        """Show a finished step."""
        status = f"loss {loss:.4g}  {count(tokens_per_second)} tokens/s  {clock(seconds_left)} left"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, status=status)
        elif self._shows and (time.monotonic() - self._last > PLAIN_SECONDS or step == self._total):
            self._last = time.monotonic()
            self.say(f"stage {self._stage}  {step}/{self._total}  {status}")

    def say(self, line: str) -> None:
        """A line of its own, above the bar."""
        if self._bar is not None:
            self._bar.console.print(line, highlight=False)
        elif self._shows:
            print(line, file=sys.stderr, flush=True)
