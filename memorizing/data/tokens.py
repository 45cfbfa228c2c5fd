"""Prepared tokens on disk: what `prepare` writes and what training and evaluation read.

FOLDER/manifest.json        format, vocabulary, counts per split
FOLDER/vocabulary.model     the SentencePiece model, if that is the vocabulary
FOLDER/SPLIT/tokens         TensorStore (zarr3) array of all documents' tokens, one after another
FOLDER/SPLIT/ends           ... of where each document ends in it
FOLDER/SPLIT/bytes          ... of the UTF-8 bytes of each document's text, for bits per byte
FOLDER/SPLIT/documents.txt  names of the documents, one a line, JSON strings
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore
from jaxtyping import Int

from memorizing.data.documents import Document
from memorizing.data.vocabulary import Vocabulary, load_vocabulary
from memorizing.errors import InputError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_CHUNK = 1 << 18
_CACHE_BYTES = 1 << 28


@dataclasses.dataclass(frozen=True)
class SplitCounts:
    """How much text one split holds."""

    documents: int
    tokens: int
    bytes: int
    sha256: str


class TokenSplit:
    """The documents of one split as tokens. Reading is thread-safe; tokens stay on disk until asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        context = tensorstore.Context({"cache_pool": {"total_bytes_limit": _CACHE_BYTES}})
        self._tokens = _open(folder / "tokens", context)
        ends = np.asarray(_open(folder / "ends").read().result())
        self.starts = np.concatenate([[0], ends]).astype(np.int64)
        self.lengths: Int[np.ndarray, " documents"] = np.diff(self.starts)
        self.bytes: Int[np.ndarray, " documents"] = np.asarray(_open(folder / "bytes").read().result())

    def read(self, document: int, first: int, stop: int) -> Int[np.ndarray, "T"]:
        """Tokens `first` to `stop` (exclusive, cut at the document's end) of a document."""
        start = self.starts[document]
        stop = min(stop, int(self.lengths[document]))
        return np.asarray(self._tokens[start + first : start + stop].read().result(), np.int32)

    def names(self) -> list[str]:
        """The documents' names, in order."""
        return [json.loads(line) for line in (self.folder / "documents.txt").read_text().splitlines()]


class PreparedTokens:
    """A prepared folder, opened and checked."""

    def __init__(self, folder: Path):
        self.folder = folder
        path = folder / MANIFEST
        if not path.is_file():
            raise InputError(f"{folder} holds no prepared tokens (no {MANIFEST}); make them with `memorizing prepare`")
        self.manifest = json.loads(path.read_text())
        if self.manifest["format_version"] != FORMAT_VERSION:
            raise InputError(
                f"{folder} was prepared in format {self.manifest['format_version']}, this program reads format "
                f"{FORMAT_VERSION}; prepare it again"
            )

    @property
    def vocabulary(self) -> Vocabulary:
        return load_vocabulary(self.manifest["vocabulary"]["kind"], self.folder)

    @property
    def vocabulary_size(self) -> int:
        return self.manifest["vocabulary"]["size"]

    def digests(self) -> dict[str, str]:
        """Of what the ids mean, and of the documents to train on."""
        return {
            "vocabulary": self.manifest["vocabulary"]["sha256"],
            "train": self.manifest["splits"]["train"]["sha256"],
        }

    def split(self, name: str) -> TokenSplit:
        if name not in self.manifest["splits"]:
            raise InputError(f"{self.folder} has no split {name!r}, only {', '.join(self.manifest['splits'])}")
        return TokenSplit(self.folder / name)


def write_split(folder: Path, documents: Iterable[Document], vocabulary: Vocabulary) -> SplitCounts:
    """Encodes documents and writes them as they come; holds no more than a chunk and the document at hand."""
    folder.mkdir(parents=True)
    dtype = np.uint16 if vocabulary.size <= 1 << 16 else np.int32
    tokens, pending = _Appended(folder / "tokens", dtype), []
    ends, sizes, names = [], [], []
    total, digest = 0, hashlib.sha256()
    for document in documents:
        encoded = vocabulary.encode(document.text).astype(dtype)
        total += len(encoded)
        digest.update(np.int64(len(encoded)).tobytes() + encoded.tobytes())
        pending.append(encoded)
        ends.append(total)
        sizes.append(len(document.text.encode("utf-8")))
        names.append(json.dumps(document.id))
        if sum(map(len, pending)) >= _CHUNK:
            joined = np.concatenate(pending)
            whole = len(joined) // _CHUNK * _CHUNK
            tokens.write(joined[:whole])
            pending = [joined[whole:]]
    tokens.write(np.concatenate(pending) if pending else np.zeros(0, dtype))
    _Appended(folder / "ends", np.int64).write(np.asarray(ends, np.int64))
    _Appended(folder / "bytes", np.int64).write(np.asarray(sizes, np.int64))
    (folder / "documents.txt").write_text("".join(name + "\n" for name in names))
    return SplitCounts(len(names), total, sum(sizes), digest.hexdigest())


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
        ],
    }
    return tensorstore.open(spec, create=True, dtype=np.dtype(create), shape=[0]).result()
