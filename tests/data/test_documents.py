"""Folders to documents, and documents to splits."""

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memorizing.data.documents import (
    SPLITS,
    Document,
    FolderDocuments,
    FolderSettings,
    Problem,
    SplitKey,
    assign_splits,
)
from memorizing.errors import InputError


@pytest.fixture
def folder(tmp_path) -> Path:
    files = {
        "b.py": "b = 1\n",
        "a/z.py": "z\n",
        "a/inner/y.py": "y\n\n\n",
        "a/notes.txt": "not code",
        "a/test/t.py": "left out",
        "c/empty.py": "",
        "d/only.md": "no code here",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def read(documents: FolderDocuments) -> dict[str, str]:
    return {found.id: found.text for found in documents.read(documents.ids()) if isinstance(found, Document)}


def skipped(documents: FolderDocuments) -> list[Problem]:
    return [found for found in documents.read(documents.ids()) if isinstance(found, Problem)]


def test_each_file_is_a_document(folder):
    documents = FolderDocuments(folder, FolderSettings(suffixes=(".py",), exclude=("test",)))
    assert documents.ids() == ["a/inner/y.py", "a/z.py", "b.py", "c/empty.py"]
    assert read(documents) == {"a/inner/y.py": "y\n\n\n", "a/z.py": "z\n", "b.py": "b = 1\n"}
    assert skipped(documents) == [("c/empty.py", "left out: 0 bytes, fewer than Folder.minimum_bytes = 1")]


def test_each_entry_is_a_document_with_its_files_joined(folder):
    documents = FolderDocuments(folder, FolderSettings("entry", (".py",), ("te?t",)))
    assert read(documents) == {"a": "### a/inner/y.py\ny\n\n### a/z.py\nz\n\n", "b.py": "### b.py\nb = 1\n\n"}
    assert skipped(documents) == [("c", "left out: 0 bytes, fewer than Folder.minimum_bytes = 1")]


def test_files_that_are_not_read_are_counted(folder):
    (folder / "linked").symlink_to(folder / "a")
    documents = FolderDocuments(folder, FolderSettings(suffixes=(".py",), exclude=("test", "c")))
    reasons = [problem.message.removeprefix("left out: ") for problem in documents.problems]
    assert reasons == ["2 by Folder.suffixes", "2 by Folder.exclude", "1 linked folders"]
    assert documents.ids() == ["a/inner/y.py", "a/z.py", "b.py"]


def test_pipes_are_left_out_without_blocking(folder):
    os.mkfifo(folder / "pipe.py")
    documents = FolderDocuments(folder, FolderSettings(suffixes=(".py",), exclude=("test",)))
    assert "pipe.py" not in documents.ids()
    assert Problem(folder.name, "left out: 1 pipes and devices") in documents.problems


def test_short_documents_are_left_out_and_named(folder):
    documents = FolderDocuments(folder, FolderSettings(suffixes=(".py",), minimum_bytes=5))
    assert set(read(documents)) == {"a/test/t.py", "b.py"}
    assert len(skipped(documents)) == 3


def test_a_file_in_another_encoding_is_refused_or_skipped(tmp_path):
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "latin.txt").write_bytes("na\xefve".encode("latin-1"))
    with pytest.raises(InputError, match=r"latin\.txt is not utf-8: byte 0xef at offset 2\. Set Folder\.encoding"):
        read(FolderDocuments(tmp_path, FolderSettings()))
    skipping = FolderDocuments(tmp_path, FolderSettings(undecodable="skip"))
    assert set(read(skipping)) == {"good.txt"}
    assert skipped(skipping) == [("latin.txt", "left out: is not utf-8: byte 0xef at offset 2")]
    assert read(FolderDocuments(tmp_path, FolderSettings(encoding="latin-1")))["latin.txt"] == "naïve"


def test_a_binary_file_leaves_the_rest_of_its_entry(tmp_path):
    for name, content in (("a/1.txt", b"one"), ("a/2.txt", b"\xff"), ("b/3.txt", b"\xff")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    documents = FolderDocuments(tmp_path, FolderSettings("entry", undecodable="skip"))
    assert read(documents) == {"a": "### a/1.txt\none\n\n"}
    assert [problem.place for problem in skipped(documents)] == ["a/2.txt", "b/3.txt"]


def test_line_ends_and_nul_bytes_are_unchanged(tmp_path):
    (tmp_path / "odd.txt").write_bytes(b"a\r\nb\x00c")
    assert read(FolderDocuments(tmp_path, FolderSettings())) == {"odd.txt": "a\r\nb\0c"}


def test_circular_links_do_not_hang(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "text.txt").write_text("text")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "nowhere.txt").symlink_to(tmp_path / "missing")
    documents = FolderDocuments(tmp_path, FolderSettings(undecodable="skip"))
    assert read(documents) == {"a/text.txt": "text"}
    assert skipped(documents) == [("nowhere.txt", "left out: cannot be read: No such file or directory")]
    with pytest.raises(InputError, match=r"nowhere\.txt cannot be read: No such file"):
        read(FolderDocuments(tmp_path, FolderSettings()))


