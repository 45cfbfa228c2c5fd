"""Prepared tokens on disk: `prepare` writes them, training and evaluation read them.

FOLDER/manifest.json         format, vocabulary, digests, counts, lengths, settings
FOLDER/notes.txt             a line for everything that was left out or unusual in the raw files, with the reason
FOLDER/origin.json           path of the raw files, and a digest of their names, sizes and times
FOLDER/vocabulary.model      the vocabulary's file, if it has one
FOLDER/SPLIT/tokens          TensorStore (zarr3) array of all documents' tokens, one document after another
FOLDER/SPLIT/ends            array of the position at which each document ends
FOLDER/SPLIT/bytes           array of the UTF-8 bytes of each document's text, for bits per byte
FOLDER/SPLIT/documents.jsonl a JSON object for each document: id, title, license
"""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorstore
from jaxtyping import Int

from memorizing.data.vocabulary import SentencePieceVocabulary, Vocabulary, load_vocabulary, save_vocabulary
from memorizing.errors import InputError
from memorizing.files import AnyPath, atomic_write
from memorizing.shapes import BEGIN_TOKEN

FORMAT_VERSION = 4
MANIFEST = "manifest.json"
NOTES = "notes.txt"
ORIGIN = "origin.json"
"""A file of its own, so that the manifest does not depend on where the raw files lie."""
NO_DOCUMENTS = "vocabulary"
"""The manifest's `source` of a folder that holds only a vocabulary."""
CHECKED_WHOLE = 1 << 28
"""Tokens of the largest split that is compared with its digest before use, which takes about a second. In larger
splits, each chunk has a checksum that is compared when the chunk is read.
"""
_CHUNK = 1 << 18
_CACHE_BYTES = 1 << 28


class Tokenized(NamedTuple):
    """A document as tokens, and the size of its text in bytes of UTF-8."""

    id: str
    title: str
    license: str
    tokens: Int[np.ndarray, "T"]
    bytes: int


@dataclasses.dataclass(frozen=True)
class SplitCounts:
    """The size and the digests of a split.

    Attributes:
        lengths: number of documents by length in tokens; key 2^k counts lengths from 2^k to 2^(k+1) - 1.
        sha256: digest of the lengths and tokens of all documents, in order.
        documents_sha256: digest of `documents.jsonl` and of the sizes of the texts.
    """

    documents: int
    tokens: int
    bytes: int
    lengths: dict[str, int]
    sha256: str
    documents_sha256: str


_MANIFEST = {
    "source": str,
    "vocabulary": {"kind": str, "size": int, "sha256": str},
    "splits": dict,
    "left_out": list,
    "left_out_counts": dict,
    "notes": int,
    "settings": dict,
}
_SPLIT = {"documents": int, "tokens": int, "bytes": int, "lengths": dict, "sha256": str, "documents_sha256": str}
"""Entries of the manifest, and of each split in it, that readers need."""


