"""TFDS datasets of the corpora: from raw files to whole documents.

    import memorizing.data.builders                                        registers them with TFDS
    builder = tfds.builder("pg19_documents", data_dir=..., corpus=Pg19())
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=RAW))
    builder.as_dataset(split="train")

Jobs read the raw files, on Beam if the download config names a runner. Each job's result stays under DATA_DIR until the
dataset is complete, so a killed run reads only what is missing. TFDS's own Beam writer sends all text through a
shuffle, which on the direct runner holds the corpus in memory. Here a document is only in the worker that reads it, and
then in the one that writes its shard.
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

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # keeps TensorFlow quiet; it computes nothing here
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

import numpy as np
import tensorflow_datasets as tfds

from memorizing.data.bulk import Beam, run_jobs, write_once
from memorizing.data.corpora.corpus import Corpus, Item
from memorizing.data.corpora.published import Published
from memorizing.data.corpora.table import CORPORA
from memorizing.data.documents import (
    SPLITS,
    Document,
    Problem,
    Split,
    SplitKey,
    assign_splits,
    files_digest,
    writable,
)
from memorizing.errors import InputError
from memorizing.files import atomic_write, folder_lock

logging.getLogger("tensorflow").setLevel(logging.ERROR)

NOTES = "notes.jsonl"
RANGES = "ranges.json"
_MOST_JOBS = 512
"""Number of jobs at most. A kill costs little of a small corpus, and a large one does not make many small files."""
_SHARDS = 256
_SHARD_BYTES = 1 << 28
"""Shards of a dataset: about `_SHARDS` files, none much larger than `_SHARD_BYTES`."""


class ShardRange(NamedTuple):
    """Documents `first` to `stop` (exclusive) of a shard of the dataset: one part for a worker."""

    split: str
    shard: int
    first: int
    stop: int


class OtherDataset(InputError):
    """Raised if the existing dataset was built from other files or settings; `changed` says how it differs."""

    def __init__(self, folder: str, made: str):
        self.changed = f"{folder} was made {made}"
        super().__init__(f"{self.changed}. Remove it, or use another --data_dir for these documents")


class CorpusDocuments(tfds.core.ShardBasedBuilder, skip_registration=True):
    """A corpus as documents. Each shard holds them in the order in which the corpus lists them.

    Features: `text`; `document_id`; `title` (or path); `bytes`, of the text in UTF-8; `license`, "" if unknown.
    """

    VERSION = tfds.core.Version("2.0.0")
    CORPUS: ClassVar[type]

    def __init__(
        self,
        *,
        corpus: Corpus | Published | None = None,
        validation: float = 0.1,
        test: float = 0.1,
        seed: int = 0,
        part_bytes: int = 1 << 23,
        **kwargs: Any,
    ):
        """Makes a builder, or a reader of an existing dataset.

        Args:
            corpus: how to read the raw files; by default the corpus with its default settings.
            validation, test: shares held out if the raw files have no splits.
            seed: random seed of the splits.
            part_bytes: bytes of text, approximately, in each of its `shard_ranges`.
            kwargs: `data_dir` and the other arguments of TFDS's builders.
        """
        self.corpus: Any = corpus or self.CORPUS()
        self._has_default_settings = corpus is None
        self._splits, self._part_bytes = (validation, test, seed), part_bytes
        self._beam: Beam | None = None
        self._jobs: list[_ReadJob] = []
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
        """Builds the dataset from the raw files in `download_config.manual_dir`, on Beam if it names a `beam_runner`.

        Raises:
            InputError: if raw files cannot be read, or the existing dataset was built from other files or settings.
        """
        config = download_config or tfds.download.DownloadConfig()
        if config.beam_runner:
            self._beam = Beam(config.beam_runner, config.beam_options)
        published = isinstance(self.corpus, Published)
        raw = None if published or config.manual_dir is None else Path(config.manual_dir).absolute()
        if raw is None and self.data_path.exists():
            if not self._has_default_settings:
                self._refuse_other({"settings": self._settings()})
            return  # TFDS does the same for every existing dataset
        if raw is None and not published:
            raise InputError(
                f"{self.data_dir} does not exist, and manual_dir does not name raw files to build it from. Run "
                "`memorizing prepare --data_dir`"
            )
        with folder_lock(self._jobs_folder, f"{self.data_dir}: another process is building it now. Wait until it ends"):
            self._jobs = self._list_jobs(raw)
            wanted = {"settings": self._settings(), "files": self._files(), "raw": str(raw or "")}
            if self.data_path.exists():
                self._refuse_other(wanted)
            for leftover in self.data_path.parent.glob(f"incomplete.*_{self.data_path.name}"):
                shutil.rmtree(leftover)
            self.info.metadata.update(wanted)
            super().download_and_prepare(download_config=config, **kwargs)
        shutil.rmtree(self._jobs_folder, ignore_errors=True)

    @property
    def is_published(self) -> bool:
        """True if the dataset exists and was built from TFDS's own dataset of the corpus."""
        return self.data_path.exists() and self.info.metadata.get("raw") == ""

    def origin(self) -> dict[str, str]:
        """Returns the settings and the digest of the raw files that the dataset was built from."""
        return {name: self.info.metadata[name] for name in ("settings", "files")}

    def state(self, raw: Path | None) -> str:
        """Returns the digest of the raw files by names, sizes and times; without `raw`, the one of the existing
        dataset.
        """
        if raw is None and self.data_path.exists():
            return self.origin()["files"]
        if not isinstance(self.corpus, Published):
            self._jobs = self._list_jobs(raw)
        return self._files()

    def _files(self) -> str:
        if isinstance(self.corpus, Published):
            return f"TFDS {self.corpus.name}"
        names = "".join(job.path.name for job in self._jobs)
        return hashlib.sha256(names.encode()).hexdigest()

    def _refuse_other(self, wanted: Mapping[str, str]) -> None:
        made = dict(self.info.metadata or {})
        if made.get("settings") != wanted["settings"]:
            raise OtherDataset(self.data_dir, f"with settings {made.get('settings')}, not with {wanted['settings']}")
        if "files" in wanted and made.get("files") != wanted["files"]:
            was, now = (repr(origin.get("raw") or "TFDS's own dataset") for origin in (made, wanted))
            others = "whose files have changed since" if was == now else f"whose files differ from those in {now}"
            raise OtherDataset(self.data_dir, f"from {was}, {others}")

    @property
    def _jobs_folder(self) -> Path:
        return Path(self.data_dir_root) / f"{self.name}.unfinished"

    def _settings(self) -> str:
        names = ("validation", "test", "seed")
        return f"{self.corpus!r} {dict(zip(names, self._splits, strict=True))} part_bytes={self._part_bytes}"

    def _shard_iterators_per_split(
        self, dl_manager: tfds.download.DownloadManager
    ) -> Mapping[str, Sequence[Callable[[], Iterator[tuple[int, dict[str, Any]]]]]]:
        run_jobs(self._jobs, "reading documents", self._beam)
        keys, copies, places, problems = [], [], [], []
        for job in self._jobs:
            for record in job.records():
                keys.append(SplitKey(record.item, record.digest, record.split))
                copies.append(record.id != record.item)
                places.append(_Place(job.text, record.start, record.length))
            problems += job.problems()
        if not keys:
            raise InputError(
                f"no document of {dl_manager.manual_dir} is left. Left out: {'; '.join(map(': '.join, problems[:5]))}. "
                "Change what leaves documents out, or give more documents"
            )
        splits, repeated = assign_splits(keys, *self._splits)
        atomic_write(Path(self.data_dir) / NOTES, "".join(json.dumps(note) + "\n" for note in [*problems, *repeated]))
        total = sum(place.length for place in places)
        shard_bytes = min(max(total // _SHARDS, self._part_bytes), _SHARD_BYTES)
        shards: dict[str, list[_Shard]] = {}
        shard_ranges: dict[str, list[ShardRange]] = {}
        shard_size, range_size = dict.fromkeys(splits, shard_bytes), dict.fromkeys(splits, self._part_bytes)
        for split, place, copy in zip(splits, places, copies, strict=True):
            if copy and split != "train":
                continue
            of_split = shards.setdefault(split, [])
            if shard_size[split] >= shard_bytes:
                of_split.append(_Shard([]))
                shard_size[split], range_size[split] = 0, self._part_bytes
            if range_size[split] >= self._part_bytes:
                shard_ranges.setdefault(split, []).append(
                    ShardRange(split, len(of_split) - 1, len(of_split[-1].places), 0)
                )
                range_size[split] = 0
            of_split[-1].places.append(place)
            shard_ranges[split][-1] = shard_ranges[split][-1]._replace(stop=len(of_split[-1].places))
            shard_size[split] += place.length
            range_size[split] += place.length
        atomic_write(Path(self.data_dir) / RANGES, json.dumps(shard_ranges))
        return shards

    def _list_jobs(self, raw: Path | None) -> list["_ReadJob"]:
        """Returns the jobs that read the raw files. A job's name is a digest of what it reads, so a resumed run finds
        it.
        """
        items, relative, states, metadata = self.corpus.list(raw), {}, {}, ""
        if raw is not None:  # relative names, so that the folder may be mounted elsewhere
            for path in {item.path: Path(item.path) for item in items}.values():
                relative[str(path)] = str(path.relative_to(raw) if path.is_relative_to(raw) else path)
                states[str(path)] = files_digest(raw, _files_in(path))
            metadata = files_digest(raw, self.corpus.metadata_files(raw))
        size, jobs = -(-len(items) // _MOST_JOBS), []
        for first in range(0, len(items), size):
            group = tuple(items[first : first + size])
            reads = [(item._replace(path=relative.get(item.path, item.path)), states.get(item.path)) for item in group]
            digest = hashlib.sha256(json.dumps([repr(self.corpus), reads, metadata]).encode()).hexdigest()
            jobs.append(_ReadJob(self._jobs_folder / f"{digest[:32]}.json", self.corpus, group))
        return jobs


def _files_in(path: Path) -> list[Path]:
    """Returns a file itself, or all files of a folder in a fixed order."""
    return sorted(folder / name for folder, _, names in path.walk() for name in names) if path.is_dir() else [path]


def problems(builder: CorpusDocuments) -> list[Problem]:
    """Returns notes on the raw files of a dataset: what was left out or unusual."""
    return [Problem(*json.loads(line)) for line in (Path(builder.data_dir) / NOTES).read_text().splitlines()]


def shard_ranges(builder: CorpusDocuments) -> dict[Split, list[ShardRange]]:
    """Returns the documents of a dataset as ranges of its shards, by split."""
    ranges = json.loads((Path(builder.data_dir) / RANGES).read_text())
    return {split: [ShardRange(*values) for values in ranges[split]] for split in SPLITS if split in ranges}


def read(builder: CorpusDocuments, shard_range: ShardRange) -> Iterator[Document]:
    """Yields the documents of a range in order. It reads the file directly, which starts faster than a `tf.data`
    pipeline.

    Raises:
        InputError: if documents are missing or damaged.
    """
    import tensorflow as tf

    file = os.fspath(builder.info.splits[shard_range.split].filepaths[shard_range.shard])
    examples = itertools.islice(tf.compat.v1.io.tf_record_iterator(file), shard_range.first, shard_range.stop)
    count = 0
    try:
        for example in map(builder.info.features.deserialize_example_np, examples):
            id, title, text, license = (example[name].decode() for name in ("document_id", "title", "text", "license"))
            yield Document(id, title, text, license)
            count += 1
        if count < shard_range.stop - shard_range.first:
            raise EOFError("it ends too early")
    except (tf.errors.OpError, EOFError) as error:
        raise InputError(
            f"{file} is damaged after document {shard_range.first + count} ({error}). Remove {builder.data_dir} and "
            "prepare again from the raw files"
        ) from error


class _Record(NamedTuple):
    """A document that was read, and the place of its line in the job's text file.

    Attributes:
        id: name of the document.
        item: name that its split depends on. For another order of the same document (`OWNER/NAME#2`, only for
            training), this is the name of the first order.
        digest: digest of its text.
        split: split that the layout gives, or None.
        start, length: bytes of its line.
    """

    id: str
    item: str
    digest: str
    split: Split | None
    start: int
    length: int


@dataclasses.dataclass(frozen=True)
class _ReadJob:
    """Reads a group of items. Documents go to `text`, one line each; `path` indexes them and holds the notes."""

    path: Path
    corpus: Corpus | Published
    items: tuple[Item, ...]

    @property
    def text(self) -> Path:
        return self.path.with_suffix(".jsonl")

    def __call__(self) -> None:
        contents: list[Any] = []
        write_once(self.text, lambda path: contents.extend(self._write(path)))
        write_once(self.path, lambda path: path.write_text(json.dumps(contents)))

    def _write(self, path: Path) -> tuple[list[_Record], list[Problem]]:
        records, problems, start = [], [], 0
        with path.open("wb") as file:
            for item in self.items:
                digests: set[str] = set()
                for reading in self.corpus.read(item):
                    problems += [Problem(*map(writable, problem)) for problem in reading.problems]
                    if (document := reading.document) is not None:
                        id, title, text, license = map(writable, document[:4])
                        line = json.dumps([id, title, text, license], ensure_ascii=False).encode("utf-8") + b"\n"
                        digest = hashlib.sha256(text.encode("utf-8")).hexdigest()
                        first = writable(item.id) if document.id.startswith(f"{item.id}#") else id
                        if first != id and digest in digests:  # few files have few orders
                            problems.append(Problem(id, "left out: in the same order as another of its documents"))
                            continue
                        digests.add(digest)
                        records.append(_Record(id, first, digest, item.split, start, len(line)))
                        start += file.write(line)
        return records, problems

    def records(self) -> list[_Record]:
        return [_Record(*record) for record in json.loads(self.path.read_text())[0]]

    def problems(self) -> list[Problem]:
        return [Problem(*problem) for problem in json.loads(self.path.read_text())[1]]


class _Place(NamedTuple):
    text: Path
    start: int
    length: int


class _Shard(NamedTuple):
    """The documents of a shard of the dataset; calling it yields them."""

    places: list[_Place]

    def __call__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for key, place in enumerate(self.places):
            with place.text.open("rb") as file:
                file.seek(place.start)
                id, title, text, license = json.loads(file.read(place.length))
            size = len(text.encode("utf-8"))
            yield key, {"text": text, "document_id": id, "title": title, "bytes": size, "license": license}


BUILDERS: dict[str, type[CorpusDocuments]] = {
    name: type(f"{corpus.__name__}Documents", (CorpusDocuments,), {"CORPUS": corpus, "__module__": __name__})
    for name, corpus in CORPORA.items()
}
"""The builder of each corpus. TFDS registers it as `pg19_documents` and so on when it is defined."""
