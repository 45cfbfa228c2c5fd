"""Reads a compiled program's collectives from its HLO text: their arrays, number of runs, and bytes sent."""

import dataclasses
import math
import re
from collections.abc import Iterator

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f64": 8, "s64": 8, "u64": 8}
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.+?) ([\w\-]+)\(")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_CALLS = re.compile(r"(?:to_apply|calls|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count"?:\{"?n"?:"?(\d+)')
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_BOUND = re.compile(r" = [su]\d+\[\]\S* constant\((\d+)\)")
# The TPU compiler's name for a fusion that sums over devices and gives each device its shard. Its text has an
# all-reduce of the whole array and slices of it; the device runs a reduce-scatter (`emitter`: AllReduceScatterFusion).
_SCATTERED_SUM = "all-reduce-scatter"
_STARTS = 'custom_call_target="AsyncCollectiveStart"'
_GROUPS = re.compile(r"replica_groups=(?:\[\d+,(\d+)\]|\{\{([\d,]*)\}|mesh\[([^\]]*)\] \{([^}]*)\})")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One instruction that moves data between devices.

    Attributes:
        kind: one of `KINDS`.
        arrays: dtypes and shapes of the result on each device.
        devices: number of devices in each group.
        times: number of runs in one call of the program, loop iterations included; a loop of unknown length counts
            once.
        sent: bytes that each device sends per run, by the ring algorithm of its kind.
    """

    kind: str
    arrays: tuple[tuple[str, tuple[int, ...]], ...]
    devices: int
    times: int
    sent: int

    @property
    def total(self) -> int:
        """Bytes that each device sends in one call of the program."""
        return self.sent * self.times


def collectives(hlo: str) -> list[Collective]:
    """Returns the collectives of a compiled module, from its text (`jax.stages.Compiled.as_text`)."""
    bodies, entry = _computations(hlo)
    found: list[Collective] = []

    def visit(name: str, times: int, in_fusion: bool = False) -> None:
        body = bodies.get(name, [])
        scatters = name.startswith(_SCATTERED_SUM)
        # An asynchronous collective appears in the fusion that starts it, in those that run at the same time, and in
        # the one that ends it. (Several can have the same `channel_id`, so it does not tell them apart.)
        counts = not in_fusion or scatters or any(_STARTS in line for line in body)
        for line in body:
            match = _INSTRUCTION.match(line)
            if not match:
                continue
            kind = match[2].removesuffix("-start")
            if kind in KINDS:
                result = match[1]
                if scatters and kind == "all-reduce":
                    kind, result = "reduce-scatter", _result(body)
                if counts:
                    found.append(_collective(kind, result, line, match[2].endswith("-start"), times))
                continue
            trips = _trips(line, bodies) if match[2] == "while" else 1
            for called in _called(line):
                visit(called, times * trips, match[2] == "fusion")

    visit(entry, 1)
    return found


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    bodies: dict[str, list[str]] = {}
    entry = name = ""
    for line in hlo.splitlines():
        if match := _COMPUTATION.match(line):
            name = match[1]
            bodies[name] = []
            entry = name if line.startswith("ENTRY") else entry
        elif name:
            bodies[name].append(line)
    return bodies, entry


def _result(body: list[str]) -> str:
    """Returns the type of a computation's result."""
    [root] = (match[1] for line in body if "ROOT " in line and (match := _INSTRUCTION.match(line)))
    return root


def _trips(line: str, bodies: dict[str, list[str]]) -> int:
    """Returns the number of iterations of a loop, from the compiler (CPU, GPU) or the bound in its condition (TPU)."""
    if known := _TRIPS.search(line):
        return int(known[1])
    condition = bodies.get(match[1], []) if (match := _CONDITION.search(line)) else []
    bounds = [int(bound[1]) for each in condition if (bound := _BOUND.search(each))]
    counts_up = any(" compare(" in each and "direction=LT" in each for each in condition)
    return bounds[0] if counts_up and len(bounds) == 1 else 1


def _devices(line: str) -> int:
    """Returns the number of devices in a group, in any HLO syntax for groups."""
    group = _GROUPS.search(line)
    if group is None:
        return 2
    if group[3] is not None:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", group[3]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", group[4]))
    return int(group[1]) if group[1] else len(group[2].split(","))


def _called(line: str) -> Iterator[str]:
    yield from _CALLS.findall(line)
    for branches in _BRANCHES.findall(line):
        yield from re.findall(r"%?([\w.\-]+)", branches)


def _collective(kind: str, result: str, line: str, starts: bool, times: int) -> Collective:
    arrays = [(dtype, tuple(int(size) for size in shape.split(",") if size)) for dtype, shape in _ARRAY.findall(result)]
    if starts and kind in ("all-gather", "collective-permute") and len(arrays) > 1:
        # The type lists operands, results, and for permutes two synchronization tokens.
        arrays = [each for each in arrays if not (each[0] == "u32" and each[1] == ())]
        arrays = arrays[len(arrays) // 2 :]
    devices = _devices(line)
    size = sum(math.prod(shape) * _BYTES.get(dtype, 4) for dtype, shape in arrays)
    share = (devices - 1) / devices
    sent = {
        "all-gather": size * share,
        "all-reduce": 2 * size * share,
        "reduce-scatter": size * (devices - 1),
        "collective-permute": size,
    }.get(kind, size * share)
    return Collective(kind, tuple(arrays), devices, times, int(sent))
