"""One device's read of a bank: search, gather, and a softmax over the `K` slots found (or over all slots, if dense).

On a mesh, each device along the `memory` axis holds some slots. It attends to the retrieved slots that it holds, and
the sums of the softmax are added over devices: keys and values of the memory never travel.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Bool, Float

from memorizing.memory.bank import ReadStats
from memorizing.memory.eviction import EvictionRule
from memorizing.memory.search import Keys, Neighbors, Search
from memorizing.memory.search.blocked import Blocked
from memorizing.memory.search.contract import counted as counted_scores
from memorizing.memory.search.gather import gather, gather_keys
from memorizing.memory.search.sharded import Sharded
from memorizing.model.attention_output import AttentionOutput, ScoreSummary
from memorizing.model.read_tracking import (
    LocalSlots,
    ReadTracking,
    retrieval_units,
    sample_queries,
    sampled_recall,
    units_by_slot,
)

RETRIEVED = "retrieved"
"""Name under which retrieved keys and values are saved for the backward pass, even with `Model.remat`. By then the
memory has been written to, so searching it again would need a copy of all of it."""


class BankView(NamedTuple):
    """The parts of a bank that a read needs."""

    keys: Keys
    values_BHMD: Float[jax.Array, "B H M D"]
    valid_BM: Bool[jax.Array, "B M"]
    tracking: ReadTracking


@dataclasses.dataclass(frozen=True)
class ReadPlan:
    """Static choices of a read.

    Attributes:
        search: finds the neighbors.
        neighbors: slots per query (`K`).
        group: query heads that share a head of the bank; queries come in groups, see groups.py.
        eviction: rule that counts retrievals; used only if the bank's slot table tracks usage.
        lookups: whether to return the neighbors.
        axis: mesh axis over which slots are split; None on one device.
    """

    search: Search
    neighbors: int
    group: int
    eviction: EvictionRule
    lookups: bool = False
    axis: str | None = None


class MemoryRead(NamedTuple):
    """Result of a read. On a mesh, each device along the axis returns its share of the `N` queries.

    Attributes:
        output: the attention over what was found; zeros and scores of 0 for queries that found nothing.
        found_BHN: whether the query found anything.
        stats: what the bank tracks of this read.
        neighbors: retrieved slots of all queries; None if not requested.
    """

    output: AttentionOutput
    found_BHN: Bool[jax.Array, "B H N"]
    stats: ReadStats
    neighbors: Neighbors | None


def read_bank(query_BHND: Float[jax.Array, "B H N D"], view: BankView, plan: ReadPlan) -> MemoryRead:
    """Attends to the neighbors of each query."""
    count, first, oracle = view.valid_BM.shape[1], 0, Blocked(minimum_score=plan.search.minimum_score)
    search, searched_BHND, axis = plan.search, lax.stop_gradient(query_BHND), plan.axis
    if axis is not None:
        search, oracle = Sharded(inner=search, axis=axis), Sharded(inner=oracle, axis=axis)
        first = lax.axis_index(axis) * count
    slots = LocalSlots(first, count, axis)
    if plan.search.is_dense:
        return _read_densely(query_BHND, view, plan)._replace(
            neighbors=search(searched_BHND, view.keys, view.valid_BM, plan.neighbors) if plan.lookups else None
        )
    found = search(searched_BHND, view.keys, view.valid_BM, plan.neighbors)
    recall, tracking = None, view.tracking
    if tracking.recall is not None and tracking.age_BM is not None:
        tokens = query_BHND.shape[2] // plan.group
        sample = sample_queries(tracking.recall, tokens, plan.group)
        wanted = oracle(searched_BHND[:, :, sample.places_Q], view.keys, view.valid_BM, plan.neighbors)
        recall = sampled_recall(found, wanted, sample, slots, -(-tracking.age_BM // tokens))
    output, found_BHN, units_BM = _attend(query_BHND, found, view, slots, plan)
    return MemoryRead(output, found_BHN, ReadStats(recall, units_BM), found if plan.lookups else None)


def _attend(query_BHND, found: Neighbors, view: BankView, slots: LocalSlots, plan: ReadPlan):
    """Attends to the neighbors that lie on this device, with scores and sums over all devices."""
    index_BHNK, is_here_BHNK = slots.locate(found)
    retrieved = (
        gather_keys(view.keys, index_BHNK),
        gather(view.values_BHMD, index_BHNK),
        is_here_BHNK,
        found.scores_BHNK[..., :1],
    )
    keys_BHNKD, values_BHNKD, is_here_BHNK, best_BHN1 = checkpoint_name(retrieved, RETRIEVED)
    keys_BHNKD, values_BHNKD = (part.astype(query_BHND.dtype) for part in (keys_BHNKD, values_BHNKD))
    # The scores are computed again from the gathered keys, because through these the gradient reaches the query.
    scores_BHNK = jnp.einsum("BHND,BHNKD->BHNK", query_BHND, keys_BHNKD, preferred_element_type=jnp.float32)
    # The best score is the same on all devices, and finite if nothing is found: no NaN in or out of `exp`.
    best_BHN1 = jnp.maximum(best_BHN1, -1e30)
    weights_BHNK = _exponentials(scores_BHNK, is_here_BHNK, best_BHN1)
    remote_BHND = jnp.einsum(
        "BHNK,BHNKD->BHND", weights_BHNK.astype(query_BHND.dtype), values_BHNKD, preferred_element_type=jnp.float32
    )
    total_BHN1, units_BM = weights_BHNK.sum(-1, keepdims=True), None
    if (table := view.tracking.slot_table) is not None:
        units_BHNK = retrieval_units(weights_BHNK, total_BHN1, table.coming_B, plan.group, slots.axis, plan.eviction)
        units_BM = units_by_slot(index_BHNK, units_BHNK, slots)
    sums = _SoftmaxSums(remote_BHND, total_BHN1, jnp.where(is_here_BHNK, scores_BHNK, 0.0)[..., :1], best_BHN1)
    return *_normalize(sums, query_BHND.dtype, slots.axis), units_BM


def _read_densely(query_BHND: Float[jax.Array, "B H N D"], view: BankView, plan: ReadPlan) -> MemoryRead:
    """Attends to all valid slots: nothing is selected, so nothing is gathered."""
    axis = plan.axis
    keys_BHMD, values_BHMD = (part.astype(query_BHND.dtype) for part in (view.keys.plain(), view.values_BHMD))
    scores_BHNM = jnp.einsum("BHND,BHMD->BHNM", query_BHND, keys_BHMD, preferred_element_type=jnp.float32)
    counted_BHNM = counted_scores(lax.stop_gradient(scores_BHNM), view.valid_BM, plan.search.minimum_score)
    counts_BHNM = counted_BHNM > -jnp.inf
    local_best_BHN1 = jnp.where(counts_BHNM, scores_BHNM, -1e30).max(-1, keepdims=True)
    best_BHN1 = lax.stop_gradient(local_best_BHN1)
    is_here_BHN1 = jnp.ones_like(best_BHN1)
    if axis is not None:
        best_BHN1 = lax.pmax(best_BHN1, axis)
        is_here_BHN1 = (lax.stop_gradient(local_best_BHN1) == best_BHN1).astype(jnp.float32)
        is_here_BHN1 /= lax.psum(is_here_BHN1, axis)  # splits a tie between devices evenly
    weights_BHNM = _exponentials(scores_BHNM, counts_BHNM, best_BHN1)
    sum_BHND = jnp.einsum(
        "BHNM,BHMD->BHND", weights_BHNM.astype(query_BHND.dtype), values_BHMD, preferred_element_type=jnp.float32
    )
    local_best_BHN1 = jnp.where(best_BHN1 > -1e30, local_best_BHN1 * is_here_BHN1, 0.0)
    total_BHN1, units_BM = weights_BHNM.sum(-1, keepdims=True), None
    if (table := view.tracking.slot_table) is not None:
        units_BHNM = retrieval_units(weights_BHNM, total_BHN1, table.coming_B, plan.group, axis, plan.eviction)
        units_BM = units_BHNM.sum((1, 2))
        units_BM = units_BM if axis is None else lax.psum(units_BM, "model")
    sums = _SoftmaxSums(sum_BHND, total_BHN1, local_best_BHN1, best_BHN1)
    output, found_BHN = _normalize(sums, query_BHND.dtype, axis)
    return MemoryRead(output, found_BHN, ReadStats(None, units_BM), None)


def _exponentials(scores: jax.Array, counts: jax.Array, top: jax.Array) -> jax.Array:
    """Returns the softmax before division by its total; 0 for scores that do not count."""
    return jnp.where(counts, jnp.exp(jnp.where(counts, scores - top, 0.0)), 0.0)


class _SoftmaxSums(NamedTuple):
    """Sums of a softmax over the slots of one device.

    Attributes:
        sum_BHND: weighted values, before division by the total.
        total_BHN1: sum of the exponentials.
        best_BHN1: on the device that holds the best slot, its score; on the others, 0.
        top_BHN1: the score that was subtracted in the exponentials, the same on all devices.
    """

    sum_BHND: Float[jax.Array, "B H N D"]
    total_BHN1: Float[jax.Array, "B H N 1"]
    best_BHN1: Float[jax.Array, "B H N 1"]
    top_BHN1: Float[jax.Array, "B H N 1"]


def _normalize(
    sums: _SoftmaxSums, dtype: jnp.dtype, axis: str | None
) -> tuple[AttentionOutput, Bool[jax.Array, "B H N_own"]]:
    """Adds the sums over devices and divides them; also returns which queries found anything."""
    sum_BHND, total_BHN1, best_BHN1, top_BHN1 = sums
    if axis is not None:
        sum_BHND, total_BHN1, best_BHN1 = (
            lax.psum_scatter(part, axis, scatter_dimension=2, tiled=True) for part in (sum_BHND, total_BHN1, best_BHN1)
        )
        local_queries = total_BHN1.shape[2]
        top_BHN1 = lax.dynamic_slice_in_dim(top_BHN1, lax.axis_index(axis) * local_queries, local_queries, axis=2)
    found_BHN1 = total_BHN1 > 0
    total_BHN1 = jnp.where(found_BHN1, total_BHN1, 1.0)
    log_total_BHN1 = jnp.where(found_BHN1, jnp.log(total_BHN1) + top_BHN1, 0.0)
    scores = ScoreSummary(best_BHN1[..., 0], log_total_BHN1[..., 0])
    return AttentionOutput((sum_BHND / total_BHN1).astype(dtype), scores), found_BHN1[..., 0]
