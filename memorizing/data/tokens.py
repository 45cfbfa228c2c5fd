"""Prepared tokens on disk: what `prepare` writes and what training and evaluation read.

FOLDER/manifest.json         format, vocabulary, digests, counts, lengths, settings
FOLDER/notes.txt             what was left out or odd in the raw files, and why, a line each
FOLDER/origin.json           where the raw files lay, and a digest of their sizes and times: whether tokens are of these
FOLDER/vocabulary.model      the SentencePiece model, if that is the vocabulary
FOLDER/SPLIT/tokens          TensorStore (zarr3) array of all documents' tokens, one after another
FOLDER/SPLIT/ends            ... of where each document ends in it
FOLDER/SPLIT/bytes           ... of the UTF-8 bytes of each document's text, for bits per byte
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
"""Beside the manifest, which is the same wherever and whenever the raw files were put."""
NO_DOCUMENTS = "vocabulary"
"""The `source` of a folder that holds a vocabulary alone."""
CHECKED_WHOLE = 1 << 28
"""Splits of up to so many tokens are read and compared with their digest before use, in a second or so; of larger ones
each chunk has a checksum of its own, which is compared when it is read."""
_CHUNK = 1 << 18
_CACHE_BYTES = 1 << 28


class Tokenized(NamedTuple):
    """A document as tokens, and the size of its text in UTF-8."""

    id: str
    title: str
    license: str
    tokens: Int[np.ndarray, "T"]
    bytes: int


@dataclasses.dataclass(frozen=True)
class SplitCounts:
    """How much text one split holds.

    Attributes:
        lengths: of documents in tokens: how many have at least so many and less than twice as many, by powers of two.
        sha256: of lengths and tokens of all documents, in order.
        documents_sha256: of what is known about them: `documents.jsonl`, then the sizes of their texts.
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
"""What readers rely on, and of each split."""


