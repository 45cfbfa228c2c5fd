"""Locality-sensitive hashing: only slots whose key lies on the same side of some random planes are looked at.

            |  key              The code in a table: the sides of `bits` planes, 0 or 1 each. Two vectors at an angle a
       -----+----- plane        have the same one with probability (1 - a / pi)^bits; several tables, several chances;
      query |                   and probes across the planes that the query lies nearest to (Lv et al., 2007).

The best keys of a query can lie at wide angles, and then it takes probes more than bits to find them. Keys of a trained
model have much in common, so that most lie on one side of a plane through the origin: codes are of what a key differs
by from the running mean of keys, which changes no order of inner products with a query. Codes are computed as keys are
written, and as the mean moves on they go stale. Planes follow from a seed alone, orthogonal within a table.
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
    """Random hyperplanes in several tables.

    Attributes:
        tables: how often keys are hashed, each time with other planes.
        bits: planes of a table; it has `2^bits` buckets.
        probes: buckets of each table that a query looks into, the most likely ones first.
        candidates: slots that a query looks at, over all tables; first the best bucket of each, then the next ...
        bucket_size: slots of a bucket that are looked at, the latest ones, so that none takes all the candidates.
        decay: what the mean of the keys before counts when a segment is written.
        seed: of the planes.
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
        if self.candidates >= valid_BM.shape[1]:  # all may be looked at
            return Blocked(minimum_score=self.minimum_score)(queries_BHND, keys, valid_BM, neighbors)
        entries = keys.index.slots
        # Ages by subtraction are right even when the count of what was written has wrapped around.
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
        """The codes of the buckets to look into: the query's own, then by how near the planes are to be crossed."""
        distances_BHNTb = self._distances(queries_BHND)
        code_BHNT = ((distances_BHNTb >= 0) * self._weights()).sum(-1, dtype=jnp.int32)
        # Of the nearest planes all subsets: two more planes than it takes to make as many.
        near = min(self.bits, math.ceil(math.log2(self.probes)) + 2)
        costs, planes = lax.top_k(-(distances_BHNTb**2), near)
        subsets = (np.arange(2**near)[:, None] >> np.arange(near)) & 1
        flips_BHNTS = (jnp.take(self._weights(), planes)[..., None, :] * subsets).sum(-1, dtype=jnp.int32)
        _, chosen = lax.top_k((costs[..., None, :] * subsets).sum(-1), self.probes)
        return code_BHNT[..., None] ^ jnp.take_along_axis(flips_BHNTS, chosen, axis=-1)

    def _distances(self, vectors_BHND: Float[jax.Array, "B H N D"]) -> Float[jax.Array, "B H N T b"]:
        """How far vectors lie above each plane, times their length."""
        size = vectors_BHND.shape[-1]
        rng = np.random.default_rng(self.seed)
        # Bases of the whole space, as many as make up the planes of a table.
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
        bits: number of bits of a hash, at most 30. A table has `2^bits` buckets.
        probes: number of buckets that a query looks into in each table, those of the most similar hashes.
        candidates: number of slots that a query looks at, over all tables.
    """

    tables: int = 4
    bits: int = 10
    probes: int = 32
    candidates: int = 2048
    keeps_index = True

    def __post_init__(self):
        self._check_positive()
        if self.bits > 30:
            raise InputError(f"Lsh.bits = {self.bits}: must be at most 30")
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
