"""`memorizing evaluate`: a checkpoint over corpora and splits, at several memory sizes, with and without XL cache.

Each reading of a split leaves files in WORKDIR/evaluations, named by what was read and how:

    [CORPUS-]SPLIT-memory-M[-xl|-no-xl][-NAME].json     the figures: `figures.py`
                                              .csv      a line for each document
                                              .npz      if asked for, every token: nats, correct; and ends of documents

How documents are read: `perplexity.py`.
"""

import csv
import dataclasses
import io
import itertools
import json
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from memorizing.errors import InputError
from memorizing.evaluation.answers import Answers
from memorizing.evaluation.corpora import Corpus
from memorizing.evaluation.figures import Baseline, Summary
from memorizing.evaluation.perplexity import DocumentScores, EvaluationSettings, check_losses, score_documents
from memorizing.files import AnyPath, atomic_write
from memorizing.memory.bank import Bank
from memorizing.memory.search import chosen
from memorizing.memory.settings import MemorySettings
from memorizing.model.settings import ModelSettings
from memorizing.model.transformer import Parameters, abstract_model
from memorizing.parallel.hosts import is_first, say
from memorizing.parallel.mesh import PARAMETER_RULES, placed, shardings
from memorizing.storage.checkpoints import Checkpoints, CorruptCheckpoint

FOLDER = "evaluations"
PUBLISHED_WORDS = {("pg19", "validation", 50): 3_007_061, ("pg19", "test", 100): 6_966_499}
"""By which PG-19's authors divide a loss (Rae et al., arXiv 1911.05507), by source, split and number of documents."""


class Run(NamedTuple):
    """A trained model, and how it reads."""

    workdir: AnyPath
    model: ModelSettings
    segment_length: int
    parameters: Parameters
    step: int


class Reading(NamedTuple):
    """One way to read a corpus's split.

    Attributes:
        name: tells its files from those of other settings.
        prebuilt: the memory that each document starts with; of no banks for an empty one.
    """

    corpus: Corpus
    memory: MemorySettings
    mesh: Mesh
    xl_cache: bool
    name: str = ""
    prebuilt: tuple[Bank, ...] = ()

    def file(self, trained_with_xl_cache: bool) -> str:
        """The name of its files, without an ending."""
        parts = [] if self.corpus.is_own else [self.corpus.name]
        parts += [self.corpus.split_name, "memory", str(self.memory.size)]
        if self.xl_cache != trained_with_xl_cache:
            parts.append("xl" if self.xl_cache else "no-xl")
        return "-".join([*parts, self.name] if self.name else parts)


def readings(
    corpora: Sequence[Corpus],
    memories: Iterable[tuple[MemorySettings, Mesh, tuple[Bank, ...]]],
    xl_caches: Sequence[bool],
    name: str = "",
) -> list[Reading]:
    """Each corpus with each memory (its mesh, its `prebuilt` banks), smallest first, with or without XL cache.

    Raises:
        InputError: for a size that is named twice.
    """
    by_size = sorted(memories, key=lambda pair: pair[0].size)
    sizes = [memory.size for memory, _, _ in by_size]
    if len(set(sizes)) < len(sizes):
        raise InputError(f"--memory_size={','.join(map(str, sizes))}: name each once")
    return [
        Reading(corpus, memory, mesh, xl_cache, name, prebuilt)
        for corpus in corpora
        for xl_cache in xl_caches
        for memory, mesh, prebuilt in by_size
    ]


