"""Shapes, dtypes and searches to benchmark, and the defaults of each platform."""

import dataclasses
import re
from collections.abc import Mapping
from typing import NamedTuple

from memorizing.errors import InputError
from memorizing.memory.quantize import DTYPES
from memorizing.memory.search import SEARCHES
from memorizing.memory.settings import MemorySettings
from memorizing.model.settings import ModelSettings

DTYPE_NAMES = ("float32", "bfloat16", *DTYPES)
_CPU, _OTHER = (
    {"B": 4, "H": 4, "N": 256, "D": 64, "K": 32},
    {"B": 8, "H": 8, "N": 512, "D": 128, "K": 32},
)
_CPU_SLOTS, _OTHER_SLOTS = "M1024,M8192,M32768,M65536", "M8192,M65536,M262144"


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of one search, by their letters (see `memorizing.shapes`)."""

    B: int
    H: int
    N: int
    M: int
    D: int
    K: int

    def __post_init__(self):
        for letter, size in dataclasses.asdict(self).items():
            if size < 1:
                raise InputError(f"--shapes: {letter}{size} in {self}: every size must be at least 1")
        if self.K > self.M:
            raise InputError(f"--shapes: K{self.K} in {self} is more than M{self.M}. Retrieve at most {self.M}")

    def __str__(self):
        return "x".join(f"{letter}{size}" for letter, size in dataclasses.asdict(self).items())

    @property
    def flops(self) -> float:
        """FLOPs of the scores."""
        return 2.0 * self.B * self.H * self.N * self.M * self.D


def read_shapes(text: str, default: Mapping[str, int]) -> list[Shape]:
    """Reads shapes such as `B8xH8xN512xM65536xD128xK32,M8192`. A letter that is left out takes its default.

    Raises:
        InputError: names what cannot be read.
    """
    shapes = []
    for part in text.split(","):
        sizes = dict(default)
        named = re.findall(r"(?:^|x)([BHNMDK])(\d+)", part)
        if not named or "x".join(map("".join, named)) != part or len({letter for letter, _ in named}) < len(named):
            raise InputError(
                f"--shapes={text}: {part!r} is not a shape. Write letters with sizes and x between, such as "
                f"B8xH8xN512xM65536xD128xK32, or only some of the letters; shapes with commas between"
            )
        sizes |= {letter: int(size) for letter, size in named}
        if missing := [letter for letter in "BHNMDK" if letter not in sizes]:
            raise InputError(f"--shapes={text}: {part!r} lacks {', '.join(missing)}. Add it, such as M65536")
        shapes.append(Shape(**sizes))
    return shapes


class Choices(NamedTuple):
    """The measurements: each search at each shape and dtype of keys. No searches stand for those of the platform."""

    shapes: list[Shape]
    dtypes: list[str]
    searches: list[str]


def choose(
    platform: str,
    shapes: str | None,
    dtypes: str | None,
    searches: str | None,
    run: Mapping[str, int] | None = None,
) -> Choices:
    """Reads the options. Missing ones take the defaults of the platform (`cpu`, `gpu`, ...) or the sizes of a `run`.

    Raises:
        InputError: names what is impossible, and what is possible.
    """
    if platform == "cpu":
        sizes, slots, default_dtypes = _CPU, _CPU_SLOTS, "float32,bfloat16"
    else:
        sizes, slots, default_dtypes = _OTHER, _OTHER_SLOTS, "bfloat16"
    if run is not None:
        sizes, slots = run, f"M{run['M']}"
    return Choices(
        read_shapes(slots if shapes is None else shapes, sizes),
        _known("--dtype", dtypes or default_dtypes, DTYPE_NAMES, "dtype of keys"),
        [] if searches is None else _known("--searches", searches, search_names(), "search"),
    )


def search_names() -> tuple[str, ...]:
    """Returns the values of `Memory.search`."""
    return ("auto", *SEARCHES)


def default_searches(platform: str) -> list[str]:
    """Returns the searches that name this platform (`cpu`, `gpu`, `tpu`) as one of theirs."""
    return [name for name, kind in SEARCHES.items() if platform in kind.platforms]


def run_sizes(model: ModelSettings, memory: MemorySettings, segment_length: int) -> dict[str, int]:
    """Returns the sizes of a run by their letters, for one row."""
    return {"B": 1, **searched_sizes(model, segment_length), "M": memory.size, "K": memory.neighbors}


def searched_sizes(model: ModelSettings, segment_length: int) -> dict[str, int]:
    """Returns the sizes that a memory layer searches: query heads that share a key head count as more queries of one
    head."""
    return {"H": model.kv_head_count, "N": segment_length * model.group, "D": model.head_size}


def check_rounds(rounds: int) -> None:
    """Rejects fewer than one round."""
    if rounds < 1:
        raise InputError(f"--rounds={rounds}: must be at least 1. Use about 10 for a spread")


def _known(option: str, text: str, known: tuple[str, ...], what: str) -> list[str]:
    for name in (names := text.split(",")):
        if name not in known:
            raise InputError(f"{option}={text}: {name!r} is not a {what}. Choose from {', '.join(known)}")
    return names
