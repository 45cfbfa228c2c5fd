"""Eviction rule `least_used`: the token that received the least attention leaves."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from memorizing.memory.eviction.contract import EvictionRule
from memorizing.memory.slot_table import SlotTable

PARTS = 1 << 14
"""Units of one query's and head's attention. Sums over 100,000 queries and heads fit into 32 bits."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeastUsed(EvictionRule):
    """Evicts the token with the least attention so far, summed over heads and queries.

    A new token starts with the mean of the tokens in memory, because nothing could read it yet. So a token stays as
    long as it is read more than the average of newer tokens. Of equal tokens the oldest leaves first.
    """

    usage_dtype = jnp.float32

    def rank(self, slot_table: SlotTable) -> Float[jax.Array, "B M"]:
        return slot_table.tracked_usage_BM

    def retrieval_units(self, shares: Float[jax.Array, "*shape"]) -> Int[jax.Array, "*shape"]:
        return jnp.round(PARTS * shares).astype(jnp.int32)

    def usage_after_read(self, slot_table: SlotTable, units_BM: Int[jax.Array, "B M"]) -> Float[jax.Array, "B M"]:
        return slot_table.tracked_usage_BM + units_BM.astype(jnp.float32) / PARTS

    def new_usage(self, slot_table: SlotTable) -> Float[jax.Array, "B"]:
        held_BM = slot_table.held_BM
        return jnp.where(held_BM, slot_table.tracked_usage_BM, 0).sum(1) / jnp.maximum(held_BM.sum(1), 1)
