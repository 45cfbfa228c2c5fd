"""PG-19: a document is a book of Project Gutenberg, without the license text in its file.

    raw/2600-0.txt ... and raw/metadata.csv          usually `-0` is UTF-8, `-8` ISO-8859-1, and no suffix ASCII, or
    raw/train|validation|test/2600-0.txt ...         the same with the split in the layout

`metadata.csv` is PG-19's own table: id, title, year, url. Without it, titles are taken from the files.
"""

import csv
import dataclasses
import functools
import io
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

from memorizing.data.corpora.corpus import (
    Corpus,
    Document,
    Item,
    Problem,
    PublishedForm,
    ReadResult,
    decode_text,
    document_items,
    entries,
    left_out_item,
    read_file,
    require_unique,
    split_folders,
)
from memorizing.data.documents import SPLITS, Split
from memorizing.errors import InputError

METADATA = "metadata.csv"

_NAME = re.compile(r"(.+?)(-0|-8)?\.txt", re.IGNORECASE)
_PREFERENCE = ("-0", "", "-8")  # of several files of a book: UTF-8 before what may have lost characters

# A marker can be wrapped: its title goes on in the next lines, to the closing asterisks.
_START = re.compile(
    r"^[ \t]*\*{2,} ?START OF (?:THE|THIS) PROJECT GUTENBERG[^\n]*?"
    r"(?:\*{2,}[ \t]*$|\n(?:[^\n*]+\n){0,3}[^\n*]*\*{2,}[ \t]*$|$)",
    re.IGNORECASE | re.MULTILINE,
)
_SMALL_PRINT = re.compile(r"^[ \t]*\*+ ?START ?\** ?THE SMALL PRINT", re.IGNORECASE | re.MULTILINE)
_SMALL_PRINT_END = re.compile(r"^[ \t]*\*+ ?END ?\** ?THE SMALL PRINT[^\n]*$", re.IGNORECASE | re.MULTILINE)
_END = re.compile(r"^[ \t]*\*{2,} ?END OF (?:THE|THIS) PROJECT GUTENBERG", re.IGNORECASE | re.MULTILINE)
_LAST_LINE = re.compile(
    r"^[ \t]*(?:\*+[ \t]*)?End of (?:the |this )?Project Gutenberg(?:['’]s|\b)", re.IGNORECASE | re.MULTILINE
)
_TAIL = 30_000
"""Characters from the end in which a last line without a marker is searched. The license has about 19,000."""


@dataclasses.dataclass(frozen=True)
class Pg19(Corpus):
    """Settings of PG-19: books of Project Gutenberg.

    Attributes:
        strip_license: whether to remove Project Gutenberg's header and tail. Books without markers stay whole.
    """

    strip_license: bool = True

    published: ClassVar = PublishedForm("pg19", {"text": "book_text", "id": "book_id", "title": "book_title"})

    def list(self, raw: Path) -> list[Item]:
        """Returns all books by split and number. If a book has several files, the one in UTF-8 is taken."""
        folders, strays = split_folders(raw, _has_books, auxiliary=(METADATA,))
        items = [*(item for split, folder in folders for item in _items(split, folder)), *strays]
        if not document_items(items):
            raise InputError(
                f"--raw={raw} has no .txt files, nor do its train, validation, test. Give the folder that holds one "
                "file per book, with Project Gutenberg's names (2600-0.txt)"
            )
        require_unique(items)
        ids = {item.id for item in document_items(items)}
        for metadata in dict.fromkeys([raw / METADATA, *(folder / METADATA for _, folder in folders)]):
            if missing := [id for id in _titles(metadata) if id not in ids]:
                more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
                note = f"it lists {len(missing)} books that have no file here: {', '.join(missing[:5])}{more}"
                items.append(Item(METADATA, None, str(metadata), note=note))
        return items

    def metadata_files(self, raw: Path) -> tuple[Path, ...]:
        return tuple(folder / METADATA for folder in (raw, *(raw / split for split in SPLITS)))

    def read_documents(self, item: Item) -> Iterator[ReadResult]:
        path = Path(item.path)
        text, problems = decode(path)
        if text is None:
            yield ReadResult(None, problems)
            return
        listed = {**_titles(path.parent.parent / METADATA), **_titles(path.parent / METADATA)}
        title = listed.get(item.id) or _title(text) or item.id
        if self.strip_license:
            text = without_license(text)
        text = text.strip("\n")
        if not text.strip():
            yield ReadResult(None, (*problems, Problem(path.name, "left out: it has no text")))
            return
        license = "public domain (Project Gutenberg)"
        yield ReadResult(Document(item.id, title, text + "\n", license), problems)


