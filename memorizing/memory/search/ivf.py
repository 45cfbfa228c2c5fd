"""Inverted lists: keys near the same centroid form a list, and a query looks into the most promising lists.

    written     list = argmax of key . centroid                       stored with the slot
    learned     sum  = decay * count * centroid + keys of the list    spherical k-means, one segment at a time
                centroid = sum / |sum|
    searched    the `probes` lists with the largest query . centroid, until `candidates` slots are scored

Each row and head has its own centroids. They follow the newest keys: older keys weigh less, and a centroid with few
keys moves to where keys are many. A slot's list is fixed when it is written. If its centroid moves later, or the row
starts a new document, recall drops, but results stay valid.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float

from memorizing.errors import InputError
from memorizing.memory.search.blocked import Blocked
from memorizing.memory.search.buckets import Runs, best_candidates, by_queries, fill, runs_of, sort_into_buckets, take
from memorizing.memory.search.contract import Index, Keys, Neighbors, Search, SearchSettings

FIRST_ROUNDS = 8
"""Rounds of k-means over the first segment, which initialize the centroids."""

DEAD = 0.02
"""A centroid whose count is below this share of the mean moves. A larger share would move centroids whose lists still
have valid slots, and queries would then look for these slots in the wrong place.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class IVF(Search):
    """Inverted lists whose centroids are learned while keys are written.

    Attributes:
        lists: number of lists (centroids) of each row and head.
        probes: number of lists that a query looks into.
        candidates: number of slots that a query scores, list by list, newest slots of a list first.
        decay: factor on the counts of earlier keys when a segment is written.
    """

    lists: int = 128
    probes: int = 32
    candidates: int = 2048
    decay: float = 0.98

    def empty_index(self, rows: int, heads: int, slots: int, head_size: int) -> Index:
        return Index(
            {
                "lists_BHM": jnp.zeros((rows, heads, slots), jnp.int32),
                "stamps_BHM": jnp.zeros((rows, heads, slots), jnp.int32),
            },
            {
                "centroids_BHCD": jnp.zeros((rows, heads, self.lists, head_size), jnp.float32),
                "counts_BHC": jnp.zeros((rows, heads, self.lists), jnp.float32),
                "written": jnp.zeros((), jnp.int32),
            },
        )

    def entries(self, keys_BHND, learned):
        written, tokens = learned["written"], keys_BHND.shape[2]
        keys_BHND = keys_BHND.astype(jnp.float32)
        centroids_BHCD, counts_BHC = lax.cond(
            written == 0,
            lambda: self._first(keys_BHND),
            lambda: (learned["centroids_BHCD"], self.decay * learned["counts_BHC"]),
        )
        centroids_BHCD, counts_BHC = self._moved(keys_BHND, centroids_BHCD, counts_BHC)
        centroids_BHCD, counts_BHC = self._reseeded(keys_BHND, centroids_BHCD, counts_BHC)
        entries = {
            "lists_BHM": jnp.einsum("BHND,BHCD->BHNC", keys_BHND, centroids_BHCD).argmax(-1).astype(jnp.int32),
            "stamps_BHM": jnp.broadcast_to(written + jnp.arange(tokens, dtype=jnp.int32), keys_BHND.shape[:3]),
        }
        learned = {"centroids_BHCD": centroids_BHCD, "counts_BHC": counts_BHC, "written": written + tokens}
        return entries, learned

    def __call__(self, queries_BHND, keys: Keys, valid_BM, neighbors: int) -> Neighbors:
        if self.candidates >= valid_BM.shape[1]:  # all slots may be scored
            return Blocked(minimum_score=self.minimum_score)(queries_BHND, keys, valid_BM, neighbors)
        entries, learned = keys.index.slots, keys.index.learned
        age_BHM = learned["written"] - entries["stamps_BHM"]
        buckets = sort_into_buckets(entries["lists_BHM"][..., None], age_BHM, valid_BM)
        flat_BHM = buckets.order_BHTM[:, :, 0]
        all_lists = jnp.broadcast_to(jnp.arange(self.lists), (*flat_BHM.shape[:2], 1, 1, self.lists))
        starts_BH1C, sizes_BH1C = runs_of(buckets, all_lists)

        def find(queries_BHND):
            promise_BHNC = jnp.einsum("BHND,BHCD->BHNC", queries_BHND.astype(jnp.float32), learned["centroids_BHCD"])
            promise_BHNC = jnp.where(sizes_BH1C > 0, promise_BHNC, -jnp.inf)
            _, wanted_BHNP = lax.top_k(promise_BHNC, self.probes)
            runs = Runs(take(starts_BH1C[:, :, 0], wanted_BHNP), take(sizes_BH1C[:, :, 0], wanted_BHNP))
            place_BHNC, is_one_BHNC = fill(runs, self.candidates)
            slots_BHNC = take(flat_BHM, place_BHNC)
            return best_candidates(queries_BHND, keys, slots_BHNC, is_one_BHNC, neighbors, self.minimum_score)

        return by_queries(find, queries_BHND, self.candidates * (queries_BHND.shape[-1] + self.probes))

    def _first(self, keys_BHND: Float[jax.Array, "B H N D"]) -> tuple[jax.Array, jax.Array]:
        """Returns the centroids of the first segment, all with a count of 0."""
        tokens = keys_BHND.shape[2]
        chosen = jnp.arange(self.lists) * tokens // max(self.lists, tokens)
        centroids_BHCD = unit(keys_BHND[:, :, chosen])
        nothing_BHC = jnp.zeros(centroids_BHCD.shape[:3], jnp.float32)

        def again(_, centroids_BHCD):
            return self._moved(keys_BHND, centroids_BHCD, nothing_BHC)[0]

        return lax.fori_loop(0, FIRST_ROUNDS, again, centroids_BHCD), nothing_BHC

    def _moved(self, keys_BHND, centroids_BHCD, counts_BHC) -> tuple[jax.Array, jax.Array]:
        """Adds each key to its nearest centroid. Returns the new centroids and counts."""
        nearest_BHN = jnp.einsum("BHND,BHCD->BHNC", keys_BHND, centroids_BHCD).argmax(-1)
        is_in_BHNC = (nearest_BHN[..., None] == jnp.arange(self.lists)).astype(jnp.float32)
        sums_BHCD = counts_BHC[..., None] * centroids_BHCD + jnp.einsum("BHNC,BHND->BHCD", is_in_BHNC, unit(keys_BHND))
        counts_BHC = counts_BHC + is_in_BHNC.sum(2)
        return jnp.where(counts_BHC[..., None] > 0, unit(sums_BHCD), centroids_BHCD), counts_BHC

    def _reseeded(self, keys_BHND, centroids_BHCD, counts_BHC) -> tuple[jax.Array, jax.Array]:
        """Returns centroids and counts after centroids with few keys moved to keys of the fullest lists.

        Each moved centroid takes half the count of the list that it splits. At most `N` centroids move.
        """
        tokens, lists = keys_BHND.shape[2], self.lists
        most = min(tokens, lists)
        nearest_BHN = jnp.einsum("BHND,BHCD->BHNC", keys_BHND, centroids_BHCD).argmax(-1)
        fullness_BHN = jnp.take_along_axis(counts_BHC, nearest_BHN, axis=-1)
        # Takes one key of each list before the second of any, fullest lists first: a list's k-th key counts 1/k.
        is_before_BHN = jnp.tril(nearest_BHN[..., :, None] == nearest_BHN[..., None, :], -1).sum(-1)
        _, seeds_BHC = lax.top_k(fullness_BHN / (2.0 + is_before_BHN), most)
        seed_BHC = jnp.take_along_axis(nearest_BHN, seeds_BHC, axis=-1)
        count_BHC = jnp.take_along_axis(counts_BHC, seed_BHC, axis=-1) / 2
        sizes_BHC, dead_BHC = lax.top_k(-counts_BHC, most)
        is_dead_BHC = -sizes_BHC < DEAD * counts_BHC.mean(-1, keepdims=True)
        is_new_BHCC = (dead_BHC[..., None] == jnp.arange(lists)) & is_dead_BHC[..., None]
        put = is_new_BHCC.astype(jnp.float32)
        is_new_BHC = is_new_BHCC.any(2)
        new_BHCD = jnp.einsum(
            "BHSC,BHSD->BHCD", put, unit(jnp.take_along_axis(keys_BHND, seeds_BHC[..., None], axis=2))
        )
        new_counts_BHC = jnp.einsum("BHSC,BHS->BHC", put, count_BHC)
        return (
            jnp.where(is_new_BHC[..., None], new_BHCD, centroids_BHCD),
            jnp.where(is_new_BHC, new_counts_BHC, counts_BHC),
        )


def unit(vectors: Float[jax.Array, "*any D"]) -> Float[jax.Array, "*any D"]:
    """Returns the vectors scaled to length 1; zeros stay zeros."""
    return vectors * lax.rsqrt(jnp.maximum((vectors**2).sum(-1, keepdims=True), 1e-30))


@dataclasses.dataclass(frozen=True, kw_only=True)
class IvfSettings(SearchSettings):
    """Settings of the inverted lists.

    Attributes:
        lists: number of lists (centroids) of each row and head.
        probes: number of lists that a query looks into, those with the nearest centroids.
        candidates: number of slots that a query scores.
    """

    lists: int = 128
    probes: int = 32
    candidates: int = 2048
    keeps_index = True

    def __post_init__(self):
        self._check_positive()
        if self.probes > self.lists:
            raise InputError(
                f"Ivf.probes = {self.probes} is more than Ivf.lists = {self.lists}. Set Ivf.probes to at most "
                f"{self.lists}, or use more lists"
            )

    def make(self, minimum_score, platform):
        return IVF(minimum_score=minimum_score, lists=self.lists, probes=self.probes, candidates=self.candidates)

    def check_size(self, slots, retrieved):
        self._check_candidates(self.candidates, slots, retrieved, "lists")
