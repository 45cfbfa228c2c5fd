"""The shared part of searches that score only some slots: buckets of slots, candidates, and their top-k.

    slots by bucket, newest first        | 7 2 | 9 8 4 1 | 5 | 6 3 0 |     sorted once per segment
    runs of a query, most promising first    b       d                       its buckets, in each table
    its candidates                           9 8 4 1 6 3                     a fixed number, filled run by run

The candidates' keys are gathered and scored as in every search. The best are chosen by score, equal scores by lower
slot. So these searches can only lose recall.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float, Int

from memorizing.memory.search.contract import Keys, Neighbors, inner_products, pad
from memorizing.memory.search.gather import gather

GATHERED = 1 << 24
"""Largest number of gathered features held at a time; queries are searched in blocks that stay below it."""


class Buckets(NamedTuple):
    """Slots sorted into the buckets of each table. Invalid slots are in no bucket.

    Attributes:
        order_BHTM: slots by bucket, newest first within a bucket; invalid slots at the end.
        sorted_BHTM: bucket of each entry of `order_BHTM`.
    """

    order_BHTM: Int[jax.Array, "B H T M"]
    sorted_BHTM: Int[jax.Array, "B H T M"]


class Runs(NamedTuple):
    """Runs of slots in `Buckets.order_BHTM`, for each query in the order in which it scores them.

    Attributes:
        starts_BHNR: first index of each run, counted through all tables.
        sizes_BHNR: number of slots in each run; may be 0.
    """

    starts_BHNR: Int[jax.Array, "B H N R"]
    sizes_BHNR: Int[jax.Array, "B H N R"]


def sort_into_buckets(
    buckets_BHMT: Int[jax.Array, "B H M T"], age_BHM: Int[jax.Array, "B H M"], valid_BM: Bool[jax.Array, "B M"]
) -> Buckets:
    """Sorts each table's slots by bucket number (0 or more), then by age."""
    none = jnp.iinfo(jnp.int32).max
    buckets_BHTM = jnp.moveaxis(jnp.where(valid_BM[:, None, :, None], buckets_BHMT, none), 3, 2)
    age_BHTM = jnp.broadcast_to(age_BHM[:, :, None], buckets_BHTM.shape)
    slot_BHTM = lax.broadcasted_iota(jnp.int32, buckets_BHTM.shape, 3)
    sorted_BHTM, _, order_BHTM = lax.sort((buckets_BHTM, age_BHTM, slot_BHTM), num_keys=2)
    return Buckets(order_BHTM, sorted_BHTM)


def runs_of(buckets: Buckets, wanted_BHNTP: Int[jax.Array, "B H N T P"]) -> Runs:
    """Returns the buckets of each query as runs: the first bucket of every table, then the second of every table."""
    slots = buckets.sorted_BHTM.shape[-1]
    shape = wanted_BHNTP.shape
    wanted_BHTX = jnp.moveaxis(wanted_BHNTP, 2, 3).reshape(*shape[:2], shape[3], -1)
    find = functools.partial(jnp.searchsorted, method="scan_unrolled")
    for _ in range(3):
        find = jax.vmap(find)
    first = find(buckets.sorted_BHTM, wanted_BHTX)
    sizes = find(buckets.sorted_BHTM, wanted_BHTX + 1) - first
    starts = first + slots * jnp.arange(shape[3])[:, None]
    by_query = lambda part: part.reshape(*shape[:2], shape[3], shape[2], shape[4]).transpose(0, 1, 3, 4, 2)  # noqa: E731
    return Runs(*(by_query(part).reshape(*shape[:3], -1).astype(jnp.int32) for part in (starts, sizes)))


def fill(runs: Runs, candidates: int) -> tuple[Int[jax.Array, "B H N C"], Bool[jax.Array, "B H N C"]]:
    """Returns the indices in `Buckets.order_BHTM` of each query's first `candidates` slots, and which of them exist."""
    ends_BHNR = jnp.cumsum(runs.sizes_BHNR, axis=-1)
    # Candidate c is in the run whose cumulative size it reaches, at its distance from the end of the run before.
    shift_BHNR = runs.starts_BHNR - (ends_BHNR - runs.sizes_BHNR)
    # Without the barrier, XLA would recompute the sums for each candidate on CPUs.
    ends_BHNR, shift_BHNR = lax.optimization_barrier((ends_BHNR, shift_BHNR))
    steps_BHNR = jnp.diff(shift_BHNR, axis=-1)
    number_C = jnp.arange(candidates, dtype=jnp.int32)
    passed_BHNCR = number_C[:, None] >= ends_BHNR[..., None, :-1]
    place_BHNC = (
        number_C + shift_BHNR[..., :1] + jnp.where(passed_BHNCR, steps_BHNR[..., None, :], 0).sum(-1, dtype=jnp.int32)
    )
    return lax.optimization_barrier((place_BHNC, number_C < ends_BHNR[..., -1:]))