def decode(path: Path) -> tuple[str | None, tuple[Problem, ...]]:
    r"""Returns the text of a UTF-8 or ISO-8859-1 file with `\n` as line end and no byte-order mark; None for binary
    files.
    """
    raw = read_file(path)
    if (place := raw.find(b"\0")) >= 0:
        message = f"left out: a NUL byte at offset {place}, so it is not text; fix or replace the file"
        return None, (Problem(path.name, message),)
    text, problems = decode_text(raw, path.name)
    return text.replace("\r\n", "\n").replace("\r", "\n"), problems


def without_license(text: str) -> str:
    """Returns the text between the markers, or `text` itself if it has none."""
    half = len(text) // 2
    if (small_print := _SMALL_PRINT.search(text, half)) is not None:  # some old books have it at their end
        text = text[: small_print.start()]
    starts = [match.end() for pattern in (_START, _SMALL_PRINT_END) for match in pattern.finditer(text, 0, half)]
    text = text[max(starts, default=0) :]
    if (end := _END.search(text)) is not None:
        text = text[: end.start()]
    *_, last = (None, *_LAST_LINE.finditer(text, max(0, len(text) - _TAIL)))
    return text[: last.start()] if last else text


def _items(split: Split | None, folder: Path) -> Iterator[Item]:
    books: dict[str, list[tuple[str, Path]]] = {}
    for path in entries(folder):
        name = _NAME.fullmatch(path.name)
        if name and not path.name.startswith(".") and path.is_file():
            books.setdefault(name[1], []).append(((name[2] or ""), path))
        elif path.name != METADATA:
            reason = "a folder" if path.is_dir() else "not named like a text of Project Gutenberg (2600-0.txt)"
            yield left_out_item(path, split, reason)
    for id in sorted(books, key=lambda id: (not id.isdecimal(), int(id) if id.isdecimal() else 0, id)):
        first, *others = sorted(books[id], key=lambda file: (_PREFERENCE.index(file[0]), file[1].name))
        yield Item(id, split, str(first[1]))
        for _, path in others:
            yield left_out_item(path, split, f"another file of the same book, {id}")


def _has_books(path: Path) -> bool:
    return any(_NAME.fullmatch(file.name) for file in ([path] if path.is_file() else entries(path)))


def _title(text: str) -> str:
    match = re.search(r"^Title: *(.+(?:\n +.+)*)", text[:5000], re.MULTILINE)
    return " ".join(match[1].split()) if match else ""


@functools.lru_cache(maxsize=4)
def _titles(metadata: Path) -> Mapping[str, str]:
    if not metadata.is_file():
        return {}
    text = io.StringIO(read_file(metadata).decode("utf-8-sig", errors="replace"), newline="")
    rows = csv.reader(text)
    titles: dict[str, str] = {}
    line = 1
    try:
        for row in rows:
            line = rows.line_num + 1
            titles.update({row[0].strip(): row[1].strip()} if len(row) > 1 else {})
    except csv.Error as error:
        raise InputError(
            f"{metadata} is not a table of id, title, year, url from line {line} on ({error}). Close the quotes in "
            "that line, or move the file away to take titles from the books"
        ) from error
    return titles
