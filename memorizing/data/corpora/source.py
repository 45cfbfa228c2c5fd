"""What the five corpora have in common: a corpus lists its documents cheaply, then reads them one by one, anywhere.

    list(raw)  -> items       names and places, no text: runs once
    read(item) -> readings    whole documents and what was wrong with them: runs on any worker, in any order

Items and corpora are plain values that can be pickled, so that a worker of Apache Beam can read what another listed.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

from memorizing.data.documents import Document, Problem, Split


class Item(NamedTuple):
    """Where a document lies, or a file of many documents.

    Attributes:
        id: unique in the corpus, stable from run to run and machine to machine (no absolute paths).
        split: if the layout says so, else None.
        path: of the file, folder or archive that holds it.
        member: of an archive or line of a shard, if the path alone does not say.
    """

    id: str
    split: Split | None
    path: str
    member: str = ""


class Reading(NamedTuple):
    """A document of an item, or None if it is left out, and why or what else was noticed."""

    document: Document | None
    problems: tuple[Problem, ...] = ()


@runtime_checkable
class Corpus(Protocol):
    """One kind of raw files. Implemented by a frozen dataclass per corpus, whose fields are its settings."""

    def list(self, raw: Path) -> list[Item]:
        """All documents below `raw`, in a fixed order.

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