def by_queries[T](find: Callable[[T], Neighbors], queries: T, features: int) -> Neighbors:
    """Applies `find` to blocks of queries, each of which gathers `features`, so that at most `GATHERED` are held.

    `queries` are arrays `[B, H, N, ...]`.
    """
    rows, heads, tokens = jax.tree.leaves(queries)[0].shape[:3]
    blocks = -(-rows * heads * tokens * features // GATHERED)
    size = -(-tokens // min(blocks, tokens))
    blocks = -(-tokens // size)
    if blocks == 1:
        return find(queries)

    def split(part: jax.Array) -> jax.Array:
        padded = pad(part, {2: blocks * size})
        return jnp.moveaxis(padded.reshape(rows, heads, blocks, size, *part.shape[3:]), 2, 0)

    def join(part: jax.Array) -> jax.Array:
        return jnp.moveaxis(part, 0, 2).reshape(rows, heads, blocks * size, -1)[:, :, :tokens]

    return jax.tree.map(join, lax.map(find, jax.tree.map(split, queries)))


def best_candidates(
    queries_BHND: Float[jax.Array, "B H N D"],
    keys: Keys,
    slots_BHNC: Int[jax.Array, "B H N C"],
    is_one_BHNC: Bool[jax.Array, "B H N C"],
    neighbors: int,
    minimum_score: float | None,
) -> Neighbors:
    """Returns the best candidates by their current keys. A candidate that is named several times counts once."""
    slots_BHNC, is_one_BHNC = pad(slots_BHNC, {3: neighbors}), pad(is_one_BHNC, {3: neighbors})
    # Sorting by slot puts duplicates next to each other, and `top_k` takes the lower slot of equal scores.
    none = keys.vectors_BHMD.shape[2]
    slots_BHNC = jnp.sort(jnp.where(is_one_BHNC, slots_BHNC, none), axis=-1)
    is_new_BHNC = jnp.pad(slots_BHNC[..., 1:] != slots_BHNC[..., :-1], [(0, 0)] * 3 + [(1, 0)], constant_values=True)
    counts_BHNC = is_new_BHNC & (slots_BHNC < none)
    slots_BHNC = jnp.minimum(slots_BHNC, none - 1)
    scores_BHNC = scores_of(queries_BHND, keys, slots_BHNC)
    if minimum_score is not None:
        counts_BHNC &= scores_BHNC >= minimum_score
    scores_BHNK, places_BHNK = lax.top_k(jnp.where(counts_BHNC, scores_BHNC, -jnp.inf), neighbors)
    return Neighbors(scores_BHNK, jnp.take_along_axis(slots_BHNC, places_BHNK, axis=-1))


def scores_of(
    queries_BHND: Float[jax.Array, "B H N D"], keys: Keys, slots_BHNC: Int[jax.Array, "B H N C"]
) -> Float[jax.Array, "B H N C"]:
    """Returns the inner products of each query with the keys in its slots."""
    rows, heads, tokens, size = queries_BHND.shape
    vectors = gather(keys.vectors_BHMD, slots_BHNC).reshape(rows, heads * tokens, -1, size)
    scales = None
    if keys.scales_BHM is not None:
        scales = gather(keys.scales_BHM[..., None], slots_BHNC).reshape(rows, heads * tokens, -1)
    # Treats each query as a head with its own memory, so that scores are those of every search.
    queries = queries_BHND.reshape(rows, heads * tokens, 1, size)
    return inner_products(queries, vectors, scales).reshape(slots_BHNC.shape)


def take(numbers_BHX: Int[jax.Array, "B H X"], places_BHNC: Int[jax.Array, "B H N C"]) -> Int[jax.Array, "B H N C"]:
    """Returns the values at these indices, per row and head."""
    flat = places_BHNC.reshape(*places_BHNC.shape[:2], -1)
    return jnp.take_along_axis(numbers_BHX, flat, axis=2, mode="clip").reshape(places_BHNC.shape)
