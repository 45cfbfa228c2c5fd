"""One document, read by a trained model with its memory and without it.

    gain of a token = its loss without memory - its loss with memory            (nats; both have the XL cache)

How lookups are read: `evaluation/lookups.py`. Figures over the whole document: `inspection_figures.py`. The HTML page:
`inspection_page.py`.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from memorizing.data.vocabulary import Vocabulary
from memorizing.errors import InputError
from memorizing.evaluation.lookups import NOWHERE, ReadSegment, SegmentLookups, read_document
from memorizing.evaluation.perplexity import TrainedModel
from memorizing.model.transformer import abstract_model, constant_gates
from memorizing.reports.token_kinds import texts_of


class ShownRange(NamedTuple):
    """The tokens whose lookups are kept: `count` tokens from `first`, with the `top` neighbors of each head."""

    first: int = 0
    count: int = 10_000
    top: int = 4

    def check(self, length: int) -> None:
        """Rejects a range outside a document of `length` tokens.

        Raises:
            InputError: names the option, its value and the rule.
        """
        if not 0 <= self.first < length:
            raise InputError(f"--first={self.first} is not in the document. Give a token from 0 to {length - 1}")
        for name, value in (("tokens", self.count), ("top", self.top)):
            if value < 1:
                raise InputError(f"--{name}={value} shows nothing. Use at least 1")


class ShownLookups(NamedTuple):
    """The best neighbors of each token in a range of the document, for `L` memory layers in order.

    Attributes:
        first: position of the first token of the range.
        places_TLHK: positions of the retrieved tokens; `NOWHERE` where there is no neighbor.
        weights_TLHK: softmax of the scores over all neighbors of a head.
        gates_TLH: gate value of each head, 0 to 1; 0 where nothing was found.
    """

    first: int
    places_TLHK: Int[np.ndarray, "T L H K"]
    scores_TLHK: Float[np.ndarray, "T L H K"]
    weights_TLHK: Float[np.ndarray, "T L H K"]
    gates_TLH: Float[np.ndarray, "T L H"]


@dataclasses.dataclass(frozen=True)
class Inspection:
    """A document read with memory and without memory.

    Attributes:
        name: name of the document.
        texts: text of each token.
        nats_T, without_T: losses with memory and without memory, in nats.
        correct_T: True where the model's first choice, with memory, was right.
        layers: numbers of the memory layers.
        gates_LH: gate value of each head. If it depends on the token, the mean over tokens that found something.
        gates_are_learned: True if the gate is a learned parameter, False if it depends on the token.
        top_T: position with the largest sum of weight times gate over all heads; `NOWHERE` if nothing was found.
        used_T: sum of weight times gate that each position received from all later tokens.
        distances_LHR: sum of each head's weights at distances of 2^R to 2^(R+1) - 1 tokens.
        shown: lookups in the range that is shown.
    """

    name: str
    tokens_T: Int[np.ndarray, "T"]
    texts: list[str]
    nats_T: Float[np.ndarray, "T"]
    without_T: Float[np.ndarray, "T"]
    correct_T: Bool[np.ndarray, "T"]
    layers: list[int]
    gates_LH: Float[np.ndarray, "L H"]
    gates_are_learned: bool
    top_T: Int[np.ndarray, "T"]
    used_T: Float[np.ndarray, "T"]
    distances_LHR: Float[np.ndarray, "L H R"]
    shown: ShownLookups

    @property
    def gains_T(self) -> Float[np.ndarray, "T"]:
        return self.without_T - self.nats_T


def inspect_document(
    trained: TrainedModel,
    name: str,
    tokens_T: Int[np.ndarray, "T"],
    vocabulary: Vocabulary,
    shown: ShownRange,
) -> Inspection:
    """Reads a document without memory, then with memory, and collects what each token looked up."""
    model, memory, segment_length, parameters = trained
    layers, length = sorted(model.memory_layers), len(tokens_T)
    nats_T, without_T = np.zeros(length, np.float32), np.zeros(length, np.float32)
    correct_T = np.zeros(length, bool)
    no_memory = dataclasses.replace(memory, size=0)
    for segment in read_document(model, no_memory, parameters, tokens_T, segment_length, vocabulary.begin):
        without_T[segment.first : segment.first + len(segment.nats_N)] = segment.nats_N
    collected = _Lookups(length, layers, model.heads, shown._replace(top=min(shown.top, memory.retrieved)))
    for segment in read_document(model, memory, parameters, tokens_T, segment_length, vocabulary.begin):
        span = slice(segment.first, segment.first + len(segment.nats_N))
        nats_T[span], correct_T[span] = segment.nats_N, segment.correct_N
        if segment.layers:
            collected.add(segment, span)
    learned = constant_gates(abstract_model(model, memory)[0], parameters)
    gates_LH = collected.mean_gates()
    if learned:
        gates_LH = np.stack([np.broadcast_to(learned[layer], model.heads) for layer in layers])
    return Inspection(
        name, tokens_T, texts_of(vocabulary.pieces(tokens_T)), nats_T, without_T, correct_T, layers, gates_LH,
        bool(learned), collected.top_T, collected.used_T, collected.distances_LHR, collected.shown,
    )  # fmt: skip


class _Lookups:
    """Collects the lookups of a document, segment by segment. Attributes: see `Inspection`."""

    def __init__(self, length: int, layers: list[int], heads: int, shown: ShownRange):
        stop = min(shown.first + shown.count, length)
        shape = (stop - shown.first, len(layers), heads, shown.top)
        self._layers, self._heads, self._shown_span = layers, heads, slice(shown.first, stop)
        floats = (np.zeros(dims, np.float32) for dims in (shape, shape, shape[:3]))
        self.shown = ShownLookups(shown.first, np.full(shape, NOWHERE, np.int32), *floats)
        self._gate_sums_LH, self._gate_counts_LH = np.zeros(shape[1:3]), np.zeros(shape[1:3], int)
        self.top_T, self.used_T = np.full(length, NOWHERE, np.int64), np.zeros(length)
        self.distances_LHR = np.zeros((len(layers), heads, 1 + int(length).bit_length()))

    def add(self, segment: ReadSegment, span: slice) -> None:
        """Adds a segment, whose tokens have the positions `span`."""
        places_NLHK, scores_NLHK, weights_NLHK, gates_NLH = (
            np.stack([segment.layers[layer][field].swapaxes(0, 1) for layer in self._layers], axis=1)
            for field in range(len(SegmentLookups._fields))
        )
        self._gate_sums_LH += gates_NLH.sum(0, dtype=np.float64)
        self._gate_counts_LH += (gates_NLH > 0).sum(0)
        source, target = _overlap(span, self._shown_span)
        for shown, found in zip(self.shown[1:4], (places_NLHK, scores_NLHK, weights_NLHK), strict=True):
            shown[target] = found[source][..., : shown.shape[-1]]
        self.shown.gates_TLH[target] = gates_NLH[source]
        mass_NLHK = weights_NLHK * gates_NLH[..., None]
        distance_NLHK = np.arange(span.start, span.stop)[:, None, None, None] - places_NLHK
        for layer in range(len(self._layers)):
            for head in range(self._heads):
                bins = np.log2(np.maximum(distance_NLHK[:, layer, head], 1)).astype(int)
                np.add.at(self.distances_LHR[layer, head], bins.ravel(), weights_NLHK[:, layer, head].ravel())
        used = np.where(places_NLHK >= 0, mass_NLHK, 0.0)
        np.add.at(self.used_T, np.maximum(places_NLHK, 0).ravel(), used.ravel())
        self.top_T[span] = [_heaviest(*token) for token in zip(places_NLHK, mass_NLHK, strict=True)]

    def mean_gates(self) -> Float[np.ndarray, "L H"]:
        """Returns the mean gate of each head over tokens that found something."""
        return self._gate_sums_LH / np.maximum(self._gate_counts_LH, 1)


def _overlap(one: slice, other: slice) -> tuple[slice, slice]:
    """Returns the intersection of two ranges, counted from the start of each."""
    start, stop = max(one.start, other.start), max(max(one.start, other.start), min(one.stop, other.stop))
    return slice(start - one.start, stop - one.start), slice(start - other.start, stop - other.start)


def _heaviest(places_LHK: Int[np.ndarray, "L H K"], mass_LHK: Float[np.ndarray, "L H K"]) -> int:
    """Returns the position with the largest sum, the earliest of equal ones; `NOWHERE` if nothing was found."""
    found = places_LHK != NOWHERE
    if not found.any():
        return NOWHERE
    places, index = np.unique(places_LHK[found], return_inverse=True)
    return int(places[np.argmax(np.bincount(index, mass_LHK[found]))])