class TokenSplit:
    """The documents of one split as tokens. Reading is thread-safe; tokens stay on disk until asked for."""

    def __init__(self, folder: Path, begin: int = BEGIN_TOKEN):
        """`begin` is the token from which a document's first one is predicted."""
        self.folder, self.begin = folder, begin
        context = tensorstore.Context({"cache_pool": {"total_bytes_limit": _CACHE_BYTES}})
        with _damage_named(folder):
            self._tokens = _open(folder / "tokens", context)
            ends = np.asarray(_open(folder / "ends").read().result())
            self.bytes: Int[np.ndarray, " documents"] = np.asarray(_open(folder / "bytes").read().result())
        self.starts = np.concatenate([[0], ends]).astype(np.int64)
        self.lengths: Int[np.ndarray, " documents"] = np.diff(self.starts)

    def read(self, document: int, first: int, stop: int) -> Int[np.ndarray, "T"]:
        """Tokens `first` to `stop` (exclusive, cut at the document's end) of a document.

        Raises:
            InputError: when what is on disk is not what was written.
        """
        start = self.starts[document]
        stop = min(stop, int(self.lengths[document]))
        with _damage_named(self.folder / "tokens"):
            return np.asarray(self._tokens[start + first : start + stop].read().result(), np.int32)

    def documents(self) -> list[dict[str, str]]:
        """What is known about the documents, in order: `id`, `title`, `license`."""
        return [json.loads(line) for line in (self.folder / "documents.jsonl").read_text().splitlines()]

    def documents_sha256(self) -> str:
        """The digest of what is on disk, as `SplitCounts` has it."""
        path = self.folder / "documents.jsonl"
        with _damage_named(path), path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")
        digest.update(self.bytes.astype("<i8").tobytes())
        return digest.hexdigest()

    def names(self) -> list[str]:
        """The documents' names, in order."""
        return [document["id"] for document in self.documents()]

    def missing_chunks(self) -> int:
        """How many files of the array are not there."""
        store = tensorstore.KvStore.open({"driver": "file", "path": f"{(self.folder / 'tokens').absolute()}/"}).result()
        return -(-int(self.starts[-1]) // _CHUNK) - sum(key.startswith(b"c/") for key in store.list().result())

    def sha256(self) -> str:
        """The digest of what is on disk, as `SplitCounts` has it; reads everything."""
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
            raise InputError(f"{folder} holds no prepared tokens (no {MANIFEST}); make them with `memorizing prepare`")
        try:
            self.manifest = json.loads(path.read_text())
            version = self.manifest["format_version"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is damaged ({error!r}); prepare {folder} again") from error
        if version != FORMAT_VERSION:
            raise InputError(
                f"{folder} was prepared in format {version}, this program reads format {FORMAT_VERSION}; prepare it "
                "again"
            )
        faults = _faults(self.manifest, _MANIFEST)
        if not faults and self.manifest["source"] != NO_DOCUMENTS:
            faults = _faults(self.manifest, {"splits": {"train": _SPLIT}})
        for name in () if faults else self.manifest["splits"]:
            faults += _faults(self.manifest, {"splits": {name: _SPLIT}})
        if faults:
            raise InputError(f"{path} is damaged: without {', '.join(faults)}; prepare {folder} again")
        self.vocabulary_size: int = self.manifest["vocabulary"]["size"]
        kind, begin = self.manifest["vocabulary"]["kind"], self.manifest["vocabulary"].get("begin", BEGIN_TOKEN)
        self.vocabulary = load_vocabulary(kind, folder, self.vocabulary_size, begin)
        self._refuse("vocabulary", self.manifest["vocabulary"]["sha256"], fingerprint(self.vocabulary))

    def digests(self) -> dict[str, str]:
        """Of what the ids mean, and of the documents to train on."""
        digests = {"vocabulary": self.manifest["vocabulary"]["sha256"]}
        if train := self.manifest["splits"].get("train"):
            digests["train"] = train["sha256"]
        return digests

    def split(self, name: str) -> TokenSplit:
        """A split, compared with what the manifest says about it (see `CHECKED_WHOLE`).

        Raises:
            InputError: when there is no such split, or what is on disk is not what was written.
        """
        if name not in self.manifest["splits"]:
            splits = ", ".join(self.manifest["splits"])
            only = (
                f"only {splits}" if splits else "but a vocabulary alone: name prepared tokens (--data, Training.data)"
            )
            raise InputError(f"{self.folder} has no split {name!r}, {only}")
        split, expected = TokenSplit(Path(self.folder / name), self.vocabulary.begin), self.manifest["splits"][name]
        counts = (len(split.lengths), int(split.starts[-1]))
        if counts != (expected["documents"], expected["tokens"]):
            found = "{:,} documents with {:,} tokens".format(*counts)
            self._refuse(name, f"{expected['documents']:,} documents with {expected['tokens']:,} tokens", found)
        if split.missing_chunks():  # which would be read as zeros
            self._refuse(f"{name} split", "whole", "without some of its files")
        known = f"{name} split's documents.jsonl or bytes"
        if (counts := (len(split.bytes), int(split.bytes.sum()))) != (expected["documents"], expected["bytes"]):
            found = "{:,} documents of {:,} bytes".format(*counts)
            self._refuse(known, f"{expected['documents']:,} documents of {expected['bytes']:,} bytes", found)
        self._refuse(known, expected["documents_sha256"], split.documents_sha256())
        if expected["tokens"] <= CHECKED_WHOLE:
            self.check(name, split)
        return split

    def check(self, name: str, split: TokenSplit) -> None:
        """Compares all of a split with its digest.

        Raises:
            InputError: when what is on disk is not what was written.
        """
        self._refuse(f"{name} split", self.manifest["splits"][name]["sha256"], split.sha256())

    def _refuse(self, what: str, expected: str, found: str) -> None:
        if expected != found:
            raise InputError(
                f"{self.folder}: its {what} is {found[:40]}, but {MANIFEST} says {expected[:40]}: files are damaged or "
                "were mixed with others; prepare it again, or copy it again from where it is whole"
            )


def _faults(manifest: Any, shape: Mapping[str, Any], place: str = "") -> list[str]:
    """Names that `shape` has and the manifest has not, or has otherwise."""
    faults = []
    for name, kind in shape.items():
        value = manifest.get(name)
        if isinstance(kind, dict) and isinstance(value, dict):
            faults += _faults(value, kind, f"{place}{name}.")
        elif isinstance(kind, dict) or not isinstance(value, kind):
            faults.append(place + name)
    return faults


def given_vocabulary(path: Path, setting: str) -> Vocabulary:
    """The vocabulary of a prepared folder, or of a SentencePiece model made elsewhere.

    Raises:
        InputError: naming the `setting` that gave it, when it is neither, or would not give back every text.
    """
    try:
        vocabulary = PreparedTokens(path).vocabulary if path.is_dir() else SentencePieceVocabulary(path.read_bytes())
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"{setting} = {str(path)!r} is no prepared folder and no SentencePiece model: {error}"
        ) from error
    if isinstance(vocabulary, SentencePieceVocabulary) and (lost := vocabulary.loses()):
        raise InputError(
            f"{setting} = {str(path)!r} does not give back the text that it encodes; it loses {', '.join(lost)}: take "
            "one that `memorizing prepare` trained (no normalization, byte fallback, ids 0, 1, 2 for pad, end, unknown)"
        )
    return vocabulary


@contextlib.contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError) as error:
        raise InputError(
            f"{path} is missing or damaged: {error}; prepare it again, or copy it again from where it is whole"
        ) from error


