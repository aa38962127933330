"""One HTML page from everything a run left behind: curves, tables and pictures, in a single file.

    uv run benchmarks/report.py runs/mine --out report.html
    uv run benchmarks/report.py runs/mine docs/results/babyllama --title "Llama, linearized"

Every directory below the given ones that holds a ``result.json`` (a training stage or an evaluation with ``--out``)
becomes a section: its tables, its pictures, and, folded away, the settings that made it. The page needs no network and
no other file.
"""

from __future__ import annotations

import argparse
import base64
import html
import json
import math
import sys
from pathlib import Path
from typing import Any

from lizard_jax.atomic import write_atomic
from lizard_jax.errors import UserError

FOLDED = ("settings", "config", "versions", "device", "cores")
"""What says how a result was made, rather than what it is."""
ROWS = 200
"""Most rows of a table on the page; ``result.json`` has the rest."""

STYLE = """
:root { color-scheme: light dark; --ink: #1a2420; --paper: #fdfdfb; --line: #d5dcd6; --soft: #5f6f66; --mark: #2c7a4b; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4ebe6; --paper: #151a17; --line: #37423b; --soft: #9aaba1; --mark: #7fcf9d; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
       max-width: 62rem; padding: 2rem 1rem 4rem; }
h1 { font-size: 1.8rem; margin: 0 0 .2rem; } h2 { font-size: 1.25rem; margin: 3rem 0 .5rem; color: var(--mark); }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; } nav a { margin-right: 1rem; } a { color: var(--mark); }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .2rem .8rem .2rem 0; border-bottom: 1px solid var(--line); vertical-align: top; text-align: left; }
td.number, th.number { text-align: right; white-space: nowrap; } td { white-space: pre-wrap; }
img { max-width: 100%; height: auto; background: white; border-radius: 4px; margin: .6rem 0; }
details { margin: .8rem 0; color: var(--soft); } summary { cursor: pointer; }
"""


def number(value: Any) -> str:
    """A cell's text: counts with commas, other numbers to five digits."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if not math.isfinite(value):
            return str(value)
        return f"{value:.4f}" if 1e-3 <= abs(value) < 1e5 or value == 0 else f"{value:.4g}"
    if isinstance(value, list) and all(isinstance(x, int | float | str) for x in value):
        return ", ".join(number(x) for x in value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def cell(value: Any, tag: str = "td") -> str:
    """One cell of a table."""
    kind = ' class="number"' if isinstance(value, int | float) and not isinstance(value, bool) else ""
    return f"<{tag}{kind}>{html.escape(number(value))}</{tag}>"


def table(columns: list[str], rows: list[list[Any]]) -> str:
    """A table with a head, its columns aligned as their first values are."""
    first = rows[0] if rows else columns
    kinds = [' class="number"' if isinstance(x, int | float) else "" for x in first]
    head = "".join(
        f"<th{kind}>{html.escape(str(name).replace('_', ' '))}</th>" for name, kind in zip(columns, kinds, strict=True)
    )
    body = "".join(f"<tr>{''.join(cell(value) for value in row)}</tr>" for row in rows[:ROWS])
    more = f"<p>{len(rows) - ROWS:,} more rows in result.json</p>" if len(rows) > ROWS else ""
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{more}'


def is_flat(value: Any) -> bool:
    """Whether a value fits into one cell."""
    return not isinstance(value, dict) and not (
        isinstance(value, list) and any(isinstance(x, dict | list) for x in value)
    )


def content(name: str, value: Any, level: int = 3) -> str:
    """Tables of a JSON value: a list of records is a table, a record two columns, with deeper ones below it."""
    title = f"<h{level}>{html.escape(name.replace('_', ' '))}</h{level}>" if name else ""
    if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
        columns = list(dict.fromkeys(key for row in value for key in row))
        return title + table(columns, [[row.get(key) for key in columns] for row in value])
    if isinstance(value, dict):
        alike = [list(row) for row in value.values() if isinstance(row, dict)]
        if len(alike) == len(value) > 1 and all(is_flat(x) for row in value.values() for x in row.values()):
            columns = list(dict.fromkeys(key for row in alike for key in row))
            rows = [[key, *(row.get(column) for column in columns)] for key, row in value.items()]
            return title + table(["", *columns], rows)
        flat = [[key.replace("_", " "), part] for key, part in value.items() if is_flat(part)]
        deep = [content(key, part, min(level + 1, 6)) for key, part in value.items() if not is_flat(part)]
        return title + (table(["", ""], flat) if flat else "") + "".join(deep)
    return title + f"<p>{html.escape(number(value))}</p>"


def picture(file: Path) -> str:
    """The picture itself, in the page."""
    data = base64.b64encode(file.read_bytes()).decode()
    return f'<img alt="{html.escape(file.stem)}" src="data:image/png;base64,{data}">'


def training(result: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """A stage's table, teacher beside before and after, and what is left of its result."""
    columns = [name for name in ("teacher", "before", "after") if name in result]
    rows: list[list[Any]] = [[name, *(result[c].get(name) for c in columns)] for name in ("loss", "perplexity")]
    layers = len(result["before"].get("layer_mse", ()))
    parts = {c: result[c].get("layer_mse", [0.0] * layers) for c in columns}
    rows += [[f"layer {n}, MSE", *(parts[c][n] for c in columns)] for n in range(layers)]
    return table(["", *columns], rows), {name: value for name, value in result.items() if name not in columns}


