"""PG-19: the license goes in all its wordings, encodings and line ends are handled, and a book is never lost unsaid."""

import hashlib
import pickle
import shutil
import time

import pytest

from memorizing.data.corpora.pg19 import Pg19, without_license
from memorizing.errors import InputError
from tests import shared_data

HEADER = "The Project Gutenberg EBook of A Book\n\nTitle: A Book\n  of Two Lines\nLanguage: English\n\n"
BODY = "CHAPTER I\n\nIt was *** a book.\n\nTHE END"


def write(folder, name, content):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def read(raw, corpus=None):
    corpus = corpus or Pg19()
    return [reading for item in corpus.list(raw) for reading in corpus.read(item)]


MARKERS = {
    "this": (
        "*** START OF THIS PROJECT GUTENBERG EBOOK A BOOK ***",
        "*** END OF THIS PROJECT GUTENBERG EBOOK A BOOK ***",
    ),
    "tight": (
        "***START OF THE PROJECT GUTENBERG EBOOK A BOOK***",
        "***END OF THE PROJECT GUTENBERG EBOOK A BOOK***",
    ),
    "number": (
        "*** START OF THE PROJECT GUTENBERG EBOOK 43 ***",
        "End of Project Gutenberg's A Book, by One\n\n*** END OF THE PROJECT GUTENBERG EBOOK 43 ***",
    ),
    "wrapped": (
        "*** START OF THIS PROJECT GUTENBERG EBOOK A BOOK\nOF A LONG TITLE ***",
        "End of the Project Gutenberg EBook of A Book\n\n*** END OF THIS PROJECT GUTENBERG EBOOK A\nBOOK ***",
    ),
    "small-print": (
        "*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*",
        "End of The Project Gutenberg Etext of A Book",
    ),
    "both": (
        "*** START OF THE PROJECT GUTENBERG ETEXT A BOOK ***\n\n*END THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*V*END*",
        "End of Project Gutenberg’s Etext, A Book",
    ),
    "small-print-last": (
        "*** START OF THIS PROJECT GUTENBERG EBOOK A BOOK ***",
        "***START**THE SMALL PRINT!**FOR PUBLIC DOMAIN EBOOKS**START***",
    ),
}


@pytest.mark.parametrize("wording", MARKERS)
def test_header_and_tail_are_removed_in_all_wordings(wording):
    start, end = MARKERS[wording]
    body = BODY * 40  # long enough for the halves that markers are looked for in
    assert without_license(f"{HEADER}{start}\n\n{body}\n\n{end}\nlicense ...\n")[0].strip() == body


def test_a_book_without_markers_is_unchanged():
    text = "The end of the project was near. START OF THIS PROJECT\n" + BODY
    assert without_license(text) == (text, "")


def test_encodings_marks_and_line_ends(tmp_path):
    write(tmp_path, "1-0.txt", b"\xef\xbb\xbf" + "naïve\r\nbook".encode())
    write(tmp_path, "2-8.txt", "naïve\r\nbook".encode("latin-1"))
    write(tmp_path, "3.txt", b"old\rmac")
    found = read(tmp_path)
    assert [reading.document.text for reading in found] == ["naïve\nbook\n", "naïve\nbook\n", "old\nmac\n"]
    (problem,) = found[1].problems
    assert problem == ("2-8.txt", "not UTF-8 (byte 0xef at offset 2): read as ISO-8859-1")
    assert not found[0].problems and not found[2].problems


def test_the_utf_8_file_of_a_book_is_read_and_the_others_noted(tmp_path):
    for name in ("7-8.txt", "7.txt", "7-0.txt", "10-0.txt"):
        write(tmp_path, name, name)
    found = read(tmp_path)
    assert [(reading.document.id, reading.document.text) for reading in found if reading.document] == [
        ("7", "7-0.txt\n"),
        ("10", "10-0.txt\n"),
    ]
    left_out = [problem for reading in found for problem in reading.problems]
    assert left_out == [(name, "left out: another file of the same book, 7") for name in ("7-8.txt", "7.txt")]


