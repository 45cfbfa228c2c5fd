"""PG-19: a document is a book of Project Gutenberg, without the license text in its file.

    raw/2600-0.txt ... and raw/metadata.csv          usually `-0` is UTF-8, `-8` 8-bit with accents, and no suffix
                                                     ASCII without them, or
    raw/train|validation|test/2600-0.txt ...         the same with the split in the layout

`metadata.csv` is PG-19's own table: id, title, year, url. Without it, titles are taken from the files.
"""

import contextlib
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
    decode_8_bit,
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
_PREFERENCE = ("-0", "-8", "")  # of several files of a book: those with accents before ASCII

_MARKER = re.compile(
    r"^[ \t]*(?:"
    # A marker can be wrapped: its title goes on in the next lines, to the closing asterisks.
    r"(?P<start>\*{2,} ?START OF (?:THE|THIS)?(?: COPYRIGHTED)? ?PROJECT GUTENBERG[^\n]{0,300}?"
    r"(?:\*{2,}[ \t]*$|\n(?:[^\n*]{1,200}\n){0,3}[^\n*]{0,200}\*{2,}[ \t]*$|$))"
    r"|(?P<end>\*{2,} ?END OF (?:THE|THIS)?(?: COPYRIGHTED)? ?PROJECT GUTENBERG)"
    r"|(?P<print>\*+ ?START ?\** ?THE SMALL PRINT)"
    r"|(?P<printed>\*+ ?END ?\** ?THE SMALL PRINT[^\n]*$)"
    r"|(?P<last>(?:\*+[ \t]*)?(?:End|Ende|Fin|Fine|Fim|Einde|Slut|Loppu)\b[^\n]{0,40}?"
    r"\bPro[a-z]{3,6} Gutenberg(?:['’]s|\b)))",
    re.IGNORECASE | re.MULTILINE,
)
_TAIL = 30_000
"""Characters from the end in which a last line without a marker is searched. The license has about 19,000."""
_LICENSE = re.compile(
    r"this e(?:book|text) is for the use of anyone anywhere at no cost|project gutenberg-tm license", re.I
)
_DECLARED = re.compile(rb"^Character set encoding:\s*([\w-]+)", re.IGNORECASE | re.MULTILINE)
_MUCH = 0.25
"""Share of a file from which on what is left out is noted."""


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
            whole, (text, remark) = text, without_license(text)
            left = len(whole.strip()) - len(text.strip())
            if left > _MUCH * len(whole.strip()):
                remark += f"; {left:,} of {len(whole):,} characters ({left / len(whole):.0%}) left out"
            remark = remark.removeprefix("; ")
            if remark:
                problems = (*problems, Problem(path.name, remark))
        text = text.strip("\n")
        if not text.strip():
            yield ReadResult(None, (*problems, Problem(path.name, "left out: it has no text")))
            return
        license = "public domain (Project Gutenberg)"
        yield ReadResult(Document(item.id, title, text + "\n", license), problems)


def decode(path: Path) -> tuple[str | None, tuple[Problem, ...]]:
    r"""Returns the text of a file in UTF-8 or an 8-bit encoding, with `\n` as line end and without a byte-order mark.

    Returns None for binary files.
    """
    raw = read_file(path)
    if (place := raw.find(b"\0")) >= 0:
        message = f"left out: a NUL byte at offset {place}, so it is not text; fix or replace the file"
        return None, (Problem(path.name, message),)
    declared = _DECLARED.search(raw[:20_000])
    text, problems = decode_text(raw, path.name)
    if problems and declared:
        with contextlib.suppress(LookupError):
            text, name = decode_8_bit(raw, declared[1].decode("ascii"))
            problems = (Problem(path.name, f"not UTF-8, declared as {declared[1].decode()}: read as {name}"),)
    return text.replace("\r\n", "\n").replace("\r", "\n"), problems


def without_license(text: str) -> tuple[str, str]:
    """Returns the works in a file, without licenses, headers and what lies between works; and a remark, or "".

    A work goes from a start marker to the next end marker. Without markers of start, it begins after the small print,
    or at the start of the file. A text without any marker is unchanged.
    """
    markers = [(match.lastgroup, match.start(), match.end()) for match in _MARKER.finditer(text)]
    kinds = {kind for kind, _, _ in markers}
    tail = len(text) - _TAIL
    works: list[str] = []
    begin = None if "start" in kinds else 0  # of the current work; None outside of works
    for kind, start, end in markers:
        if kind == "start":
            if begin is not None:  # the marker before it had no end
                works.append(text[begin:start])
            begin = end
        elif begin is None:
            continue
        elif kind == "printed":  # what lies before the end of the small print is none of the work
            begin = end
        elif kind == "print":
            if any(other == "printed" and place > start for other, place, _ in markers):
                works.append(text[begin:start])  # small print in the middle: the work goes on after it
                begin = end
            else:  # some old books have the small print at their end
                works.append(text[begin:start])
                begin = None
        elif kind == "end" or (kind == "last" and (start > tail or "end" in kinds)):
            works.append(text[begin:start])
            begin = None
    if begin is not None:
        works.append(text[begin:])
    found = [work.strip("\n") for work in works if work.strip()]
    if "start" not in kinds and "printed" in kinds:
        found = found[-1:]
    remark = "no marker was found, so the text may hold license text" if not kinds and _LICENSE.search(text) else ""
    if not kinds:
        return text, remark
    return "\n\n".join(found), f"{len(found)} works in one file" if len(found) > 1 else ""


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