def section(source: Path, name: str, number: int) -> str:
    """One directory's results.

    Raises:
        UserError: its ``result.json`` is damaged.
    """
    file = source / "result.json"
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as a result: {error}") from None
    if not isinstance(result, dict):
        raise UserError(f"{file} is no result of train.py or lizard_jax.eval")
    parts = [f'<h2 id="part{number}">{html.escape(name)}</h2>']
    if isinstance(result.get("before"), dict) and isinstance(result.get("after"), dict):
        first, result = training(result)
        parts.append(first)
    parts += [picture(image) for image in sorted(source.glob("*.png"))]
    parts.append(content("", {key: value for key, value in result.items() if key not in FOLDED}))
    made = {key: result[key] for key in FOLDED if key in result}
    if made:
        parts.append(f"<details><summary>how it was made</summary>{content('', made, 4)}</details>")
    return "".join(parts)


def page(places: list[Path], title: str) -> str:
    """The whole page.

    Raises:
        UserError: a place that is not there, or no result in any.
    """
    found: dict[Path, str] = {}
    for source in places:
        if not source.is_dir():
            raise UserError(f"no directory at {source}")
        for file in sorted(source.rglob("result.json")):
            below = file.parent.relative_to(source)
            found.setdefault(file.parent, source.name if below == Path() else f"{source.name}/{below}")
    if not found:
        raise UserError(
            f"no result.json in {', '.join(map(str, places))}; give a run of train.py, or an evaluation's --out"
        )
    links = "".join(f'<a href="#part{n}">{html.escape(name)}</a>' for n, name in enumerate(found.values()))
    sections = "".join(section(source, name, n) for n, (source, name) in enumerate(found.items()))
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style><h1>{html.escape(title)}</h1>"
        f"<nav>{links}</nav>{sections}</html>\n"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("places", nargs="+", type=Path, metavar="DIR", help="run directories, results of evaluations")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="the page (default %(default)s)")
    parser.add_argument("--title", help="heading (default: the first directory's name)")
    args = parser.parse_args()
    try:
        text = page(args.places, args.title or f"lizard-jax: {args.places[0].resolve().name}")
        write_atomic(args.out, text)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: cannot write {args.out}: {error.strerror or error}", file=sys.stderr)
        return 2
    print(f"{args.out}: {len(text) / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
