"""A run's identity: files that were deleted, edited or copied are named, and nothing else is trained or evaluated."""

import json
import re
import shutil
from pathlib import Path

import pytest

from memorizing.cli import main
from memorizing.runs import CONFIG_FILE
from memorizing.storage.checkpoints import CHECKPOINTS, newest_identity, steps_on_disk
from memorizing.storage.workdir import DATA_FILE, DROPPED_FILE
from tests.tiny_run import prepare_and_train, write_texts

pytestmark = pytest.mark.large

MORE = "--gin_param=NUM_STEPS = 16"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A run of 8 steps in `run`, its tokens in `data`, and other tokens in `other`."""
    place = tmp_path_factory.mktemp("place")
    prepare_and_train(place)
    raw = write_texts(place / "others", {f"{number}.txt": f"other text {number} " * 20 for number in range(30)})
    assert main(["prepare", f"--gin_file={place / 'settings.gin'}", f"--raw={raw}", f"--out={place / 'other'}"]) == 0
    return place


@pytest.fixture
def run(place, tmp_path) -> Path:
    shutil.copytree(place / "run", tmp_path / "run")
    return tmp_path / "run"


def refused(capsys, *arguments: str) -> str:
    """Runs a command that is refused without a traceback; returns its message."""
    capsys.readouterr()
    assert main(list(arguments)) in (1, 2)
    return capsys.readouterr().err.splitlines()[-1]


def edited(path: Path, pattern: str, text: str) -> None:
    content, count = re.subn(pattern, text, path.read_text(), flags=re.MULTILINE)
    assert count == 1
    path.write_text(content)


def test_a_checkpoint_records_step_settings_and_data(run):
    identity = newest_identity(run)
    assert identity is not None and identity.step == 8
    assert identity.settings["Model.layers"] == "2" and identity.settings["Ivf.lists"] == "128"
    saved = json.loads((run / DATA_FILE).read_text())
    assert identity.data == {name: saved[name] for name in ("vocabulary", "train")}


@pytest.mark.parametrize("line", ["^Batch.seed = .*\n", "^Optimizer.kind = .*\n", "^Model.gate_bias = .*\n"])
def test_a_line_that_was_removed_from_the_settings_is_named(line, run, capsys):
    """Its default would train, or be evaluated, in silence."""
    name = line.strip("^\n").partition(" ")[0]
    if name == "Batch.seed":
        edited(run / CONFIG_FILE, "^SEED = .*\n", "SEED = 3\n")
    else:
        edited(run / CONFIG_FILE, line, "")
    message = refused(capsys, "train", f"--workdir={run}", MORE)
    assert name in message and "the run in" in message and "started with" in message
    if name.startswith("Model"):
        assert f"{CONFIG_FILE} says {name} = -2.0, but the checkpoint of step 8 was trained with 0.0" in refused(
            capsys, "evaluate", f"--workdir={run}"
        )
    assert steps_on_disk(run / CHECKPOINTS) == [8]


def test_a_changed_learning_rate_is_reported(run, capsys):
    edited(run / CONFIG_FILE, "^Optimizer.learning_rate = .*", "Optimizer.learning_rate = 0.02")
    assert main(["train", f"--workdir={run}", MORE]) == 0
    assert "Optimizer.learning_rate = 0.02 from here on; the run started with 0.01" in capsys.readouterr().out


def test_settings_that_are_missing_are_named_or_compared_with_the_checkpoint(run, place, capsys):
    (run / CONFIG_FILE).unlink()
    assert f"{run / CONFIG_FILE} is missing, but there are checkpoints" in refused(capsys, "train", f"--workdir={run}")
    given = [f"--gin_file={place / 'settings.gin'}", f"--gin_param=DATA = '{place / 'data'}'", MORE]
    message = refused(capsys, "train", f"--workdir={run}", *given, "--gin_param=SEED = 3")
    assert "seed = 3, but the run in" in message
    assert main(["train", f"--workdir={run}", *given]) == 0
    assert steps_on_disk(run / CHECKPOINTS) == [8, 16]


@pytest.mark.parametrize("content", [None, "", '{"folder": "x"', "[1]", "{}"])
def test_a_data_record_that_is_gone_or_damaged_lets_no_other_tokens_in(content, run, place, capsys):
    path = run / DATA_FILE
    path.unlink()
    if content is not None:
        path.write_text(content)
    other = f"--gin_param=DATA = '{place / 'other'}'"
    message = refused(capsys, "train", f"--workdir={run}", MORE, other)
    named = f"{place / 'other'} has another train split" if content is None else str(path)
    assert named in message and steps_on_disk(run / CHECKPOINTS) == [8]
    path.unlink(missing_ok=True)
    assert main(["train", f"--workdir={run}", MORE]) == 0


def test_a_data_record_of_another_run_is_named(run, capsys):
    edited(run / DATA_FILE, '"train": "[0-9a-f]{6}', '"train": "000000')
    assert "the file was edited or is another run's" in refused(capsys, "train", f"--workdir={run}", MORE)


def test_a_checkpoint_copied_to_another_step_is_set_aside(run, capsys):
    shutil.copytree(run / CHECKPOINTS / "8", run / CHECKPOINTS / "12")
    assert main(["train", f"--workdir={run}", MORE]) == 0
    output = capsys.readouterr()
    assert "it is a copy of the checkpoint of step 8" in output.out + output.err
    assert (run / CHECKPOINTS / "12.damaged").exists() and steps_on_disk(run / CHECKPOINTS) == [8, 16]


def test_a_damaged_record_of_a_dropped_memory_is_named(run, capsys):
    (run / DROPPED_FILE).write_text('{"st')
    message = refused(capsys, "train", f"--workdir={run}", MORE, "--reset_memory")
    assert f"{run / DROPPED_FILE} is damaged" in message and "Remove it" in message
