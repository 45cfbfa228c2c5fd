"""`memorizing settings`: the table of all settings, made from the settings' dataclasses and their docstrings."""

import argparse
import dataclasses
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memorizing.errors import InputError

BEGIN = "<!-- The rest is written by: memorizing settings --update=configs/README.md -->"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `memorizing settings`."""
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="section or setting to print, such as Memory or Batch.size; default: all",
    )
    parser.add_argument(
        "--update", type=Path, metavar="FILE", help="Markdown file whose tables are replaced; default: print"
    )


def run(options: argparse.Namespace) -> None:
    """Lists every setting with its type, default and meaning."""
    if options.update is None:
        for line in text_lines(options.names):
            print(line)
        return
    before = options.update.read_text()
    if BEGIN not in before:
        raise InputError(f"--update={options.update} has no line {BEGIN!r}. Add it where the tables should start")
    options.update.write_text(updated(before))


def updated(page: str) -> str:
    """Returns the page with new tables after the line `BEGIN`."""
    return page[: page.index(BEGIN)] + BEGIN + "\n" + "".join(f"\n{line}" for line in markdown_lines()) + "\n"


class Setting(typing.NamedTuple):
    """One setting, as shown to users.

    Attributes:
        name: its name in gin files, such as `Batch.size`.
        kind: its type.
        default: its default value.
        summary: the first sentence of its description.
        details: the whole description.
    """

    name: str
    kind: str
    default: str
    summary: str
    details: str


def sections() -> dict[str, Any]:
    """Returns the settings' dataclasses by section."""
    from memorizing.config import SECTIONS

    return SECTIONS


def settings_of(section: str) -> list[Setting]:
    """Returns the settings of a section in their order."""
    cls = sections()[section]
    descriptions = attribute_descriptions(cls)
    fields = [field for field in dataclasses.fields(cls) if field.repr]
    hints = typing.get_type_hints(cls)
    return [
        Setting(
            f"{section}.{field.name}",
            kind_of(hints[field.name]),
            repr(
                field.default if field.default is not dataclasses.MISSING else typing.cast(Any, field).default_factory()
            ),
            first_sentence(descriptions[field.name]),
            descriptions[field.name],
        )
        for field in fields
    ]


def attribute_descriptions(cls: type) -> dict[str, str]:
    """Returns the texts under "Attributes:" in the docstrings of a class and of its bases."""
    found: dict[str, str] = {}
    for each in reversed(cls.__mro__):
        _, _, text = (each.__doc__ or "").partition("Attributes:\n")
        for entry in re.findall(r"^ {8}(\S.*(?:\n {12}.*)*)", text, flags=re.MULTILINE):
            names, _, description = entry.partition(":")
            found |= dict.fromkeys(names.split(", "), " ".join(description.split()))
    return found


def first_sentence(text: str) -> str:
    """Returns the text up to its first full stop outside of parentheses, without it."""
    depth = 0
    for place, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if character == "." and depth == 0 and text[place + 1 : place + 2] in ("", " "):
            return text[:place]
    return text


def kind_of(hint: Any) -> str:
    """Returns a type as text: `int`, `float or None`, `'segment' or 'call'`."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(map(repr, arguments))
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return " or ".join(map(kind_of, arguments))
    if typing.get_origin(hint) is tuple:
        inner = [kind_of(each) for each in arguments if each is not Ellipsis]
        return f"tuple of {inner[0]}" if Ellipsis in arguments else f"({', '.join(inner)})"
    return "None" if hint is type(None) else getattr(hint, "__name__", str(hint))


def text_lines(names: Sequence[str]) -> list[str]:
    """Returns what the terminal shows: whole descriptions of the settings named, or one line for each setting.

    Raises:
        InputError: for a name that is neither a section nor a setting.
    """
    every = [setting for section in sections() for setting in settings_of(section)]
    if not names:
        return [f"{each.name} = {each.default}    {each.summary}" for each in every]
    lines = []
    for name in names:
        found = [each for each in every if each.name == name or each.name.startswith(f"{name}.")]
        if not found:
            raise InputError(f"there is no setting {name!r}. Sections are {', '.join(sections())}")
        for each in found:
            lines += [f"{each.name} = {each.default}    ({each.kind})", f"    {each.details}"]
    return lines


def markdown_lines() -> list[str]:
    """Returns a table for each section."""
    lines = ["## Every setting"]
    for section, cls in sections().items():
        lines += ["", f"### {section}", "", (cls.__doc__ or "").strip().splitlines()[0], ""]
        lines += ["| setting | type | default | meaning |", "|---|---|---|---|"]
        lines += [
            "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"
            for each in settings_of(section)
            for row in [(f"`{each.name}`", each.kind, f"`{each.default}`", each.summary)]
        ]
    return lines
