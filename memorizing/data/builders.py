"""TFDS datasets of the five corpora, from raw files to whole documents.

    import memorizing.data.builders                                        which registers them with TFDS
    builder = tfds.builder("pg19_documents", data_dir=..., corpus=Pg19())
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=RAW))
    builder.as_dataset(split="train")

Reading is done in parts, by Beam if the download config names a runner, and each part is kept under DATA_DIR until the
dataset is there: after a kill only parts that are missing are read. What TFDS's own Beam writer does, sending all text
through a shuffle, would hold the corpus in memory on the direct runner; here a document is only ever with the worker
that reads it, and then with the one that writes its shard.
"""

import dataclasses
import hashlib
import itertools
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow greets otherwise; nothing is computed with it
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

import numpy as np
import tensorflow_datasets as tfds

from memorizing.data.bulk import Beam, do, write_once
from memorizing.data.corpora.arxiv import Arxiv
from memorizing.data.corpora.c4 import C4
from memorizing.data.corpora.github import Github
from memorizing.data.corpora.isabelle import Isabelle
from memorizing.data.corpora.pg19 import Pg19
from memorizing.data.corpora.published import Published
from memorizing.data.corpora.source import Corpus, HasMetadata, Item
from memorizing.data.documents import (
    SPLITS,
    Document,
    Known,
    Problem,
    Split,
    assign_splits,
    state_of,
    writable,
)
from memorizing.errors import InputError
from memorizing.files import atomic_write, folder_lock

logging.getLogger("tensorflow").setLevel(logging.ERROR)

NOTES = "notes.jsonl"
PIECES = "pieces.json"
_PARTS = 512
"""At most so many parts are read, so that a kill costs little of a short corpus, and a long one has no tiny files."""
_SHARDS = 256
_SHARD_BYTES = 1 << 28
"""About so many files in a dataset, but none much larger than this."""


class Piece(NamedTuple):
    """Documents `first` to `stop` (exclusive) of a file of the dataset, enough for a worker to do at once."""

    split: str
    shard: int
    first: int
    stop: int


class OtherDataset(InputError):
    """The dataset that is there was made otherwise; `changed` says how, without a remedy."""

    def __init__(self, folder: str, made: str):
        self.changed = f"{folder} was made {made}"
        super().__init__(f"{self.changed}: remove it, or keep these documents in another --data_dir")


