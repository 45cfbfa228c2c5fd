"""Attention over what the external memory retrieves: search, gather, softmax over the `K` found.

    idx     = top-K over valid slots of  stop_gradient(q) . memory_k      # per row, head and token
    remote  = softmax(q . memory_k[idx]) memory_v[idx]                    # gradient flows to q alone

No position bias: a memory is found by what it holds. What is done with `remote`: `gates.py`.

Where slots are split over devices, each gathers and attends to those of the `K` that it holds, and the sums of the
softmax are added up over devices: neither keys nor values of the memory ever travel.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Bool, Float, Int

from memorizing.memory.bank import PARTS, Bank, ReadStats, Recall, tokens_ago, valid
from memorizing.memory.search import Keys, Neighbors, Search
from memorizing.memory.search.blocked import Blocked
from memorizing.memory.search.contract import counted as counted_scores
from memorizing.memory.search.gather import gather, gather_keys
from memorizing.memory.search.sharded import Sharded
from memorizing.memory.slot_table import SlotTable
from memorizing.model.gates import Read, Scores, together
from memorizing.model.groups import by_key_head, by_query_head
from memorizing.model.learned_index import LearnedIndex, sampled, taught
from memorizing.parallel.mesh import current_mesh, spec, specs
from memorizing.shapes import Array

RETRIEVED = "retrieved"
"""The name of what is kept for the backward pass even where activations are computed again (`Model.remat`): by then the
memory has been written to, so to search it again would take a copy of all of it."""


def attend_to_memory(
    query_BHND: Float[jax.Array, "B H N D"],
    bank: Bank,
    search: Search,
    neighbors: int,
    *,
    index: LearnedIndex | None = None,
    mask_BN: Bool[Array, "B N"] | None = None,
    write_every: int = 1,
    negative_rows: int = 0,
) -> tuple[Read, Bool[jax.Array, "B H N"], ReadStats]:
    """Reads the memory; also says which queries have found anything. Those that have not read zeros, at scores of 0.

    With `negative_rows` each row's queries also retrieve from the memories of the so many rows after it, all in one
    softmax with its own: contrastive training (arXiv 2307.03170), which teaches queries to tell documents apart
    (keys in a memory have no gradient). Queries that find nothing in their own memory find nothing.

    Notices what the bank keeps account of, in the row's own memory: what sampled queries found, and how much attention
    each slot received; not of queries of padding, see `memory.bank.masked`.

    A layer's `index` is for the search to use, and learns from what is read, if `mask_BN` tells which tokens are none
    of padding.
    """
    bank = lax.stop_gradient(bank)
    group, keys = query_BHND.shape[1] // bank.keys_BHMD.shape[1], bank.keys
    if index is not None:
        learned = keys.index.learned | lax.stop_gradient(index)._asdict()
        keys = keys._replace(index=keys.index._replace(learned=learned))
    tracking = _read_tracking(bank, write_every)

    def attend(query_BHND: jax.Array, tracking: ReadTracking) -> tuple[Read, jax.Array, ReadStats]:
        attend: Any = functools.partial(_attend, search=search, neighbors=neighbors, group=group)
        if (mesh := current_mesh()) is not None:
            used_BM = None if tracking.slot_table is None else tracking.slot_table.used_BM
            attend = jax.shard_map(
                functools.partial(attend, axis="memory"),
                mesh=mesh,
                # Every device along the memory axis reads the queries of the whole segment, and gives back its share.
                in_specs=(spec("BH_D"), specs(keys), spec("BHMD"), spec("BM"), specs(tracking)),
                out_specs=(spec("BHND"), spec("BHN"), spec("BHN"), specs(ReadStats(tracking.recall, used_BM))),
                check_vma=False,  # searches start their scans from constants, which are the same on all devices
            )
        *read, read_stats = attend(by_key_head(query_BHND, group), keys, bank.values_BHMD, valid(bank), tracking)
        out_BHND, scores, found_BHN = jax.tree.map(lambda part: by_query_head(part, group), read)
        return Read(out_BHND, scores), found_BHN, read_stats

    read, found_BHN, read_stats = attend(query_BHND, tracking)
    if index is not None and mask_BN is not None:
        places = sampled(query_BHND.shape[2])
        asked_BHND = lax.stop_gradient(by_key_head(query_BHND[:, :, places], group))
        asks_BN = jnp.repeat(mask_BN[:, places], group, axis=1)
        weight = jnp.sum(mask_BN, dtype=jnp.float32)  # as much as all tokens: the gradient is divided by their number
        read = read._replace(out_BHND=taught(read.out_BHND, index, asked_BHND, bank.keys, valid(bank), asks_BN, weight))
    if negative_rows:
        # Queries travel to the memories, not memories to the queries; what is read comes back.
        others = [
            jax.tree.map(
                lambda part, by=by: jnp.roll(part, -by, axis=0),
                attend(jnp.roll(query_BHND, by, axis=0), ReadTracking(None, None, None))[:2],
            )
            for by in range(1, negative_rows + 1)
        ]
        read = together([read, *(it[0] for it in others)], [found_BHN, *(it[1] for it in others)])
    return read, found_BHN, read_stats


class ReadTracking(NamedTuple):
    """What a bank keeps account of while it is read, as far as it does: see `ReadStats`.

    Attributes:
        recall: counts of neighbors.
        ago_BM: beside these, how many tokens ago that of each slot was read.
        addresses: of a bank that counts the attention which each slot receives.
    """

    recall: Recall | None
    ago_BM: Int[jax.Array, "B M"] | None
    slot_table: SlotTable | None


def _read_tracking(bank: Bank, write_every: int) -> ReadTracking:
    counts = bank.slot_table is not None and bank.slot_table.used_BM is not None
    ago_BM = None if bank.recall is None else tokens_ago(bank, write_every)
    return ReadTracking(bank.recall, ago_BM, bank.slot_table if counts else None)


def _attend(
    query_BHND: Float[jax.Array, "B H N D"],
    keys: Keys,
    values_BHMD: Float[jax.Array, "B H M D"],
    valid_BM: Bool[jax.Array, "B M"],
    tracking: ReadTracking,
    search: Search,
    neighbors: int,
    group: int,
    axis: str | None = None,
) -> tuple[Float[jax.Array, "B H N_own D"], Scores, Bool[jax.Array, "B H N_own"], ReadStats]:
    """On one device; or, with an `axis`, on each along it: the slots are its own, as is the part of `N` it returns.

    Heads are those of the bank, and the queries `group` for each token (see groups.py).
    """
    slots, first, oracle = valid_BM.shape[1], 0, Blocked(minimum_score=search.minimum_score)
    searched_BHND = lax.stop_gradient(query_BHND)
    if search.is_dense:
        search(searched_BHND, keys, valid_BM, min(neighbors, slots))  # for who listens; dropped where nobody does
        return _attend_densely(
            query_BHND, keys, values_BHMD, valid_BM, tracking.slot_table, search.minimum_score, group, axis
        )
    if axis is not None:
        search, oracle = Sharded(inner=search, axis=axis), Sharded(inner=oracle, axis=axis)
        first = lax.axis_index(axis) * slots
    found = search(searched_BHND, keys, valid_BM, neighbors)
    counted = None
    if tracking.recall is not None and tracking.ago_BM is not None:
        tokens = query_BHND.shape[2] // group
        places = sampled(tokens)
        is_token_BQ = jnp.repeat(places < tracking.recall.tokens_B[:, None], group, axis=1)
        places = (places[:, None] * group + jnp.arange(group)).ravel()  # all queries of the sampled tokens
        wanted = oracle(searched_BHND[:, :, places], keys, valid_BM, neighbors)
        is_token_BHQK = is_token_BQ[:, None, :, None]
        sought, wanted = (  # padding wants and finds nothing
            each._replace(scores_BHNK=jnp.where(is_token_BHQK, each.scores_BHNK, -jnp.inf))
            for each in (Neighbors(*(part[:, :, places] for part in found)), wanted)
        )
        counted = count(sought, wanted, _segments_ago(sought, tracking.ago_BM, tokens, first, axis))
    index_BHNK = found.slots_BHNK - first
    is_here_BHNK = (found.scores_BHNK > -jnp.inf) & (index_BHNK >= 0) & (index_BHNK < slots)
    index_BHNK = jnp.clip(index_BHNK, 0, slots - 1)
    retrieved = (
        gather_keys(keys, index_BHNK),
        gather(values_BHMD, index_BHNK),
        is_here_BHNK,
        found.scores_BHNK[..., :1],
    )
    keys_BHNKD, values_BHNKD, is_here_BHNK, best_BHN1 = checkpoint_name(retrieved, RETRIEVED)
    keys_BHNKD, values_BHNKD = (part.astype(query_BHND.dtype) for part in (keys_BHNKD, values_BHNKD))
    # The scores are computed again from the gathered keys, because through these the gradient reaches the query.
    scores_BHNK = jnp.einsum("BHND,BHNKD->BHNK", query_BHND, keys_BHNKD, preferred_element_type=jnp.float32)
    # The best score is the same on all devices, and finite even where nothing is found: no NaN in or out of `exp`.
    best_BHN1 = jnp.maximum(best_BHN1, -1e30)
    weights_BHNK = _powers(scores_BHNK, is_here_BHNK, best_BHN1)
    remote_BHND = jnp.einsum(
        "BHNK,BHNKD->BHND", weights_BHNK.astype(query_BHND.dtype), values_BHNKD, preferred_element_type=jnp.float32
    )
    total_BHN1, used_BM = weights_BHNK.sum(-1, keepdims=True), None
    if tracking.slot_table is not None:
        parts_BHNK = _parts(weights_BHNK, total_BHN1, tracking.slot_table.coming_B, group, axis)
        used_BM = _received(index_BHNK, parts_BHNK, slots, axis)
    parts = remote_BHND, total_BHN1, jnp.where(is_here_BHNK, scores_BHNK, 0.0)[..., :1]
    return *_read(*parts, best_BHN1, query_BHND.dtype, axis), ReadStats(counted, used_BM)


def _attend_densely(
    query_BHND: Float[jax.Array, "B H N D"],
    keys: Keys,
    values_BHMD: Float[jax.Array, "B H M D"],
    valid_BM: Bool[jax.Array, "B M"],
    slot_table: SlotTable | None,
    minimum_score: float | None,
    group: int,
    axis: str | None,
) -> tuple[Float[jax.Array, "B H N_own D"], Scores, Bool[jax.Array, "B H N_own"], ReadStats]:
    """The same over all valid slots: nothing is selected, so nothing is gathered."""
    keys_BHMD, values_BHMD = (part.astype(query_BHND.dtype) for part in (keys.plain(), values_BHMD))
    scores_BHNM = jnp.einsum("BHND,BHMD->BHNM", query_BHND, keys_BHMD, preferred_element_type=jnp.float32)
    counts_BHNM = counted_scores(lax.stop_gradient(scores_BHNM), valid_BM, minimum_score) > -jnp.inf
    own_BHN1 = jnp.where(counts_BHNM, scores_BHNM, -1e30).max(-1, keepdims=True)
    best_BHN1 = lax.stop_gradient(own_BHN1)
    is_here_BHN1 = jnp.ones_like(best_BHN1)
    if axis is not None:
        best_BHN1 = lax.pmax(best_BHN1, axis)
        is_here_BHN1 = (lax.stop_gradient(own_BHN1) == best_BHN1).astype(jnp.float32)
        is_here_BHN1 /= lax.psum(is_here_BHN1, axis)  # where slots on several devices score alike
    powers_BHNM = _powers(scores_BHNM, counts_BHNM, best_BHN1)
    sum_BHND = jnp.einsum(
        "BHNM,BHMD->BHND", powers_BHNM.astype(query_BHND.dtype), values_BHMD, preferred_element_type=jnp.float32
    )
    own_BHN1 = jnp.where(best_BHN1 > -1e30, own_BHN1 * is_here_BHN1, 0.0)
    total_BHN1, used_BM = powers_BHNM.sum(-1, keepdims=True), None
    if slot_table is not None:
        used_BM = _parts(powers_BHNM, total_BHN1, slot_table.coming_B, group, axis).sum((1, 2))
        used_BM = used_BM if axis is None else lax.psum(used_BM, "model")
    return *_read(sum_BHND, total_BHN1, own_BHN1, best_BHN1, query_BHND.dtype, axis), ReadStats(None, used_BM)


def _powers(scores: jax.Array, counts: jax.Array, top: jax.Array) -> jax.Array:
    """Of the softmax before it is divided by their total; 0 where nothing counts."""
    return jnp.where(counts, jnp.exp(jnp.where(counts, scores - top, 0.0)), 0.0)


def _read(
    sum_BHND: Float[jax.Array, "B H N D"],
    total_BHN1: Float[jax.Array, "B H N 1"],
    best_BHN1: Float[jax.Array, "B H N 1"],
    top_BHN1: Float[jax.Array, "B H N 1"],
    dtype: jnp.dtype,
    axis: str | None,
) -> tuple[Float[jax.Array, "B H N_own D"], Scores, Bool[jax.Array, "B H N_own"]]:
    """What was read, and by which queries, from the sums of the softmax on each device along the `axis`.

    `best_BHN1` is 0 on all devices but the one whose slot scored best; `top_BHN1`, by which powers were kept small, is
    the same on all.
    """
    if axis is not None:
        sum_BHND, total_BHN1, best_BHN1 = (
            lax.psum_scatter(part, axis, scatter_dimension=2, tiled=True) for part in (sum_BHND, total_BHN1, best_BHN1)
        )
        own = total_BHN1.shape[2]
        top_BHN1 = lax.dynamic_slice_in_dim(top_BHN1, lax.axis_index(axis) * own, own, axis=2)
    found_BHN1 = total_BHN1 > 0
    total_BHN1 = jnp.where(found_BHN1, total_BHN1, 1.0)
    log_total_BHN1 = jnp.where(found_BHN1, jnp.log(total_BHN1) + top_BHN1, 0.0)
    scores = Scores(best_BHN1[..., 0], log_total_BHN1[..., 0])
    return (sum_BHND / total_BHN1).astype(dtype), scores, found_BHN1[..., 0]


def _parts(
    weights_BHNK: Float[jax.Array, "B H N K"],
    total_BHN1: Float[jax.Array, "B H N 1"],
    tokens_B: Int[jax.Array, "B"],
    group: int,
    axis: str | None,
) -> Int[jax.Array, "B H N K"]:
    """Shares of the softmax in whole parts, see `ReadStats`; 0 for queries of padding, after the first `tokens_B`."""
    if axis is not None:
        total_BHN1 = lax.psum(total_BHN1, axis)
    shares_BHNK = lax.stop_gradient(weights_BHNK / jnp.where(total_BHN1 > 0, total_BHN1, 1.0))
    is_token_BN = jnp.arange(weights_BHNK.shape[2]) // group < tokens_B[:, None]
    return jnp.where(is_token_BN[:, None, :, None], jnp.round(PARTS * shares_BHNK), 0).astype(jnp.int32)


def _received(
    index_BHNK: Int[jax.Array, "B H N K"], parts_BHNK: Int[jax.Array, "B H N K"], slots: int, axis: str | None
) -> Int[jax.Array, "B M"]:
    """What each of this device's slots received, of all heads and queries."""
    rows = len(index_BHNK)
    add = lambda index_X, parts_X: jnp.zeros(slots, jnp.int32).at[index_X].add(parts_X)  # noqa: E731
    used_BM = jax.vmap(add)(index_BHNK.reshape(rows, -1), parts_BHNK.reshape(rows, -1))
    return used_BM if axis is None else lax.psum(used_BM, "model")


