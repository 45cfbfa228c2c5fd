"""Where documents come from, behind one contract: a folder, the recall task, a corpus, a seqio task.

A source says which documents are in which split, in pieces, and reads a piece anywhere, any time. Only the last two
need TensorFlow, and load it when they are opened.
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
from typing import Any, Protocol, runtime_checkable

from memorizing.data.bulk import Beam, BeamSettings
from memorizing.data.documents import SPLITS, Document, FolderDocuments, Known, Problem, Split, assign_splits
from memorizing.data.recall import RecallDocuments, words
from memorizing.data.settings import PrepareSettings
from memorizing.data.vocabulary import Vocabulary, WordVocabulary
from memorizing.errors import InputError

type Piece = Any
"""Documents that are read together; what it is, only its source knows. Can be pickled."""


@runtime_checkable
class Source(Protocol):
    """Documents in splits.

    Attributes:
        vocabulary: if it has one of its own, else None.
        problems: with what is in no piece, known once it is open.
        digest: of the documents as far as they are known once it is open, and of how they are read; others have
            another.
        in_beam: whether its pieces are worth sending to Beam's workers.
        repeats: whether the same document may be in two of its splits, which only shows when it is read.
    """

    vocabulary: Vocabulary | None
    problems: list[Problem]
    digest: str

    @property
    def in_beam(self) -> bool: ...

    @property
    def repeats(self) -> bool: ...

    def open(self, report: Callable[[str], None]) -> dict[Split, list[Piece]]:
        """All pieces. A killed run that opens it again gets the same.

        Raises:
            InputError: when there is nothing to read.
        """
        ...

    def read(self, piece: Piece) -> Iterator[Document | Problem]: ...

    def state(self) -> str:
        """Of the files it reads, open or not: with other sizes or times they have another. "" if it reads none."""
        ...


def open_source(
    settings: PrepareSettings,
    sections: Mapping[str, Any],
    beam: BeamSettings,
    raw: Path | None,
    data_dir: Path | None,
    work: Path,
) -> Source:
    """The source that the settings name."""
    if settings.source == "task":
        return TaskSource(settings, data_dir)
    if settings.source == "recall":
        documents = RecallDocuments(sections["recall"], settings.seed)
        return Listed(settings, documents, vocabulary=WordVocabulary(words(sections["recall"])))
    if settings.source == "folder":
        if raw is None:
            raise InputError("--raw is missing: name the folder that holds the documents")
        return Listed(settings, FolderDocuments(raw, sections["folder"]))
    corpus = sections[settings.source]
    if data_dir is not None:
        return CorpusSource(settings, corpus, beam, raw, data_dir.absolute())
    reads = [settings.source, repr(corpus), settings.validation, settings.test, settings.seed, settings.part_bytes]
    digest = hashlib.sha256(json.dumps([*reads, str(raw)]).encode()).hexdigest()[:32]
    return CorpusSource(settings, corpus, beam, raw, work / "documents" / digest, kept=False)


@runtime_checkable
class _Documents(Protocol):
    problems: list[Problem]

    @property
    def state(self) -> str: ...

    def ids(self) -> list[str]: ...

    def read(self, ids: list[str]) -> Iterator[Document | Problem]: ...


@dataclasses.dataclass
class Listed:
    """Documents with names, which are read once more to tokenize them: a folder, or the recall task."""

    settings: PrepareSettings
    documents: _Documents
    vocabulary: Vocabulary | None = None
    problems: list[Problem] = dataclasses.field(default_factory=list)
    digest: str = ""
    in_beam: bool = False
    repeats: bool = False

    def open(self, report: Callable[[str], None]) -> dict[Split, list[Piece]]:
        known, sizes = self._known()
        splits, copies = assign_splits(known, self.settings.validation, self.settings.test, self.settings.seed)
        self.problems += [*self.documents.problems, *copies]
        pieces: dict[Split, list[Piece]] = {split: [] for split in SPLITS if split in splits}
        full = dict.fromkeys(pieces, self.settings.part_bytes)
        for document, split, size in zip(known, splits, sizes, strict=True):
            if full[split] >= self.settings.part_bytes:
                pieces[split].append([])
                full[split] = 0
            pieces[split][-1].append(document.id)
            full[split] += size
        counts = ", ".join(f"{splits.count(split)} {split}" for split in pieces)
        report(f"{len(known)} documents: {counts}")
        return pieces

    def read(self, piece: Piece) -> Iterator[Document | Problem]:
        return self.documents.read(piece)

    def state(self) -> str:
        return self.documents.state

    def _known(self) -> tuple[list[Known], list[int]]:
        """Digests and sizes of all documents; what is wrong with the others goes to `problems`."""
        known, sizes = [], []
        for id in self.documents.ids():
            problems = []
            for found in self.documents.read([id]):
                if isinstance(found, Problem):
                    problems.append(found)
                else:
                    text = found.text.encode("utf-8")
                    known.append(Known(id, hashlib.sha256(text).hexdigest()))
                    sizes.append(len(text))
            if not known or known[-1].id != id:
                self.problems += problems
        self.digest = hashlib.sha256(json.dumps(known).encode()).hexdigest()
        return known, sizes


@dataclasses.dataclass
class CorpusSource:
    """A corpus of the paper: a TFDS dataset of its documents is built, or found in `data_dir`, and read.

    Attributes:
        kept: whether datasets in `data_dir` are the user's; others, which lie in OUT.unfinished, are made again when
            the raw files have changed.
        found: the state of the raw files when it was opened.
    """

    settings: PrepareSettings
    corpus: Any
    beam: BeamSettings
    raw: Path | None
    data_dir: Path
    kept: bool = True
    problems: list[Problem] = dataclasses.field(default_factory=list)
    vocabulary: Vocabulary | None = None
    digest: str = ""
    found: str = ""
    repeats: bool = False

    @property
    def in_beam(self) -> bool:
        """The default, Beam's runner in this process, would only add the second that it takes to start."""
        return self.beam != BeamSettings()

    def open(self, report: Callable[[str], None]) -> dict[Split, list[Piece]]:
        builders, builder = self._builder()
        try:
            self._build(builder)
        except builders.OtherDataset as error:
            if self.kept:
                raise
            report(f"{error.changed}: they are read again")
            shutil.rmtree(builder.data_dir)
            _, builder = self._builder()
            self._build(builder)
        self.problems = builders.notes(builder)
        made_of = builder.made_of()
        self.digest, self.found = json.dumps(made_of), made_of["files"]
        pieces: dict[Split, list[Piece]] = builders.pieces(builder)
        counts = {split: builder.info.splits[split].num_examples for split in pieces}
        report(f"{sum(counts.values())} documents: " + ", ".join(f"{n} {split}" for split, n in counts.items()))
        return pieces

    def read(self, piece: Piece) -> Iterator[Document | Problem]:
        builders, builder = self._builder()
        return builders.read(builder, piece)

    def state(self) -> str:
        return self.found or self._builder()[1].state(self.raw)

    def _build(self, builder: Any) -> None:
        tfds, beam = needed("tensorflow_datasets", self.settings.source), Beam.of(self.beam)
        config = tfds.download.DownloadConfig(manual_dir=self.raw, beam_runner=beam.runner, beam_options=beam.options)
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS tells where it puts what, of which nothing may stay
            builder.download_and_prepare(download_config=config)

    def _builder(self) -> tuple[Any, Any]:
        """Without raw files, of a dataset that is there; if there is none, of what TFDS publishes."""
        builders = needed("memorizing.data.builders", self.settings.source)
        from memorizing.data.corpora.published import PUBLISHED, Published

        def made_by(corpus: Any) -> Any:
            return builders.BUILDERS[self.settings.source](
                corpus=corpus,
                validation=self.settings.validation,
                test=self.settings.test,
                seed=self.settings.seed,
                piece_bytes=self.settings.part_bytes,
                data_dir=self.data_dir,
            )

        builder = made_by(self.corpus)
        if self.raw is not None or (builder.data_path.exists() and not builder.is_published):
            return builders, builder
        if self.settings.source not in PUBLISHED:
            raise InputError(
                f"--raw is missing: name the folder that holds the files of {self.settings.source}, or with --data_dir "
                f"one in which their documents are already ({builder.data_path} is not there)"
            )
        least = getattr(self.corpus, "minimum_bytes", 1)
        return builders, made_by(Published(self.settings.source, str(self.data_dir), least, self.beam))


