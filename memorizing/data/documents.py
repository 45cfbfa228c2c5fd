"""Documents, the splits they belong to, and those of a folder of text.

In a folder each file is a document, or each entry with its files joined.
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

type Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


class Document(NamedTuple):
    """A whole text, which a model reads from start to end; its size in bytes is that of `text` in UTF-8.

    Attributes:
        id: its name, stable from run to run and machine to machine (no absolute paths).
        title: for people; "" if there is none but the name.
        text: all of it.
        license: "" if it is not known.
        tokens: of `text`, if its source has them already.
    """

    id: str
    title: str
    text: str
    license: str = ""
    tokens: Int[np.ndarray, "T"] | None = None


class Problem(NamedTuple):
    """Something in the raw files that was not as it should be: reported, never fatal, never silent.

    The message starts with `left out` if something is not in the documents because of it.
    """

    place: str
    message: str


def writable(text: str) -> str:
    """Text that UTF-8 can write: bytes of a name that it cannot, which Python keeps as surrogates, become `?`."""
    return text.encode("utf-8", errors="replace").decode("utf-8")


class UnreadableFile(InputError):
    """A file that cannot be read, or not as text in the stated encoding; `reason` says why, without its place."""

    def __init__(self, path: Path, reason: str, remedy: str):
        super().__init__(f"{path} {reason}; {remedy}")
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class FolderSettings:
    """How a folder becomes documents.

    Attributes:
        document: `file` (each file, however deep) or `entry` (each file or sub-folder directly inside, its files
            joined depth-first by name, each preceded by a line with its path).
        suffixes: of the files to take; () for all.
        exclude: names of files and folders to leave out, `*` and `?` as in a shell.
        encoding: of the files.
        undecodable: what to do with a file that is not in that encoding or cannot be read: `refuse` to go on, or
            `skip` it and say so.
        minimum_bytes: shorter documents are left out (and counted).
    """

    document: Literal["file", "entry"] = "file"
    suffixes: tuple[str, ...] = (".txt",)
    exclude: tuple[str, ...] = ()
    encoding: str = "utf-8"
    undecodable: Literal["refuse", "skip"] = "refuse"
    minimum_bytes: int = 1

    def __post_init__(self):
        try:
            codecs.lookup(self.encoding)
        except LookupError:
            raise InputError(
                f"Folder.encoding = {self.encoding!r}: unknown to Python; it knows 'utf-8', 'latin-1' and many more"
            ) from None
        if self.minimum_bytes < 0:
            raise InputError(f"Folder.minimum_bytes = {self.minimum_bytes}: must be 0 or more")


class FolderDocuments:
    """The documents of a folder, listed at once and read one at a time."""

    def __init__(self, root: Path, settings: FolderSettings, option: str = "--raw"):
        """`option` is what a person named the folder with."""
        self.settings, self.root = settings, root
        if not root.is_dir():
            raise InputError(f"{option}={root}: no such folder; name the folder that holds the documents")
        files, self.problems = _files(root, settings)
        files.sort(key=lambda path: path.relative_to(root).parts)
        self._files: dict[str, list[Path]] = {}
        for path in files:
            relative = path.relative_to(root)
            name = relative.as_posix() if settings.document == "file" else relative.parts[0]
            self._files.setdefault(name, []).append(path)
        if not self._files:
            wanted = " or ".join(settings.suffixes) if settings.suffixes else "any name"
            raise InputError(
                f"{option}={root}: no files of {wanted} in it (Folder.suffixes = {settings.suffixes}, "
                f"Folder.exclude = {settings.exclude}); change these or name another folder"
            )

    @property
    def state(self) -> str:
        """Of all files, by name: other sizes or times of change give another."""
        return files_digest(self.root, [path for files in self._files.values() for path in files])

    def ids(self) -> list[str]:
        """All documents, by name."""
        return list(self._files)

    def read(self, ids: Sequence[str]) -> Iterator[Document | Problem]:
        """The named documents in order; a problem for short ones and (if so set) for files that are not text."""
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
        return f"### {path.relative_to(self.root).as_posix()}\n{text.rstrip()}\n\n" if text.strip() else ""


def read_path(option: str, path: Path, settings: FolderSettings) -> Iterator[Document | Problem]:
    """A file as a document, or the documents of a folder in order of their names.

    Raises:
        InputError: naming the `option` by which it was asked for, when there are none, or they are no text.
    """
    if path.is_dir():
        documents = FolderDocuments(path, settings, option)
        yield from documents.problems
        yield from documents.read(documents.ids())
    elif path.exists():
        yield Document(path.name, "", read_text(path, settings.encoding))
    else:
        raise InputError(f"{option}={path}: no such file or folder")


def read_text(path: Path, encoding: str) -> str:
    """The text of a file.

    Raises:
        UnreadableFile: when it cannot be read, or is not in that encoding.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        remedy = "mend it, or set Folder.undecodable = 'skip' to leave it out"
        raise UnreadableFile(path, f"cannot be read: {error.strerror}", remedy) from error
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        raise UnreadableFile(
            path,
            f"is not {encoding}: byte {raw[error.start]:#04x} at offset {error.start}",
            "set Folder.encoding to what it is (latin-1, say), or Folder.undecodable = 'skip' to leave it out",
        ) from error


