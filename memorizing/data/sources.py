"""Sources of documents behind one contract: a folder, the recall task, a corpus, a seqio task.

A source says which documents are in which split, grouped in parts, and reads a part on any worker at any time. Corpora
and seqio tasks need TensorFlow; their sources import it when they are opened. `settings.SOURCES` lists the names.
"""

import contextlib
import dataclasses
import hashlib
import importlib
import io
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from memorizing.data.bulk import Beam, BeamSettings
from memorizing.data.corpora.corpus import Corpus
from memorizing.data.documents import SPLITS, Document, FolderDocuments, Problem, Split, SplitKey, assign_splits
from memorizing.data.recall import RecallDocuments, words
from memorizing.data.settings import SOURCES, PrepareSettings
from memorizing.data.vocabulary import Vocabulary, WordVocabulary
from memorizing.errors import InputError

type Part = Any
"""Documents that are read and tokenized together. Each source has its own type of part; it can be pickled."""


class SourceRequest(NamedTuple):
    """The settings and folders that a source is opened with.

    Attributes:
        settings: `Prepare` settings.
        sections: settings of the sources, by their names in `settings.SOURCES`.
        beam: Beam runner and options.
        raw: folder of the source's files, or None.
        data_dir: folder in which TFDS stores a corpus's documents. None removes them once they are tokenized.
    """

    settings: PrepareSettings
    sections: Mapping[str, Any]
    beam: BeamSettings
    raw: Path | None
    data_dir: Path | None


@runtime_checkable
class Source(Protocol):
    """Documents in splits.

    Attributes:
        vocabulary: the source's own vocabulary, or None.
        problems: notes about files that are in no part. Complete once the source is open.
        digest: digest of the documents, as far as they are known when the source is open, and of how they are read.
        in_beam: whether to send parts to Beam's workers.
        repeats: whether two splits may hold the same document, which shows only when it is read.
    """

    vocabulary: Vocabulary | None
    problems: list[Problem]
    digest: str

    @property
    def in_beam(self) -> bool: ...

    @property
    def repeats(self) -> bool: ...

    def open(self, report: Callable[[str], None]) -> dict[Split, list[Part]]:
        """Returns all parts. A resumed run gets the same parts.

        Raises:
            InputError: if there is nothing to read.
        """
        ...

    def read(self, part: Part) -> Iterator[Document | Problem]: ...

    def state(self) -> str:
        """Returns a digest of the names, sizes and times of the files it reads, open or not; "" without files."""
        ...


def open_source(request: SourceRequest, work: Path) -> Source:
    """Returns the source that the settings name; `work` is a folder for its temporary files."""
    settings, raw = request.settings, request.raw
    if SOURCES[settings.source] is None:
        return TaskSource(settings, request.data_dir)
    section = request.sections[settings.source]
    if isinstance(section, Corpus):
        if request.data_dir is not None:
            return CorpusSource(settings, section, request.beam, raw, request.data_dir.absolute())
        reads = [settings.source, repr(section), settings.validation, settings.test, settings.seed, settings.part_bytes]
        digest = hashlib.sha256(json.dumps([*reads, str(raw)]).encode()).hexdigest()[:32]
        return CorpusSource(settings, section, request.beam, raw, work / "documents" / digest, is_temporary=True)
    if settings.source == "recall":
        return ListedSource(settings, RecallDocuments(section, settings.seed), WordVocabulary(words(section)))
    if raw is None:
        raise InputError("--raw is missing. Give the folder that holds the documents")
    return ListedSource(settings, FolderDocuments(raw, section))


@runtime_checkable
class _Documents(Protocol):
    problems: list[Problem]

    @property
    def state(self) -> str: ...

    def ids(self) -> list[str]: ...

    def split(self, id: str) -> Split | None: ...

    def read(self, ids: list[str]) -> Iterator[Document | Problem]: ...


@dataclasses.dataclass
class ListedSource:
    """A folder of text, or the recall task. Documents are read twice: to find duplicates, and to tokenize them."""

    settings: PrepareSettings
    documents: _Documents
    vocabulary: Vocabulary | None = None
    problems: list[Problem] = dataclasses.field(default_factory=list)
    digest: str = ""
    in_beam: bool = False
    repeats: bool = False

    def open(self, report: Callable[[str], None]) -> dict[Split, list[Part]]:
        keys, sizes = self._keys()
        splits, copies = assign_splits(keys, self.settings.validation, self.settings.test, self.settings.seed)
        self.problems += [*self.documents.problems, *copies]
        parts: dict[Split, list[Part]] = {split: [] for split in SPLITS if split in splits}
        part_size = dict.fromkeys(parts, self.settings.part_bytes)
        for key, split, size in zip(keys, splits, sizes, strict=True):
            if part_size[split] >= self.settings.part_bytes:
                parts[split].append([])
                part_size[split] = 0
            parts[split][-1].append(key.id)
            part_size[split] += size
        counts = ", ".join(f"{splits.count(split)} {split}" for split in parts)
        report(f"{len(keys)} documents: {counts}")
        return parts

    def read(self, part: Part) -> Iterator[Document | Problem]:
        return self.documents.read(part)

    def state(self) -> str:
        return self.documents.state

    def _keys(self) -> tuple[list[SplitKey], list[int]]:
        """Returns the split keys and sizes of all documents; adds to `problems` for files that are not documents."""
        keys, sizes = [], []
        for id in self.documents.ids():
            problems = []
            for result in self.documents.read([id]):
                if isinstance(result, Problem):
                    problems.append(result)
                else:
                    text = result.text.encode("utf-8")
                    keys.append(SplitKey(id, hashlib.sha256(text).hexdigest(), self.documents.split(id)))
                    sizes.append(len(text))
            if not keys or keys[-1].id != id:
                self.problems += problems
        self.digest = hashlib.sha256(json.dumps(keys).encode()).hexdigest()
        return keys, sizes


