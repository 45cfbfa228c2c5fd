"""Values inside the memory layers that a caller can ask a model to return, as with Flax's `sow`.

    logits, carry, intermediates = apply_and_collect(graph, parameters, batch, carry, Collect(gates=True))
    intermediates[9].gate_BHN                                  # memory layer 9

What is not requested is not computed.
"""

import dataclasses
from typing import NamedTuple

import jax
from jaxtyping import Float

from memorizing.memory.search import Neighbors


@dataclasses.dataclass(frozen=True)
class Collect:
    """Choice of values to return for each memory layer.

    Attributes:
        gates: the gate's value for each token.
        lookups: the queries, and the neighbors that they retrieved. A dense layer selects nothing, so asking for its
            lookups adds a search.
    """

    gates: bool = False
    lookups: bool = False


COLLECT_NOTHING = Collect()


class Lookups(NamedTuple):
    """Queries of a memory layer and the slots that they retrieved from the layer's bank, by query head."""

    queries_BHND: Float[jax.Array, "B H N D"]
    neighbors: Neighbors


class LayerIntermediates(NamedTuple):
    """Requested values of one memory layer; None for values that were not requested.

    Attributes:
        gate_BHN: the gate's value; 0 for tokens that found nothing.
        lookups: queries and their neighbors.
    """

    gate_BHN: Float[jax.Array, "B H N"] | None = None
    lookups: Lookups | None = None


type Intermediates = dict[int, LayerIntermediates]
"""Requested values by the number of the memory layer, counted from 1; empty if there are no banks."""