def vocabulary_entry(vocabulary: Vocabulary) -> dict[str, Any]:
    """As a manifest has it."""
    return {
        "kind": vocabulary.kind,
        "size": vocabulary.size,
        "sha256": fingerprint(vocabulary),
        "begin": vocabulary.begin,
    }


def write_vocabulary(folder: AnyPath, vocabulary: Vocabulary) -> None:
    """Writes a prepared folder that holds a vocabulary and no documents; replaces an earlier one."""
    folder.mkdir(parents=True, exist_ok=True)
    save_vocabulary(vocabulary, folder)
    nothing = {"splits": {}, "left_out": [], "left_out_counts": {}, "notes": 0, "settings": {}}
    manifest = {
        "format_version": FORMAT_VERSION,
        "source": NO_DOCUMENTS,
        "vocabulary": vocabulary_entry(vocabulary),
        **nothing,
    }
    atomic_write(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def fingerprint(vocabulary: Vocabulary) -> str:
    """A digest of what the ids mean."""
    content = getattr(vocabulary, "model", None) or "\n".join(getattr(vocabulary, "words", [])).encode()
    if vocabulary.begin != BEGIN_TOKEN:
        content += f"begin {vocabulary.begin}".encode()
    return hashlib.sha256(vocabulary.kind.encode() + content).hexdigest()


def token_type(vocabulary: Vocabulary) -> type:
    """What its ids are stored as."""
    return np.uint16 if vocabulary.size <= 1 << 16 else np.int32


def write_split(folder: Path, documents: Iterable[Tokenized], dtype: type) -> SplitCounts:
    """Writes documents as they come; holds no more than a chunk and the document at hand."""
    folder.mkdir(parents=True)
    tokens, pending, waiting = _Appended(folder / "tokens", dtype), [], 0
    ends, sizes = [], []
    total, digest, known_digest, lengths = 0, hashlib.sha256(), hashlib.sha256(), {}
    with (folder / "documents.jsonl").open("wb") as lines:
        for document in documents:
            encoded = document.tokens.astype(dtype)
            digest.update(np.int64(len(encoded)).tobytes() + encoded.tobytes())
            total += len(encoded)
            ends.append(total)
            sizes.append(document.bytes)
            known = {"id": document.id, "title": document.title, "license": document.license}
            line = json.dumps(known).encode() + b"\n"
            lines.write(line)
            known_digest.update(line)
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
    known_digest.update(np.asarray(sizes, "<i8").tobytes())
    histogram = {str(1 << power): lengths[power] for power in sorted(lengths)}
    return SplitCounts(len(ends), total, sum(sizes), histogram, digest.hexdigest(), known_digest.hexdigest())


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
