"""Losses of whole documents. Each document is read from its start, while its caches and its memory grow.

The rows of a batch read documents side by side. The longest document comes first, and each goes to the row that is free
soonest. The figures do not depend on this layout: the losses of a document depend on that document alone. Evaluation
holds its own carry, with a memory of any size.

Figures computed from the losses: `figures.py`.
"""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float

from memorizing.data.batches import Prefetcher, read_batch
from memorizing.data.tokens import TokenSplit
from memorizing.errors import InputError
from memorizing.memory.bank import Bank, Recall
from memorizing.memory.settings import MemorySettings
from memorizing.model.carry import Carry, empty_carry
from memorizing.model.parameters import Parameters
from memorizing.model.settings import ModelSettings
from memorizing.model.transformer import abstract_model, apply_model
from memorizing.parallel.mesh import assemble, constrain_tree, everywhere, init_sharded, local_rows, shardings
from memorizing.sections import check_range
from memorizing.shapes import Batch
from memorizing.storage.prebuilt import begin_documents
from memorizing.training.loss import Predictions, score


@dataclasses.dataclass(frozen=True)
class EvaluationSettings:
    """Settings of an evaluation.

    `batch_size` and `segments_per_call` change figures by float rounding only. The exception is
    `Memory.eviction = 'reservoir'`: its random draws depend on the row and on the documents read there before.

    Attributes:
        data: folder of prepared tokens; empty for the folder of training.
        split: name of the split to read.
        batch_size: number of documents read side by side, over all devices.
        segments_per_call: number of segments that one compiled call scans over.
    """

    data: str = ""
    split: str = "test"
    batch_size: int = 8
    segments_per_call: int = 8

    def __post_init__(self):
        check_range(self, 1, 2**24, "batch_size", "segments_per_call")


class TrainedModel(NamedTuple):
    """A model with its parameters and reading settings.

    Attributes:
        segment_length: tokens in a segment.
    """

    model: ModelSettings
    memory: MemorySettings
    segment_length: int
    parameters: Parameters


class DocumentScores(NamedTuple):
    """Scores of one document.

    Attributes:
        document: index of the document in its split.
        nats_T: loss of each token, in nats.
        correct_T: True where the token had the largest logit.
        neighbors_found: true neighbors of sampled queries that the search found; 0 unless `Memory.report_recall`.
        true_neighbors: number of true neighbors of these queries; 0 unless `Memory.report_recall`.
    """

    document: int
    nats_T: Float[np.ndarray, "T"]
    correct_T: Bool[np.ndarray, "T"]
    neighbors_found: int = 0
    true_neighbors: int = 0


type Step = Sequence[tuple[int, int] | None]
"""The document and the segment of it that each row reads at one step; None for a row without a document."""
type CallResults = tuple[Predictions, Recall | None]


def score_documents(
    trained: TrainedModel,
    split: TokenSplit,
    settings: EvaluationSettings,
    mesh: Mesh,
    prebuilt: tuple[Bank, ...] = (),
) -> Iterator[DocumentScores]:
    """Reads every document of a split once, and yields its scores when its end is reached. All processes get the same.

    Each document starts with an empty memory, or with the `prebuilt` banks of a snapshot (see `storage/snapshots.py`).
    """
    length = trained.segment_length
    nats = {document: [] for document in range(len(split.lengths))}
    correct = {document: [] for document in range(len(split.lengths))}
    recall_counts = np.zeros((len(split.lengths), 2), np.int64)
    with contextlib.closing(_results_of_calls(trained, split, settings, mesh, prebuilt)) as calls:
        for steps, (predictions, recall) in calls:
            for (segment, step), row in itertools.product(enumerate(steps), range(settings.batch_size)):
                if (place := step[row]) is None:
                    continue
                document, number = place
                remaining = int(split.lengths[document]) - number * length
                if recall is not None:
                    recall_counts[document] += (
                        recall.found_BH[segment, row].sum(),
                        recall.wanted_BH[segment, row].sum(),
                    )
                nats[document].append(predictions.nats_BN[segment, row, :remaining])
                correct[document].append(predictions.correct_BN[segment, row, :remaining])
                if remaining <= length:
                    nats_T, correct_T = (np.concatenate(parts.pop(document)) for parts in (nats, correct))
                    yield DocumentScores(document, nats_T, correct_T, *recall_counts[document].tolist())


