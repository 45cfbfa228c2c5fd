"""Exact search by definition: all scores, then `lax.top_k`. The reference, and good for small memories."""

import dataclasses

from jax import lax

from memorizing.memory.search.contract import Keys, Neighbors, Search, counted, inner_products


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exact(Search):
    """Materializes the scores `[B, H, N, M]` in float32 and sorts out the best of each query."""

    def __call__(self, queries_BHND, keys: Keys, valid_BM, neighbors: int) -> Neighbors:
        scores_BHNM = inner_products(queries_BHND, keys.vectors_BHMD, keys.scales_BHM)
        return Neighbors(*lax.top_k(counted(scores_BHNM, valid_BM, self.minimum_score), neighbors))
