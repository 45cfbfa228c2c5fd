"""Gin text: it runs nothing, its size and depth are bounded, and what cannot be read is quoted with its place."""

import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memorizing.bindings import LARGEST_TEXT, Bindings, ConfigError, import_modules
from memorizing.cli import main
from memorizing.config import load
from memorizing.runs import CONFIG_FILE, load_trained, open_workdir, stored_config

HEADER = "# memorizing run, format 2: every setting\n"
HINT = "Write settings as 'Section.name = value'"


def read(*texts):
    bindings = Bindings()
    bindings.read([], texts)
    return bindings


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module that leaves a file behind when it runs; its name."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "it_ran.py").write_text(
        f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n"
    )
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.delitem(sys.modules, "it_ran", raising=False)
    return "it_ran"


@pytest.mark.parametrize(
    "line",
    [
        "import it_ran",
        "from it_ran import anything",
        "import it_ran as other",
        "from __gin__ import dynamic_registration",
        "Model.layers = @it_ran.f()",
        "Model.layers = (1, [@it_ran.f])",
        "include 'other.gin'",
        "a/Model.layers = 3",
    ],
)
def test_the_settings_of_a_run_run_nothing(line, module, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "other.gin").write_text(f"import {module}\n")
    (run / CONFIG_FILE).write_text(f"{HEADER}Model.heads = 2\n{line}\n")
    for opened in (stored_config, lambda run: load_trained(run, [], []), lambda run: open_workdir(run, [], [])):
        with pytest.raises(ConfigError, match=rf"{CONFIG_FILE}, line 3: "):
            opened(run)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("line", ["import it_ran", "from it_ran import anything"])
def test_files_import_modules_only_if_the_user_allows_it(line, module, tmp_path, capsys):
    (tmp_path / "inner.gin").write_text(f"{line}\n")
    (tmp_path / "mine.gin").write_text("include 'inner.gin'\nModel.layers = 3\nModel.memory_layers = (3,)\n")
    with pytest.raises(ConfigError, match=r"inner\.gin, line 1: imports it_ran.*--allow_imports"):
        load([tmp_path / "mine.gin"], [])
    with pytest.raises(ConfigError, match=r"'import it_ran': imports it_ran"):
        load([], ["import it_ran"])
    command = ["prepare", f"--gin_file={tmp_path / 'mine.gin'}", f"--out={tmp_path / 'out'}"]
    assert main(command) == 2 and not (tmp_path / "ran").exists()
    assert main([*command, "--allow_imports"]) == 2
    assert "it_ran" not in capsys.readouterr().err.splitlines()[-1] and (tmp_path / "ran").exists()
    assert load([tmp_path / "mine.gin"], [])[0].model.layers == 3


def test_a_module_that_cannot_be_imported_is_named(tmp_path):
    (tmp_path / "mine.gin").write_text("import no_such_module\n")
    with pytest.raises(ConfigError, match=r"mine\.gin, line 1: No module named 'no_such_module'"):
        import_modules([tmp_path / "mine.gin"], [])


DOUBLING = ["A0 = (1, 1)", *(f"A{n} = (%A{n - 1}, %A{n - 1})" for n in range(1, 60)), "Model.memory_layers = %A59"]
CHAIN = ["A0 = 1", *(f"A{n} = %A{n - 1}" for n in range(1, 5000)), "Model.layers = %A4999"]
UNREADABLE = {
    "an unclosed bracket": (["Model.memory_layers = (1,"], ["'Model.memory_layers = (1,'", "not closed", HINT]),
    "an unclosed quote": (["DATA = 'runs"], ['"DATA = \'runs"', HINT]),
    "a NUL byte": (["Model.layers = \0"], [r"'Model.layers = \x00'", HINT]),
    "an expression": (["Training.seed = 2**63"], ["'Training.seed = 2**63'", HINT]),
    "deep brackets": (
        ["Model.layers = " + "(" * 10_000 + ")" * 10_000],
        ["'Model.layers = (((", "nested too deeply", HINT],
    ),
    "a number of many digits": (["Model.layers = " + "9" * 100_000], ["'Model.layers = 999", HINT]),
    "a number beyond 64 bits": (
        ["Training.seed = 9223372036854775808"],
        ["Training.seed = 9223372036854775808", "2^63"],
    ),
    "such a number in a tuple": (["Model.memory_layers = (-9223372036854775809,)"], ["Model.memory_layers", "2^63"]),
    "macros that double": (DOUBLING, ["%A59 has more than 10,000 values"]),
    "macros in a long chain": (CHAIN, ["%A4999", "too deeply"]),
    "macros in a circle": (["A = %B", "B = (%A,)", "Model.layers = %A"], ["%A refers to itself", "plain value"]),
    "a value of a macro with a scope": (["Model.layers = %a/B"], ["%a/B", "never set"]),
    "words": (["hello world"], ["'hello world'", HINT]),
    "nothing after the sign": (["Model.layers ="], ["'Model.layers ='", HINT]),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_a_binding_that_cannot_be_read_is_quoted_at_once(case):
    texts, words = UNREADABLE[case]
    start = time.process_time()
    with pytest.raises(ConfigError) as caught:
        load([], texts)
    message = str(caught.value)
    assert time.process_time() - start < 2 and len(message) < 700
    for word in words:
        assert word in message, message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"Model.layers = 3\nModel.norm = 'caf\xe9'\n", r"line 2: is not UTF-8"),
        (b"Model.layers = 3\n\nModel.memory_layers = (1,\n", r"run\.gin.*not closed"),
        (b"Model.layers = 3\nModel.heads = 3 4\n", r"run\.gin, line 2: "),
        (b"#" * (LARGEST_TEXT + 1), r"1,048,577 bytes, more than"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_the_line(content, words, tmp_path):
    (tmp_path / "run.gin").write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        load([tmp_path / "run.gin"], [])


def test_byte_order_marks_line_ends_and_blocks_are_read(tmp_path):
    (tmp_path / "run.gin").write_bytes(b"\xef\xbb\xbfMEMORY_SIZE = 1024\r\nMemory.size = %MEMORY_SIZE\r\n")
    assert load([tmp_path / "run.gin"], [])[0].memory.size == 1024
    assert load([], ["Model:\n    layers = 12\n    heads = 4"])[0].model.heads == 4


def test_the_last_value_of_a_macro_holds_for_settings_before_it():
    bindings = read("A = 1", "B = (%A, 2)", "Model.memory_layers = %B", "A = 7")
    assert bindings.resolve(bindings.settings["Model.memory_layers"].value) == (7, 2)
    assert bindings.used_macros() == {"A": 7, "B": (("A",), 2)} and repr(bindings.used_macros()["B"]) == "(%A, 2)"


@given(st.text(st.sampled_from("aA.=%@()[]{}'\"\\,:/ \n\t#-019_\0é"), max_size=40) | st.text(max_size=30))
def test_any_text_is_read_or_refused(text):
    try:
        read(text)
    except ConfigError as error:
        assert str(error)
