"""Statistics of one read of a bank: recall of its search, ages of what it retrieves, attention that slots receive."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float, Int

from memorizing.memory.bank import Bank, Recall, tokens_ago
from memorizing.memory.eviction import EvictionRule
from memorizing.memory.search import Neighbors
from memorizing.memory.slot_table import SlotTable
from memorizing.model.learned_index import sampled


class ReadTracking(NamedTuple):
    """Data needed to track a read (see `ReadStats`); None for what the bank does not track.

    Attributes:
        recall: counts of neighbors.
        age_BM: age of each slot's token, in tokens; needed for `recall`.
        slot_table: the table of slots, if the bank tracks the attention that each slot receives.
    """

    recall: Recall | None = None
    age_BM: Int[jax.Array, "B M"] | None = None
    slot_table: SlotTable | None = None


def read_tracking(bank: Bank, write_every: int, rule: EvictionRule) -> ReadTracking:
    """Returns what this bank tracks.

    Raises:
        ValueError: if the bank tracks usage, but `rule` does not say how.
    """
    age_BM = None if bank.recall is None else tokens_ago(bank, write_every)
    uses = bank.slot_table is not None and bank.slot_table.usage_BM is not None
    if uses and rule.usage_dtype is None:
        raise ValueError(
            "this memory tracks the usage of its slots for Memory.eviction. Read it with "
            "options=ReadOptions(eviction=memory.eviction_rule), and add the read's statistics with memory.bank.add"
        )
    return ReadTracking(bank.recall, age_BM, bank.slot_table if uses else None)


class LocalSlots(NamedTuple):
    """The slots that one device holds: the global number of the first one, their count, and the mesh axis or None."""

    first: jax.Array | int
    count: int
    axis: str | None

    def locate(self, found: Neighbors) -> tuple[Int[jax.Array, "B H N K"], Bool[jax.Array, "B H N K"]]:
        """Returns the local index of each neighbor (clipped to the slots here), and whether it lies on this device."""
        index_BHNK = found.slots_BHNK - self.first
        is_here_BHNK = (found.scores_BHNK > -jnp.inf) & (index_BHNK >= 0) & (index_BHNK < self.count)
        return jnp.clip(index_BHNK, 0, self.count - 1), is_here_BHNK


class SampledQueries(NamedTuple):
    """The queries whose neighbors are counted: their places, and which of them belong to real tokens, not padding."""

    places_Q: Int[jax.Array, "Q"]
    is_token_BQ: Bool[jax.Array, "B Q"]


def sample_queries(recall: Recall, tokens: int, group: int) -> SampledQueries:
    """Samples all `group` queries of some of a segment's `tokens` tokens."""
    places = sampled(tokens)
    is_token_BQ = jnp.repeat(places < recall.tokens_B[:, None], group, axis=1)
    return SampledQueries((places[:, None] * group + jnp.arange(group)).ravel(), is_token_BQ)


def sampled_recall(
    found: Neighbors, wanted: Neighbors, sample: SampledQueries, slots: LocalSlots, age_segments_BM: jax.Array
) -> Recall:
    """Counts, of the sampled queries, the neighbors in `found` (all queries) and in `wanted` (the sample, exact)."""
    is_token_BHQK = sample.is_token_BQ[:, None, :, None]
    retrieved, wanted = (  # padding wants and finds nothing
        each._replace(scores_BHNK=jnp.where(is_token_BHQK, each.scores_BHNK, -jnp.inf))
        for each in (Neighbors(*(part[:, :, sample.places_Q] for part in found)), wanted)
    )
    return count(retrieved, wanted, _summed_ages(retrieved, age_segments_BM, slots))


def count(found: Neighbors, wanted: Neighbors, age_BH: Int[jax.Array, "B H"]) -> Recall:
    """Returns counts to add to a bank: how many `wanted` neighbors exist, and how many of them are in `found`.

    `age_BH` is the sum of the ages of the found slots, in segments.
    """
    exists_BHNK = wanted.scores_BHNK > -jnp.inf
    slots_BHNK = jnp.where(found.scores_BHNK > -jnp.inf, found.slots_BHNK, -1)
    is_found_BHNK = (wanted.slots_BHNK[..., :, None] == slots_BHNK[..., None, :]).any(-1) & exists_BHNK
    found_BH, wanted_BH = (part.sum((2, 3), dtype=jnp.int32) for part in (is_found_BHNK, exists_BHNK))
    retrieved_BH = (slots_BHNK >= 0).sum((2, 3), dtype=jnp.int32)
    return Recall(found_BH, wanted_BH, retrieved_BH, age_BH, jnp.zeros(len(exists_BHNK), jnp.int32))


def _summed_ages(found: Neighbors, age_BM: Int[jax.Array, "B M"], slots: LocalSlots) -> Int[jax.Array, "B H"]:
    """Sums the ages of the found slots over all devices, in segments: 1 for the segment before."""
    index_BHNK, is_here_BHNK = slots.locate(found)
    ages_BHNK = jax.vmap(lambda ages_M, index_HNK: ages_M[index_HNK])(age_BM, index_BHNK)
    age_BH = jnp.where(is_here_BHNK, ages_BHNK, 0).sum((2, 3), dtype=jnp.int32)
    return age_BH if slots.axis is None else lax.psum(age_BH, slots.axis)


def retrieval_units(
    weights_BHNK: Float[jax.Array, "B H N K"],
    total_BHN1: Float[jax.Array, "B H N 1"],
    tokens_B: Int[jax.Array, "B"],
    group: int,
    axis: str | None,
    rule: EvictionRule,
) -> Int[jax.Array, "B H N K"]:
    """Returns the units that the rule gives each slot for its share of the softmax; 0 for queries of padding.

    The segment's first `tokens_B` tokens are real; the rest is padding.
    """
    if axis is not None:
        total_BHN1 = lax.psum(total_BHN1, axis)
    shares_BHNK = lax.stop_gradient(weights_BHNK / jnp.where(total_BHN1 > 0, total_BHN1, 1.0))
    is_token_BN = jnp.arange(weights_BHNK.shape[2]) // group < tokens_B[:, None]
    return jnp.where(is_token_BN[:, None, :, None], rule.retrieval_units(shares_BHNK), 0)


def units_by_slot(
    index_BHNK: Int[jax.Array, "B H N K"], units_BHNK: Int[jax.Array, "B H N K"], slots: LocalSlots
) -> Int[jax.Array, "B M"]:
    """Sums the units that each slot of this device received, over all heads and queries."""
    rows = len(index_BHNK)
    add = lambda index_X, units_X: jnp.zeros(slots.count, jnp.int32).at[index_X].add(units_X)  # noqa: E731
    units_BM = jax.vmap(add)(index_BHNK.reshape(rows, -1), units_BHNK.reshape(rows, -1))
    return units_BM if slots.axis is None else lax.psum(units_BM, "model")
