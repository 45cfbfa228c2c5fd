"""The contract of a corpus, and what the readers of the five corpora share.

    list(raw)  -> items       names and places, without text; runs once
    read(item) -> results     whole documents and notes; runs on any worker, in any order

Items and corpora are plain values that can be pickled, so an Apache Beam worker can read what another process listed.
Everything below `raw` is accounted for: a file that is not a document becomes an item with a note that says why. A file
or folder that cannot be read raises an error, because a document would be missing.

To add a corpus: write a frozen dataclass that derives from `Corpus` in a file of this folder, add a line to
`table.CORPORA`, and add an example of a document to `tests/data/corpora/test_every_corpus.py`.
"""

import abc
import codecs
import io
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import ClassVar, NamedTuple, NoReturn

from memorizing.data.documents import SPLITS, Document, Problem, Split, UnreadableFile
from memorizing.errors import InputError


class Item(NamedTuple):
    """The place of a document, of a file with many documents, or of something that is not a document.

    Attributes:
        id: unique among the documents and stable between runs and machines (no absolute paths).
        split: split that the folder layout gives, or None.
        path: file, folder or archive that holds the item.
        member: name inside the archive, "" if the path is enough.
        note: why the item is not a document, "" for documents.
    """

    id: str
    split: Split | None
    path: str
    member: str = ""
    note: str = ""


class ReadResult(NamedTuple):
    """A document of an item, or None if it was left out, and notes about it."""

    document: Document | None
    problems: tuple[Problem, ...] = ()


class PublishedForm(NamedTuple):
    """A TFDS dataset with the documents of a corpus.

    Attributes:
        name: dataset and config in TFDS, such as `c4/en`.
        features: its features that hold `text`, `id` and `title`.
    """

    name: str
    features: Mapping[str, str]


class Corpus(abc.ABC):
    """A kind of raw files. A subclass is a frozen dataclass whose fields are the corpus's settings.

    Attributes:
        published: TFDS dataset to read if no raw files are given.
        task_minimum_tokens: documents with fewer tokens are left out of the corpus's seqio tasks.
        has_orders: whether `reordered` gives a document in other orders, for a `_shuffled` seqio task.
    """

    published: ClassVar[PublishedForm | None] = None
    task_minimum_tokens: ClassVar[int] = 0
    has_orders: ClassVar[bool] = False

    @abc.abstractmethod
    def list(self, raw: Path) -> list[Item]:
        """Returns all documents below `raw` in a fixed order, and an item with a note for everything else.

        Raises:
            InputError: if `raw` has no document of this kind, or the same document twice.
        """

    @abc.abstractmethod
    def read_documents(self, item: Item) -> Iterator[ReadResult]:
        """Yields the documents of an item that has no note; most corpora have one document per item.

        Raises:
            InputError: for a damaged file that would lose documents, such as a truncated archive.
        """

    def read(self, item: Item) -> Iterator[ReadResult]:
        """Yields the documents of an item, or its note."""
        if item.note:
            yield ReadResult(None, (Problem(item.id, item.note),))
        else:
            yield from self.read_documents(item)

    @staticmethod
    def reordered(text: str, seed: int) -> str:
        """Returns a document in another random order, if the corpus has orders."""
        return text

    def metadata_files(self, raw: Path) -> tuple[Path, ...]:
        """Returns files outside the items that documents depend on (titles, for example), whether they exist or not.

        Documents are read again when one of these files changes.
        """
        return ()


def document_items(items: list[Item]) -> list[Item]:
    """Returns the items that are documents."""
    return [item for item in items if not item.note]


def require_unique(items: list[Item]) -> None:
    """Raises InputError if two documents have the same id."""
    first: dict[str, Item] = {}
    for item in document_items(items):
        if (other := first.setdefault(item.id, item)) is not item:
            one, two = (f"{each.path} {each.member}".strip() for each in (item, other))
            raise InputError(f"{one} and {two} are both document {item.id}: move one of them away")


def left_out_item(path: Path, split: Split | None, reason: str) -> Item:
    """Returns the item for an entry of the raw folder, or of one of its splits, that is not a document."""
    name = f"{split}/{path.name}" if split else path.name
    return Item(name if name.isprintable() else ascii(name), split, str(path), note=f"left out: {reason}")


