"""`memorizing evaluate`: its files, and its figures against the losses of the tokens that it writes."""

import csv
import json
import math
import shutil

import numpy as np
import pytest

from memorizing.cli import main
from memorizing.evaluation import evaluate
from tests.tiny_run import SETTINGS, TEXTS, prepare_and_train, write_texts


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("evaluate")
    prepare_and_train(place)
    other = write_texts(place / "other_raw", {name: text.upper() for name, text in TEXTS.items()})
    assert main(["prepare", f"--gin_file={place / 'settings.gin'}", f"--raw={other}", f"--out={place / 'other'}"]) == 0
    run = place / "run"
    both = ["--memory_size=64,0", "--xl_cache=both", "--split=test,validation", "--per_token"]
    assert main(["evaluate", f"--workdir={run}", *both]) == 0
    assert (
        main(["evaluate", f"--workdir={run}", f"--data=new={place / 'other'}", "--memory_size=0,64", "--per_token"])
        == 0
    )
    return place


def figures(place, name: str) -> dict:
    return json.loads((place / "run" / "evaluations" / f"{name}.json").read_text())


NAMES = [
    *(f"{split}-memory-{size}{xl}" for split in ("test", "validation") for size in (0, 64) for xl in ("", "-no-xl")),
    *(f"new-test-memory-{size}" for size in (0, 64)),
]


def test_every_combination_writes_its_files(place):
    written = {path.name for path in (place / "run" / "evaluations").iterdir()}
    assert written == {f"{name}.{ending}" for name in NAMES for ending in ("json", "csv", "npz")}
    for name in NAMES:
        found = figures(place, name)
        assert found["xl_cache"] == (not name.endswith("-no-xl"))
        assert found["corpus"] == ("new" if name.startswith("new") else "folder")
        assert f"{found['split']}-memory-{found['memory_size']}" in name


@pytest.mark.parametrize("name", NAMES)
def test_the_figures_follow_from_the_losses_of_all_tokens(place, name):
    found, folder = figures(place, name), place / "run" / "evaluations"
    arrays = np.load(folder / f"{name}.npz")
    nats = arrays["nats"].astype(np.float64)
    assert math.exp(nats.mean()) == pytest.approx(found["perplexity"], rel=1e-6)
    assert nats.sum() / math.log(2) / found["bytes"] == pytest.approx(found["bits_per_byte"], rel=1e-6)
    assert arrays["correct"].mean() == pytest.approx(found["accuracy"])
    with (folder / f"{name}.csv").open() as file:
        rows = list(csv.DictReader(file))
    parts = np.split(nats, arrays["ends"][:-1])
    assert [int(row["tokens"]) for row in rows] == [len(part) for part in parts]
    for row, part in zip(rows, parts, strict=True):
        assert float(row["nats"]) == pytest.approx(part.sum(), rel=1e-6)
        assert float(row["perplexity"]) == pytest.approx(math.exp(part.mean()), rel=1e-6)
    texts = [TEXTS[row["name"]] for row in rows]
    assert 1 < len(texts) < len(TEXTS)
    assert [int(row["words"]) for row in rows] == [len(text.split()) for text in texts]
    assert [int(row["bytes"]) for row in rows] == [len(text.encode()) for text in texts]
    if found["memory_size"] == 0:
        assert "gain" not in found
        return
    before = np.load(folder / f"{name.replace(f'-{found["memory_size"]}', '-0')}.npz")["nats"].astype(np.float64)
    gain = found["gain"]
    assert gain["against_memory_size"] == 0
    assert gain["nats_per_token"] == pytest.approx((before - nats).mean(), abs=1e-7)
    assert gain["tokens_gained"] == pytest.approx((before - nats > 0.1).mean())
    assert gain["tokens_lost"] == pytest.approx((nats - before > 0.1).mean())
    assert sum(float(row["gain"]) for row in rows) == pytest.approx((before - nats).sum(), abs=1e-4)


def test_memory_and_xl_cache_change_the_losses(place):
    """No two evaluations of the test split have the same loss."""
    losses = [figures(place, name)["loss_nats_per_token"] for name in NAMES if name.startswith("test")]
    assert len(set(losses)) == len(losses)


