"""`memorizing prepare` stopped half-way: what it goes on with, what it refuses, and what it leaves behind."""

import dataclasses
import importlib
import importlib.util
import os
import shutil
from pathlib import Path

import pytest

from memorizing.data import prepare as module
from memorizing.data import sources
from memorizing.data.bulk import BeamSettings
from memorizing.data.corpora.github import Github
from memorizing.data.corpora.pg19 import Pg19
from memorizing.data.documents import FolderSettings
from memorizing.data.prepare import prepare
from memorizing.data.settings import PrepareSettings
from memorizing.data.tokens import PreparedTokens
from memorizing.data.vocabulary import SentencePieceVocabulary
from memorizing.errors import InputError
from memorizing.files import folder_lock

SETTINGS = PrepareSettings(vocabulary_size=290, vocabulary_model="bpe", validation=0.2, test=0.2, part_bytes=1000)


@pytest.fixture
def raw(tmp_path):
    folder = tmp_path / "raw"
    folder.mkdir()
    for number in range(20):
        (folder / f"{number}.txt").write_text("".join(f"line {line} of book {number}\n" for line in range(30)))
    return folder


def run(raw, out, settings=SETTINGS, **sections):
    sections = {"folder": FolderSettings(), "pg19": Pg19(), **sections}
    return prepare(settings, sections, BeamSettings(), raw, out, report=lambda line: None)


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def stopped(raw, tmp_path, monkeypatch):
    """A preparation that ended after six documents were tokenized."""
    encode, calls = SentencePieceVocabulary.encode, []

    def failing(self, text):
        calls.append(text)
        if len(calls) > 6:
            raise MemoryError
        return encode(self, text)

    monkeypatch.setattr(SentencePieceVocabulary, "encode", failing)
    with pytest.raises(MemoryError):
        run(raw, tmp_path / "out")
    monkeypatch.setattr(SentencePieceVocabulary, "encode", encode)
    assert not (tmp_path / "out").exists() and list((tmp_path / "out.unfinished" / "tokens").rglob("*.npz"))
    return tmp_path / "out"


def test_resumes_where_it_stopped(raw, stopped, tmp_path, monkeypatch):
    run(raw, tmp_path / "undisturbed")
    encode, calls = SentencePieceVocabulary.encode, []
    monkeypatch.setattr(SentencePieceVocabulary, "encode", lambda self, text: calls.append(1) or encode(self, text))
    monkeypatch.setattr(module, "train_sentencepiece", None)  # the vocabulary is not trained again either
    run(raw, stopped)
    assert 10 < len(calls) < 20 and files(stopped) == files(tmp_path / "undisturbed")
    assert not (tmp_path / "out.unfinished").exists()


def test_other_settings_or_documents_do_not_touch_unfinished_work(raw, stopped, tmp_path):
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "out.unfinished").rglob("*.npz")}

    def fails(raw, settings=SETTINGS, **sections):
        with pytest.raises(InputError, match="no document of the train split is left"):
            run(raw, stopped, dataclasses.replace(settings, minimum_tokens=9999), **sections)

    fails(raw)
    fails(raw, dataclasses.replace(SETTINGS, vocabulary_size=291))
    fails(raw, folder=FolderSettings(minimum_bytes=2))
    three = (raw / "3.txt").read_text()
    (raw / "3.txt").write_text("another text " * 9)
    fails(raw)
    assert {path: path.stat().st_mtime_ns for path in done} == done
    (raw / "3.txt").write_text(three)
    run(raw, stopped)
    run(raw, tmp_path / "undisturbed")
    assert tokens(stopped) == tokens(tmp_path / "undisturbed")


def tokens(folder):
    return {name: content for name, content in files(folder).items() if name != "origin.json"}


needs_tfds = pytest.mark.skipif(
    importlib.util.find_spec("tensorflow_datasets") is None, reason="needs the extra `prepare`"
)


def corpus(**fields):
    return dataclasses.replace(SETTINGS, **{"source": "pg19", "vocabulary": "bytes", **fields})


@needs_tfds
def test_documents_are_not_read_again_after_an_error_is_fixed(raw, tmp_path, monkeypatch):
    """A typo costs nothing: not of the folder, the vocabulary or the minimum."""
    out = tmp_path / "out"
    with pytest.raises(InputError, match="nowhere"):
        run(tmp_path / "nowhere", out, corpus())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw"]
    with pytest.raises(InputError, match="Choose a smaller"):
        run(raw, out, corpus(vocabulary="sentencepiece", vocabulary_size=30_000))
    monkeypatch.setattr(Pg19, "read", None)
    with pytest.raises(InputError, match="no document of the train split is left"):
        run(raw, out, corpus(minimum_tokens=10_000))
    assert run(raw, out, corpus(minimum_tokens=5))["splits"]["train"]["documents"] > 5


