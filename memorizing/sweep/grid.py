"""The grid of a sweep: the settings that vary, and the points that follow.

    --over MEMORY_SIZE=0,512 --over DATA=isabelle=runs/isabelle/data,github=runs/github/data --seeds 2

gives 2 x 2 x 2 points, named by their values: `MEMORY_SIZE=0,DATA=isabelle,seed=0`. Values are gin literals separated
by commas; words and paths need no quotes. `points.py` says how points are trained and evaluated.
"""

import ast
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from memorizing.data.tokens import PreparedTokens
from memorizing.errors import InputError

DATA = ("DATA", "Training.data")
"""Settings whose values are folders of prepared tokens, which may be written as NAME=FOLDER."""
LABEL_LENGTH = 60


class Value(NamedTuple):
    """One value of a swept setting, for JSON and as gin text."""

    shown: Any
    gin: str
    label: str
    """The value as part of a file name."""


class Axis(NamedTuple):
    """A swept setting and its values."""

    name: str
    values: tuple[Value, ...]


class Point(NamedTuple):
    """One combination of values and a seed."""

    name: str
    values: dict[str, Any]
    bindings: tuple[str, ...]
    """The values as gin bindings, `'MEMORY_SIZE = 512'`, except data and seed."""
    seed: int | None = None
    data: str | None = None
    """Folder of the data, if the sweep varies it."""
    corpus: str | None = None
    """Name of that data."""


def parse_axis(text: str) -> Axis:
    """Reads `NAME=V1,V2`.

    Raises:
        InputError: if the text has another form, or a value appears twice.
    """
    given = re.fullmatch(r"\s*([A-Za-z_]\w*(?:\.\w+)?)\s*=(.*)", text, flags=re.DOTALL)
    if given is None:
        raise InputError(f"--over {text}: must be NAME=VALUE,VALUE such as MEMORY_SIZE=0,1536 or Model.layers=2,4")
    name = given[1]
    if name in ("SEED", "Training.seed", "Batch.seed"):
        raise InputError(f"--over {text}: seeds are not swept like settings. Use --seeds N")
    parts = [part.strip() for part in split_values(given[2])]
    if "" in parts:
        raise InputError(f"--over {text}: a value is empty. Write '' for an empty text")
    values = tuple(_data_value(part) if name in DATA else _value(name, part) for part in parts)
    for what in ("gin", "label"):
        each = [getattr(value, what) for value in values]
        twice = next((one for one in each if each.count(one) > 1), None)
        if twice is not None:
            way_out = "give them names, NAME=FOLDER" if name in DATA else "leave one out"
            raise InputError(f"--over {text}: {twice} appears twice. {way_out}")
    return Axis(name, values)


def split_values(text: str) -> list[str]:
    """Splits text at commas outside brackets and quotes."""
    parts, depth, quote, before = [""], 0, "", ""
    for character in text:
        if quote:
            quote = "" if character == quote and before != "\\" else quote
        elif character in "'\"":
            quote = character
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        if character == "," and not quote and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
        before = character
    if quote or depth:
        raise InputError(f"--over {text}: a quote or bracket is not closed. Close it")
    return parts


def _value(name: str, text: str) -> Value:
    try:
        literal = ast.literal_eval(text)
        return Value(
            json.loads(json.dumps(literal)),
            repr(literal),
            _label(text if isinstance(literal, int | float) else str(literal)),
        )
    except (ValueError, SyntaxError, TypeError):
        pass
    if re.fullmatch(r"%\w+", text):
        return Value(text, text, _label(text))
    if not re.fullmatch(r"[A-Za-z_./~][\w./~+:-]*", text) or text.lower() in ("true", "false", "none"):
        raise InputError(f"--over {name}={text}: is not a gin value. Write numbers, True, (1, 2), or 'text' in quotes")
    return Value(text, repr(text), _label(text))


def _data_value(text: str) -> Value:
    """Reads a folder, or NAME=FOLDER. The default name is the source of the folder's documents."""
    given = re.fullmatch(r"([\w.-]+)=(.+)", text)
    folder = given[2] if given else text
    if folder[0] in "'\"":
        folder = str(ast.literal_eval(folder))
    name = given[1] if given else PreparedTokens(Path(folder)).manifest["source"]
    return Value(name, repr(folder), _label(name))


def _label(text: str) -> str:
    return re.sub(r"[^\w.+-]+", "_", text).strip("_")[:LABEL_LENGTH] or "_"


def combinations(axes: Sequence[Axis], seeds: Sequence[int | None]) -> list[Point]:
    """Returns all points; the last axis and the seeds change fastest.

    Raises:
        InputError: for a setting that is swept twice.
    """
    names = [axis.name for axis in axes]
    for name in names:
        if names.count(name) > 1 or (name in DATA and sum(each in DATA for each in names) > 1):
            raise InputError(f"--over {name}=...: appears twice. Give all its values in one --over")
    return [
        _point(list(zip(names, chosen, strict=True)), seed)
        for chosen in itertools.product(*(axis.values for axis in axes))
        for seed in seeds
    ]


def _point(pairs: list[tuple[str, Value]], seed: int | None) -> Point:
    labels = [f"{name}={value.label}" for name, value in pairs] + ([] if seed is None else [f"seed={seed}"])
    values = {name: value.shown for name, value in pairs}
    point = Point(",".join(labels) or "as-it-is", values, _bindings(pairs), seed)
    for name, value in pairs:
        if name in DATA:
            point = point._replace(data=str(ast.literal_eval(value.gin)), corpus=value.shown)
    return point


def _bindings(pairs: list[tuple[str, Value]]) -> tuple[str, ...]:
    return tuple(f"{name} = {value.gin}" for name, value in pairs if name not in DATA)