def _files(root: Path, settings: FolderSettings) -> tuple[list[Path], list[Problem]]:
    """The files to read, and a problem for each kind of thing that is not read."""
    files, counts = [], {"by Folder.suffixes": 0, "by Folder.exclude": 0, "linked folders": 0, "pipes and devices": 0}
    for folder, folders, names in root.walk():
        kept = []
        for name in [*folders, *names]:
            if any(fnmatch.fnmatch(name, pattern) for pattern in settings.exclude):
                counts["by Folder.exclude"] += 1
            elif name in folders:
                kept.append(name)
            elif (folder / name).is_dir():  # listed among the files, since it is only linked
                counts["linked folders"] += 1
            elif settings.suffixes and not name.endswith(settings.suffixes):
                counts["by Folder.suffixes"] += 1
            elif (folder / name).exists() and not (folder / name).is_file():  # reading could wait for ever
                counts["pipes and devices"] += 1
            else:
                files.append(folder / name)
        folders[:] = kept
    problems = [Problem(root.name, f"left out: {count} {reason}") for reason, count in counts.items() if count]
    return files, problems


def files_digest(root: Path, files: Iterable[Path]) -> str:
    """Of files, by their names below `root`: other sizes or times of change give another; links are what they lead to.

    So they give the same wherever the folder is seen from.
    """
    found: list[tuple[str, int, int]] = []
    for file in files:
        name = str(file.relative_to(root) if file.is_relative_to(root) else file)
        try:
            its = file.stat()
            found.append((name, its.st_size, its.st_mtime_ns))
        except OSError as error:  # a link that leads nowhere or round
            found.append((name, -1, error.errno or 0))
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


class SplitKey(NamedTuple):
    """What splits depend on.

    Attributes:
        id: of a document.
        digest: of its text; equal ones are the same text.
        split: if its source says so, else None.
    """

    id: str
    digest: Hashable
    split: Split | None = None


def assign_splits(
    documents: Sequence[SplitKey], validation: float, test: float, seed: int
) -> tuple[list[Split], list[Problem]]:
    """The split of each document, and a problem for each text that comes more than once.

    As the source says; else by a hash of each document's name, so that a document stays where it is when others come
    and go. With few documents a hash can leave a split without any: then the document whose hash is nearest to it moves
    there. The same text is never in two splits: all its documents go where the first of them is.

    Raises:
        InputError: when there are fewer documents than splits that want some, or only some have a split.
    """
    first: dict[Hashable, int] = {}
    copies: dict[int, list[int]] = {}
    for number, document in enumerate(documents):
        if (original := first.setdefault(document.digest, number)) != number:
            copies.setdefault(original, []).append(number)
    given = {document.split for document in documents}
    if given >= {None} and len(given) > 1:
        without = next(document.id for document in documents if document.split is None)
        raise InputError(f"{without} is in no split, but other documents are: put all into train, validation, test")
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
            f"the same text as {', '.join(documents[copy].id for copy in others)}: all are kept, in {splits[original]}",
        )
        for original, others in copies.items()
    ]
    return splits, problems


def _splits_by_hash(ids: list[str], validation: float, test: float, seed: int) -> dict[str, Split]:
    wanted = [split for split, share in zip(SPLITS, (1.0, validation, test), strict=True) if share > 0]
    ids = list(dict.fromkeys(ids))
    if len(ids) < len(wanted):
        raise InputError(
            f"{len(ids)} document(s) cannot fill the splits {', '.join(wanted)}: give more documents, or set "
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