class TokenSplit:
    """The documents of a split as tokens. Reading is thread-safe, and tokens stay on disk until they are read."""

    def __init__(self, folder: Path, begin: int = BEGIN_TOKEN):
        """Opens a split; `begin` is the token from which the first token of a document is predicted."""
        self.folder, self.begin = folder, begin
        context = tensorstore.Context({"cache_pool": {"total_bytes_limit": _CACHE_BYTES}})
        with _damage_named(folder):
            self._tokens = _open(folder / "tokens", context)
            ends = np.asarray(_open(folder / "ends").read().result())
            self.bytes: Int[np.ndarray, " documents"] = np.asarray(_open(folder / "bytes").read().result())
        self.starts = np.concatenate([[0], ends]).astype(np.int64)
        self.lengths: Int[np.ndarray, " documents"] = np.diff(self.starts)

    def read(self, document: int, first: int, stop: int) -> Int[np.ndarray, "T"]:
        """Returns tokens `first` to `stop` of a document; `stop` is exclusive and limited to the document's end.

        Raises:
            InputError: if the data on disk is damaged.
        """
        start = self.starts[document]
        stop = min(stop, int(self.lengths[document]))
        with _damage_named(self.folder / "tokens"):
            return np.asarray(self._tokens[start + first : start + stop].read().result(), np.int32)

    def documents(self) -> list[dict[str, str]]:
        """Returns `id`, `title` and `license` of each document, in order."""
        return [json.loads(line) for line in (self.folder / "documents.jsonl").read_text().splitlines()]

    def documents_sha256(self) -> str:
        """Returns the digest of `documents.jsonl` and of the sizes on disk; see `SplitCounts`."""
        path = self.folder / "documents.jsonl"
        with _damage_named(path), path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")
        digest.update(self.bytes.astype("<i8").tobytes())
        return digest.hexdigest()

    def names(self) -> list[str]:
        """Returns the documents' names, in order."""
        return [document["id"] for document in self.documents()]

    def missing_chunks(self) -> int:
        """Returns the number of missing files of the token array."""
        store = tensorstore.KvStore.open({"driver": "file", "path": f"{(self.folder / 'tokens').absolute()}/"}).result()
        return -(-int(self.starts[-1]) // _CHUNK) - sum(key.startswith(b"c/") for key in store.list().result())

    def sha256(self) -> str:
        """Reads all tokens on disk and returns their digest; see `SplitCounts`."""
        digest = hashlib.sha256()
        dtype = self._tokens.dtype.numpy_dtype
        for document, length in enumerate(self.lengths):
            digest.update(np.int64(length).tobytes())
            for first in range(0, int(length), _CHUNK):
                digest.update(self.read(document, first, first + _CHUNK).astype(dtype).tobytes())
        return digest.hexdigest()


class PreparedTokens:
    """A prepared folder, opened and checked."""

    def __init__(self, folder: AnyPath):
        self.folder = folder
        path = folder / MANIFEST
        if not path.is_file():
            raise InputError(f"{folder} holds no prepared tokens (no {MANIFEST}). Make them with `memorizing prepare`")
        try:
            self.manifest = json.loads(path.read_text())
            version = self.manifest["format_version"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is damaged ({error!r}). Run `memorizing prepare` again") from error
        if version != FORMAT_VERSION:
            raise InputError(
                f"{folder} was prepared in format {version}, and this version reads format {FORMAT_VERSION}. Run "
                "`memorizing prepare` again"
            )
        faults = _faults(self.manifest, _MANIFEST)
        if not faults and self.manifest["source"] != NO_DOCUMENTS:
            faults = _faults(self.manifest, {"splits": {"train": _SPLIT}})
        for name in () if faults else self.manifest["splits"]:
            faults += _faults(self.manifest, {"splits": {name: _SPLIT}})
        if faults:
            raise InputError(f"{path} is damaged: {', '.join(faults)} missing. Run `memorizing prepare` again")
        self.vocabulary_size: int = self.manifest["vocabulary"]["size"]
        kind, begin = self.manifest["vocabulary"]["kind"], self.manifest["vocabulary"].get("begin", BEGIN_TOKEN)
        self.vocabulary = load_vocabulary(kind, folder, self.vocabulary_size, begin)
        self._refuse("vocabulary", self.manifest["vocabulary"]["sha256"], fingerprint(self.vocabulary))

    def digests(self) -> dict[str, str]:
        """Returns the digest of the vocabulary and, if there is one, of the train split."""
        digests = {"vocabulary": self.manifest["vocabulary"]["sha256"]}
        if train := self.manifest["splits"].get("train"):
            digests["train"] = train["sha256"]
        return digests

    def split(self, name: str) -> TokenSplit:
        """Returns a split, compared with the manifest (see `CHECKED_WHOLE`).

        Raises:
            InputError: if there is no such split, or the data on disk is damaged.
        """
        if name not in self.manifest["splits"]:
            splits = ", ".join(self.manifest["splits"])
            only = f"only {splits}" if splits else "but only a vocabulary. Give prepared tokens (--data, Training.data)"
            raise InputError(f"{self.folder} has no split {name!r}, {only}")
        split, expected = TokenSplit(Path(self.folder / name), self.vocabulary.begin), self.manifest["splits"][name]
        counts = (len(split.lengths), int(split.starts[-1]))
        if counts != (expected["documents"], expected["tokens"]):
            found = "{:,} documents with {:,} tokens".format(*counts)
            self._refuse(name, f"{expected['documents']:,} documents with {expected['tokens']:,} tokens", found)
        if split.missing_chunks():  # missing chunks would be read as zeros
            self._refuse(f"{name} split", "complete", "missing some of its files")
        index = f"{name} split's documents.jsonl or bytes"
        if (counts := (len(split.bytes), int(split.bytes.sum()))) != (expected["documents"], expected["bytes"]):
            found = "{:,} documents of {:,} bytes".format(*counts)
            self._refuse(index, f"{expected['documents']:,} documents of {expected['bytes']:,} bytes", found)
        self._refuse(index, expected["documents_sha256"], split.documents_sha256())
        if expected["tokens"] <= CHECKED_WHOLE:
            self.check(name, split)
        return split

    def check(self, name: str, split: TokenSplit) -> None:
        """Compares all tokens of a split with its digest.

        Raises:
            InputError: if the data on disk is damaged.
        """
        self._refuse(f"{name} split", self.manifest["splits"][name]["sha256"], split.sha256())

    def _refuse(self, what: str, expected: str, found: str) -> None:
        if expected != found:
            raise InputError(
                f"{self.folder}: its {what} is {found[:40]}, but {MANIFEST} says {expected[:40]}. Files are damaged or "
                "mixed with others. Prepare it again, or copy it again from an undamaged folder"
            )


def _faults(manifest: Any, shape: Mapping[str, Any], place: str = "") -> list[str]:
    """Returns the names in `shape` that are missing in the manifest or have another type."""
    faults = []
    for name, kind in shape.items():
        value = manifest.get(name)
        if isinstance(kind, dict) and isinstance(value, dict):
            faults += _faults(value, kind, f"{place}{name}.")
        elif isinstance(kind, dict) or not isinstance(value, kind):
            faults.append(place + name)
    return faults


def given_vocabulary(path: Path, setting: str) -> Vocabulary:
    """Returns the vocabulary of a prepared folder or of a SentencePiece model file.

    Raises:
        InputError: naming `setting`, if the path is neither, or the vocabulary does not decode every text exactly.
    """
    try:
        vocabulary = PreparedTokens(path).vocabulary if path.is_dir() else SentencePieceVocabulary(path.read_bytes())
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"{setting} = {str(path)!r} is neither a prepared folder nor a SentencePiece model: {error}"
        ) from error
    if isinstance(vocabulary, SentencePieceVocabulary) and (lost := vocabulary.loses()):
        raise InputError(
            f"{setting} = {str(path)!r} does not decode every text exactly; it loses {', '.join(lost)}. Use "
            "one that `memorizing prepare` trained (no normalization, byte fallback, ids 0, 1, 2 for pad, end, unknown)"
        )
    return vocabulary


@contextlib.contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Turns read errors into an InputError that names the damaged file."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise InputError(
            f"{path} is missing or damaged: {error}. Prepare it again, or copy it again from an undamaged folder"
        ) from error


