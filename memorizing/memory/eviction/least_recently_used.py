"""Eviction rule `least_recently_used`: the token whose last retrieval is longest ago leaves."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from memorizing.errors import InputError
from memorizing.memory.eviction.contract import EvictionRule
from memorizing.memory.slot_table import SlotTable


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeastRecentlyUsed(EvictionRule):
    """Evicts the token whose last retrieval with enough attention is longest ago.

    Time is counted in segments, because all queries of a segment read the same memory. Writing a token counts as its
    first retrieval. Of tokens with the same time, the oldest leaves first.

    Attributes:
        minimum_share: share of a query's attention, 0 to 1, above which a retrieval counts. 0 counts every retrieval;
            with 32 neighbors, 1/32 = 0.03 is the mean share.
    """

    minimum_share: float = 0.03

    usage_dtype = jnp.int32

    def __post_init__(self):
        if not 0 <= self.minimum_share < 1:
            raise InputError(
                f"LeastRecentlyUsed.minimum_share = {self.minimum_share}: must be at least 0 and below 1, the share of "
                "a slot that gets all attention. 0.03 is the mean share of 32 neighbors"
            )

    def rank(self, slot_table: SlotTable) -> Int[jax.Array, "B M"]:
        return slot_table.tracked_usage_BM

    def retrieval_units(self, shares: Float[jax.Array, "*shape"]) -> Int[jax.Array, "*shape"]:
        return (shares > self.minimum_share).astype(jnp.int32)

    def usage_after_read(self, slot_table: SlotTable, units_BM: Int[jax.Array, "B M"]) -> Int[jax.Array, "B M"]:
        return jnp.where(units_BM > 0, slot_table.read_B[:, None], slot_table.tracked_usage_BM)

    def new_usage(self, slot_table: SlotTable) -> Int[jax.Array, "B"]:
        return slot_table.read_B
