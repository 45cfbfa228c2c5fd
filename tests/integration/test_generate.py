"""`memorizing generate`, `memorize` and `evaluate --memory` with a tiny run."""

import json
import re
import shutil
from pathlib import Path

import pytest

import memorizing
from memorizing.cli import main
from tests.integration.test_resume import GIN, finish
from tests.integration.test_resume import memorizing as started


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with `data`, the trained runs `one` and `other`, and documents in `texts`."""
    folder = tmp_path_factory.mktemp("generate")
    (folder / "run.gin").write_text(GIN)
    (folder / "texts").mkdir()
    for number in range(12):
        (folder / "texts" / f"{number}.txt").write_text(f"the {number}th of these texts tells of {number} things. " * 9)
    settings = ["--gin_file=run.gin", "--gin_param", "NUM_STEPS = 40", "--gin_param", "Training.memory_from_step = 0"]
    finish(started("prepare", *settings, "--raw=texts", "--out=data", cwd=folder))
    for name, seed in (("one", 0), ("other", 1)):
        finish(started("train", *settings, "--gin_param", f"Training.seed = {seed}", f"--workdir={name}", cwd=folder))
    return folder


def run(capfd, *arguments: str, status: int = 0) -> tuple[str, str]:
    """Runs a command and returns its standard output and standard error."""
    capfd.readouterr()
    assert main(list(arguments)) == status
    return capfd.readouterr()


def test_generate_continues_documents_and_snapshots(folder, capfd, monkeypatch):
    monkeypatch.chdir(folder)
    how = ["--workdir=one", "--tokens=40", "--seed=3", "--top_p=0.9"]
    text, message = run(capfd, "generate", *how, "--document=texts", "--prompt=the 3")
    assert text.startswith("the 3") and len(text) > 20
    assert "3.txt: " in message and re.search(r"tokens read; 32 are in a memory of 32", message)

    _, _ = run(capfd, "memorize", "--workdir=one", "--document=texts", "--out=memory")
    again, _ = run(capfd, "generate", *how, "--memory=memory", "--prompt=the 3")
    assert again == text
    Path("prompt").write_text("the 3")
    assert run(capfd, "generate", *how, "--memory=memory", "--prompt_file=prompt")[0] == text
    assert run(capfd, "generate", *how, "--memory=memory", "--prompt=the 3", "--clear_memory")[0] != text
    assert run(capfd, "generate", *how[:-2], "--memory=memory", "--prompt=the 3", "--seed=4")[0] != text
    assert run(capfd, "generate", *how, "--memory=memory", "--memory_size=64", "--prompt=the 3")[0].startswith("the 3")

    assert (
        "already holds this snapshot" in run(capfd, "memorize", "--workdir=one", "--document=texts", "--out=memory")[0]
    )
    _, message = run(capfd, "memorize", "--workdir=one", "--document=texts/1.txt", "--out=memory", status=2)
    assert (
        "--out=memory holds a snapshot of other texts" in message and "1.txt: " not in message
    )  # nothing is read for it
    _, message = run(capfd, "generate", "--workdir=other", "--memory=memory", status=2)
    assert "other parameters" in message
    for arguments, words in (
        (["memorize", "--workdir=one", "--out=new"], "--document is missing"),
        (["memorize", "--workdir=one", "--document=texts", "--out=texts"], "--out=texts exists already"),
        (["generate", "--workdir=one", "--document=nowhere"], "--document=nowhere does not exist"),
        (["generate", "--workdir=one", "--memory=texts"], "texts holds no memory snapshot"),
        (["generate", "--workdir=one", "--memory_size=33"], "Memory.size = 33"),
        (["generate", "--workdir=one", "--top_p=0"], "top_p = 0"),
    ):
        assert words in run(capfd, *arguments, status=2)[1]


def test_evaluate_starts_documents_with_a_snapshot(folder, capfd, monkeypatch):
    monkeypatch.chdir(folder)
    run(capfd, "memorize", "--workdir=one", "--document=texts", "--out=known")
    run(capfd, "evaluate", "--workdir=one")
    run(capfd, "evaluate", "--workdir=one", "--memory=known")
    without, with_memory = (
        json.loads(Path("one/evaluations", name).read_text())
        for name in ("test-memory-32.json", "test-memory-32-from-known.json")
    )
    assert with_memory["prebuilt_tokens"] == 32 and with_memory["tokens"] == without["tokens"]
    assert with_memory["perplexity"] != without["perplexity"]
    assert (
        "has no tokens for a memory of 0"
        in run(capfd, "evaluate", "--workdir=one", "--memory=known", "--memory_size=0", status=2)[1]
    )


def test_the_run_folder_alone_generates_inspects_and_opens_a_reader(folder, capfd, monkeypatch, tmp_path):
    """The workdir is copied to another place and the prepared tokens are moved away; all results stay the same."""
    text = folder / "texts" / "1.txt"

    def results(workdir: Path) -> list[str]:
        generated, _ = run(capfd, "generate", f"--workdir={workdir}", f"--document={text}", "--prompt=the", "--seed=1")
        page = workdir / "page.html"
        run(capfd, "inspect", f"--workdir={workdir}", f"--document={text}", f"--out={page}")
        written = memorizing.open_reader(workdir).write("the 3", tokens=20, seed=2)
        return [generated, page.with_suffix(".jsonl").read_text(), written]

    before = results(folder / "one")
    copied = tmp_path / "elsewhere" / "run"
    shutil.copytree(folder / "one", copied)
    monkeypatch.chdir(tmp_path)
    (folder / "data").rename(folder / "moved")
    try:
        assert results(copied) == before
        _, message = run(capfd, "inspect", f"--workdir={copied}", "--document=1.txt", status=2)
        assert "holds no prepared tokens" in message  # a document of the split needs the split
    finally:
        (folder / "moved").rename(folder / "data")

    record = json.loads((copied / "data.json").read_text())
    (copied / "data.json").write_text(json.dumps(record | {"vocabulary": "0" * 64}))
    _, message = run(capfd, "generate", f"--workdir={copied}", "--tokens=1", status=2)
    assert "says vocabulary = '0000" in message and "the file was edited" in message
    shutil.rmtree(copied / "vocabulary")
    _, message = run(capfd, "generate", f"--workdir={copied}", "--tokens=1", status=2)
    assert "has no vocabulary" in message and "copy its whole folder" in message