def test_titles_come_from_the_metadata_or_the_text(tmp_path):
    write(tmp_path, "1.txt", HEADER + BODY)
    write(tmp_path, "2.txt", HEADER + BODY)
    write(tmp_path, "3.txt", BODY)
    write(tmp_path, "metadata.csv", '2,"A, B and C",1900,http://x\n9,Missing,1901,http://y\n')
    found = {reading.document.id: reading.document.title for reading in read(tmp_path) if reading.document}
    assert found == {"1": "A Book of Two Lines", "2": "A, B and C", "3": "3"}
    problems = [problem for reading in read(tmp_path) for problem in reading.problems]
    assert problems == [("metadata.csv", "it lists 1 books that have no file here: 9")]


def test_malformed_metadata_is_refused_by_line(tmp_path):
    write(tmp_path, "1.txt", BODY)
    write(tmp_path, "metadata.csv", '1,One,1900,u\n2,"Two,1900,u\n' + "3,Three,1900,u\n" * 10_000)
    with pytest.raises(InputError, match=r"metadata\.csv is not a table .* from line 2 on \(.*\)\. Close the quotes"):
        read(tmp_path)


def test_splits_of_the_layout_and_metadata_above_them(tmp_path):
    write(tmp_path / "train", "1.txt", "one")
    write(tmp_path / "test", "2.txt", "two")
    write(tmp_path, "metadata.csv", "1,First,1900,u\n2,Second,1900,u\n")
    corpus = Pg19()
    items = corpus.list(tmp_path)
    assert [(item.id, item.split) for item in items] == [("1", "train"), ("2", "test")]
    assert [reading.document.title for item in items for reading in corpus.read(item)] == ["First", "Second"]
    assert pickle.loads(pickle.dumps((corpus, items))) == (corpus, items)
    write(tmp_path / "test", "1-0.txt", "one")
    with pytest.raises(InputError, match="are both document 1: move one"):
        corpus.list(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"), [(b"", "it has no text"), (b"a\0b", "a NUL byte at offset 1"), (b" \r\n", "no")]
)
def test_binary_and_empty_files_are_left_out_with_a_note(tmp_path, content, words):
    write(tmp_path, "1.txt", content)
    (reading,) = read(tmp_path)
    assert reading.document is None and words in reading.problems[0].message and reading.problems[0].place == "1.txt"


def test_a_folder_without_books_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"--raw=.* has no \.txt files"):
        Pg19().list(tmp_path)


def test_the_shared_corpus(tmp_path):
    folders = [shared_data.unpacked("pg19", split, tmp_path) for split in ("train", "validation", "test")]
    found = read(folders[0].parent)
    documents = [reading.document for reading in found]
    assert len(documents) == 29 and all(documents)
    noted = [problem.place for reading in found for problem in reading.problems]
    assert noted == ["14263-8.txt", "16595-8.txt"]
    for document in documents:
        assert "\r" not in document.text and "\ufeff" not in document.text
        for words in ("PROJECT GUTENBERG EBOOK", "Project Gutenberg License", "www.gutenberg", "SMALL PRINT"):
            assert words not in document.text, (document.id, words)
        assert document.title != document.id
    whole = next(document for document in documents if document.id == "84").text
    assert (
        hashlib.sha256(whole.encode()).digest()
        == hashlib.sha256((folders[0] / "84-0.txt").read_bytes().strip(b"\n") + b"\n").digest()
    )


