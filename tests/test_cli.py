"""The command: what it refuses at once, with exit status 2 and without a traceback."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from memorizing.cli import main
from memorizing.files import atomic_write, run_folder
from memorizing.runs import CONFIG_FILE, open_workdir

BASE = Path(__file__).resolve().parents[1] / "configs" / "base.gin"


@pytest.fixture
def workdir(tmp_path) -> Path:
    """Writes the settings of a run whose model has no memory layer and which has no checkpoint."""
    _, text = open_workdir(tmp_path / "run", [BASE], ["Model.memory_layers = ()", "MEMORY_SIZE = 0"])
    atomic_write(tmp_path / "run" / CONFIG_FILE, text)
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--memory_size=100"], ["Memory.size = 100", "Batch.segment_length = 512", "Use 512"]),
        (["--memory_size=0,512"], ["Memory.size = 512", "Model.memory_layers = ()"]),
        (["--memory_size=-512"], ["Memory.size = -512", "at least 0"]),
        (["--gin_param", "Modle.layers = 3"], ["did you mean 'Model'"]),
        ([], ["Training.data = ''", "DATA = 'FOLDER'"]),
    ],
)
def test_invalid_evaluations_are_refused(arguments, words, workdir, capsys):
    assert main(["evaluate", f"--workdir={workdir}", *arguments]) == 2
    message = capsys.readouterr().err
    assert message.startswith("memorizing evaluate: error: ")
    for word in words:
        assert word in message


def test_memory_sizes_are_whole_numbers(workdir, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["evaluate", f"--workdir={workdir}", "--memory_size=8k"])
    assert caught.value.code == 2
    assert "'8k' is not a list of whole numbers" in capsys.readouterr().err


def test_a_workdir_without_a_run_is_refused(tmp_path, capsys):
    for command in (["evaluate"], ["train"]):
        assert main([*command, f"--workdir={tmp_path / 'none'}"]) == 2
        assert str(tmp_path / "none") in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "address", ["gs:/bucket/run", "gs:bucket/run", "gs://bucket", "gs:", "s3://bucket/run", "foo://x"]
)
@pytest.mark.parametrize("command", ["train", "evaluate", "compare"])
def test_unsupported_addresses_are_not_taken_for_folders(command, address, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    option = "--with" if command == "compare" else "--workdir"
    others = [f"--without={tmp_path}", f"--out={tmp_path}"] if command == "compare" else []
    assert main([command, f"{option}={address}", *others]) == 2
    message = capsys.readouterr().err
    assert f"{option}={address}: must be a folder, or gs://BUCKET/RUN" in message
    assert not list(tmp_path.iterdir())


def test_a_missing_requirement_of_buckets_is_named(capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["train", "--workdir=gs://bucket/run"]) == 2
    assert "pip install gcsfs google-cloud-storage" in capsys.readouterr().err


def test_a_backslash_in_the_name_of_a_run_is_refused(tmp_path, capsys):
    """TensorStore would write the arrays to another folder."""
    run = str(tmp_path / "x\\run")
    assert main(["train", f"--workdir={run}", f"--gin_file={BASE}"]) == 2
    assert f"--workdir={run}: has a backslash" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_path_with_a_colon_is_a_path(tmp_path):
    assert run_folder("--workdir", f"{tmp_path}/gs:/run") == tmp_path / "gs:" / "run"
    assert run_folder("--workdir", "run:2") == Path("run:2")


@pytest.mark.parametrize("command", ["prepare", "train", "evaluate", "compare", "sweep"])
def test_help_of_each_command_tells_how_settings_are_given(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    told = capsys.readouterr().out
    assert "--gin_file" in told and "later ones win" in told


@pytest.mark.parametrize("argument", ["--prompt=caf\udce9", "--workdir=caf\udce9", "--gin_param=DATA = 'caf\udce9'"])
def test_arguments_that_are_not_utf_8_are_refused(argument, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["generate", "--workdir=run", argument])
    assert caught.value.code == 2
    assert (
        r"\udce9" in (message := capsys.readouterr().err) and "is not UTF-8. Give texts and paths in UTF-8" in message
    )


def command(*arguments: str, **variables: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "memorizing.cli", *arguments],
        env=os.environ | variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_a_terminal_of_few_letters_shows_question_marks(tmp_path):
    """The tokens of a document with other letters are listed; no letter of it is in ASCII."""
    (tmp_path / "raw").mkdir()
    for number in range(6):
        (tmp_path / "raw" / f"{number}.txt").write_text("éàü\n" * 20 + f"{number}\n")
    data = [
        "prepare",
        f"--raw={tmp_path / 'raw'}",
        f"--out={tmp_path / 'data'}",
        "--gin_param=Prepare.vocabulary = 'bytes'",
    ]
    assert main(data) == 0
    shown = command("show_data", str(tmp_path / "data"), PYTHONIOENCODING="ascii")
    output, errors = shown.communicate(timeout=120)
    assert shown.returncode == 0, errors
    assert b"???" in output and output.isascii()


def test_output_into_a_closed_pipe_ends_quietly():
    shown = command("settings")
    assert shown.stdout and shown.stderr
    shown.stdout.readline()
    shown.stdout.close()
    assert shown.stderr.read() == b"" and shown.wait(timeout=120) in (0, 128 + signal.SIGPIPE)
    shown.stderr.close()
