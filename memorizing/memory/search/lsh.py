"""Locality-sensitive hashing: a query scores only slots whose keys are on the same side of some random planes.

            |  key              A key's code in a table has a bit for each of `bits` planes: its side of the plane.
       -----+----- plane        Two vectors at angle a share a code with probability (1 - a / pi)^bits. Several tables
      query |                   and probes across the planes nearest to the query raise it (Lv et al., 2007).

The best keys of a query can be at wide angles; then more probes help more than more bits. Keys of a trained model have
much in common, so most of them lie on one side of a plane through the origin. Codes are therefore computed from the key
minus the running mean of keys, which changes no order of inner products. Codes are computed when keys are written, so
they go stale as the mean moves. The planes depend only on a seed and are orthogonal within a table.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Float, Int

from memorizing.errors import InputError
from memorizing.memory.search.blocked import Blocked
from memorizing.memory.search.buckets import best_candidates, by_queries, fill, runs_of, sort_into_buckets, take
from memorizing.memory.search.contract import Index, Keys, Neighbors, Search, SearchSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class LSH(Search):
    """Locality-sensitive hashing with random planes in several tables.

    Attributes:
        tables: number of hash tables, each with its own planes.
        bits: number of planes in a table; it has `2^bits` buckets.
        probes: number of buckets that a query looks into in each table, most likely ones first.
        candidates: number of slots that a query scores, over all tables: the best bucket of each table, then the next.
        bucket_size: number of newest slots scored in a bucket, so that no bucket takes all candidates.
        decay: factor on the mean of earlier keys when a segment is written.
        seed: random seed of the planes.
    """

    tables: int = 4
    bits: int = 10
    probes: int = 32
    candidates: int = 2048
    bucket_size: int = 256
    decay: float = 0.95
    seed: int = 0

    def empty_index(self, rows: int, heads: int, slots: int, head_size: int) -> Index:
        return Index(
            {
                "codes_BHMT": jnp.zeros((rows, heads, slots, self.tables), jnp.int32),
                "stamps_BHM": jnp.zeros((rows, heads, slots), jnp.int32),
            },
            {"mean_BHD": jnp.zeros((rows, heads, head_size), jnp.float32), "written": jnp.zeros((), jnp.int32)},
        )

    def entries(self, keys_BHND, learned):
        written, tokens = learned["written"], keys_BHND.shape[2]
        stamps_BHN = jnp.broadcast_to(written + jnp.arange(tokens, dtype=jnp.int32), keys_BHND.shape[:3])
        keys_BHND = keys_BHND.astype(jnp.float32)
        share = jnp.where(written != 0, 1 - self.decay, 1.0)
        mean_BHD = (1 - share) * learned["mean_BHD"] + share * keys_BHND.mean(2)
        is_above = self._distances(keys_BHND - mean_BHD[:, :, None]) >= 0
        codes = (is_above * self._weights()).sum(-1, dtype=jnp.int32)
        return {"codes_BHMT": codes, "stamps_BHM": stamps_BHN}, {"mean_BHD": mean_BHD, "written": written + tokens}

    def __call__(self, queries_BHND, keys: Keys, valid_BM, neighbors: int) -> Neighbors:
        if self.candidates >= valid_BM.shape[1]:  # all slots may be scored
            return Blocked(minimum_score=self.minimum_score)(queries_BHND, keys, valid_BM, neighbors)
        entries = keys.index.slots
        # Ages by subtraction are right even after the count of written tokens has wrapped around.
        age_BHM = keys.index.learned["written"] - entries["stamps_BHM"]
        buckets = sort_into_buckets(entries["codes_BHMT"], age_BHM, valid_BM)
        flat_BHX = buckets.order_BHTM.reshape(*buckets.order_BHTM.shape[:2], -1)

        def find(queries_BHND):
            runs = runs_of(buckets, self._probed(queries_BHND))
            runs = runs._replace(sizes_BHNR=jnp.minimum(runs.sizes_BHNR, self.bucket_size))
            place_BHNC, is_one_BHNC = fill(runs, self.candidates)
            slots_BHNC = take(flat_BHX, place_BHNC)
            return best_candidates(queries_BHND, keys, slots_BHNC, is_one_BHNC, neighbors, self.minimum_score)

        return by_queries(find, queries_BHND, self.candidates * (queries_BHND.shape[-1] + self.tables * self.probes))

    def _probed(self, queries_BHND: Float[jax.Array, "B H N D"]) -> Int[jax.Array, "B H N T P"]:
        """Returns the codes of the buckets to look into: the query's own, then those across the nearest planes."""
        distances_BHNTb = self._distances(queries_BHND)
        code_BHNT = ((distances_BHNTb >= 0) * self._weights()).sum(-1, dtype=jnp.int32)
        # All subsets of the nearest planes: two planes more than needed for `probes` subsets.
        near = min(self.bits, math.ceil(math.log2(self.probes)) + 2)
        costs, planes = lax.top_k(-(distances_BHNTb**2), near)
        subsets = (np.arange(2**near)[:, None] >> np.arange(near)) & 1
        flips_BHNTS = (jnp.take(self._weights(), planes)[..., None, :] * subsets).sum(-1, dtype=jnp.int32)
        _, chosen = lax.top_k((costs[..., None, :] * subsets).sum(-1), self.probes)
        return code_BHNT[..., None] ^ jnp.take_along_axis(flips_BHNTS, chosen, axis=-1)

    def _distances(self, vectors_BHND: Float[jax.Array, "B H N D"]) -> Float[jax.Array, "B H N T b"]:
        """Returns the distance of vectors above each plane, times their length."""
        size = vectors_BHND.shape[-1]
        rng = np.random.default_rng(self.seed)
        # Enough orthogonal bases of the whole space for the planes of a table.
        bases = -(-self.bits // size)
        planes = np.linalg.qr(rng.normal(size=(self.tables, bases, size, size)))[0]
        planes = np.swapaxes(planes, 2, 3).reshape(self.tables, -1, size)[:, : self.bits].astype(np.float32)
        return jnp.einsum("BHND,TbD->BHNTb", vectors_BHND.astype(jnp.float32), planes)

    def _weights(self) -> jax.Array:
        return 2 ** jnp.arange(self.bits, dtype=jnp.int32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LshSettings(SearchSettings):
    """Settings of locality-sensitive hashing.

    Attributes:
        tables: number of hash tables.
        bits: number of bits of a hash, at most 30: a table has `2^bits` buckets.
        probes: number of buckets that a query looks into in each table, those of the most similar hashes.
        candidates: number of slots that a query scores, over all tables.
    """

    tables: int = 4
    bits: int = 10
    probes: int = 32
    candidates: int = 2048
    keeps_index = True

    def __post_init__(self):
        self._check_positive()
        if self.bits > 30:
            raise InputError(f"Lsh.bits = {self.bits}: must be at most 30. Use 30 or fewer")
        if self.probes > 2**self.bits:
            raise InputError(
                f"Lsh.probes = {self.probes} is more than the {2**self.bits} hashes of Lsh.bits = {self.bits}. Set "
                f"Lsh.probes to at most {2**self.bits}, or use more bits"
            )

    def make(self, minimum_score, platform):
        return LSH(
            minimum_score=minimum_score, tables=self.tables, bits=self.bits, probes=self.probes,
            candidates=self.candidates,
        )  # fmt: skip

    def check_size(self, slots, retrieved):
        self._check_candidates(self.candidates, slots, retrieved, "probes")
