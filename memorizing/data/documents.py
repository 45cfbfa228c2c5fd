"""Documents, their splits, and the documents of a folder of text.

In a folder, each file is a document, or each entry with its files joined.
"""

import codecs
import dataclasses
import fnmatch
import hashlib
import json
from collections.abc import Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int

from memorizing.errors import InputError
from memorizing.sections import check_range

type Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


class Document(NamedTuple):
    """A whole text, which a model reads from start to end.

    Attributes:
        id: name, stable between runs and machines (no absolute paths).
        title: title for people, "" if there is none.
        text: the whole text. Its size is counted in bytes of UTF-8.
        license: "" if unknown.
        tokens: tokens of `text`, if the source has them.
    """

    id: str
    title: str
    text: str
    license: str = ""
    tokens: Int[np.ndarray, "T"] | None = None


class Problem(NamedTuple):
    """A note about something unusual in the raw files. It is reported and never stops the program.

    The message starts with `left out` if the note explains why something is in no document.
    """

    place: str
    message: str


def writable(text: str) -> str:
    """Returns text that UTF-8 can encode. Bytes of a file name that Python keeps as surrogates become `?`."""
    return text.encode("utf-8", errors="replace").decode("utf-8")


class UnreadableFile(InputError):
    """Raised for a file that cannot be read or decoded; `reason` says why, without the path."""

    def __init__(self, path: Path, reason: str, remedy: str):
        super().__init__(f"{path} {reason}. {remedy[:1].upper()}{remedy[1:]}")
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class FolderSettings:
    """Settings of a folder of text.

    Attributes:
        document: `file` (each file, however deep) or `entry` (each file or sub-folder directly inside; its files are
            joined depth-first by name, each after a line with its path).
        suffixes: suffixes of the files to read; () for all files.
        exclude: names of files and folders to leave out, with the wildcards `*` and `?`.
        encoding: encoding of the files.
        undecodable: what happens if a file cannot be read or decoded: `refuse` stops, `skip` leaves it out with a note.
        minimum_bytes: shorter documents are left out and counted.
        splits: whether the sub-folders `train`, `validation` and `test`, if `train` is there, are the splits.
    """

    document: Literal["file", "entry"] = "file"
    suffixes: tuple[str, ...] = (".txt",)
    exclude: tuple[str, ...] = ()
    encoding: str = "utf-8"
    undecodable: Literal["refuse", "skip"] = "refuse"
    minimum_bytes: int = 1
    splits: bool = True

    def __post_init__(self):
        try:
            codecs.lookup(self.encoding)
        except LookupError:
            raise InputError(
                f"Folder.encoding = {self.encoding!r} is not an encoding that Python knows. Use 'utf-8', 'latin-1', ..."
            ) from None
        check_range(self, 0, 2**50, "minimum_bytes")