def test_a_missing_vocabulary_is_refused_before_reading(raw, tmp_path, monkeypatch):
    monkeypatch.setattr(Pg19, "list", None)
    with pytest.raises(InputError, match=r"Prepare\.vocabulary_from = '/nope'"):
        run(raw, tmp_path / "out", corpus(vocabulary_from="/nope"))
    assert not (tmp_path / "out.unfinished").exists()


@needs_tfds
def test_adding_documents_fixes_too_few_documents(tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "1.txt").write_text("one book")
    with pytest.raises(InputError, match=r"Give more documents, or set Prepare\.validation"):
        run(tmp_path / "raw", tmp_path / "out", corpus())
    run(tmp_path / "raw", tmp_path / "out", corpus(validation=0.0, test=0.0))
    for number in range(2, 6):
        (tmp_path / "raw" / f"{number}.txt").write_text(f"book {number}")
    with pytest.raises(InputError, match="no document of the train split is left"):
        run(tmp_path / "raw", tmp_path / "more", corpus(minimum_tokens=9999))
    (tmp_path / "raw" / "6.txt").write_text("a sixth book")
    counts = run(tmp_path / "raw", tmp_path / "more", corpus())["splits"]
    assert sum(split["documents"] for split in counts.values()) == 6


@pytest.mark.parametrize("settings", [SETTINGS, pytest.param(corpus(), marks=needs_tfds)], ids=["folder", "pg19"])
def test_a_finished_folder_of_other_raw_files_is_refused(raw, tmp_path, settings, monkeypatch):
    manifest = run(raw, tmp_path / "out", settings)
    monkeypatch.chdir(tmp_path)
    assert run(Path("raw"), tmp_path / "out", settings) == manifest  # the same folder, otherwise named
    with pytest.raises(InputError, match=r"already exists, made with Prepare\.seed = 0, now Prepare\.seed = 1"):
        run(raw, tmp_path / "out", dataclasses.replace(settings, seed=1))
    other = tmp_path / "other"
    shutil.copytree(raw, other)
    (other / "3.txt").write_text("another text")
    with pytest.raises(InputError, match=rf"made from --raw={raw}, now from --raw={other}, which holds other files"):
        run(other, tmp_path / "out", settings)
    (raw / "3.txt").write_text("another text")
    with pytest.raises(InputError, match=rf"made from --raw={raw}, whose files have changed since"):
        run(raw, tmp_path / "out", settings)


def test_a_foreign_folder_is_not_removed(raw, tmp_path):
    (tmp_path / "out.unfinished").mkdir()
    (tmp_path / "out.unfinished" / "thesis.txt").write_text("two years")
    with pytest.raises(InputError, match=r"out\.unfinished holds thesis\.txt, .*Move the folder away"):
        run(raw, tmp_path / "out")
    (tmp_path / "out.unfinished" / "thesis.txt").rename(tmp_path / "thesis.txt")
    run(raw, tmp_path / "out")
    (tmp_path / "out.unfinished").mkdir()
    (tmp_path / "thesis.txt").rename(tmp_path / "out.unfinished" / "thesis.txt")
    with pytest.raises(InputError, match=r"out\.unfinished holds thesis\.txt"):
        run(raw, tmp_path / "out")
    assert (tmp_path / "out.unfinished" / "thesis.txt").exists()


def test_names_that_are_not_utf_8_are_accepted(raw, tmp_path):
    (raw / os.fsdecode(b"na\xefve.txt")).write_text("line 1 of a book\n")
    (raw / os.fsdecode(b"empty\xef.txt")).write_text("")
    manifest = run(raw, tmp_path / "out")
    assert manifest["left_out"] == ["empty?.txt: left out: 0 bytes, fewer than Folder.minimum_bytes = 1"]
    prepared = PreparedTokens(tmp_path / "out")
    assert "na?ve.txt" in [name for split in manifest["splits"] for name in prepared.split(split).names()]


