"""What the five corpora have in common: a corpus lists its documents cheaply, then reads them one by one, anywhere.

    list(raw)  -> items       names and places, no text: runs once
    read(item) -> readings    whole documents and what was wrong with them: runs on any worker, in any order

Items and corpora are plain values that can be pickled, so that a worker of Apache Beam can read what another listed.
Nothing below `raw` is passed over in silence: what is no document of the corpus is an item too, whose reading says why.
A file or folder that cannot be read is refused, since a document would be missing, or a part of one.
"""

import io
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn, Protocol, runtime_checkable

from memorizing.data.documents import SPLITS, Document, Problem, Split, UnreadableFile
from memorizing.errors import InputError


class Item(NamedTuple):
    """Where a document lies, or a file of many documents, or something that is neither.

    Attributes:
        id: unique among the documents, stable from run to run and machine to machine (no absolute paths).
        split: if the layout says so, else None.
        path: of the file, folder or archive that holds it.
        member: of an archive, if the path alone does not say.
        note: of what is no document, what is to be said about it; "" for documents.
    """

    id: str
    split: Split | None
    path: str
    member: str = ""
    note: str = ""


class Reading(NamedTuple):
    """A document of an item, or None if it is left out, and why or what else was noticed."""

    document: Document | None
    problems: tuple[Problem, ...] = ()


@runtime_checkable
class Corpus(Protocol):
    """One kind of raw files. Implemented by a frozen dataclass per corpus, whose fields are its settings."""

    def list(self, raw: Path) -> list[Item]:
        """All documents below `raw`, in a fixed order, and a note for each thing there that is none.

        Raises:
            InputError: when there is nothing of this kind there; names the folder, what was looked for, a remedy.
        """
        ...

    def read(self, item: Item) -> Iterator[Reading]:
        """What is at `item`, one document at a time; most corpora have one document an item.

        Raises:
            InputError: for a broken file that would lose documents unnoticed (a truncated archive); names file,
                place and remedy.
        """
        ...


@runtime_checkable
class HasMetadata(Protocol):
    """A corpus whose documents also depend on files that belong to no item: titles, say."""

    def metadata_files(self, raw: Path) -> tuple[Path, ...]:
        """These files, those that may be there as well: when one of them changes, documents are read again."""
        ...


def documents(items: list[Item]) -> list[Item]:
    """Those of the items that are no notes."""
    return [item for item in items if not item.note]


def noted(item: Item) -> Reading:
    """What a note reads as."""
    return Reading(None, (Problem(item.id, item.note),))


def left_out(path: Path, split: Split | None, reason: str) -> Item:
    """The note for an entry of the raw folder, or of one of its splits, that is no document."""
    name = f"{split}/{path.name}" if split else path.name
    return Item(name if name.isprintable() else ascii(name), split, str(path), note=f"left out: {reason}")


def layout(
    raw: Path, is_document: Callable[[Path], bool], known: tuple[str, ...] = ()
) -> tuple[list[tuple[Split | None, Path]], list[Item]]:
    """The folders that hold documents, each with its split, and notes for what lies beside them.

    These are `train`, `validation` and `test` in `raw`, as many as there are; else `raw` itself, with nothing beside.

    Args:
        is_document: whether an entry of `raw` that is not hidden could be a document, or a folder of them.
        known: names of entries that are read for the documents' sake.

    Raises:
        InputError: when `raw` cannot be read, or when documents lie beside splits: they would be in none.
    """
    folders: list[tuple[Split | None, Path]] = [(split, raw / split) for split in SPLITS if (raw / split).is_dir()]
    if not folders:
        return [(None, raw)], []
    beside = [path for path in entries(raw) if path.name not in known and (path.name, path) not in folders]
    if strays := [path.name for path in beside if not path.name.startswith(".") and is_document(path)]:
        splits = " and ".join(f"{split}/" for split, _ in folders)
        more = f" and {len(strays) - 5} more" if len(strays) > 5 else ""
        raise InputError(
            f"--raw={raw} has {splits}, which are read as splits, but beside them {', '.join(strays[:5])}{more}, which "
            f"would be in no split: move documents into {', '.join(SPLITS)}, or rename what is no split"
        )
    return folders, [left_out(path, None, "beside the folders of the splits") for path in beside]


def entries(folder: Path) -> list[Path]:
    """Files and folders directly in a folder, by name; none if it is no folder, where readers say what they look for.

    Raises:
        InputError: when it cannot be read.
    """
    if not folder.is_dir():
        return []
    try:
        return sorted(folder.iterdir(), key=lambda path: path.name)
    except OSError as error:
        _refuse(error)


def walk(root: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """`Path.walk`, which would pass over folders that cannot be read.

    Raises:
        InputError: for such a folder.
    """
    return root.walk(on_error=_refuse)


def opened(path: Path) -> io.BufferedReader:
    """A file, open for reading.

    Raises:
        InputError: when it cannot be opened.
    """
    try:
        return path.open("rb")
    except OSError as error:
        _refuse(error)


def bytes_of(path: Path) -> bytes:
    """All that is in a file.

    Raises:
        InputError: when it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        _refuse(error)


def size_of(path: Path) -> int | None:
    """In bytes, of a regular file; None of links, folders and devices.

    Raises:
        InputError: when it cannot be known.
    """
    try:
        status = path.lstat()
    except OSError as error:
        _refuse(error)
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _refuse(error: OSError) -> NoReturn:
    remedy = "mend its name or its permissions, or move it away to go on without it"
    raise UnreadableFile(Path(error.filename), f"cannot be read ({error.strerror})", remedy) from error