@dataclasses.dataclass
class CorpusSource:
    """A corpus of the paper. A TFDS dataset of its documents is built, or found in `data_dir`, and read.

    Attributes:
        is_temporary: whether `data_dir` lies in OUT.unfinished. Such datasets are built again when the raw files have
            changed; datasets in a folder of the user's are refused then.
        files: digest of the raw files when the source was opened.
    """

    settings: PrepareSettings
    corpus: Corpus
    beam: BeamSettings
    raw: Path | None
    data_dir: Path
    is_temporary: bool = False
    problems: list[Problem] = dataclasses.field(default_factory=list)
    vocabulary: Vocabulary | None = None
    digest: str = ""
    files: str = ""
    repeats: bool = False

    @property
    def in_beam(self) -> bool:
        """The default runner works in this process; it would only add its start-up time."""
        return self.beam != BeamSettings()

    def open(self, report: Callable[[str], None]) -> dict[Split, list[Part]]:
        builders, builder = self._builder()
        try:
            self._build(builder)
        except builders.OtherDataset as error:
            if not self.is_temporary:
                raise
            report(f"{error.changed}: they are read again")
            shutil.rmtree(builder.data_dir)
            _, builder = self._builder()
            self._build(builder)
        self.problems = builders.problems(builder)
        origin = builder.origin()
        self.digest, self.files = json.dumps(origin), origin["files"]
        parts: dict[Split, list[Part]] = builders.shard_ranges(builder)
        counts = {split: builder.info.splits[split].num_examples for split in parts}
        report(f"{sum(counts.values())} documents: " + ", ".join(f"{n} {split}" for split, n in counts.items()))
        return parts

    def read(self, part: Part) -> Iterator[Document | Problem]:
        builders, builder = self._builder()
        return builders.read(builder, part)

    def state(self) -> str:
        return self.files or self._builder()[1].state(self.raw)

    def _build(self, builder: Any) -> None:
        tfds = require_module("tensorflow_datasets", self.settings.source)
        beam = Beam.from_settings(self.beam)
        config = tfds.download.DownloadConfig(manual_dir=self.raw, beam_runner=beam.runner, beam_options=beam.options)
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints paths, which for a temporary dataset mislead
            builder.download_and_prepare(download_config=config)

    def _builder(self) -> tuple[Any, Any]:
        """Returns the module `builders` and a builder for the raw files, an existing dataset, or TFDS's own dataset."""
        name = self.settings.source
        builders = require_module("memorizing.data.builders", name)
        from memorizing.data.corpora.published import Published

        def make(corpus: Corpus | Published) -> Any:
            return builders.BUILDERS[name](
                corpus=corpus,
                validation=self.settings.validation,
                test=self.settings.test,
                seed=self.settings.seed,
                part_bytes=self.settings.part_bytes,
                data_dir=self.data_dir,
            )

        builder = make(self.corpus)
        if self.raw is not None or (builder.data_path.exists() and not builder.is_published):
            return builders, builder
        if self.corpus.published is None:
            raise InputError(
                f"--raw is missing. Give the folder that holds the files of {name}, or with --data_dir a folder that "
                f"already holds their documents ({builder.data_path} does not exist)"
            )
        least = getattr(self.corpus, "minimum_bytes", 1)
        return builders, make(Published(name, str(self.data_dir), least, self.beam))


@dataclasses.dataclass
class TaskSource:
    """A task or mixture of seqio's registry whose feature `targets` holds the tokens of a document."""

    settings: PrepareSettings
    data_dir: Path | None
    problems: list[Problem] = dataclasses.field(default_factory=list)
    vocabulary: Vocabulary | None = None
    digest: str = ""
    in_beam: bool = False
    repeats: bool = True

    def open(self, report: Callable[[str], None]) -> dict[Split, list[Part]]:
        vocabulary = self.settings.vocabulary_from
        tasks, task = self._task(Path(vocabulary) if vocabulary else None)
        self.vocabulary = tasks.vocabulary_of(task)
        parts = tasks.shards(task)
        self.digest = f"{task.name} {parts} {tasks.state(task)}"
        members = tasks.members(task)
        others = [(member.name, split) for member in members for split in tasks.splits_of(member)]
        self.problems = [Problem(name, f"left out: its split {split}") for name, split in others if split not in SPLITS]
        report(f"{task.name}: splits {', '.join(parts)}, vocabulary of {self.vocabulary.size} tokens")
        if members != [task]:
            names = ", ".join(member.name for member in members)
            report(f"  a mixture: reads every document of {names} once, whatever their rates")
        return parts

    def read(self, part: Part) -> Iterator[Document | Problem]:
        tasks = require_module("memorizing.data.tasks", "task")
        task = tasks.find(self.settings.task, self.settings.task_modules)
        return tasks.read(task, part, self.settings.seed)

    def state(self) -> str:
        tasks, task = self._task()
        return tasks.state(task)

    def _task(self, vocabulary: Path | None = None) -> tuple[Any, Any]:
        tasks = require_module("memorizing.data.tasks", "task")
        tasks.use(self.data_dir, vocabulary)
        return tasks, tasks.find(self.settings.task, self.settings.task_modules)


def require_module(module: str, source: str) -> Any:
    """Imports a module that needs the extra `prepare`.

    Raises:
        InputError: if the extra is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise InputError(
            f"Prepare.source = {source!r} needs {error.name}, which is not installed. Install the extra `prepare` "
            "(EXTRA=prepare bash launch/setup.sh, or pip install 'memorizing[prepare]')"
        ) from error