@pytest.mark.parametrize(("name", "words"), [("none", "none does not exist"), ("", r"has no files of \.txt")])
def test_a_folder_without_documents_is_refused(tmp_path, name, words):
    with pytest.raises(InputError, match=words):
        FolderDocuments(tmp_path / name, FolderSettings())


names = st.lists(st.text("abcdef", min_size=1, max_size=6), min_size=3, max_size=60, unique=True)
shares = st.sampled_from([0.0, 0.01, 0.1, 0.45])


def assigned(ids, validation, test, seed):
    """Documents of different texts."""
    splits, copies = assign_splits([SplitKey(id, id) for id in ids], validation, test, seed)
    assert not copies
    return dict(zip(ids, splits, strict=True))


@settings(deadline=None)
@given(names, shares, shares, st.integers(0, 5))
def test_every_document_is_in_one_split_and_no_split_is_empty(ids, validation, test, seed):
    splits = assigned(ids, validation, test, seed)
    assert set(splits) == set(ids)
    wanted = {split for split, share in zip(SPLITS, (1, validation, test), strict=True) if share}
    assert set(splits.values()) == wanted


def test_documents_keep_their_split_when_others_are_added():
    ids = [f"document-{number}" for number in range(1000)]
    few, many = assigned(ids[:500], 0.1, 0.1, 0), assigned(ids, 0.1, 0.1, 0)
    assert all(many[id] == few[id] for id in few)
    held_out = [split for split in many.values() if split != "train"]
    assert 120 < len(held_out) < 280
    assert assigned(ids, 0.1, 0.1, 1) != many


def test_too_few_documents_for_the_splits_are_refused():
    with pytest.raises(InputError, match=r"2 document\(s\) cannot fill the splits train, validation, test"):
        assigned(["a", "b"], 0.1, 0.1, 0)


@settings(deadline=None)
@given(st.lists(st.tuples(st.text("abc", min_size=1, max_size=3), st.integers(0, 9)), min_size=12, max_size=60))
def test_equal_texts_share_a_split_and_are_noted(documents):
    known = [SplitKey(f"{id}-{number}", digest) for number, (id, digest) in enumerate(documents)]
    if len({document.digest for document in known}) < 3:
        return
    splits, copies = assign_splits(known, 0.2, 0.2, 0)
    of_text = {}
    for document, split in zip(known, splits, strict=True):
        assert of_text.setdefault(document.digest, split) == split
    texts = [document.digest for document in known]
    repeated = {digest for digest in texts if texts.count(digest) > 1}
    assert {next(known for known in known if known.id == place).digest for place, _ in copies} == repeated


def test_given_splits_are_used_except_for_repeated_texts():
    known = [
        SplitKey("a", 1, "train"),
        SplitKey("b", 2, "test"),
        SplitKey("c", 1, "validation"),
        SplitKey("d", 3, "validation"),
    ]
    splits, copies = assign_splits(known, 0.1, 0.1, 0)
    assert splits == ["train", "test", "train", "validation"]
    assert copies == [("a", "the same text as c: all are in train")]
    with pytest.raises(InputError, match="e is in no split, but other documents are"):
        assign_splits([*known, SplitKey("e", 4)], 0.1, 0.1, 0)


def test_names_that_are_not_utf_8_get_question_marks(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / os.fsdecode(b"\xff.txt")).write_text("text")
    assert read(FolderDocuments(tmp_path, FolderSettings("entry"))) == {"a": "### a/?.txt\ntext\n\n"}
    assert read(FolderDocuments(tmp_path, FolderSettings())) == {"a/?.txt": "text"}


def write(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"text of {name}\n")
    return root


@pytest.mark.parametrize(
    ("document", "names"),
    [("file", ["test/x/c.txt", "train/a.txt", "train/x/b.txt"]), ("entry", ["test/x", "train/a.txt", "train/x"])],
)
def test_folders_named_as_splits_are_the_splits(document, names, tmp_path):
    """Also if the names of splits are excluded, as the quickstart excludes tests of packages."""
    write(tmp_path, "train/a.txt", "train/x/b.txt", "test/x/c.txt", "README.md")
    documents = FolderDocuments(tmp_path, FolderSettings(document, exclude=("test",)))
    assert sorted(documents.ids()) == names
    assert all(documents.split(name) == name.partition("/")[0] for name in names)
    if document == "entry":
        assert read(documents)["train/x"].startswith("### x/b.txt\n")


def test_documents_next_to_splits_are_refused_unless_these_are_documents(tmp_path):
    write(tmp_path, "train/a.txt", "validation/b.txt", "c.txt", "d/e.txt")
    with pytest.raises(
        InputError, match=r"splits train/, validation/ and next to them c\.txt, d/e\.txt.*Folder\.splits = False"
    ):
        FolderDocuments(tmp_path, FolderSettings())
    documents = FolderDocuments(tmp_path, FolderSettings(splits=False))
    assert (
        documents.ids() == ["c.txt", "d/e.txt", "train/a.txt", "validation/b.txt"] and documents.split("c.txt") is None
    )


def test_a_folder_named_test_without_train_is_a_document(tmp_path):
    write(tmp_path, "test/a.txt", "code/b.txt")
    documents = FolderDocuments(tmp_path, FolderSettings("entry"))
    assert documents.ids() == ["code", "test"] and documents.split("test") is None