def _segments_ago(
    found: Neighbors, ago_BM: Int[jax.Array, "B M"], tokens: int, first: jax.Array | int, axis: str | None
) -> Int[jax.Array, "B H"]:
    """The ages of what was found, added up over all devices: 1 for what the segment before had."""
    index_BHNK, slots = found.slots_BHNK - first, ago_BM.shape[1]
    is_here_BHNK = (found.scores_BHNK > -jnp.inf) & (index_BHNK >= 0) & (index_BHNK < slots)
    ages_BM = -(-ago_BM // tokens)
    ages_BHNK = jax.vmap(lambda ages_M, index_HNK: ages_M[index_HNK])(ages_BM, jnp.clip(index_BHNK, 0, slots - 1))
    age_BH = jnp.where(is_here_BHNK, ages_BHNK, 0).sum((2, 3), dtype=jnp.int32)
    return age_BH if axis is None else lax.psum(age_BH, axis)


def count(found: Neighbors, wanted: Neighbors, age_BH: Int[jax.Array, "B H"]) -> Recall:
    """How many of the `wanted` neighbors there are, and how many were `found`: to be added to a bank's counts.

    `age_BH` are the ages of those found, in segments, added up.
    """
    exists_BHNK = wanted.scores_BHNK > -jnp.inf
    slots_BHNK = jnp.where(found.scores_BHNK > -jnp.inf, found.slots_BHNK, -1)
    is_found_BHNK = (wanted.slots_BHNK[..., :, None] == slots_BHNK[..., None, :]).any(-1) & exists_BHNK
    found_BH, wanted_BH = (part.sum((2, 3), dtype=jnp.int32) for part in (is_found_BHNK, exists_BHNK))
    retrieved_BH = (slots_BHNK >= 0).sum((2, 3), dtype=jnp.int32)
    return Recall(found_BH, wanted_BH, retrieved_BH, age_BH, jnp.zeros(len(exists_BHNK), jnp.int32))
