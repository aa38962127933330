"""What a compiled program moves: bytes of a device's own memory, and bytes over links, read from its text.

A loop's body counts as often as it runs. Every operation reads its operands and writes its results once; of an array
that it only cuts a piece from or writes one into, that piece counts. On TPUs what lies in VMEM counts when it is copied
there, and not when it is used. What is sent meanwhile counts once, over links and in memory: a TPU's compiler lays
pieces of a collective into other operations, and into loops, that run while it is under way; all of them bear its
channel.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "copy-start", "slice-start", "after-all",
    "partition-id", "replica-id", "iota", "while", "conditional", "call", "opt-barrier",
}  # fmt: skip
_CUTS = {"dynamic-slice", "slice", "gather"}
_BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16, "s32": 32, "u32": 32,
    "f32": 32, "s64": 64, "u64": 64, "f64": 64,
}  # fmt: skip
_SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\](\{[^{}]*\})?")
_LINE = re.compile(r"\s*(ROOT )?%?([\w.-]+) = (.*?) ([a-z][a-z-]*)\((.*?)\)(?:, |$)(.*)")
_HEAD = re.compile(r"(ENTRY )?%?([\w.-]+) .*\{$")


@dataclasses.dataclass(frozen=True)
class Operation:
    """One line of a program."""

    root: bool
    name: str
    shape: str
    kind: str
    operands: tuple[str, ...]
    rest: str
    text: str

    @property
    def called(self) -> dict[str, str]:
        """The computations that it runs, by their part in it."""
        return dict(re.findall(r"\b(condition|body|calls|to_apply)=%?([\w.-]+)", self.rest))


@dataclasses.dataclass(frozen=True)
class Moved:
    """Of one device and one run of the program.

    Attributes:
        memory: bytes read from and written to its memory.
        links: bytes that it receives over links, by kind of collective, if each goes round a ring.
        results: bytes of the collectives' results, by kind.
    """

    memory: float
    links: dict[str, float]
    results: dict[str, float]


def size(shape: str, *, everywhere: bool = False) -> int:
    """Bytes of a shape, or of each part of a tuple; what lies in VMEM is left out unless it is asked for."""
    return sum(
        _BITS[name] * math.prod(int(n) for n in dims.split(",") if n) // 8
        for name, dims, layout in _SHAPE.findall(shape)
        if name in _BITS and (everywhere or "S(1)" not in layout)
    )


def moved(text: str, devices: int) -> Moved:
    """What a program moves, from its optimized HLO.

    Args:
        devices: of the mesh that it is compiled for.
    """
    parts, entry = _parts(text)
    # By channel and by operation that bears it: how often it runs, its kind, what it sends, the size of its result, and
    # where it is part of a fusion, of what it reads and writes.
    sending: defaultdict[str, dict[str, tuple[float, str, float, int, int]]] = defaultdict(dict)

    def run(name: str, times: float) -> float:
        """The bytes of memory that a computation moves; what it sends is noted on the way."""
        total = 0.0
        shapes = {one.name: one.shape for one in parts[name]}
        for one in parts[name]:
            called = one.called
            if one.kind == "while":
                turns = _trips(parts, one)
                total += turns * run(called["body"], times * turns)
            elif one.kind == "conditional":
                branches = re.findall(r"branch_computations=\{(.*?)\}", one.rest)
                names = re.findall(r"[\w.-]+", branches[0].replace("%", "")) if branches else re.findall(
                    r"(?:true|false)_computation=%?([\w.-]+)", one.rest
                )  # fmt: skip
                total += max((run(branch, times) for branch in names), default=0.0)
            elif one.kind in ("call", "async-start") and (inner := called.get("to_apply") or called.get("calls")):
                total += run(inner, times)
            else:
                inside = [one] if one.kind != "fusion" else parts.get(called.get("calls", ""), [])
                within = {each.name: each.shape for each in inside}
                for each in inside:
                    kind, channel = each.kind.removesuffix("-start"), re.search(r"channel_id=(\d+)", each.rest)
                    if kind in COLLECTIVES:
                        scatters = kind == "all-reduce" and "all-reduce-scatter" in called.get("calls", "")
                        sent, result = _sent("reduce-scatter of all" if scatters else kind, each, devices)
                        bearers = sending[channel[1] if channel else each.name]
                        before = bearers[each.name][0] if each.name in bearers else 0.0
                        read = sum(size(within.get(name, "")) for name in each.operands)
                        touched = 0 if each is one else read + size(each.shape)
                        bearers[each.name] = (before + times, kind, sent, result, touched)
                total += _touched(one, shapes, parts.get(called.get("calls", ""), []))
        return total

    memory = run(entry, 1.0)
    links: defaultdict[str, float] = defaultdict(float)
    results: defaultdict[str, float] = defaultdict(float)
    for bearers in sending.values():
        times, kind, sent, result, _ = min(bearers.values())
        memory += times * min(touched for *_, touched in bearers.values())
        links[kind] += times * sent
        results[kind] += times * result
    return Moved(memory, dict(links), dict(results))


def launches(text: str) -> int:
    """How many operations a run of a program starts, those in a loop as often as it runs."""
    parts, entry = _parts(text)

    def run(name: str) -> int:
        total = 0
        for one in parts[name]:
            called = one.called
            if one.kind == "while":
                total += run(called["body"]) * _trips(parts, one)
            elif one.kind in ("call", "async-start") and (inner := called.get("to_apply") or called.get("calls")):
                total += run(inner)
            elif one.kind not in _FREE and not one.kind.endswith("-done"):
                total += 1
        return total

    return run(entry)


def _parts(text: str) -> tuple[dict[str, list[Operation]], str]:
    """The computations of a module by name, and the name of the first that runs."""
    found: dict[str, list[Operation]] = {}
    entry, here = "", ""
    # What a Pallas kernel says of itself may stand in lines of its own, in the middle of an operation's.
    text = re.sub(r"kernel_metadata=\{\n.*?\n\}", "kernel_metadata={}", text)
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        if not line.startswith(" "):
            head = _HEAD.match(line)
            here = head[2] if head else ""
            if head:
                found[here] = []
                entry = here if head[1] else entry
        elif here and (match := _LINE.match(line)):
            root, name, shape, kind, operands, rest = match.groups()
            names = tuple(re.findall(r"%?([\w.-]+)(?:,|$)", operands))
            found[here].append(Operation(bool(root), name, shape, kind, names, rest, line))
    return found, entry


def _trips(parts: dict[str, list[Operation]], loop: Operation) -> int:
    """How often a loop runs: as its compiler says, or the constant that its counter is compared with over its step."""
    if known := re.search(r"known_trip_count\W+n\W+(\d+)", loop.rest):
        return int(known[1])
    condition = _inlined(parts, loop.called["condition"])
    constants = [value for one in condition if (value := _integer(one)) is not None]
    counters = [int(index[1]) for one in condition if (index := re.search(r"index=(\d+)", one.rest))]
    step = _step(_inlined(parts, loop.called["body"]), counters[0]) if counters else 1
    return max(1, math.ceil(max(constants, default=1) / step))


def _inlined(parts: dict[str, list[Operation]], name: str) -> list[Operation]:
    """The operations of a computation, and after them those of its fusions."""
    lines = [*parts.get(name, [])]
    for one in lines:
        if one.kind == "fusion":
            lines += parts.get(one.called.get("calls", ""), [])
    return lines


def _integer(one: Operation) -> int | None:
    """The value of a constant, where it is one number."""
    value = re.search(r"= [su]\d+\[\]\S* constant\((\d+)\)", one.text) if one.kind == "constant" else None
    return int(value[1]) if value else None


def _step(body: list[Operation], index: int) -> int:
    """What a loop's body adds to the counter that lies there in its state: 2 where the compiler made two turns one."""
    by_name = {one.name: one for one in body}
    [root, *_] = [one for one in body if one.root] or [None]
    turn = by_name.get(root.operands[index]) if root is not None and root.kind == "tuple" else None
    if turn is None or turn.kind != "add":
        return 1
    values = [_integer(by_name[name]) for name in turn.operands if name in by_name]
    return next((value for value in values if value), 1)


