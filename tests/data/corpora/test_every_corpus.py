"""Properties of every corpus: nothing in the raw folder is dropped silently, and unreadable input is refused."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from memorizing.data.corpora import table
from memorizing.data.corpora.c4 import C4
from memorizing.data.corpora.corpus import Corpus, document_items
from memorizing.errors import InputError

CORPORA: dict[str, Corpus] = {name: corpus() for name, corpus in table.CORPORA.items()} | {"c4": C4(minimum_bytes=0)}
PAPER = "\\documentclass{article}\n\\begin{document}\nText.\n\\end{document}\n"
PAGE = '{"text": "a page", "url": "u"}\n'
FILES = {  # of a document each, by where they are below a folder of documents
    "pg19": ("1-0.txt", "A book.\n"),
    "arxiv": ("1/main.tex", PAPER),
    "github": ("o__r/a.py", "a = 1\n"),
    "isabelle": ("thys/E/A.thy", "theory A imports Main begin end\n"),
    "c4": ("c4.0.json", PAGE),
}
STRANGERS = {
    "pg19": ["3-0.txt.gz", "4.text", "5\n.txt", "sub/2.txt", ".6.txt"],
    "arxiv": ["p2.tex", "2101.00001.gz", "2101.00002.tar.gz", "arXiv_src_2101_001.tar.gz", ".git/a.tex"],
    "github": ["B__y.7z", "C__z.tar.zst", "readme.txt", ".git/a.py"],
    "isabelle": ["README", "thys/NEWS", "thys/Empty/document/root.tex"],
    "c4": ["c4.1.json.zst", "sub/c4.2.json", ".c4.3.json.gz"],
}


def write(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


def notes(corpus: Corpus, raw: Path) -> dict[str, str]:
    readings = [reading for item in corpus.list(raw) for reading in corpus.read(item)]
    assert sum(reading.document is not None for reading in readings) == 1
    return {problem.place: problem.message for reading in readings for problem in reading.problems}


@pytest.mark.parametrize("split", ["", "test/"])
@pytest.mark.parametrize("name", CORPORA)
def test_everything_that_is_not_a_document_is_noted(tmp_path, name, split):
    file, content = FILES[name]
    write(tmp_path, {f"{split}{stranger}": content for stranger in STRANGERS[name]} | {split + file: content})
    found = notes(CORPORA[name], tmp_path)
    for stranger in STRANGERS[name]:
        stranger = stranger.removeprefix("thys/").partition("/")[0]
        place = split + stranger if stranger.isprintable() else ascii(split + stranger)
        assert found.pop(place).startswith("left out: "), place
    assert not [message for message in found.values() if message.startswith("left out")]


def test_linked_repositories_and_dangling_links_are_noted(tmp_path):
    write(tmp_path, {"raw/o__r/a.py": "a\n", "elsewhere/a.py": "a\n", "books/1.txt": "A book.\n"})
    (tmp_path / "raw" / "p__q").symlink_to(tmp_path / "elsewhere")
    assert "a link" in notes(CORPORA["github"], tmp_path / "raw")["p__q"]
    (tmp_path / "books" / "2.txt").symlink_to("nothing")
    assert list(notes(CORPORA["pg19"], tmp_path / "books")) == ["2.txt"]


@pytest.mark.parametrize("name", CORPORA)
def test_documents_next_to_splits_are_refused_and_other_files_noted(tmp_path, name):
    file, content = FILES[name]
    raw = write(tmp_path, {f"test/{file}": content, "NOTICE": "x", "train.tar.xz": "x", ".git/" + file: content})
    assert {"NOTICE", "train.tar.xz", ".git"} <= notes(CORPORA[name], raw).keys()
    beside = file.partition("/")[0]
    write(raw, {file: content})
    with pytest.raises(InputError, match=f"has the splits test/ and next to them {beside}. .* Move"):
        CORPORA[name].list(raw)


@pytest.mark.parametrize("name", ["pg19", "c4"])
def test_a_folder_of_documents_without_the_name_of_a_split_is_refused(tmp_path, name):
    file, content = FILES[name]
    write(tmp_path, {f"{folder}/{file}": content for folder in ("train", "valid")})
    with pytest.raises(InputError, match=r"next to them valid\. .* rename folders that are not splits"):
        CORPORA[name].list(tmp_path)


def test_a_repository_with_the_name_of_a_split_is_refused(tmp_path):
    write(tmp_path, {f"{name}/pkg/a.py": "a\n" for name in ("A__x", "B__y", "C__z", "test")})
    with pytest.raises(InputError, match=r"next to them A__x, B__y, C__z\. With splits, every document must be in one"):
        CORPORA["github"].list(tmp_path)


@pytest.fixture
def forbidding() -> Iterator[Path]:
    """A folder in which permissions count: for the superuser, who may read everything, as somebody else."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    user = os.geteuid()
    try:
        yield folder
    finally:
        os.seteuid(user)
        shutil.rmtree(folder)


def forbid(path: Path) -> None:
    path.chmod(0)
    if os.geteuid() == 0:
        os.seteuid(65534)


@pytest.mark.parametrize("name", CORPORA)
def test_an_unreadable_file_is_refused_by_name(forbidding, name):
    file, content = FILES[name]
    write(forbidding, {file: content})
    forbid(forbidding / file)
    with pytest.raises(InputError, match=r"cannot be read \(Permission denied\)\. Fix .* or move it away") as error:
        notes(CORPORA[name], forbidding)
    assert str(error.value).startswith(f"{forbidding / file} ")


@pytest.mark.parametrize("name", CORPORA)
def test_an_unreadable_folder_is_refused_by_name(forbidding, name):
    file, content = FILES[name]
    write(forbidding, {f"train/{file}": content})
    in_train = (forbidding / "train" / file).parent
    # Sub-folders of a split are noted, not read, where a document is a file.
    folder = in_train / "sub" if in_train.name != "train" else forbidding / "test"
    folder.mkdir()
    forbid(folder)
    with pytest.raises(InputError, match=r"cannot be read \(Permission denied\)") as error:
        notes(CORPORA[name], forbidding)
    assert str(error.value).startswith(f"{folder} ")


def test_an_unreadable_archive_is_refused_by_name(forbidding):
    write(forbidding, {"o__r.zip": "x"})
    forbid(forbidding / "o__r.zip")
    with pytest.raises(InputError, match=r"o__r\.zip cannot be read"):
        notes(CORPORA["github"], forbidding)


def test_document_items_leaves_out_notes(tmp_path):
    write(tmp_path, {"1.txt": "A book.\n", "1-8.txt": "A book.\n", "metadata.csv": "2,B,1900,u\n"})
    items = CORPORA["pg19"].list(tmp_path)
    assert [item.id for item in document_items(items)] == ["1"]
    assert [item.note for item in items[1:]] == [
        "left out: another file of the same book, 1",
        "it lists 1 books that have no file here: 2",
    ]
