"""Perplexity over whole documents, each read from its start with its caches and memory growing.

The rows of a batch read documents side by side, longest first, each on the row that is free soonest. What is reported
does not depend on that: a document's numbers are its own. Evaluation holds a carry of its own, at any memory size.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Bool, Float

from memorizing.data.batches import Ahead, read_batch
from memorizing.data.tokens import TokenSplit
from memorizing.errors import InputError
from memorizing.memory.settings import MemorySettings
from memorizing.model.settings import ModelSettings
from memorizing.model.transformer import Carry, Parameters, abstract_model, apply_model, empty_carry
from memorizing.parallel.mesh import assemble, constrain_tree, everywhere, local_rows, made, shardings
from memorizing.shapes import Batch
from memorizing.training.loss import Predictions, score


@dataclasses.dataclass(frozen=True)
class EvaluationSettings:
    """How documents are evaluated; no figure depends on `rows` or `segments_per_call` beyond float rounding.

    Attributes:
        data: folder of prepared tokens; empty for that of training.
        split: of it.
        rows: documents read side by side, over all devices.
        segments_per_call: segments that one compiled call scans over.
    """

    data: str = ""
    split: str = "test"
    rows: int = 8
    segments_per_call: int = 8

    def __post_init__(self):
        for name in ("rows", "segments_per_call"):
            if getattr(self, name) < 1:
                raise InputError(f"Evaluation.{name} = {getattr(self, name)}: must be at least 1")


class DocumentScores(NamedTuple):
    """What the model made of one document, token by token."""

    document: int
    nats_T: Float[np.ndarray, "T"]
    correct_T: Bool[np.ndarray, "T"]


def score_documents(
    model: ModelSettings,
    memory: MemorySettings,
    parameters: Parameters,
    split: TokenSplit,
    segment_length: int,
    rows: int,
    segments_per_call: int,
    mesh: Mesh,
) -> Iterator[DocumentScores]:
    """Reads every document of a split once, and yields each when its end is reached; in every process alike."""
    graph, _ = abstract_model(model, memory)
    call = make_score_call(graph)
    plan = reading_plan(split.lengths, rows, segment_length)
    plan += [[None for _ in range(rows)] for _ in range(-len(plan) % segments_per_call)]
    calls = [plan[first : first + segments_per_call] for first in range(0, len(plan), segments_per_call)]

    own = local_rows(mesh, rows)

    def read_calls() -> Iterator[Batch]:
        for steps in calls:
            parts = [read_batch(split, [step[row] for row in own], segment_length) for step in steps]
            yield Batch(*(np.stack(part) for part in zip(*parts, strict=True)))

    empty = functools.partial(empty_carry, model, memory, rows, segment_length)
    carry = made(mesh, empty, functools.partial(shardings, mesh))
    nats = {document: [] for document in range(len(split.lengths))}
    correct = {document: [] for document in range(len(split.lengths))}
    ahead = Ahead(read_calls())
    try:
        for steps, batches in zip(calls, ahead, strict=True):
            with jax.set_mesh(mesh):
                carry, predictions = call(parameters, carry, assemble(mesh, batches, rows, own, leading="S"))
            predictions = jax.device_get(predictions)
            for segment, step in enumerate(steps):
                for row, place in enumerate(step):
                    if place is None:
                        continue
                    document, number = place
                    left = int(split.lengths[document]) - number * segment_length
                    nats[document].append(predictions.nats_BN[segment, row, :left])
                    correct[document].append(predictions.correct_BN[segment, row, :left])
                    if left <= segment_length:
                        yield DocumentScores(
                            document, np.concatenate(nats.pop(document)), np.concatenate(correct.pop(document))
                        )
    finally:
        ahead.close()


type ScoreCall = Callable[[Parameters, Carry, Batch], tuple[Carry, Predictions]]


def make_score_call(graph: nnx.GraphDef) -> ScoreCall:
    """The compiled function that reads `S` segments and scores every token of them."""

    def score_call(parameters: Parameters, carry: Carry, batches: Batch) -> tuple[Carry, Predictions]:
        def read(carry: Carry, batch: Batch) -> tuple[Carry, Predictions]:
            logits_BNV, carry = apply_model(graph, parameters, batch, carry)
            return constrain_tree(carry), score(logits_BNV, batch)

        carry, predictions = jax.lax.scan(read, carry, batches)
        return carry, everywhere(predictions)

    return jax.jit(score_call, donate_argnums=1)


def reading_plan(lengths: np.ndarray, rows: int, segment_length: int) -> list[list[tuple[int, int] | None]]:
    """For each step, what each row reads: (document, segment), or nothing once no document is left."""
    segments = -(-np.asarray(lengths) // segment_length)
    queues: list[list[tuple[int, int]]] = [[] for _ in range(rows)]
    for document in np.argsort(-segments, kind="stable"):
        shortest = min(queues, key=len)
        shortest += [(int(document), segment) for segment in range(segments[document])]
    steps = max(map(len, queues))
    return [[queue[step] if step < len(queue) else None for queue in queues] for step in range(steps)]


class Summary:
    """Sums over documents, and the figures that follow from them."""

    def __init__(self):
        self.nats, self.tokens, self.bytes, self.documents, self.correct = 0.0, 0, 0, 0, 0
        self._by_position: dict[int, tuple[float, int]] = {}

    def add(self, scores: DocumentScores, document_bytes: int) -> None:
        """Counts one document."""
        nats_T = scores.nats_T.astype(np.float64)
        self.nats += float(nats_T.sum())
        self.correct += int(scores.correct_T.sum())
        self.tokens += len(nats_T)
        self.bytes += document_bytes
        self.documents += 1
        start, stop = 0, 128
        while start < len(nats_T):
            nats, tokens = self._by_position.get(start, (0.0, 0))
            part = nats_T[start:stop]
            self._by_position[start] = (nats + float(part.sum()), tokens + len(part))
            start, stop = stop, 2 * stop

    def figures(self) -> dict:
        """As they go into `evaluations/NAME.json`."""
        loss = self.nats / self.tokens
        return {
            "perplexity": math.exp(loss),
            "loss_nats_per_token": loss,
            "bits_per_byte": self.nats / math.log(2) / self.bytes,
            "accuracy": self.correct / self.tokens,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "documents": self.documents,
            "perplexity_by_position": [
                {"first_token": start, "tokens": tokens, "perplexity": math.exp(nats / tokens)}
                for start, (nats, tokens) in sorted(self._by_position.items())
            ],
        }
