"""The lookups of a model while it reads one document: for each token and head, the retrieved tokens and their weights.

    input at position i       d[i-1]  ->  queries the memory, predicts  d[i]
    slot of position j        key and value of the input d[j-1]: the retrieved token is j - 1, its continuation j

A document is read alone from its start, so the age of a slot's token gives its position. Weights are the softmax over
the retrieved scores; the gate's value is reported next to them.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from memorizing.memory.bank import tokens_ago
from memorizing.memory.search import Neighbors
from memorizing.memory.settings import MemorySettings
from memorizing.model.carry import Carry, empty_carry
from memorizing.model.intermediates import Collect
from memorizing.model.parameters import Parameters
from memorizing.model.settings import ModelSettings
from memorizing.model.transformer import abstract_model, apply_and_collect
from memorizing.shapes import BEGIN_TOKEN, Batch
from memorizing.training.loss import Predictions, score

NOWHERE = -2
"""Position of a neighbor that was not found. The begin token has position -1."""


class SegmentLookups(NamedTuple):
    """Lookups of one layer in one segment, best neighbor first.

    Attributes:
        places_HNK: document positions of the retrieved tokens, or `NOWHERE`.
        scores_HNK, weights_HNK: scores and attention weights of the retrieved tokens.
        gates_HN: gate value of each token; 0 if nothing was found.
    """

    places_HNK: Int[np.ndarray, "H N K"]
    scores_HNK: Float[np.ndarray, "H N K"]
    weights_HNK: Float[np.ndarray, "H N K"]
    gates_HN: Float[np.ndarray, "H N"]


class ReadSegment(NamedTuple):
    """Predictions and lookups of one segment.

    Attributes:
        first: document position of its first token; the arrays hold its real tokens only.
        nats_N: loss of each token, in nats.
        correct_N: whether the most likely token was the right one.
        layers: lookups of each memory layer, by number; empty while the memory is empty.
    """

    first: int
    nats_N: Float[np.ndarray, "N"]
    correct_N: Bool[np.ndarray, "N"]
    layers: dict[int, SegmentLookups]


def read_document(
    model: ModelSettings,
    memory: MemorySettings,
    parameters: Parameters,
    tokens_T: Int[np.ndarray, "T"],
    segment_length: int,
    begin: int = BEGIN_TOKEN,
) -> Iterator[ReadSegment]:
    """Reads a document from its start, and yields the predictions and lookups of each segment.

    A memory of size 0 has no lookups.
    """
    call, layers = reader(model, memory), sorted(model.memory_layers) if memory.size else []
    carry = empty_carry(model, memory, 1, segment_length)
    for first in range(0, len(tokens_T), segment_length):
        carry, predictions, found = call(parameters, carry, segment_of(tokens_T, first, segment_length, begin))
        predictions, found = jax.device_get((predictions, found))
        count = min(segment_length, len(tokens_T) - first)
        looked = {
            layer: _placed(neighbors, ago_BHNK, gate_BHN, first, count)
            for layer, (neighbors, ago_BHNK, gate_BHN) in zip(layers, found, strict=True)
            if first
        }
        yield ReadSegment(first, predictions.nats_BN[0, :count], predictions.correct_BN[0, :count], looked)


type Call = Callable[[Parameters, Carry, Batch], tuple[Carry, Predictions, Any]]


@functools.cache
def reader(model: ModelSettings, memory: MemorySettings) -> Call:
    """Returns the compiled function that reads a segment of one row.

    For each memory layer it returns the neighbors found, their ages in tokens, and the gate's values.
    """
    graph, _ = abstract_model(dataclasses.replace(model, remat=False, dropout=0.0), memory)

    @functools.partial(jax.jit, donate_argnums=1)
    def read(parameters: Parameters, carry: Carry, batch: Batch) -> tuple[Carry, Predictions, Any]:
        owners = model.bank_layers if carry.banks else ()
        ages = {owner: tokens_ago(bank, memory.write_every) for owner, bank in zip(owners, carry.banks, strict=True)}
        logits_BNV, carry, intermediates = apply_and_collect(
            graph, parameters, batch, carry, Collect(gates=True, lookups=True)
        )
        found = []
        for layer, (gate_BHN, lookups) in intermediates.items():
            assert lookups is not None
            age_BHNK = jnp.take(ages[model.read_from[layer]][0], lookups.neighbors.slots_BHNK, mode="clip")
            found.append((lookups.neighbors, age_BHNK, gate_BHN))
        return carry, score(logits_BNV, batch), found

    return read


def segment_of(tokens_T: Int[np.ndarray, "T"], first: int, segment_length: int, begin: int = BEGIN_TOKEN) -> Batch:
    """Returns the segment of one row that starts at `first`; see `Batch`."""
    targets = np.zeros((1, segment_length), np.int32)
    inputs, mask = targets.copy(), np.zeros((1, segment_length), bool)
    own = tokens_T[first : first + segment_length]
    before = tokens_T[first - 1 : first] if first else np.asarray([begin])
    targets[0, : len(own)], mask[0, : len(own)] = own, True
    inputs[0, : len(own)] = np.concatenate([before, own])[: len(own)]
    return Batch(inputs, targets, mask, np.asarray([first == 0]))


def _placed(found: Neighbors, ago_BHNK: np.ndarray, gate_BHN: np.ndarray, first: int, count: int) -> SegmentLookups:
    scores_HNK = np.asarray(found.scores_BHNK, np.float32)[0, :, :count]
    exists_HNK = np.isfinite(scores_HNK)
    # One token ago is the input of place `first - 1`, which is the token before that.
    places_HNK = np.where(exists_HNK, first - 1 - ago_BHNK[0, :, :count], NOWHERE).astype(np.int32)
    best_HN1 = np.max(np.where(exists_HNK, scores_HNK, -1e30), axis=-1, keepdims=True)
    powers_HNK = np.where(exists_HNK, np.exp(np.where(exists_HNK, scores_HNK - best_HN1, 0.0)), 0.0)
    total_HN1 = powers_HNK.sum(-1, keepdims=True)
    weights_HNK = powers_HNK / np.where(total_HN1 > 0, total_HN1, 1.0)
    return SegmentLookups(places_HNK, scores_HNK, weights_HNK, np.asarray(gate_BHN, np.float32)[0, :, :count])