def _results_of_calls(
    trained: TrainedModel, split: TokenSplit, settings: EvaluationSettings, mesh: Mesh, prebuilt: tuple[Bank, ...]
) -> Generator[tuple[Sequence[Step], CallResults]]:
    """Yields the steps of each compiled call and its results, on the host."""
    model, memory, length, parameters = trained
    rows, per_call = settings.batch_size, settings.segments_per_call
    plan = reading_plan(split.lengths, rows, length)
    plan += [[None for _ in range(rows)] for _ in range(-len(plan) % per_call)]
    steps_of_calls = [plan[first : first + per_call] for first in range(0, len(plan), per_call)]
    process_rows = local_rows(mesh, rows)

    def batches_of_calls() -> Iterator[Batch]:
        for steps in steps_of_calls:
            batches = [read_batch(split, [step[row] for row in process_rows], length) for step in steps]
            yield Batch(*(np.stack(arrays) for arrays in zip(*batches, strict=True)))

    call = score_call(model, memory)
    empty = functools.partial(empty_carry, model, memory, rows, length)
    carry = init_sharded(mesh, empty, functools.partial(shardings, mesh))
    prefetcher = Prefetcher(batches_of_calls())

    def dispatched() -> Iterator[tuple[Sequence[Step], CallResults]]:
        nonlocal carry
        for steps, batches in zip(steps_of_calls, prefetcher, strict=True):
            with jax.set_mesh(mesh):
                batches = assemble(mesh, batches, rows, process_rows, leading="S")
                carry, results = call(parameters, carry, batches, prebuilt)
            yield steps, results

    try:
        # Results of a call are fetched after the next call is dispatched, so that the devices do not wait for the host.
        for (steps, results), _ in itertools.pairwise(itertools.chain(dispatched(), [((), None)])):
            yield steps, jax.device_get(results)
    finally:
        prefetcher.close()


LARGEST_LOSS = 700.0
"""Largest loss of a token in nats: beyond it the perplexity overflows. Sound models stay far below."""


def check_losses(nats_T: Float[np.ndarray, "T"], document: str, step: int) -> None:
    """Raises an error if a loss is NaN, infinite or beyond `LARGEST_LOSS`.

    Raises:
        InputError: names the document, the token and what to do.
    """
    if not (broken_T := ~(nats_T < LARGEST_LOSS)).any():  # True for NaN, too
        return
    token = int(np.argmax(broken_T))
    raise InputError(
        f"the model of step {step} is broken: its loss at token {token} of {document} is {nats_T[token]} nats. A loss "
        f"must be a number below {LARGEST_LOSS:.0f}. Go back to an earlier checkpoint, or try Model.dtype = 'float32'"
    )


type ScoreCall = Callable[[Parameters, Carry, Batch, tuple[Bank, ...]], tuple[Carry, CallResults]]


@functools.cache  # shared by all splits, so that each model and memory is compiled once
def score_call(model: ModelSettings, memory: MemorySettings) -> ScoreCall:
    """Returns the compiled function that reads `S` segments and scores all of their tokens.

    If banks count recall, the function also returns the counts of each segment, summed over memory layers.
    """
    graph, _ = abstract_model(model, memory)

    def score_segments(parameters: Parameters, carry: Carry, batches: Batch, prebuilt: tuple[Bank, ...] = ()):
        def read(before: Carry, batch: Batch):
            if prebuilt:
                before, batch = begin_documents(before, batch, prebuilt, memory)
            logits_BNV, after = apply_model(graph, parameters, batch, before)
            counts = [
                jax.tree.map(jnp.subtract, new.recall, old.recall)
                for old, new in zip(before.banks, after.banks, strict=True)
                if new.recall is not None
            ]
            recall = jax.tree.map(lambda *layers: sum(layers), *counts) if counts else None
            return constrain_tree(after), (score(logits_BNV, batch), recall)

        carry, results = jax.lax.scan(read, carry, batches)
        return carry, everywhere(results)

    return jax.jit(score_segments, donate_argnums=1)


def reading_plan(lengths: np.ndarray, rows: int, segment_length: int) -> list[Step]:
    """Returns the steps in which `rows` rows read documents of these lengths (in tokens), the longest first."""
    segments = -(-np.asarray(lengths) // segment_length)
    queues: list[list[tuple[int, int]]] = [[] for _ in range(rows)]
    for document in np.argsort(-segments, kind="stable"):
        shortest = min(queues, key=len)
        shortest += [(int(document), segment) for segment in range(segments[document])]
    steps = max(map(len, queues))
    return [[queue[step] if step < len(queue) else None for queue in queues] for step in range(steps)]
