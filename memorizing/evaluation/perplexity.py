"""Perplexity over whole documents, each read from its start with its caches and memory growing.

The rows of a batch read documents side by side, longest first, each on the row that is free soonest. What is reported
does not depend on that: a document's numbers are its own. Evaluation holds a carry of its own, at any memory size.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
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
from memorizing.model.settings import ModelSettings
from memorizing.model.transformer import Carry, Parameters, abstract_model, apply_model, empty_carry
from memorizing.parallel.mesh import assemble, constrain_tree, everywhere, init_sharded, local_rows, shardings
from memorizing.shapes import Batch
from memorizing.storage.snapshots import begin_documents
from memorizing.training.loss import Predictions, score


@dataclasses.dataclass(frozen=True)
class EvaluationSettings:
    """How documents are evaluated; no figure depends on `rows` or `segments_per_call` beyond float rounding.

    But for a memory whose `Memory.eviction` is `reservoir`: what that draws depends on the row and on its documents.

    Attributes:
        data: folder of prepared tokens; empty for that of training.
        split: of it.
        batch_size: documents read side by side, over all devices.
        segments_per_call: segments that one compiled call scans over.
    """

    data: str = ""
    split: str = "test"
    batch_size: int = 8
    segments_per_call: int = 8

    def __post_init__(self):
        for name in ("batch_size", "segments_per_call"):
            if getattr(self, name) < 1:
                raise InputError(f"Evaluation.{name} = {getattr(self, name)}: must be at least 1")


class DocumentScores(NamedTuple):
    """What the model made of one document, token by token.

    Attributes:
        found, wanted: how many of the true neighbors of sampled queries the search found, and how many there were; 0
            unless `Memory.report_recall`.
    """

    document: int
    nats_T: Float[np.ndarray, "T"]
    correct_T: Bool[np.ndarray, "T"]
    found: int = 0
    wanted: int = 0


def score_documents(
    model: ModelSettings,
    memory: MemorySettings,
    parameters: Parameters,
    split: TokenSplit,
    segment_length: int,
    rows: int,
    segments_per_call: int,
    mesh: Mesh,
    prebuilt: tuple[Bank, ...] = (),
) -> Iterator[DocumentScores]:
    """Reads every document of a split once, and yields each when its end is reached; in every process alike.

    Each starts with an empty memory, or with a `prebuilt` one (see snapshots.py).
    """
    call = score_call(model, memory)
    plan = reading_plan(split.lengths, rows, segment_length)
    plan += [[None for _ in range(rows)] for _ in range(-len(plan) % segments_per_call)]
    calls = [plan[first : first + segments_per_call] for first in range(0, len(plan), segments_per_call)]

    own = local_rows(mesh, rows)

    def read_calls() -> Iterator[Batch]:
        for steps in calls:
            parts = [read_batch(split, [step[row] for row in own], segment_length) for step in steps]
            yield Batch(*(np.stack(part) for part in zip(*parts, strict=True)))

    empty = functools.partial(empty_carry, model, memory, rows, segment_length)
    carry = init_sharded(mesh, empty, functools.partial(shardings, mesh))
    nats = {document: [] for document in range(len(split.lengths))}
    correct = {document: [] for document in range(len(split.lengths))}
    counted = np.zeros((len(split.lengths), 2), np.int64)
    ahead = Prefetcher(read_calls())

    def dispatched() -> Iterator[tuple[list, tuple[Predictions, Recall | None]]]:
        nonlocal carry
        for steps, batches in zip(calls, ahead, strict=True):
            with jax.set_mesh(mesh):
                carry, results = call(parameters, carry, assemble(mesh, batches, rows, own, leading="S"), prebuilt)
            yield steps, results

    try:
        # Each is fetched once the next one is under way: the devices do not wait for what is done here.
        for (steps, results), _ in itertools.pairwise(itertools.chain(dispatched(), [((), None)])):
            predictions, recall = jax.device_get(results)
            for segment, step in enumerate(steps):
                for row, place in enumerate(step):
                    if place is None:
                        continue
                    document, number = place
                    left = int(split.lengths[document]) - number * segment_length
                    if recall is not None:
                        counted[document] += (recall.found_BH[segment, row].sum(), recall.wanted_BH[segment, row].sum())
                    nats[document].append(predictions.nats_BN[segment, row, :left])
                    correct[document].append(predictions.correct_BN[segment, row, :left])
                    if left <= segment_length:
                        nats_T, correct_T = (np.concatenate(each.pop(document)) for each in (nats, correct))
                        yield DocumentScores(document, nats_T, correct_T, *counted[document].tolist())
    finally:
        ahead.close()


LARGEST = 700.0
"""Nats of a token beyond which a perplexity is no number; a sound model never comes near."""


def check_losses(nats_T: Float[np.ndarray, "T"], document: str, step: int) -> None:
    """Refuses the losses of a ruined model.

    Raises:
        InputError: naming the document, and the way out.
    """
    if not (ruined_T := ~(nats_T < LARGEST)).any():  # NaN is not below either
        return
    place = int(np.argmax(ruined_T))
    raise InputError(
        f"the checkpoint of step {step} is ruined: token {place} of {document} costs it {nats_T[place]} nats. Go back "
        "to an earlier checkpoint, or try Model.dtype = 'float32'"
    )


type ScoreCall = Callable[[Parameters, Carry, Batch, tuple[Bank, ...]], tuple[Carry, tuple[Predictions, Recall | None]]]


@functools.cache  # the same for every split and corpus: compiled once
def score_call(model: ModelSettings, memory: MemorySettings) -> ScoreCall:
    """The compiled function that reads `S` segments and scores every token of them.

    It also gives what was counted of the neighbors in each segment, over all memory layers, if banks count that.
    """
    graph, _ = abstract_model(model, memory)

    def score_segments(parameters: Parameters, carry: Carry, batches: Batch, prebuilt: tuple[Bank, ...] = ()):
        def read(before: Carry, batch: Batch):
            if prebuilt:
                before, batch = begin_documents(before, batch, prebuilt, memory)
            logits_BNV, carry = apply_model(graph, parameters, batch, before)
            counts = [
                jax.tree.map(jnp.subtract, now.recall, then.recall)
                for then, now in zip(before.banks, carry.banks, strict=True)
                if now.recall is not None
            ]
            recall = jax.tree.map(lambda *layers: sum(layers), *counts) if counts else None
            return constrain_tree(carry), (score(logits_BNV, batch), recall)

        carry, results = jax.lax.scan(read, carry, batches)
        return carry, everywhere(results)

    return jax.jit(score_segments, donate_argnums=1)


def reading_plan(lengths: np.ndarray, rows: int, segment_length: int) -> list[list[tuple[int, int] | None]]:
    """For each step, what each row reads: (document, segment), or nothing once no document is left."""
    segments = -(-np.asarray(lengths) // segment_length)
    queues: list[list[tuple[int, int]]] = [[] for _ in range(rows)]
    for document in np.argsort(-segments, kind="stable"):
        shortest = min(queues, key=len)
        shortest += [(int(document), segment) for segment in range(segments[document])]
    steps = max(map(len, queues))
    return [[queue[step] if step < len(queue) else None for queue in queues] for step in range(steps)]