@dataclasses.dataclass
class TaskSource:
    """A task or mixture of seqio's registry, whose feature `targets` has a document's tokens."""

    settings: PrepareSettings
    data_dir: Path | None
    problems: list[Problem] = dataclasses.field(default_factory=list)
    vocabulary: Vocabulary | None = None
    digest: str = ""
    in_beam: bool = False
    repeats: bool = True

    def open(self, report: Callable[[str], None]) -> dict[Split, list[Piece]]:
        tasks = needed("memorizing.data.tasks", "task")
        vocabulary = self.settings.vocabulary_from
        tasks.use(self.data_dir, Path(vocabulary) if vocabulary else None)
        task = tasks.find(self.settings.task, self.settings.task_modules)
        self.vocabulary = tasks.vocabulary_of(task)
        pieces = tasks.pieces(task)
        self.digest = f"{task.name} {pieces} {tasks.state(task)}"
        members = tasks.members(task)
        others = [(its.name, split) for its in members for split in tasks.splits_of(its) if split not in SPLITS]
        self.problems = [Problem(name, f"left out: its split {split}") for name, split in others]
        report(f"{task.name}: splits {', '.join(pieces)}, vocabulary of {self.vocabulary.size} tokens")
        if members != [task]:
            names = ", ".join(its.name for its in members)
            report(f"  a mixture: every document of {names} once, at whatever rate they are mixed")
        return pieces

    def read(self, piece: Piece) -> Iterator[Document | Problem]:
        tasks = needed("memorizing.data.tasks", "task")
        task = tasks.find(self.settings.task, self.settings.task_modules)
        return tasks.read(task, piece, self.settings.seed)

    def state(self) -> str:
        tasks = needed("memorizing.data.tasks", "task")
        tasks.use(self.data_dir)
        return tasks.state(tasks.find(self.settings.task, self.settings.task_modules))


def needed(module: str, source: str) -> Any:
    """A module that needs the extra `prepare`.

    Raises:
        InputError: when it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise InputError(
            f"Prepare.source = {source!r} needs {error.name}, which is not installed: install the extra `prepare` "
            "(EXTRA=prepare bash launch/setup.sh, or pip install 'memorizing[prepare]')"
        ) from error