def test_files_of_other_documents_are_not_overwritten(place, capsys, tmp_path):
    shutil.copytree(place / "run", tmp_path / "run")
    path = tmp_path / "run" / "evaluations" / "new-test-memory-0.json"
    before = path.read_text()
    command = ["evaluate", f"--workdir={tmp_path / 'run'}", "--memory_size=0", f"--data=new={place / 'data'}"]
    assert main(command) == 2
    assert "is an evaluation of other documents" in capsys.readouterr().err and path.read_text() == before
    assert main([*command, "--name=again"]) == 0
    assert json.loads(path.with_name("new-test-memory-0-again.json").read_text())["name"] == "again"


def test_replacing_an_evaluation_removes_its_per_token_file_and_rejects_a_damaged_one(place, capsys, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(place / "run", run)
    folder, again = run / "evaluations", ["evaluate", f"--workdir={run}", "--memory_size=0", "--split=validation"]
    assert main(again) == 0
    assert not (folder / "validation-memory-0.npz").exists()  # its losses could be others than those of the figures
    assert (folder / "test-memory-0.npz").exists() and "--per_token makes a new one" in capsys.readouterr().out
    (folder / "validation-memory-0.json").write_text("{")
    assert main(again) == 2
    assert "validation-memory-0.json would be replaced, but it is damaged" in capsys.readouterr().err


def test_pg19_uses_the_published_word_counts_under_any_corpus_name(place, monkeypatch):
    monkeypatch.setitem(evaluate.PUBLISHED_WORDS, ("folder", "test", figures(place, NAMES[0])["documents"]), 50)
    assert main(["evaluate", f"--workdir={place / 'run'}", f"--data=mine={place / 'data'}", "--memory_size=0"]) == 0
    found = figures(place, "mine-test-memory-0")
    for ending in ("json", "csv"):
        (place / "run" / "evaluations" / f"mine-test-memory-0.{ending}").unlink()
    assert found["published_words"] == 50 != found["words"]
    assert found["word_perplexity"] == pytest.approx(math.exp(found["loss_nats_per_token"] * found["tokens"] / 50))


def test_replacing_figures_of_other_settings_is_reported(place, capsys, tmp_path):
    shutil.copytree(place / "run", tmp_path / "run")
    command = ["evaluate", f"--workdir={tmp_path / 'run'}", "--memory_size=64", "--gin_param=Memory.search = 'blocked'"]
    assert main([*command, "--name=blocked"]) == 0
    assert "replacing" not in capsys.readouterr().out
    assert main(command) == 0
    output = capsys.readouterr().out
    assert "replacing" in output and "which was made with Memory.search = 'auto'" in output
    assert figures(tmp_path, "test-memory-64")["memory"]["search"] == "blocked"


def test_nan_losses_are_rejected(place, monkeypatch, capsys):
    def nan_scores(*arguments):
        yield from (each._replace(nats_T=each.nats_T * np.nan) for each in score_documents(*arguments))

    score_documents = evaluate.score_documents
    monkeypatch.setattr(evaluate, "score_documents", nan_scores)
    assert main(["evaluate", f"--workdir={place / 'run'}", "--name=broken"]) == 2
    assert "is broken: its loss at token 0 of" in capsys.readouterr().err
    assert not list((place / "run" / "evaluations").glob("*broken*"))


def test_two_corpora_of_one_name_are_rejected(place, capsys):
    command = ["evaluate", f"--workdir={place / 'run'}", f"--data={place / 'data'}", f"--data={place / 'other'}"]
    assert main(command) == 2
    assert "would both be called 'folder'" in capsys.readouterr().err
    for twice in ("--memory_size=32,32", "--split=test,test"):
        assert main(["evaluate", f"--workdir={place / 'run'}", twice]) == 2
        assert f"{twice} names a" in capsys.readouterr().err


def test_a_missing_split_is_rejected_before_anything_is_read(place, capsys):
    assert main(["evaluate", f"--workdir={place / 'run'}", "--split=test,tset", "--name=never"]) == 2
    assert "no split 'tset'" in capsys.readouterr().err
    assert not list((place / "run" / "evaluations").glob("*never*"))


def test_another_vocabulary_is_rejected(place, capsys, tmp_path):
    settings = tmp_path / "settings.gin"
    settings.write_text(SETTINGS.replace("'bytes'", "'sentencepiece'").replace("= 259", "= 300"))
    raw = write_texts(tmp_path / "raw")
    if main(["prepare", f"--gin_file={settings}", f"--raw={raw}", f"--out={tmp_path / 'data'}"]) != 0:
        pytest.skip(capsys.readouterr().err)
    assert main(["evaluate", f"--workdir={place / 'run'}", f"--data=x={tmp_path / 'data'}"]) == 2
    assert "vocabulary" in capsys.readouterr().err