def test_an_early_error_leaves_no_folder(tmp_path):
    with pytest.raises(InputError, match="nowhere does not exist"):
        run(tmp_path / "nowhere", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_second_process_is_refused(raw, tmp_path):
    with (
        folder_lock(tmp_path / "out.unfinished", "taken"),
        pytest.raises(InputError, match=r"another `memorizing prepare` is writing it now"),
    ):
        run(raw, tmp_path / "out")


@pytest.mark.parametrize("source", ["pg19", "task"])
def test_a_missing_extra_is_named(raw, tmp_path, source, monkeypatch):
    def missing(name, *_):
        raise ModuleNotFoundError("No module", name="tensorflow_datasets")

    monkeypatch.setattr(sources.importlib, "import_module", missing)
    settings = PrepareSettings(source=source, task="x" if source == "task" else "")
    with pytest.raises(InputError, match=r"needs tensorflow_datasets, which is not installed\. .*EXTRA=prepare"):
        run(raw, tmp_path / "out", settings)
    assert importlib.import_module is missing


def test_an_unpublished_corpus_needs_raw_files(tmp_path):
    pytest.importorskip("memorizing.data.builders")
    with pytest.raises(InputError, match=r"--raw is missing\. Give the folder that holds the files of github"):
        run(None, tmp_path / "out", PrepareSettings(source="github"), github=Github())


@pytest.mark.parametrize("source", ["github", "pg19"])
def test_documents_in_data_dir_need_no_raw_files(tmp_path, source, monkeypatch):
    builders = pytest.importorskip("memorizing.data.builders")
    monkeypatch.setattr(builders.tfds, "builder", None)  # so nothing is fetched
    raw, sections = tmp_path / "raw", {"github": Github(), "pg19": Pg19()}
    for number in range(12):
        (raw / f"o__r{number}").mkdir(parents=True)
        (raw / f"o__r{number}" / "a.py").write_text(f"a = {number}\n")
        (raw / f"{number}.txt").write_text(f"book {number}\n")

    def prepared(name, raw, **fields):
        settings = PrepareSettings(source=source, vocabulary="bytes", **fields)
        say = lambda line: None  # noqa: E731
        prepare(settings, sections, BeamSettings(), raw, tmp_path / name, tmp_path / "data", say)
        return files(tmp_path / name)

    one = prepared("one", raw)
    shutil.rmtree(raw)
    other = prepared("other", None)
    assert one.pop("origin.json") != other.pop("origin.json") and one == other
    prepared("one", None)  # which is complete
    with pytest.raises(InputError, match=r"was made with settings .*'seed': 0.*, not with .*'seed': 1"):
        prepared("another", None, seed=1)


def test_an_output_folder_that_cannot_be_made_is_named(raw, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(InputError, match=r"file/out\.unfinished cannot be created or written to \(Not a directory\)"):
        run(raw, tmp_path / "file" / "out")
    (tmp_path / "out.unfinished").write_text("no folder either")
    with pytest.raises(InputError, match=r"out\.unfinished cannot be created or written to \(File exists\)"):
        run(raw, tmp_path / "out")


def test_file_system_errors_become_input_errors(raw, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "there")

    monkeypatch.setattr(module, "write_split", full)
    with pytest.raises(InputError, match=r"there: No space left on device\. Fix it"):
        run(raw, tmp_path / "out")


def test_reasons_leave_out_numbers_and_names():
    for message, reason in (
        ("left out: 1,234 tokens, fewer than Prepare.minimum_tokens = 4,096", "N tokens, fewer than"),
        ("left out 3 files in other languages: a.rs, b.rs", "N files in other languages"),
        ("left out: no file in Github.languages = ('c', 'go'); it has rust", "no file in Github.languages = ...; it"),
        ("left out: damaged (at 17)", "damaged"),
    ):
        assert module._reason(message, []).startswith(reason)
    assert module._reason("left out: x", [str(number) for number in range(100)]) == "other reasons"


def test_splits_of_a_folder_stay_apart(tmp_path):
    """Held-out text never gets into training."""
    for split, count in (("train", 6), ("validation", 2), ("test", 3)):
        (tmp_path / "raw" / split).mkdir(parents=True)
        for number in range(count):
            (tmp_path / "raw" / split / f"{number}.txt").write_text(f"text {number} of {split}\n" * 20)
    manifest = run(tmp_path / "raw", tmp_path / "out", dataclasses.replace(SETTINGS, vocabulary="bytes"))
    tokens = PreparedTokens(tmp_path / "out")
    for split, count in (("train", 6), ("validation", 2), ("test", 3)):
        assert manifest["splits"][split]["documents"] == count
        opened = tokens.split(split)
        texts = [
            tokens.vocabulary.decode(opened.read(number, 0, int(length)))
            for number, length in enumerate(opened.lengths)
        ]
        assert len(texts) == count and all(f"of {split}\n" in text for text in texts)


def test_the_smallest_vocabulary_of_many_letters_is_named(tmp_path):
    letters = [chr(0x4E00 + number) for number in range(900)]
    (tmp_path / "raw").mkdir()
    for number in range(9):
        (tmp_path / "raw" / f"{number}.txt").write_text("".join(letters[number * 100 :][:100]) * 5)
    settings = dataclasses.replace(SETTINGS, vocabulary_size=300)
    with pytest.raises(
        InputError, match=r"vocabulary_size = 300 is too small: .* Set it to at least (\d+), or use"
    ) as caught:
        run(tmp_path / "raw", tmp_path / "out", settings)
    needed = int(str(caught.value).split("at least ")[1].split(",")[0])
    assert run(tmp_path / "raw", tmp_path / "out", dataclasses.replace(settings, vocabulary_size=needed))