def evaluate(
    run: Run,
    planned: Sequence[Reading],
    settings: EvaluationSettings,
    per_token: bool = False,
    say: Callable[[str], None] = say,
) -> list[dict]:
    """Reads as planned; writes the figures of each reading, says a line of them, and returns them.

    Of readings that follow one another and differ in their memory only, the gain of each is measured against the first.
    Files of an earlier evaluation of the same documents are replaced, since they are made again in full.

    Raises:
        InputError: before anything is read, when files of other documents are in the way.
    """
    folder = run.workdir / FOLDER
    for reading in planned:
        _check_replaceable(folder / f"{reading.file(run.model.xl_cache)}.json", reading, say)
    results = []
    for _, alike in itertools.groupby(planned, key=lambda reading: (id(reading.corpus), reading.xl_cache)):
        several, baseline = list(alike), None
        for reading in several:
            start = time.perf_counter()
            summary, kept, figures = read(run, reading, settings, baseline, per_token or len(several) > 1)
            figures |= _about(run, reading) | {"seconds": time.perf_counter() - start}
            if baseline is None and len(several) > 1:
                baseline = Baseline(reading.memory.size, {each.document: each.nats_T for each in kept})
            if is_first():
                name = reading.file(run.model.xl_cache)
                atomic_write(folder / f"{name}.json", json.dumps(figures, indent=1) + "\n")
                atomic_write(folder / f"{name}.csv", _lines(summary))
                if per_token:
                    atomic_write(folder / f"{name}.npz", _arrays(kept))
                elif (folder / f"{name}.npz").exists():
                    (folder / f"{name}.npz").unlink()
                    say(f"{folder / name}.npz, of an earlier evaluation, is removed: --per_token makes it anew")
            say(sentence(figures))
            results.append(figures)
    return results


def read(
    run: Run, reading: Reading, settings: EvaluationSettings, baseline: Baseline | None = None, keeps: bool = False
) -> tuple[Summary, list[DocumentScores], dict]:
    """Reads all documents once: sums, every token's scores if they are to be kept (in order), and the figures."""
    corpus, summary, kept = reading.corpus, Summary(baseline), []
    answers = Answers(run.segment_length) if corpus.tokens.manifest["source"] == "recall" else None
    model = dataclasses.replace(run.model, xl_cache=reading.xl_cache)
    for scores in score_documents(
        model, reading.memory, run.parameters, corpus.split, run.segment_length, settings.batch_size,
        settings.segments_per_call, reading.mesh, reading.prebuilt,
    ):  # fmt: skip
        document = scores.document
        check_losses(scores.nats_T, corpus.names[document], run.step)
        summary.add(scores, int(corpus.split.bytes[document]), corpus.names[document], corpus.words(document))
        if answers is not None:
            answers.add(corpus.split.read(document, 0, len(scores.correct_T)), scores.correct_T)
        if keeps:
            kept.append(scores)
    source = corpus.tokens.manifest["source"]  # whatever it is called here
    figures = summary.figures(PUBLISHED_WORDS.get((source, corpus.split_name, len(corpus.names))))
    if reading.prebuilt:
        figures["prebuilt_tokens"] = int(reading.prebuilt[0].length_B[0])
    if answers is not None:
        figures["answers"] = answers.figures()
    return summary, sorted(kept, key=lambda scores: scores.document), figures


def _about(run: Run, reading: Reading) -> dict:
    """What was read, and by what: enough to tell whether two evaluations can be compared."""
    memory, corpus = reading.memory, reading.corpus
    return {
        "corpus": corpus.name,
        "split": corpus.split_name,
        "data": str(corpus.tokens.folder),
        "split_sha256": corpus.sha256,
        "memory_size": memory.size,
        "xl_cache": reading.xl_cache,
        "name": reading.name,
        "segment_length": run.segment_length,
        "neighbors": memory.retrieved,
        "search": chosen(memory, reading.mesh.devices.flat[0].platform),
        "memory": dataclasses.asdict(memory),
        "dtype": run.model.dtype,
        "checkpoint_step": run.step,
    }


def _check_replaceable(path: AnyPath, reading: Reading, say: Callable[[str], None]) -> None:
    """Refuses to replace what is of other documents; says of other settings that they are replaced."""
    corpus = reading.corpus
    if not path.exists():
        return
    try:
        before = json.loads(path.read_text())
        digest, data = before.get("split_sha256", corpus.sha256), before.get("data", "elsewhere")
        memory = before.get("memory", {})
    except (ValueError, AttributeError) as error:
        raise InputError(
            f"{path}, which would be replaced, is damaged or no evaluation ({error}): remove it, or set --name"
        ) from error
    if digest != corpus.sha256:
        raise InputError(
            f"{path} is an evaluation of other documents, of {data}, than those of {corpus.tokens.folder}: "
            f"name these, with --data NAME={corpus.tokens.folder} or --name, or remove that file"
        )
    now = dataclasses.asdict(reading.memory)
    if changed := [f"Memory.{name} = {value!r}" for name, value in memory.items() if now.get(name, value) != value]:
        say(f"{path} was made with {', '.join(changed)}, and is replaced (--name keeps both)")