class CorpusDocuments(tfds.core.ShardBasedBuilder, skip_registration=True):
    """A corpus as documents; in each file of the dataset they are in the order in which the corpus lists them.

    Features: `text`; `document_id`; `title` (or path); `bytes`, of the text in UTF-8; `license`, "" if unknown.
    """

    VERSION = tfds.core.Version("1.0.0")
    CORPUS: ClassVar[type]

    def __init__(
        self,
        *,
        corpus: Corpus | Published | None = None,
        validation: float = 0.1,
        test: float = 0.1,
        seed: int = 0,
        piece_bytes: int = 1 << 23,
        **kwargs: Any,
    ):
        """Builder, or reader of what was built.

        Args:
            corpus: how the raw files are read; the corpus's own defaults if not given.
            validation, test: shares held out if the raw files are not in splits themselves.
            seed: of these.
            piece_bytes: of text, about, in each of its `pieces`.
            kwargs: `data_dir` and the other arguments of TFDS's builders.
        """
        self.corpus: Any = corpus or self.CORPUS()
        self._any_settings = corpus is None
        self._splits, self._piece_bytes = (validation, test, seed), piece_bytes
        self._beam: Beam | None = None
        self._parts: list[_Part] = []
        self.MANUAL_DOWNLOAD_INSTRUCTIONS = f"manual_dir: the raw files of {self.CORPUS.__name__}"
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        features = {"text": text, "document_id": text, "title": text, "bytes": np.int64, "license": text}
        description = f"Whole documents of {self.CORPUS.__name__}, made by memorizing."
        return tfds.core.DatasetInfo(
            builder=self,
            description=description,
            features=tfds.features.FeaturesDict(features),
            metadata=tfds.core.MetadataDict(),
        )

    def download_and_prepare(self, *, download_config: tfds.download.DownloadConfig | None = None, **kwargs) -> None:
        """As TFDS's, from the raw files in `download_config.manual_dir`; Beam if it names a `beam_runner`.

        Raises:
            InputError: for raw files that cannot be read, and for a dataset that is there but was made otherwise.
        """
        config = download_config or tfds.download.DownloadConfig()
        if config.beam_runner:
            self._beam = Beam(config.beam_runner, config.beam_options)
        published = isinstance(self.corpus, Published)
        raw = None if published or config.manual_dir is None else Path(config.manual_dir).absolute()
        if raw is None and self.data_path.exists():
            if not self._any_settings:
                self._refuse_other({"settings": self._settings()})
            return  # as with every dataset that is there
        if raw is None and not published:
            raise InputError(
                f"{self.data_dir} does not exist, and no manual_dir says which raw files to make it of; "
                "`memorizing prepare --data_dir` makes it"
            )
        with folder_lock(self._parts_folder, f"{self.data_dir}: another process is making it now; let it end"):
            self._parts = self._listed(raw)
            wanted = {"settings": self._settings(), "files": self._files(), "raw": str(raw or "")}
            if self.data_path.exists():
                self._refuse_other(wanted)
            for leftover in self.data_path.parent.glob(f"incomplete.*_{self.data_path.name}"):
                shutil.rmtree(leftover)
            self.info.metadata.update(wanted)
            super().download_and_prepare(download_config=config, **kwargs)
        shutil.rmtree(self._parts_folder, ignore_errors=True)

    @property
    def is_published(self) -> bool:
        """Whether the dataset is there and was made of what TFDS publishes."""
        return self.data_path.exists() and self.info.metadata.get("raw") == ""

    def made_of(self) -> dict[str, str]:
        """Settings and digest of the raw files of which the dataset was made."""
        return {name: self.info.metadata[name] for name in ("settings", "files")}

    def state(self, raw: Path | None) -> str:
        """The digest of the raw files as they are now, without reading them; without any, of those of the dataset."""
        if raw is None and self.data_path.exists():
            return self.made_of()["files"]
        if not isinstance(self.corpus, Published):
            self._parts = self._listed(raw)
        return self._files()

    def _files(self) -> str:
        if isinstance(self.corpus, Published):
            return f"TFDS {self.corpus.name}"
        names = "".join(part.path.name for part in self._parts)
        return hashlib.sha256(names.encode()).hexdigest()

    def _refuse_other(self, wanted: Mapping[str, str]) -> None:
        made = dict(self.info.metadata or {})
        if made.get("settings") != wanted["settings"]:
            raise OtherDataset(self.data_dir, f"with settings {made.get('settings')}, not with {wanted['settings']}")
        if "files" in wanted and made.get("files") != wanted["files"]:
            was, now = (repr(its.get("raw") or "what TFDS publishes") for its in (made, wanted))
            others = "whose files have changed since" if was == now else f"whose files are others than those in {now}"
            raise OtherDataset(self.data_dir, f"from {was}, {others}")

    @property
    def _parts_folder(self) -> Path:
        return Path(self.data_dir_root) / f"{self.name}.unfinished"

    def _settings(self) -> str:
        names = ("validation", "test", "seed")
        return f"{self.corpus!r} {dict(zip(names, self._splits, strict=True))} piece_bytes={self._piece_bytes}"

    def _shard_iterators_per_split(
        self, dl_manager: tfds.download.DownloadManager
    ) -> Mapping[str, Sequence[Callable[[], Iterator[tuple[int, dict[str, Any]]]]]]:
        do(self._parts, "reading documents", self._beam)
        known, copies, places, problems = [], [], [], []
        for part in self._parts:
            for entry in part.entries():
                known.append(Known(entry.item, entry.digest, entry.split))
                copies.append(entry.id != entry.item)
                places.append(_Place(part.text, entry.start, entry.length))
            problems += part.problems()
        if not known:
            raise InputError(
                f"no document is left of {dl_manager.manual_dir}: {'; '.join(map(': '.join, problems[:5]))}"
            )
        splits, repeated = assign_splits(known, *self._splits)
        atomic_write(Path(self.data_dir) / NOTES, "".join(json.dumps(note) + "\n" for note in [*problems, *repeated]))
        total = sum(place.length for place in places)
        shard_bytes = min(max(total // _SHARDS, self._piece_bytes), _SHARD_BYTES)
        shards: dict[str, list[_Shard]] = {}
        pieces: dict[str, list[Piece]] = {}
        shard_size, piece_size = dict.fromkeys(splits, shard_bytes), dict.fromkeys(splits, self._piece_bytes)
        for split, place, copy in zip(splits, places, copies, strict=True):
            if copy and split != "train":
                continue
            own = shards.setdefault(split, [])
            if shard_size[split] >= shard_bytes:
                own.append(_Shard([]))
                shard_size[split], piece_size[split] = 0, self._piece_bytes
            if piece_size[split] >= self._piece_bytes:
                pieces.setdefault(split, []).append(Piece(split, len(own) - 1, len(own[-1].places), 0))
                piece_size[split] = 0
            own[-1].places.append(place)
            pieces[split][-1] = pieces[split][-1]._replace(stop=len(own[-1].places))
            shard_size[split] += place.length
            piece_size[split] += place.length
        atomic_write(Path(self.data_dir) / PIECES, json.dumps(pieces))
        return shards

    def _listed(self, raw: Path | None) -> list["_Part"]:
        """The work of reading. A part is named by what it reads, so that one which was done is found again."""
        items, named, states, others = self.corpus.list(raw), {}, {}, ""
        if raw is not None:  # named below it, so that it may be seen from elsewhere
            for path in {item.path: Path(item.path) for item in items}.values():
                named[str(path)] = str(path.relative_to(raw) if path.is_relative_to(raw) else path)
                states[str(path)] = state_of(raw, _files_in(path))
            others = state_of(raw, self.corpus.metadata_files(raw)) if isinstance(self.corpus, HasMetadata) else ""
        size, parts = -(-len(items) // _PARTS), []
        for first in range(0, len(items), size):
            some = tuple(items[first : first + size])
            reads = [(item._replace(path=named.get(item.path, item.path)), states.get(item.path)) for item in some]
            digest = hashlib.sha256(json.dumps([repr(self.corpus), reads, others]).encode()).hexdigest()
            parts.append(_Part(self._parts_folder / f"{digest[:32]}.json", self.corpus, some))
        return parts


class Pg19Documents(CorpusDocuments):
    """Books of Project Gutenberg."""

    CORPUS = Pg19


class ArxivDocuments(CorpusDocuments):
    """LaTeX sources of papers."""

    CORPUS = Arxiv


class GithubDocuments(CorpusDocuments):
    """Repositories of source code."""

    CORPUS = Github


class IsabelleDocuments(CorpusDocuments):
    """Entries of the Archive of Formal Proofs."""

    CORPUS = Isabelle


class C4Documents(CorpusDocuments):
    """Web pages."""

    CORPUS = C4


def _files_in(path: Path) -> list[Path]:
    """A file itself, or all files of a folder, in a fixed order."""
    return sorted(folder / name for folder, _, names in path.walk() for name in names) if path.is_dir() else [path]


def notes(builder: CorpusDocuments) -> list[Problem]:
    """What was left out or odd in the raw files of a dataset that was built."""
    return [Problem(*json.loads(line)) for line in (Path(builder.data_dir) / NOTES).read_text().splitlines()]


def pieces(builder: CorpusDocuments) -> dict[Split, list[Piece]]:
    """The documents of a dataset that was built, split by split, in pieces."""
    found = json.loads((Path(builder.data_dir) / PIECES).read_text())
    return {split: [Piece(*piece) for piece in found[split]] for split in SPLITS if split in found}


def read(builder: CorpusDocuments, piece: Piece) -> Iterator[Document]:
    """The documents of a piece, in order. Straight from the file: setting up a pipeline of TensorFlow takes longer.

    Raises:
        InputError: when they are not all there.
    """
    import tensorflow as tf

    file = os.fspath(builder.info.splits[piece.split].filepaths[piece.shard])
    examples = itertools.islice(tf.compat.v1.io.tf_record_iterator(file), piece.first, piece.stop)
    count = 0
    try:
        for example in map(builder.info.features.deserialize_example_np, examples):
            id, title, text, license = (example[name].decode() for name in ("document_id", "title", "text", "license"))
            yield Document(id, title, text, license)
            count += 1
        if count < piece.stop - piece.first:
            raise EOFError("it ends too early")
    except (tf.errors.OpError, EOFError) as error:
        raise InputError(
            f"{file} is damaged after document {piece.first + count} ({error}): remove {builder.data_dir}, so that the "
            "raw files are read again"
        ) from error


class _Entry(NamedTuple):
    """A document that was read, and where its line starts in the file of the part.

    `item` is what its split depends on: its own name, or of a further document of the same text in another order
    (`OWNER/NAME#2`, for training only) that of the first.
    """

    id: str
    item: str
    digest: str
    split: Split | None
    start: int
    length: int


@dataclasses.dataclass(frozen=True)
class _Part:
    """Items that are read together: documents go to `text`, a line each; `path` says what is in it."""

    path: Path
    corpus: Corpus | Published
    items: tuple[Item, ...]

    @property
    def text(self) -> Path:
        return self.path.with_suffix(".jsonl")

    def __call__(self) -> None:
        found: list[Any] = []
        write_once(self.text, lambda path: found.extend(self._write(path)))
        write_once(self.path, lambda path: path.write_text(json.dumps(found)))

    def _write(self, path: Path) -> tuple[list[_Entry], list[Problem]]:
        entries, problems, start = [], [], 0
        with path.open("wb") as file:
            for item in self.items:
                own: set[str] = set()
                for reading in self.corpus.read(item):
                    problems += [Problem(*map(writable, problem)) for problem in reading.problems]
                    if (document := reading.document) is not None:
                        id, title, text, license = map(writable, document[:4])
                        line = json.dumps([id, title, text, license], ensure_ascii=False).encode("utf-8") + b"\n"
                        digest = hashlib.sha256(text.encode("utf-8")).hexdigest()
                        first = writable(item.id) if document.id.startswith(f"{item.id}#") else id
                        if first != id and digest in own:  # so few files have no further order
                            problems.append(Problem(id, "left out: in the same order as another of its documents"))
                            continue
                        own.add(digest)
                        entries.append(_Entry(id, first, digest, item.split, start, len(line)))
                        start += file.write(line)
        return entries, problems

    def entries(self) -> list[_Entry]:
        return [_Entry(*entry) for entry in json.loads(self.path.read_text())[0]]

    def problems(self) -> list[Problem]:
        return [Problem(*problem) for problem in json.loads(self.path.read_text())[1]]


class _Place(NamedTuple):
    text: Path
    start: int
    length: int


class _Shard(NamedTuple):
    """Documents of a file of the dataset; gives them when called."""

    places: list[_Place]

    def __call__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for key, place in enumerate(self.places):
            with place.text.open("rb") as file:
                file.seek(place.start)
                id, title, text, license = json.loads(file.read(place.length))
            size = len(text.encode("utf-8"))
            yield key, {"text": text, "document_id": id, "title": title, "bytes": size, "license": license}


BUILDERS: dict[str, type[CorpusDocuments]] = {
    "pg19": Pg19Documents,
    "arxiv": ArxivDocuments,
    "github": GithubDocuments,
    "isabelle": IsabelleDocuments,
    "c4": C4Documents,
}