def _touched(one: Operation, shapes: dict[str, str], inside: list[Operation]) -> int:
    """Bytes of memory that an operation reads and writes."""
    # Where a TPU's compiler begins and ends a collective it says so by name.
    if one.kind in _FREE or one.kind.endswith("-start") or one.name.startswith("async-collective"):
        return 0
    if one.kind in ("copy-done", "slice-done"):
        return size(one.shape, everywhere=True)
    if one.kind.endswith("-done"):
        return 0 if one.kind != "async-done" else size(one.shape)
    if one.kind in _CUTS:
        return 2 * size(one.shape)
    if one.kind == "dynamic-update-slice":
        return 2 * size(shapes.get(one.operands[1], ""))
    if one.kind != "fusion" or not inside:
        return size(one.shape) + sum(size(shapes.get(name, "")) for name in one.operands)
    return _read(one, shapes, inside) + _written(one, inside)


def _read(one: Operation, shapes: dict[str, str], inside: list[Operation]) -> int:
    """Bytes that a fusion reads: of each operand all, or the pieces that are cut from it."""

    def of(name: str, whole: int) -> int:
        """Of what has this name inside."""
        total = 0
        for user in inside:
            if name not in user.operands:
                continue
            if user.kind == "bitcast":
                total += of(user.name, whole)
            elif _passes(user):
                continue
            elif user.kind in _CUTS and user.operands[0] == name:
                total += size(user.shape)
            elif user.kind != "dynamic-update-slice" or user.operands[0] != name:
                return whole
        return min(whole, total)

    total = 0
    for each in inside:
        number = re.search(r"parameter\((\d+)\)", each.text) if each.kind == "parameter" else None
        if number is None or int(number[1]) >= len(one.operands):
            continue
        whole = size(shapes.get(one.operands[int(number[1])], each.shape))
        used = any(each.name in user.operands for user in inside)
        total += of(each.name, whole) if used else whole
    return total


