"""`memorizing prepare` stopped half-way: what it goes on with, what it refuses, and what it leaves behind."""

import importlib
import os

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
from memorizing.files import held

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


def test_it_goes_on_where_it_stopped(raw, stopped, tmp_path, monkeypatch):
    run(raw, tmp_path / "undisturbed")
    encode, calls = SentencePieceVocabulary.encode, []
    monkeypatch.setattr(SentencePieceVocabulary, "encode", lambda self, text: calls.append(1) or encode(self, text))
    monkeypatch.setattr(module, "train_sentencepiece", None)  # the vocabulary is not trained again either
    run(raw, stopped)
    assert 10 < len(calls) < 20 and files(stopped) == files(tmp_path / "undisturbed")
    assert not (tmp_path / "out.unfinished").exists()


def test_it_does_not_go_on_with_other_settings_or_documents(raw, stopped, tmp_path):
    other = PrepareSettings(vocabulary_size=291, vocabulary_model="bpe", validation=0.2, test=0.2, part_bytes=1000)
    words = r"out\.unfinished was begun with Prepare\.vocabulary_size = 290, now Prepare\.vocabulary_size = 291"
    with pytest.raises(InputError, match=words):
        run(raw, stopped, other)
    with pytest.raises(InputError, match=r"was begun with Folder\.minimum_bytes = 1, now Folder\.minimum_bytes = 2"):
        run(raw, stopped, folder=FolderSettings(minimum_bytes=2))
    with pytest.raises(InputError, match="was begun with --raw = "):
        (tmp_path / "elsewhere").symlink_to(raw)
        run(tmp_path / "elsewhere", stopped)
    (raw / "3.txt").write_text("another text")
    with pytest.raises(InputError, match="was begun when the documents were others than now"):
        run(raw, stopped)
    assert list((tmp_path / "out.unfinished" / "tokens").rglob("*.npz"))


def test_a_name_that_is_no_utf_8_breaks_nothing(raw, tmp_path):
    (raw / os.fsdecode(b"na\xefve.txt")).write_text("line 1 of a book\n")
    (raw / os.fsdecode(b"empty\xef.txt")).write_text("")
    manifest = run(raw, tmp_path / "out")
    assert manifest["left_out"] == ["empty?.txt: left out: 0 bytes, fewer than Folder.minimum_bytes = 1"]
    prepared = PreparedTokens(tmp_path / "out")
    assert "na?ve.txt" in [name for split in manifest["splits"] for name in prepared.split(split).names()]


def test_nothing_stays_behind_when_nothing_was_done(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        run(tmp_path / "nowhere", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_two_at_once_are_refused(raw, tmp_path):
    with (
        held(tmp_path / "out.unfinished", "taken"),
        pytest.raises(InputError, match=r"another `memorizing prepare` is writing it now"),
    ):
        run(raw, tmp_path / "out")


@pytest.mark.parametrize("source", ["pg19", "task"])
def test_without_the_extra_it_says_what_to_install(raw, tmp_path, source, monkeypatch):
    def missing(name, *_):
        raise ModuleNotFoundError("No module", name="tensorflow_datasets")

    monkeypatch.setattr(sources.importlib, "import_module", missing)
    settings = PrepareSettings(source=source, task="x" if source == "task" else "")
    with pytest.raises(InputError, match=r"needs tensorflow_datasets, which is not installed: .*EXTRA=prepare"):
        run(raw, tmp_path / "out", settings)
    assert importlib.import_module is missing


def test_a_corpus_that_is_not_published_needs_its_raw_files(tmp_path):
    pytest.importorskip("memorizing.data.builders")
    with pytest.raises(InputError, match=r"--raw is missing: name the folder that holds the files of github"):
        run(None, tmp_path / "out", PrepareSettings(source="github"), github=Github())
