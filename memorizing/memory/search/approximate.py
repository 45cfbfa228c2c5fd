"""`lax.approx_max_k` on the scores: on TPUs a PartialReduce that XLA fuses with their product, and never writes them.

On CPUs it is exact, and on GPUs brute force (jax issue 24414): other searches are better there.
"""

import dataclasses

from jax import lax

from memorizing.memory.search.contract import Keys, Neighbors, Search, counted, inner_products


@dataclasses.dataclass(frozen=True, kw_only=True)
class Approximate(Search):
    """XLA's approximate top-K, with an expected recall of `recall_target`."""

    recall_target: float = 0.95

    def __call__(self, queries_BHND, keys: Keys, valid_BM, neighbors: int) -> Neighbors:
        scores_BHNM = inner_products(queries_BHND, keys.vectors_BHMD, keys.scales_BHM)
        scores_BHNM = counted(scores_BHNM, valid_BM, self.minimum_score)
        return Neighbors(*lax.approx_max_k(scores_BHNM, neighbors, recall_target=self.recall_target))