def _written(one: Operation, inside: list[Operation]) -> int:
    """Bytes that a fusion writes: its result, or the pieces that it writes into one."""
    by_name = {each.name: each for each in inside}
    [root] = [each for each in inside if each.root] or [None]
    if root is None:
        return size(one.shape)
    pieces = [by_name[name] for name in root.operands if name in by_name] if root.kind == "tuple" else [root]
    total = 0
    for piece in pieces:
        made = piece
        while made.kind == "bitcast" and made.operands[0] in by_name:
            made = by_name[made.operands[0]]
        update = by_name.get(made.operands[1]) if made.kind == "dynamic-update-slice" else None
        if made.kind.removesuffix("-start") not in ("parameter", *COLLECTIVES):
            total += size(update.shape if update is not None else piece.shape)
    return total


def _passes(user: Operation) -> bool:
    """Whether an operation of a fusion hands on what it is given: as a result of the fusion, or to other devices, which
    ``moved`` counts when it is under way no more."""
    return (user.root and user.kind == "tuple") or user.kind.removesuffix("-start") in COLLECTIVES


def _sent(kind: str, one: Operation, devices: int) -> tuple[float, int]:
    """Bytes that a device receives for a collective round a ring, and those of its result."""
    shapes = _SHAPE.findall(one.shape)
    # What a started collective returns holds its operand beside its result.
    last = one.shape if not one.kind.endswith("-start") or len(shapes) < 2 else _result(one.kind, shapes)
    result, group = size(last, everywhere=True), _group(one.rest, devices)
    share = (group - 1) / group
    received = {
        "all-gather": result * share,
        "all-reduce": 2 * result * share,
        "reduce-scatter of all": result * share,
        "reduce-scatter": result * (group - 1),
        "all-to-all": result * share,
        "collective-permute": result,
    }[kind]
    return received, result


def _result(kind: str, shapes: list[tuple[str, str, str]]) -> str:
    """The result's part of a started collective's tuple: half of it; of a permute the second."""
    texts = [f"{name}[{dims}]" for name, dims, _ in shapes]
    if kind == "collective-permute-start":
        return texts[1]
    return " ".join(texts[len(texts) // 2 :]) if kind == "all-gather-start" else " ".join(texts)


def _group(rest: str, devices: int) -> int:
    """Of how many devices a collective is."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return len(listed[1].split(","))
    if counted := re.search(r"replica_groups=\[(\d+),(\d+)\]", rest):
        return int(counted[2])
    if named := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named[2]))
    return devices
