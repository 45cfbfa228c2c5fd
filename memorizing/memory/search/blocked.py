"""Exact search over blocks of slots, merged into a running top-k.

It holds only the scores `[B, H, N, block]` at a time, never those of all slots. Within a block the selection has two
stages. It is exact, and faster on a CPU than one `top_k` over everything:

    scores   | group 0 | group 1 | group 2 | ...        groups of G adjacent slots
    maxima        .9        .4        .7                the K groups with the largest maxima
    candidates   group 0 and group 2, in slot order     hold every one of the K best slots
    top-K    of K * G candidates

This is exact, ties included. Take a slot in a group that was left out: each of the K chosen groups has a slot that is
better, or equal and lower, so the slot is not among the K best. Candidates stay in slot order, and the running top-k
comes before a later block, so the stable `top_k` prefers the lower slot throughout.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float

from memorizing.memory.search.contract import Keys, Neighbors, Search, SearchSettings, counted, inner_products, pad


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocked(Search):
    """Finds the exact neighbors and holds the scores of `block_size` slots at a time.

    `block_size` need not divide `M`: the last block is padded with invalid slots.
    """

    block_size: int = 8192

    def __call__(self, queries_BHND, keys: Keys, valid_BM, neighbors: int) -> Neighbors:
        slots = valid_BM.shape[1]
        block_size = min(self.block_size, slots)
        blocks = -(-slots // block_size)
        padded = blocks * block_size
        vectors_BHMD, valid_BM = pad(keys.vectors_BHMD, {2: padded}), pad(valid_BM, {1: padded})
        scales_BHM = None if keys.scales_BHM is None else pad(keys.scales_BHM, {2: padded})

        def search_block(best: Neighbors, block: jax.Array) -> tuple[Neighbors, None]:
            part = functools.partial(lax.dynamic_slice_in_dim, start_index=block * block_size, slice_size=block_size)
            scores_BHNM = inner_products(
                queries_BHND, part(vectors_BHMD, axis=2), None if scales_BHM is None else part(scales_BHM, axis=2)
            )
            found = best_of_block(counted(scores_BHNM, part(valid_BM, axis=1), self.minimum_score), neighbors)
            return merge(best, found._replace(slots_BHNK=found.slots_BHNK + block * block_size)), None

        shape = (*queries_BHND.shape[:3], neighbors)
        nothing = Neighbors(jnp.full(shape, -jnp.inf, jnp.float32), jnp.zeros(shape, jnp.int32))
        if blocks == 1:
            return search_block(nothing, jnp.zeros((), jnp.int32))[0]
        return lax.scan(search_block, nothing, jnp.arange(blocks))[0]


def best_of_block(scores_BHNM: Float[jax.Array, "B H N M"], neighbors: int) -> Neighbors:
    """Returns the best slots of a block, at most `neighbors`; compares maxima of groups first if that saves work."""
    slots = scores_BHNM.shape[-1]
    group = group_size(slots, neighbors)
    if slots % group or slots // group <= neighbors:
        return Neighbors(*lax.top_k(scores_BHNM, min(neighbors, slots)))
    grouped_BHNGg = scores_BHNM.reshape(*scores_BHNM.shape[:-1], slots // group, group)
    _, chosen_BHNK = lax.top_k(grouped_BHNGg.max(-1), neighbors)
    chosen_BHNK = jnp.sort(chosen_BHNK, axis=-1)
    candidates_BHNKg = jnp.take_along_axis(grouped_BHNGg, chosen_BHNK[..., None], axis=-2)
    scores_BHNK, places_BHNK = lax.top_k(candidates_BHNKg.reshape(*scores_BHNM.shape[:-1], -1), neighbors)
    groups_BHNK = jnp.take_along_axis(chosen_BHNK, places_BHNK // group, axis=-1)
    return Neighbors(scores_BHNK, groups_BHNK * group + places_BHNK % group)


def group_size(slots: int, neighbors: int) -> int:
    """Returns the power of two that balances the two selections, of `slots / G` groups and of `K * G` candidates."""
    return 1 << round(math.log2(max(slots / neighbors, 1)) / 2)


def merge(first: Neighbors, second: Neighbors) -> Neighbors:
    """Returns the best neighbors of both, as many as `first` has. At equal scores, those of `first` come first."""
    neighbors = first.scores_BHNK.shape[-1]
    scores = jnp.concatenate([first.scores_BHNK, second.scores_BHNK], axis=-1)
    slots = jnp.concatenate([first.slots_BHNK, second.slots_BHNK], axis=-1)
    scores_BHNK, places_BHNK = lax.top_k(scores, neighbors)
    return Neighbors(scores_BHNK, jnp.take_along_axis(slots, places_BHNK, axis=-1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockedSettings(SearchSettings):
    """Settings of the blocked search.

    Attributes:
        block_size: number of slots scored at a time.
    """

    block_size: int = 8192
    is_exact = True

    def __post_init__(self):
        self._check_block_size(self.block_size)

    def make(self, minimum_score, platform):
        return Blocked(minimum_score=minimum_score, block_size=self.block_size)

    @classmethod
    def auto_rank(cls, platform, slots, neighbors):
        return 1 if platform == "cpu" else 0

    def cheaper(self):
        return f"a smaller Blocked.block_size ({self.block_size})"