def _lines(summary: Summary) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for row in summary.table():
        writer.writerow(row)
    return text.getvalue()


def _arrays(kept: Sequence[DocumentScores]) -> bytes:
    file = io.BytesIO()
    nats = [scores.nats_T for scores in kept]
    ends = np.cumsum([len(part) for part in nats])
    np.savez(file, nats=np.concatenate(nats), correct=np.concatenate([scores.correct_T for scores in kept]), ends=ends)
    return file.getvalue()


def restore(workdir: AnyPath, model: ModelSettings, mesh: Mesh) -> tuple[Parameters, int]:
    """The parameters of the newest checkpoint of a run that is not damaged, placed on the mesh, and its step.

    Raises:
        InputError: when the run has none.
        Unreadable: when all are damaged.
        ReadFailed: when one cannot be read for another reason.
    """
    _, like = abstract_model(model, MemorySettings(size=0))
    like = placed(like, shardings(mesh, like, PARAMETER_RULES))
    with Checkpoints(workdir) as checkpoints:
        steps = checkpoints.steps()
        if not steps:
            raise InputError(
                f"{workdir} has no checkpoint yet: `memorizing train` makes one every Training.checkpoint_every steps"
            )
        while True:
            step = steps.pop()
            try:
                return checkpoints.restore_parameters(step, like), step
            except CorruptCheckpoint as error:
                if not steps:
                    raise
                say(f"{error}: the one before it, of step {steps[-1]}, is evaluated")


def sentence(figures: dict) -> str:
    """The lines a person reads."""
    low, high = figures["perplexity_interval"]
    reach = f" [{low:.3f}, {high:.3f}]" if low is not None and high is not None else ""
    line = (
        f"{figures['corpus']} {figures['split']}, memory {figures['memory_size']:>7,}"
        f"{'' if figures['xl_cache'] else ', no XL cache'}: perplexity {figures['perplexity']:8.3f}{reach}, "
        f"{figures['bits_per_byte']:.4f} bits per byte "
        f"({figures['documents']} documents, {figures['tokens']:,} tokens, {figures['seconds']:.0f} s)"
    )
    if (gain := figures.get("gain")) is not None:
        low, high = gain["interval"]
        reach = f" [{low:+.4f}, {high:+.4f}]" if low is not None else ""
        line += (
            f"\n    gained over memory {gain['against_memory_size']:,}: {gain['nats_per_token']:+.4f} nats a token"
            f"{reach}; {gain['tokens_gained']:.1%} of tokens gained more than 0.1, {gain['tokens_lost']:.1%} lost more"
        )
    if "published_words" in figures:
        line += f"\n    word-level perplexity {figures['word_perplexity']:.3f}, by the published count of words"
    if "recall" in figures:
        line += f"\n    of the true neighbors of sampled queries `{figures['search']}` found {figures['recall']:.2%}"
    for kind, counts in figures.get("answers", {}).items():
        line += f"\n    {kind} questions: {counts['exact']:.1%} of {counts['questions']:,} answered exactly"
    return line


def xl_caches(asked: str | None, trained_with: bool) -> list[bool]:
    """Of `--xl_cache`: which readings there are, with and without one."""
    return {"on": [True], "off": [False], "both": [False, True], None: [trained_with]}[asked]


def at_memory_size(memory: MemorySettings, size: int) -> MemorySettings:
    """The same memory with another number of slots; a small one retrieves no more than it holds."""
    return dataclasses.replace(memory, size=size, neighbors=min(memory.neighbors, size or memory.neighbors))
