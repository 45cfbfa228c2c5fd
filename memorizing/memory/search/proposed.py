"""Two-stage search: a small copy of the keys proposes candidates, and the keys themselves decide.

    copy        int8, float8    a quarter or half of the bytes to read      score . scale
                projection      P of D features: (R q) . (R k), with R a fixed P x D matrix of orthonormal rows
                learned         P of D features: (Wq q) . (Wk k), from the model's learned index
    inner       any search over the copy: its best `candidates` slots
    decision    their keys gathered and scored in full precision; the K best by score, then slot

A neighbor is lost only if `candidates` other slots score higher in the copy. The index of `inner` is over the copy,
under names that begin with `inner_`. A learned copy is computed when the memory is read, from parameters that come with
the keys (`model/learned_index.py`), so it is not stored. With few queries that costs more than it saves, and `inner`
searches the keys instead.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from memorizing.memory.quantize import DTYPES, EightBits, dequantize, quantize
from memorizing.memory.search.blocked import Blocked
from memorizing.memory.search.buckets import best_candidates, by_queries
from memorizing.memory.search.contract import NO_INDEX, Index, Keys, Neighbors, Search

INNER = "inner_"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Proposed(Search):
    """Searches a small copy of the keys with `inner`, then decides in full precision.

    Attributes:
        inner: search over the copy. It has no minimum score, because scores in the copy differ.
        kind: kind of copy.
        candidates: number of proposals for each query; raised to `neighbors` if smaller.
        projection_size: number of features of a projected copy (`P`); at most the head size.
        seed: random seed of the projection.
    """

    inner: Search = dataclasses.field(default_factory=Blocked)
    kind: Literal[EightBits, "projection", "learned"] = "int8"
    candidates: int = 128
    projection_size: int = 32
    seed: int = 0

    def empty_index(self, rows: int, heads: int, slots: int, head_size: int) -> Index:
        if self.kind == "learned":
            return NO_INDEX
        size = min(self.projection_size, head_size) if self.kind == "projection" else head_size
        inner = self.inner.empty_index(rows, heads, slots, size)
        dtype = DTYPES.get(self.kind, jnp.bfloat16)
        copy = {"copy_BHMP": jnp.zeros((rows, heads, slots, size), dtype)}
        if self.kind in DTYPES:
            copy["copy_scales_BHM"] = jnp.zeros((rows, heads, slots), jnp.float32)
        return Index(copy | named(inner.slots), named(inner.learned))

    def entries(self, keys_BHND, learned):
        if self.kind == "learned":
            return {}, learned
        if self.kind == "projection":
            vectors, scales = self._projected(keys_BHND).astype(jnp.bfloat16), None
            copy, plain = {"copy_BHMP": vectors}, vectors
        else:
            vectors, scales = quantize(keys_BHND, jnp.dtype(DTYPES[self.kind]))
            copy, plain = {"copy_BHMP": vectors, "copy_scales_BHM": scales}, dequantize(vectors, scales)
        entries, learned = self.inner.entries(plain.astype(keys_BHND.dtype), inners(learned))
        return copy | named(entries), named(learned)

    def __call__(self, queries_BHND, keys: Keys, valid_BM, neighbors: int) -> Neighbors:
        if self.kind == "learned":
            tokens, (size, features) = queries_BHND.shape[2], keys.index.learned["index_key_HDP"].shape[1:]
            if not is_worth_it(tokens, size, features):
                search = dataclasses.replace(self.inner, minimum_score=self.minimum_score)
                return search(queries_BHND, keys._replace(index=NO_INDEX), valid_BM, neighbors)
        candidates = min(max(self.candidates, neighbors), valid_BM.shape[1])
        proposals = self.inner(*self._copies(queries_BHND, keys), valid_BM, candidates)

        def decide(parts):
            queries_BHND, (scores_BHNC, slots_BHNC) = parts
            is_one_BHNC = scores_BHNC > -jnp.inf
            return best_candidates(queries_BHND, keys, slots_BHNC, is_one_BHNC, neighbors, self.minimum_score)

        return by_queries(decide, (queries_BHND, proposals), candidates * queries_BHND.shape[-1])

    def _copies(self, queries_BHND: jax.Array, keys: Keys) -> tuple[jax.Array, Keys]:
        """Returns queries and keys for `inner`."""
        entries, learned = keys.index
        if self.kind == "learned":
            queries_BHNP = in_features(Keys(queries_BHND), learned["index_query_HDP"])
            return queries_BHNP, Keys(in_features(keys, learned["index_key_HDP"]).astype(jnp.bfloat16))
        copy = Keys(entries["copy_BHMP"], entries.get("copy_scales_BHM"), Index(inners(entries), inners(learned)))
        return self._projected(queries_BHND) if self.kind == "projection" else queries_BHND, copy

    def _projected(self, vectors_BHND: Float[jax.Array, "B H N D"]) -> Float[jax.Array, "B H N P"]:
        rows_PD = orthonormal(vectors_BHND.shape[-1], self.projection_size, self.seed)
        return jnp.einsum("BHND,PD->BHNP", vectors_BHND.astype(jnp.float32), rows_PD)


def is_worth_it(queries: int, size: int, features: int) -> bool:
    """True if this number of queries saves more by comparing learned features than computing the features costs."""
    return queries * (size - features) > size * features


def orthonormal(features: int, size: int, seed: int = 0) -> Float[np.ndarray, "P D"]:
    """Returns `size` random orthonormal directions, at most `features`."""
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(features, features)))[0][:size].astype(np.float32)


def in_features(keys: Keys, weight_HDP: Float[Array, "H D P"]) -> Float[jax.Array, "B H M P"]:
    """Returns keys in the features of a learned index, in the dtype of the keys (bfloat16 for 8 bits)."""
    vectors_BHMD, dtype = keys.vectors_BHMD, jnp.bfloat16 if keys.scales_BHM is not None else keys.vectors_BHMD.dtype
    # A weight per row, because a product with a shared weight would first transpose a copy of all vectors.
    weight_BHDP = jnp.broadcast_to(weight_HDP.astype(dtype), (len(vectors_BHMD), *weight_HDP.shape))
    features_BHMP = jnp.einsum("BHMD,BHDP->BHMP", vectors_BHMD.astype(dtype), weight_BHDP)
    return features_BHMP if keys.scales_BHM is None else features_BHMP * keys.scales_BHM[..., None].astype(dtype)


def named(inner: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Returns the arrays of the inner search under names with the prefix `inner_`."""
    return {INNER + name: part for name, part in inner.items()}


def inners(parts: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Returns the arrays of the inner search under its own names."""
    return {name.removeprefix(INNER): part for name, part in parts.items() if name.startswith(INNER)}
