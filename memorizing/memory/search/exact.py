"""Exact search by definition: all scores, then `lax.top_k`. The reference, and good for small memories."""

import dataclasses

from jax import lax

from memorizing.memory.search.contract import Keys, Neighbors, Search, SearchSettings, counted, inner_products

SMALL = 1024
"""Largest number of slots for which a kernel gains little on a GPU."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exact(Search):
    """Computes all scores `[B, H, N, M]` in float32 and selects the best of each query."""

    def __call__(self, queries_BHND, keys: Keys, valid_BM, neighbors: int) -> Neighbors:
        scores_BHNM = inner_products(queries_BHND, keys.vectors_BHMD, keys.scales_BHM)
        return Neighbors(*lax.top_k(counted(scores_BHNM, valid_BM, self.minimum_score), neighbors))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExactSettings(SearchSettings):
    """The exact search has no settings."""

    is_exact = True

    def make(self, minimum_score, platform):
        return Exact(minimum_score=minimum_score)

    @classmethod
    def auto_rank(cls, platform, slots, neighbors):
        return 3 if platform == "gpu" and slots <= SMALL else 0

    def cheaper(self):
        return "Memory.search = 'blocked', which holds the scores of one block of slots at a time"
