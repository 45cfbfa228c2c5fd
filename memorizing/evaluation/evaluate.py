"""`memorizing evaluate`: figures of a checkpoint on several splits, at several memory sizes, with and without XL cache.

Each evaluation writes files to WORKDIR/evaluations, named by what was read and how:

    [CORPUS-]SPLIT-memory-M[-xl|-no-xl][-NAME].json     the figures: see `figures.py`
                                              .csv      one line for each document
                                              .npz      with `per_token`: nats and correct of every token, document ends

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
from memorizing.evaluation.figures import CHANGED, Baseline, Summary
from memorizing.evaluation.perplexity import (
    DocumentScores,
    EvaluationSettings,
    TrainedModel,
    check_losses,
    score_documents,
)
from memorizing.evaluation.splits import EvaluationSplit
from memorizing.files import AnyPath, atomic_write
from memorizing.memory.bank import Bank
from memorizing.memory.search_choice import chosen_search
from memorizing.memory.settings import MemorySettings
from memorizing.model.parameters import Parameters
from memorizing.model.settings import ModelSettings
from memorizing.model.transformer import abstract_model
from memorizing.parallel.hosts import is_first, say
from memorizing.parallel.mesh import PARAMETER_RULES, placed, shardings
from memorizing.storage.checkpoints import Checkpoints, CorruptCheckpoint

FOLDER = "evaluations"
PUBLISHED_WORDS = {("pg19", "validation", 50): 3_007_061, ("pg19", "test", 100): 6_966_499}
"""Word counts that PG-19's authors divide the loss by (Rae et al., arXiv 1911.05507), by source, split and number of
documents."""


class RestoredRun(NamedTuple):
    """A run with the parameters of one of its checkpoints.

    Attributes:
        trained: the model as it was trained; evaluations replace its memory and its XL cache.
        step: step of the checkpoint.
    """

    workdir: AnyPath
    trained: TrainedModel
    step: int


class EvaluationCase(NamedTuple):
    """One evaluation: a split, and how the model reads it.

    Attributes:
        name: suffix that separates the files from those of other settings; empty for none.
        prebuilt: banks of a snapshot that each document starts with; empty for an empty memory.
    """

    split: EvaluationSplit
    memory: MemorySettings
    mesh: Mesh
    xl_cache: bool
    name: str = ""
    prebuilt: tuple[Bank, ...] = ()

    def file_stem(self, trained_with_xl_cache: bool) -> str:
        """Returns the name that the files of an evaluation share, without the suffix."""
        parts = [] if self.split.is_default else [self.split.corpus]
        parts += [self.split.name, "memory", str(self.memory.size)]
        if self.xl_cache != trained_with_xl_cache:
            parts.append("xl" if self.xl_cache else "no-xl")
        return "-".join([*parts, self.name] if self.name else parts)


def evaluation_cases(
    splits: Sequence[EvaluationSplit],
    memories: Iterable[tuple[MemorySettings, Mesh, tuple[Bank, ...]]],
    xl_caches: Sequence[bool],
    name: str = "",
) -> list[EvaluationCase]:
    """Returns all combinations of splits, XL caches and memories (settings, mesh, `prebuilt` banks), smallest first.

    Raises:
        InputError: if two memories have one size.
    """
    by_size = sorted(memories, key=lambda memory: memory[0].size)
    sizes = [memory.size for memory, _, _ in by_size]
    if len(set(sizes)) < len(sizes):
        raise InputError(f"--memory_size={','.join(map(str, sizes))} names a size twice. Give each size once")
    return [
        EvaluationCase(split, memory, mesh, xl_cache, name, prebuilt)
        for split in splits
        for xl_cache in xl_caches
        for memory, mesh, prebuilt in by_size
    ]


def evaluate(
    run: RestoredRun,
    cases: Sequence[EvaluationCase],
    settings: EvaluationSettings,
    per_token: bool = False,
    say: Callable[[str], None] = say,
) -> list[dict]:
    """Evaluates all cases. Writes the files of each, reports its figures through `say`, and returns the figures.

    Successive cases that differ only in their memory form a group. The gain of each is measured against the first one.
    Files of an earlier evaluation of the same documents are replaced.

    Raises:
        InputError: before anything is read, if files of other documents have the same name.
    """
    trained_with_xl_cache = run.trained.model.xl_cache
    stems = [run.workdir / FOLDER / case.file_stem(trained_with_xl_cache) for case in cases]
    for case, stem in zip(cases, stems, strict=True):
        _check_replaceable(_with_suffix(stem, ".json"), case, say)
    results = []
    pairs = zip(cases, stems, strict=True)
    for _, group in itertools.groupby(pairs, key=lambda pair: (id(pair[0].split), pair[0].xl_cache)):
        group_cases, baseline = list(group), None
        for case, stem in group_cases:
            start = time.perf_counter()
            summary, scores, figures = evaluate_case(run, case, settings, baseline, per_token or len(group_cases) > 1)
            figures |= _provenance(run, case) | {"seconds": time.perf_counter() - start}
            if baseline is None and len(group_cases) > 1:
                baseline = Baseline(case.memory.size, {each.document: each.nats_T for each in scores})
            if is_first():
                _write_files(stem, figures, summary, scores if per_token else None, say)
            say(report_lines(figures))
            results.append(figures)
    return results


def evaluate_case(
    run: RestoredRun,
    case: EvaluationCase,
    settings: EvaluationSettings,
    baseline: Baseline | None = None,
    keep_scores: bool = False,
) -> tuple[Summary, list[DocumentScores], dict]:
    """Reads all documents once. Returns their summary, their scores (only if `keep_scores`), and the figures."""
    split, summary, kept_scores = case.split, Summary(baseline), []
    source = split.tokens.manifest["source"]  # `split.corpus` may be another name for it
    answers = Answers(run.trained.segment_length) if source == "recall" else None
    model = dataclasses.replace(run.trained.model, xl_cache=case.xl_cache)
    trained = run.trained._replace(model=model, memory=case.memory)
    for scores in score_documents(trained, split.split, settings, case.mesh, case.prebuilt):
        document = scores.document
        name = split.document_names[document]
        check_losses(scores.nats_T, name, run.step)
        summary.add(scores, int(split.split.bytes[document]), name, split.words(document))
        if answers is not None:
            answers.add(split.split.read(document, 0, len(scores.correct_T)), scores.correct_T)
        if keep_scores:
            kept_scores.append(scores)
    figures = summary.figures(PUBLISHED_WORDS.get((source, split.name, len(split.document_names))))
    if case.prebuilt:
        figures["prebuilt_tokens"] = int(case.prebuilt[0].length_B[0])
    if answers is not None:
        figures["answers"] = answers.figures()
    return summary, sorted(kept_scores, key=lambda scores: scores.document), figures


def _provenance(run: RestoredRun, case: EvaluationCase) -> dict:
    """Returns what was read and how: enough to decide whether two evaluations are comparable."""
    split, memory = case.split, case.memory
    return {
        "corpus": split.corpus,
        "split": split.name,
        "data": str(split.tokens.folder),
        "split_sha256": split.sha256,
        "memory_size": memory.size,
        "xl_cache": case.xl_cache,
        "name": case.name,
        "segment_length": run.trained.segment_length,
        "neighbors": memory.retrieved,
        "search": chosen_search(memory, case.mesh.devices.flat[0].platform),
        "memory": memory.by_name(),
        "dtype": run.trained.model.dtype,
        "checkpoint_step": run.step,
    }


def _check_replaceable(path: AnyPath, case: EvaluationCase, say: Callable[[str], None]) -> None:
    """Refuses to replace an evaluation of other documents; reports the replacement of one with other settings."""
    split = case.split
    if not path.exists():
        return
    try:
        earlier = json.loads(path.read_text())
        digest, data = earlier.get("split_sha256", split.sha256), earlier.get("data", "another folder")
        memory = earlier.get("memory", {})
    except (ValueError, AttributeError) as error:
        raise InputError(
            f"{path} would be replaced, but it is damaged or no evaluation ({error}). Remove it, or add --name=NAME"
        ) from error
    if digest != split.sha256:
        raise InputError(
            f"{path} is an evaluation of other documents: it read {data}, and this one reads {split.tokens.folder}. "
            f"Use --data NAME={split.tokens.folder} or --name=NAME, or remove that file"
        )
    settings = case.memory.by_name()
    changed = [
        f"{'' if '.' in name else 'Memory.'}{name} = {value!r}"
        for name, value in memory.items()
        if settings.get(name, value) != value
    ]
    if changed:
        say(f"replacing {path}, which was made with {', '.join(changed)} (--name=NAME would keep both)")


def _with_suffix(stem: AnyPath, suffix: str) -> AnyPath:
    return stem.with_name(stem.name + suffix)  # a name may contain dots


def _write_files(
    stem: AnyPath,
    figures: dict,
    summary: Summary,
    scores: Sequence[DocumentScores] | None,
    say: Callable[[str], None],
) -> None:
    """Writes the files of one evaluation; without `scores`, removes the per-token file of an earlier one."""
    atomic_write(_with_suffix(stem, ".json"), json.dumps(figures, indent=1) + "\n")
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows(summary.table())
    atomic_write(_with_suffix(stem, ".csv"), table.getvalue())
    per_token = _with_suffix(stem, ".npz")
    if scores is not None:
        atomic_write(per_token, _per_token_arrays(scores))
    elif per_token.exists():
        per_token.unlink()
        say(f"removed {per_token}, which an earlier evaluation made; --per_token makes a new one")


def _per_token_arrays(scores: Sequence[DocumentScores]) -> bytes:
    """Returns a NumPy archive with all documents, one after another."""
    file = io.BytesIO()
    nats, correct = ([getattr(each, name) for each in scores] for name in ("nats_T", "correct_T"))
    ends = np.cumsum([len(nats_T) for nats_T in nats])
    np.savez(file, nats=np.concatenate(nats), correct=np.concatenate(correct), ends=ends)
    return file.getvalue()


def restore(workdir: AnyPath, model: ModelSettings, mesh: Mesh) -> tuple[Parameters, int]:
    """Returns the parameters of the newest intact checkpoint of a run, placed on the mesh, and the checkpoint's step.

    Raises:
        InputError: if the run has no checkpoint.
        CorruptCheckpoint: if all checkpoints are damaged.
        ReadFailed: if a checkpoint cannot be read for another reason.
    """
    _, parameters = abstract_model(model, MemorySettings(size=0))
    parameters = placed(parameters, shardings(mesh, parameters, PARAMETER_RULES))
    with Checkpoints(workdir) as checkpoints:
        steps = checkpoints.steps()
        if not steps:
            raise InputError(
                f"{workdir} has no checkpoint. `memorizing train` saves one every Training.checkpoint_every steps: "
                "train the run first"
            )
        while True:
            step = steps.pop()
            try:
                return checkpoints.restore_parameters(step, parameters), step
            except CorruptCheckpoint as error:
                if not steps:
                    raise
                say(f"{error}. Using the checkpoint before it, of step {steps[-1]}")


def report_lines(figures: dict) -> str:
    """Returns the figures of an evaluation as lines for a person."""
    low, high = figures["perplexity_interval"]
    interval = f" [{low:.3f}, {high:.3f}]" if low is not None and high is not None else ""
    line = (
        f"{figures['corpus']} {figures['split']}, memory {figures['memory_size']:>7,}"
        f"{'' if figures['xl_cache'] else ', no XL cache'}: perplexity {figures['perplexity']:8.3f}{interval}, "
        f"{figures['bits_per_byte']:.4f} bits per byte "
        f"({figures['documents']} documents, {figures['tokens']:,} tokens, {figures['seconds']:.0f} s)"
    )
    if (gain := figures.get("gain")) is not None:
        low, high = gain["interval"]
        interval = f" [{low:+.4f}, {high:+.4f}]" if low is not None else ""
        line += (
            f"\n    gain over memory {gain['against_memory_size']:,}: {gain['nats_per_token']:+.4f} nats per token"
            f"{interval}; {gain['tokens_gained']:.1%} of tokens gained more than {CHANGED} nats, "
            f"{gain['tokens_lost']:.1%} lost more"
        )
    if "published_words" in figures:
        line += f"\n    word-level perplexity {figures['word_perplexity']:.3f}, with the published word count"
    if "recall" in figures:
        line += f"\n    recall of the search `{figures['search']}` on sampled queries: {figures['recall']:.2%}"
    for kind, counts in figures.get("answers", {}).items():
        line += f"\n    {kind} questions: {counts['exact']:.1%} of {counts['questions']:,} answered exactly"
    return line


def xl_caches(option: str | None, trained_with: bool) -> list[bool]:
    """Returns the XL caches to evaluate with (True) and without (False), for the value of `--xl_cache`."""
    return {"on": [True], "off": [False], "both": [False, True], None: [trained_with]}[option]