@pytest.mark.parametrize(
    ("name", "outcome"),
    [
        ("crlf.txt", "read"),
        ("crlf-bom.txt", "read"),
        ("latin1.txt", "byte 0x.. at offset 51259"),
        ("empty.txt", "left out: it has no text"),
        ("single-line-1mb.txt", "read"),
        ("nul-bytes.txt", r"left out: a NUL byte at offset \d+"),
    ],
)
def test_malformed_inputs(tmp_path, name, outcome):
    shutil.copy(shared_data.oddity(name), tmp_path)
    (reading,) = read(tmp_path)
    if outcome == "read":
        assert not reading.problems and "\r" not in reading.document.text
        assert "START OF THIS" not in reading.document.text and not reading.document.text.startswith("\ufeff")
        if name.startswith("single"):
            assert len(reading.document.text.encode()) == 1_049_996 + 1
    else:
        (problem,) = reading.problems
        assert problem.place == name
        with pytest.raises(AssertionError, match=outcome):
            raise AssertionError(problem.message)
        assert (reading.document is None) == problem.message.startswith("left out")


WORDINGS = {
    "copyrighted": (
        "*** START OF THE COPYRIGHTED PROJECT GUTENBERG EBOOK, A ***",
        "*** END OF THE COPYRIGHTED PROJECT GUTENBERG",
    ),
    "german": ("", "Ende dieses Projekt Gutenberg Etextes Eine Erzählung"),
    "french": ("", "Fin de ce livre, Projet Gutenberg"),
    "small print": (
        "***START**THE SMALL PRINT!**FOR PUBLIC DOMAIN***\n" + "a condition\n" * 400 + "*END*THE SMALL PRINT! Ver*END*",
        "",
    ),
}


@pytest.mark.parametrize("wording", WORDINGS)
def test_short_works_keep_their_text_alone(wording):
    """Also if the license is longer than the work."""
    start, end = WORDINGS[wording]
    text = f"{HEADER if start else ''}{start}\n\n{BODY}\n\n{end}\n" + ("conditions\n" if end else "")
    assert without_license(text)[0].strip() == BODY


def test_all_works_of_a_file_are_read(tmp_path):
    parts = [
        f"*** START OF THE PROJECT GUTENBERG EBOOK {n} ***\nwork {n}\n*** END OF THE PROJECT GUTENBERG EBOOK {n} ***\n"
        for n in (1, 2)
    ]
    write(tmp_path, "1.txt", "header\n" * 30 + "between\n".join(parts) + "license\n" * 30)
    (reading,) = read(tmp_path)
    assert reading.document.text == "work 1\n\nwork 2\n"
    (remark,) = [each.message for each in reading.problems]
    assert remark.startswith("2 works in one file; ") and remark.endswith("(98%) left out")


def test_license_text_without_any_marker_is_noted(tmp_path):
    write(tmp_path, "1.txt", BODY + "\nThis eBook is for the use of anyone anywhere at no cost and with\n")
    (reading,) = read(tmp_path)
    assert reading.problems[0].message == "no marker was found, so the text may hold license text"


@pytest.mark.parametrize(
    ("content", "text", "encoding"),
    [
        (b"a \x93quoted\x94 word \x97 here", "a “quoted” word — here", "windows-1252"),
        ("naïve".encode("latin-1"), "naïve", "ISO-8859-1"),
        ("Character set encoding: ISO-8859-2\n\nžlutý".encode("iso-8859-2"), "žlutý", "ISO-8859-2"),
        (b"Character set encoding: ISO-8859-1\n\nan \x85 end \x81", "an … end \x81", "windows-1252"),
        (b"Character set encoding: nonsense\n\n\xe9", "é", "ISO-8859-1"),
    ],
)
def test_8_bit_encodings_are_those_declared_or_windows_1252(content, text, encoding, tmp_path):
    write(tmp_path, "1.txt", content)
    (reading,) = read(tmp_path)
    assert reading.document.text.strip().endswith(text) and reading.problems[0].message.endswith(f"read as {encoding}")


@pytest.mark.parametrize(
    "phrase", ["*** START OF THIS PROJECT GUTENBERG ", "*END THE SMALL PRINT ", "End of Pro", "** "]
)
def test_repeated_phrases_take_linear_time(phrase):
    start = time.process_time()
    without_license(phrase * (1_000_000 // len(phrase)))
    without_license((phrase + "\n") * (1_000_000 // len(phrase)))
    assert time.process_time() - start < 10
