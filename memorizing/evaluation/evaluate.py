"""`memorizing evaluate`: one checkpoint, one split, one or more memory sizes; a JSON file and a line for each."""

import dataclasses
import json
import time
from collections.abc import Callable

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Int

from memorizing.data.recall import question_distances
from memorizing.data.tokens import PreparedTokens
from memorizing.errors import InputError
from memorizing.evaluation.perplexity import EvaluationSettings, Summary, score_documents
from memorizing.files import AnyPath, write_whole
from memorizing.memory.bank import Bank
from memorizing.memory.search import chosen
from memorizing.memory.settings import MemorySettings
from memorizing.model.settings import ModelSettings
from memorizing.model.transformer import Parameters, abstract_model
from memorizing.parallel.hosts import is_first, say
from memorizing.parallel.mesh import PARAMETER_RULES, placed, shardings
from memorizing.training.checkpoints import Checkpoints, Unreadable

FOLDER = "evaluations"


def evaluate(
    model: ModelSettings,
    memory: MemorySettings,
    segment_length: int,
    settings: EvaluationSettings,
    parameters: Parameters,
    checkpoint_step: int,
    tokens: PreparedTokens,
    workdir: AnyPath,
    mesh: Mesh,
    name: str = "",
    say: Callable[[str], None] = say,
    prebuilt: tuple[Bank, ...] = (),
) -> dict:
    """Reads the split with a memory of `memory.size`, and writes `WORKDIR/evaluations/NAME.json`.

    Each document starts with an empty memory, or with a `prebuilt` one.
    Returns what it writes. A file of that name from an earlier evaluation is replaced, since it is made again in full.
    """
    split = tokens.split(settings.split)
    answers = Answers(segment_length) if tokens.manifest["source"] == "recall" else None
    summary, start = Summary(), time.perf_counter()
    for scores in score_documents(
        model, memory, parameters, split, segment_length, settings.rows, settings.segments_per_call, mesh, prebuilt
    ):
        summary.add(scores, int(split.bytes[scores.document]))
        if answers is not None:
            answers.add(split.read(scores.document, 0, len(scores.correct_T)), scores.correct_T)
    seconds = time.perf_counter() - start
    figures = {
        **summary.figures(),
        "memory_size": memory.size,
        "neighbours": memory.neighbours,
        "search": chosen(memory, mesh.devices.flat[0].platform),
        "segment_length": segment_length,
        "checkpoint_step": checkpoint_step,
        "data": str(tokens.folder),
        "split": settings.split,
        "seconds": seconds,
    }
    if prebuilt:
        figures["prebuilt_tokens"] = int(prebuilt[0].length_B[0])
    if answers is not None:
        figures["answers"] = answers.figures()
    path = workdir / FOLDER / f"{name or default_name(settings, memory)}.json"
    if is_first():
        write_whole(path, json.dumps(figures, indent=1) + "\n")
    say(sentence(figures))
    return figures


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
            except Unreadable as error:
                if not steps:
                    raise
                say(f"{error}: the one before it, of step {steps[-1]}, is evaluated")


def default_name(settings: EvaluationSettings, memory: MemorySettings) -> str:
    """`test-memory-8192`: what was read, and with how large a memory."""
    return f"{settings.split}-memory-{memory.size}"


def sentence(figures: dict) -> str:
    """The line a person reads."""
    line = (
        f"memory {figures['memory_size']:>7,}: perplexity {figures['perplexity']:8.3f}, "
        f"{figures['bits_per_byte']:.4f} bits per byte "
        f"({figures['documents']} documents, {figures['tokens']:,} tokens, {figures['seconds']:.0f} s)"
    )
    if "recall" in figures:
        line += f"\n    of the true neighbours of sampled queries `{figures['search']}` found {figures['recall']:.2%}"
    for kind, counts in figures.get("answers", {}).items():
        line += f"\n    {kind} questions: {counts['exact']:.1%} of {counts['questions']:,} answered exactly"
    return line


class Answers:
    """For the recall task: how many values were told exactly, by how long ago they were defined."""

    FAR = 8
    """Segments after which a question counts as far."""

    def __init__(self, segment_length: int):
        self._segment_length = segment_length
        self._counts = {"near": np.zeros(2, np.int64), "far": np.zeros(2, np.int64)}

    def add(self, tokens_T: Int[np.ndarray, "T"], correct_T: Bool[np.ndarray, "T"]) -> None:
        """Counts the questions of one document."""
        distances_T = question_distances(tokens_T)
        near_T = (distances_T > 0) & (distances_T < self._segment_length)
        far_T = distances_T >= self.FAR * self._segment_length
        for kind, asked_T in (("near", near_T), ("far", far_T)):
            self._counts[kind] += (int(asked_T.sum()), int(correct_T[asked_T].sum()))

    def figures(self) -> dict[str, dict[str, int | float]]:
        """Per kind: how many questions, and the share answered exactly."""
        return {
            kind: {"questions": int(asked), "exact": float(exact / max(asked, 1))}
            for kind, (asked, exact) in self._counts.items()
        }


def at_memory_size(memory: MemorySettings, size: int) -> MemorySettings:
    """The same memory with another number of slots; a small one retrieves no more than it holds."""
    return dataclasses.replace(memory, size=size, neighbours=min(memory.neighbours, size or memory.neighbours))