def split_folders(
    raw: Path, is_document: Callable[[Path], bool], auxiliary: tuple[str, ...] = ()
) -> tuple[list[tuple[Split | None, Path]], list[Item]]:
    """Returns the folders that hold documents, each with its split, and items for what lies next to them.

    The folders are those of `raw/train`, `raw/validation` and `raw/test` that exist. If none exists, the folder is
    `raw` itself.

    Args:
        is_document: whether an entry of `raw` that is not hidden could be a document or a folder of documents.
        auxiliary: names of entries that belong to the documents, such as a table of titles.

    Raises:
        InputError: if `raw` cannot be read, or documents lie next to the splits and so belong to none.
    """
    folders: list[tuple[Split | None, Path]] = [(split, raw / split) for split in SPLITS if (raw / split).is_dir()]
    if not folders:
        return [(None, raw)], []
    others = [path for path in entries(raw) if path.name not in auxiliary and (path.name, path) not in folders]
    if strays := [path.name for path in others if not path.name.startswith(".") and is_document(path)]:
        splits = " and ".join(f"{split}/" for split, _ in folders)
        more = f" and {len(strays) - 5} more" if len(strays) > 5 else ""
        raise InputError(
            f"--raw={raw} has the splits {splits} and next to them {', '.join(strays[:5])}{more}. With splits, every "
            f"document must be in one. Move documents into {', '.join(SPLITS)}, or rename folders that are not splits"
        )
    return folders, [left_out_item(path, None, "next to the folders of the splits") for path in others]


def entries(folder: Path) -> list[Path]:
    """Returns the files and folders directly in a folder, sorted by name; nothing if it is not a folder.

    Raises:
        InputError: if the folder cannot be read.
    """
    if not folder.is_dir():
        return []
    try:
        return sorted(folder.iterdir(), key=lambda path: path.name)
    except OSError as error:
        _refuse(error)


def walk(root: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Walks like `Path.walk`, but raises InputError for a folder that cannot be read."""
    return root.walk(on_error=_refuse)


def open_file(path: Path) -> io.BufferedReader:
    """Opens a file for reading; raises InputError if it cannot be opened."""
    try:
        return path.open("rb")
    except OSError as error:
        _refuse(error)


def read_file(path: Path) -> bytes:
    """Returns the content of a file; raises InputError if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        _refuse(error)


def decode_text(content: bytes, place: str, encoding: str = "utf-8-sig") -> tuple[str, tuple[Problem, ...]]:
    """Decodes UTF-8, or else an 8-bit encoding, which never fails; returns the text and a note in the second case.

    Raises:
        InputError: for a pointer of Git LFS in place of the file.
    """
    if content.startswith(LFS_POINTER):
        raise InputError(f"{place} is a pointer of Git LFS, not the file. Run `git lfs pull` in the repository")
    try:
        return content.decode(encoding), ()
    except UnicodeDecodeError as error:
        byte = f"byte {content[error.start]:#04x} at offset {error.start}"
        text, name = decode_8_bit(content, "iso-8859-1")
        return text, (Problem(place, f"not UTF-8 ({byte}): read as {name}"),)


def decode_8_bit(content: bytes, encoding: str) -> tuple[str, str]:
    """Decodes an 8-bit encoding; returns the text and the name of the encoding that was used.

    Texts declared as ISO-8859-1 are often windows-1252, whose bytes 0x80 to 0x9F are quotes and dashes. In ISO-8859-1
    they would be control characters.
    """
    if codecs.lookup(encoding).name in ("iso8859-1", "cp1252", "ascii"):
        if not _CONTROLS.search(content):
            return content.decode("iso-8859-1"), "ISO-8859-1"
        return content.decode("cp1252", errors="iso-8859-1-byte"), "windows-1252"
    return content.decode(encoding, errors="replace"), encoding


def _byte_of_iso_8859_1(error: UnicodeError) -> tuple[str, int]:
    """Decodes the five bytes that windows-1252 does not define."""
    assert isinstance(error, UnicodeDecodeError)
    return error.object[error.start : error.end].decode("iso-8859-1"), error.end


LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""Start of the file that Git LFS leaves in place of a large file."""
_CONTROLS = re.compile(rb"[\x80-\x9f]")
codecs.register_error("iso-8859-1-byte", _byte_of_iso_8859_1)


def file_size(path: Path) -> int | None:
    """Returns the bytes of a regular file, or None for links, folders and devices; raises InputError on failure."""
    try:
        status = path.lstat()
    except OSError as error:
        _refuse(error)
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _refuse(error: OSError) -> NoReturn:
    remedy = "fix its name or its permissions, or move it away to continue without it"
    raise UnreadableFile(Path(error.filename), f"cannot be read ({error.strerror})", remedy) from error
