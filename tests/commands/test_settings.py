"""`memorizing settings` and the page configs/README.md, which holds its tables."""

import dataclasses
import re
from pathlib import Path
from typing import Literal

import pytest

from memorizing.cli import main
from memorizing.commands.settings import attribute_descriptions, first_sentence, kind_of, sections, updated

PAGE = Path(__file__).parents[2] / "configs" / "README.md"


def test_the_page_holds_the_settings_of_the_dataclasses():
    page = PAGE.read_text()
    assert page == updated(page), "run: memorizing settings --update=configs/README.md"
    for section, cls in sections().items():
        for field in dataclasses.fields(cls):
            assert not field.repr or f"| `{section}.{field.name}` |" in page


def test_the_page_names_only_settings_that_exist():
    names = {f"{section}.{field.name}" for section, cls in sections().items() for field in dataclasses.fields(cls)}
    mentioned = set(re.findall(rf"\b(?:{'|'.join(sections())})\.[a-z]\w+", PAGE.read_text()))
    assert {name for name in mentioned if name.partition(".")[2] not in ("py", "md", "gin")} <= names


def test_the_page_names_every_macro_of_base():
    macros = dict(re.findall(r"^([A-Z]\w+) = (.*)", (PAGE.parent / "base.gin").read_text(), flags=re.MULTILINE))
    rows = dict(re.findall(r"^\| `([A-Z]\w+)` \| (\S+) \|", PAGE.read_text(), flags=re.MULTILINE))
    assert rows == {
        name: value.replace("_", ",") if name != "DATA" else "required" for name, value in macros.items()
    } | {"VOCABULARY_SIZE": "32,000"}


def test_update_replaces_old_tables(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(PAGE.read_text().replace("| `Batch.size` | int |", "| `Batch.size` | text |"))
    assert main(["settings", f"--update={page}"]) == 0
    assert page.read_text() == PAGE.read_text()
    page.write_text("no marker")
    assert main(["settings", f"--update={page}"]) == 2
    assert "has no line" in capsys.readouterr().err


def test_a_named_setting_is_shown_whole_and_an_unknown_one_is_refused(capsys):
    assert main(["settings", "Batch.size"]) == 0
    assert capsys.readouterr().out.startswith("Batch.size = 32    (int)\n    ")
    assert main(["settings"]) == 0
    assert len(capsys.readouterr().out.splitlines()) > 100
    assert main(["settings", "Batch.sise"]) == 2
    assert "no setting 'Batch.sise'" in capsys.readouterr().err


class Example:
    """A class.

    Attributes:
        one, two: both of them
            in two lines (see a. b). And more.
        three: an end; not here.
    """


def test_settings_descriptions_and_types_are_read():
    found = attribute_descriptions(Example)
    assert found["one"] == found["two"] == "both of them in two lines (see a. b). And more."
    assert first_sentence(found["one"]) == "both of them in two lines (see a. b)"
    assert first_sentence(found["three"]) == "an end; not here"


@pytest.mark.parametrize(
    ("hint", "text"),
    [
        (int, "int"),
        (float | None, "float or None"),
        (Literal["a", "b"], "'a' or 'b'"),
        (tuple[int, ...], "tuple of int"),
        (tuple[tuple[str, float], ...], "tuple of (str, float)"),
    ],
)
def test_types_are_written_as_people_read_them(hint, text):
    assert kind_of(hint) == text