def vocabulary_entry(vocabulary: Vocabulary) -> dict[str, Any]:
    """Returns the manifest's entry for a vocabulary."""
    return {
        "kind": vocabulary.kind,
        "size": vocabulary.size,
        "sha256": fingerprint(vocabulary),
        "begin": vocabulary.begin,
    }


def write_vocabulary(folder: AnyPath, vocabulary: Vocabulary) -> None:
    """Writes a prepared folder with a vocabulary and no documents; replaces an existing one."""
    folder.mkdir(parents=True, exist_ok=True)
    save_vocabulary(vocabulary, folder)
    empty = {"splits": {}, "left_out": [], "left_out_counts": {}, "notes": 0, "settings": {}}
    manifest = {
        "format_version": FORMAT_VERSION,
        "source": NO_DOCUMENTS,
        "vocabulary": vocabulary_entry(vocabulary),
        **empty,
    }
    atomic_write(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def fingerprint(vocabulary: Vocabulary) -> str:
    """Returns a digest of a vocabulary: its kind, its tokens and its begin token."""
    content = getattr(vocabulary, "model", None) or "\n".join(getattr(vocabulary, "words", [])).encode()
    if vocabulary.begin != BEGIN_TOKEN:
        content += f"begin {vocabulary.begin}".encode()
    return hashlib.sha256(vocabulary.kind.encode() + content).hexdigest()


def token_type(vocabulary: Vocabulary) -> type:
    """Returns the type in which ids are stored."""
    return np.uint16 if vocabulary.size <= 1 << 16 else np.int32


def write_split(folder: Path, documents: Iterable[Tokenized], dtype: type) -> SplitCounts:
    """Writes documents as they come. Holds one chunk and one document in memory."""
    folder.mkdir(parents=True)
    tokens, pending, waiting = _Appended(folder / "tokens", dtype), [], 0
    ends, sizes = [], []
    total, digest, documents_digest, lengths = 0, hashlib.sha256(), hashlib.sha256(), {}
    with (folder / "documents.jsonl").open("wb") as lines:
        for document in documents:
            encoded = document.tokens.astype(dtype)
            digest.update(np.int64(len(encoded)).tobytes() + encoded.tobytes())
            total += len(encoded)
            ends.append(total)
            sizes.append(document.bytes)
            entry = {"id": document.id, "title": document.title, "license": document.license}
            line = json.dumps(entry).encode() + b"\n"
            lines.write(line)
            documents_digest.update(line)
            power = max(len(encoded), 1).bit_length() - 1
            lengths[power] = lengths.get(power, 0) + 1
            pending.append(encoded)
            waiting += len(encoded)
            if waiting >= _CHUNK:
                joined = np.concatenate(pending)
                whole = waiting // _CHUNK * _CHUNK
                tokens.write(joined[:whole])
                pending, waiting = [joined[whole:]], waiting - whole
    tokens.write(np.concatenate(pending) if pending else np.zeros(0, dtype))
    _Appended(folder / "ends", np.int64).write(np.asarray(ends, np.int64))
    _Appended(folder / "bytes", np.int64).write(np.asarray(sizes, np.int64))
    documents_digest.update(np.asarray(sizes, "<i8").tobytes())
    histogram = {str(1 << power): lengths[power] for power in sorted(lengths)}
    return SplitCounts(len(ends), total, sum(sizes), histogram, digest.hexdigest(), documents_digest.hexdigest())


class _Appended:
    """A one-dimensional TensorStore array that grows."""

    def __init__(self, path: Path, dtype: type):
        self._array = _open(path, create=dtype)
        self._length = 0

    def write(self, values: np.ndarray) -> None:
        stop = self._length + len(values)
        self._array = self._array.resize(exclusive_max=[stop]).result()
        if len(values):
            self._array[self._length : stop].write(values).result()
        self._length = stop


def _open(path: Path, context: tensorstore.Context | None = None, create: type | None = None):
    spec: dict[str, Any] = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path.absolute())}}
    if create is None:
        return tensorstore.open(spec, context=context, open=True, read=True).result()
    spec["metadata"] = {
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [_CHUNK]}},
        "codecs": [
            {"name": "bytes", "configuration": {"endian": "little"}},
            {"name": "zstd", "configuration": {"level": 3}},
            {"name": "crc32c"},
        ],
    }
    return tensorstore.open(spec, create=True, dtype=np.dtype(create), shape=[0]).result()