class FolderDocuments:
    """The documents of a folder. The files are listed at once and read one at a time."""

    def __init__(self, root: Path, settings: FolderSettings, option: str = "--raw"):
        """Lists the files; `option` is the command's option that named the folder, for messages.

        Raises:
            InputError: if there is no file to read, or documents lie next to the folders of the splits.
        """
        self.settings, self.root = settings, root
        if not root.is_dir():
            raise InputError(f"{option}={root} does not exist. Give the folder that holds the documents")
        self._files: dict[str, list[Path]] = {}
        self._splits: dict[str, Split] = {}
        self.problems: list[Problem] = []
        for split, folder in _split_folders(root, settings, option):
            files, problems = _files(folder, settings)
            self.problems += problems
            for path in sorted(files, key=lambda path: path.relative_to(folder).parts):
                relative = path.relative_to(folder)
                name = relative.as_posix() if settings.document == "file" else relative.parts[0]
                if split:
                    name = f"{split}/{name}"
                    self._splits[name] = split
                self._files.setdefault(name, []).append(path)
        if not self._files:
            wanted = " or ".join(settings.suffixes) if settings.suffixes else "any name"
            raise InputError(
                f"{option}={root} has no files of {wanted} (Folder.suffixes = {settings.suffixes}, Folder.exclude = "
                f"{settings.exclude}). Change these settings or choose another folder"
            )

    @property
    def state(self) -> str:
        """Digest of the names, sizes and modification times of all files."""
        return files_digest(self.root, [path for files in self._files.values() for path in files])

    def ids(self) -> list[str]:
        """Returns the names of all documents."""
        return list(self._files)

    def split(self, id: str) -> Split | None:
        """Returns the split that a document's folder gives; None if there are no folders of splits."""
        return self._splits.get(id)

    def read(self, ids: Sequence[str]) -> Iterator[Document | Problem]:
        """Yields the documents with these names, in order, and a note for each short document and each skipped file."""
        for id in ids:
            texts = []
            for path in self._files[id]:
                try:
                    texts.append(self._text(path))
                except UnreadableFile as error:
                    if self.settings.undecodable == "refuse":
                        raise
                    yield Problem(path.relative_to(self.root).as_posix(), f"left out: {error.reason}")
            text, id = writable("".join(texts)), writable(id)
            size = len(text.encode())
            if texts and size < self.settings.minimum_bytes:
                short = f"left out: {size} bytes, fewer than Folder.minimum_bytes = {self.settings.minimum_bytes}"
                yield Problem(id, short)
            elif texts:
                yield Document(id, "", text)

    def _text(self, path: Path) -> str:
        text = read_text(path, self.settings.encoding)
        if self.settings.document == "file":
            return text
        return f"### {self._shown(path)}\n{text.rstrip()}\n\n" if text.strip() else ""

    def _shown(self, path: Path) -> str:
        """Returns the path that a document's text shows: below the folder of its split, or below the root."""
        relative = path.relative_to(self.root)
        return (relative.relative_to(relative.parts[0]) if self._splits else relative).as_posix()


def read_path(option: str, path: Path, settings: FolderSettings) -> Iterator[Document | Problem]:
    """Yields a file as a document, or the documents of a folder in order of their names.

    Raises:
        InputError: naming `option`, if the path does not exist or holds no readable text.
    """
    if path.is_dir():
        documents = FolderDocuments(path, dataclasses.replace(settings, splits=False), option)
        yield from documents.problems
        yield from documents.read(documents.ids())
    elif path.exists():
        yield Document(path.name, "", read_text(path, settings.encoding))
    else:
        raise InputError(f"{option}={path} does not exist. Give a file or a folder")


def read_text(path: Path, encoding: str) -> str:
    """Returns the text of a file.

    Raises:
        UnreadableFile: if the file cannot be read, or is not in `encoding`.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        remedy = "fix it, or set Folder.undecodable = 'skip' to leave it out"
        raise UnreadableFile(path, f"cannot be read: {error.strerror}", remedy) from error
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        raise UnreadableFile(
            path,
            f"is not {encoding}: byte {raw[error.start]:#04x} at offset {error.start}",
            "set Folder.encoding to its encoding (such as latin-1), or Folder.undecodable = 'skip' to leave it out",
        ) from error


def _split_folders(root: Path, settings: FolderSettings, option: str) -> list[tuple[Split | None, Path]]:
    """Returns the folders of the splits, or the folder itself if it has no splits."""
    folders = [(split, root / split) for split in SPLITS if (root / split).is_dir()]
    if not settings.splits or not (root / "train").is_dir():
        return [(None, root)]
    beside = dataclasses.replace(settings, exclude=(*settings.exclude, *SPLITS))
    strays = [path.relative_to(root).as_posix() for path in _files(root, beside)[0]]
    if strays:
        more = f" and {len(strays) - 5} more" if len(strays) > 5 else ""
        raise InputError(
            f"{option}={root} has the splits {', '.join(f'{split}/' for split, _ in folders)} and next to them "
            f"{', '.join(sorted(strays)[:5])}{more}. With splits, every document must be in one. Move documents into "
            f"{', '.join(SPLITS)}, or set Folder.splits = False if {folders[0][0]}/ is not a split"
        )
    return [*folders]


def _files(root: Path, settings: FolderSettings) -> tuple[list[Path], list[Problem]]:
    """Returns the files to read, and a note for each kind of file that is not read."""
    files, counts = [], {"by Folder.suffixes": 0, "by Folder.exclude": 0, "linked folders": 0, "pipes and devices": 0}
    for folder, folders, names in root.walk():
        entered = []
        for name in [*folders, *names]:
            if any(fnmatch.fnmatch(name, pattern) for pattern in settings.exclude):
                counts["by Folder.exclude"] += 1
            elif name in folders:
                entered.append(name)
            elif (folder / name).is_dir():  # a linked folder is listed among the files
                counts["linked folders"] += 1
            elif settings.suffixes and not name.endswith(settings.suffixes):
                counts["by Folder.suffixes"] += 1
            elif (folder / name).exists() and not (folder / name).is_file():  # reading it could block
                counts["pipes and devices"] += 1
            else:
                files.append(folder / name)
        folders[:] = entered
    problems = [Problem(root.name, f"left out: {count} {reason}") for reason, count in counts.items() if count]
    return files, problems


def files_digest(root: Path, files: Iterable[Path]) -> str:
    """Returns a digest of the files' names below `root`, sizes and modification times. Links count as their targets.

    The digest is the same wherever the folder is mounted.
    """
    states: list[tuple[str, int, int]] = []
    for file in files:
        name = str(file.relative_to(root) if file.is_relative_to(root) else file)
        try:
            status = file.stat()
            states.append((name, status.st_size, status.st_mtime_ns))
        except OSError as error:  # a dangling or circular link
            states.append((name, -1, error.errno or 0))
    return hashlib.sha256(json.dumps(states).encode()).hexdigest()


class SplitKey(NamedTuple):
    """The properties of a document that its split depends on.

    Attributes:
        id: name of the document.
        digest: digest of its text. Equal digests mean equal texts.
        split: split that the source gives, or None.
    """

    id: str
    digest: Hashable
    split: Split | None = None


def assign_splits(
    documents: Sequence[SplitKey], validation: float, test: float, seed: int
) -> tuple[list[Split], list[Problem]]:
    """Returns the split of each document, and a note for each text that occurs more than once.

    The source's split counts if it gives one. Otherwise a hash of the document's name decides, so a document keeps its
    split when others are added or removed. If a hash leaves a split empty, the document with the nearest hash moves
    there. All documents with the same text go to the split of the first one.

    Raises:
        InputError: if there are fewer documents than splits, or only some documents have a split.
    """
    first: dict[Hashable, int] = {}
    copies: dict[int, list[int]] = {}
    for number, document in enumerate(documents):
        if (original := first.setdefault(document.digest, number)) != number:
            copies.setdefault(original, []).append(number)
    given = {document.split for document in documents}
    if given >= {None} and len(given) > 1:
        without = next(document.id for document in documents if document.split is None)
        raise InputError(
            f"{without} is in no split, but other documents are. Put every document into train, validation or test"
        )
    by_hash: dict[str, Split] = {}
    if None in given:
        by_hash = _splits_by_hash([documents[number].id for number in first.values()], validation, test, seed)
    splits: list[Split] = []
    for document in documents:
        original = documents[first[document.digest]]
        splits.append(original.split or by_hash[original.id])
    problems = [
        Problem(
            documents[original].id,
            f"the same text as {', '.join(documents[copy].id for copy in others)}: all are in {splits[original]}",
        )
        for original, others in copies.items()
    ]
    return splits, problems


def _splits_by_hash(ids: list[str], validation: float, test: float, seed: int) -> dict[str, Split]:
    wanted = [split for split, share in zip(SPLITS, (1.0, validation, test), strict=True) if share > 0]
    ids = list(dict.fromkeys(ids))
    if len(ids) < len(wanted):
        raise InputError(
            f"{len(ids)} document(s) cannot fill the splits {', '.join(wanted)}. Give more documents, or set "
            "Prepare.validation or Prepare.test to 0"
        )

    def place(id: str) -> float:
        digest = hashlib.sha256(writable(f"{seed}:{id}").encode()).digest()
        return int.from_bytes(digest[:8]) / 2**64

    ordered = sorted(ids, key=lambda id: (place(id), id))
    tests = sum(place(id) < test for id in ordered)
    held_out = sum(place(id) < test + validation for id in ordered)
    if test:
        tests = min(max(tests, 1), len(ordered) - len(wanted) + 1)
    if validation:
        held_out = max(held_out, tests + 1)
    held_out = min(max(held_out, tests), len(ordered) - 1)
    return {
        id: "test" if index < tests else "validation" if index < held_out else "train"
        for index, id in enumerate(ordered)
    }
