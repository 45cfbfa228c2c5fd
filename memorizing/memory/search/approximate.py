"""`lax.approx_max_k` on the scores: on TPUs a PartialReduce that XLA fuses with their product, and never writes them.

On CPUs it is exact, and on GPUs brute force (jax issue 24414): other searches are better there.
"""

import dataclasses

from jax import lax

from memorizing.memory.search.contract import Keys, Neighbors, Search, SearchSettings, counted, inner_products


@dataclasses.dataclass(frozen=True, kw_only=True)
class Approximate(Search):
    """XLA's approximate top-K, with an expected recall of `recall_target`."""

    recall_target: float = 0.95

    def __call__(self, queries_BHND, keys: Keys, valid_BM, neighbors: int) -> Neighbors:
        scores_BHNM = inner_products(queries_BHND, keys.vectors_BHMD, keys.scales_BHM)
        scores_BHNM = counted(scores_BHNM, valid_BM, self.minimum_score)
        return Neighbors(*lax.approx_max_k(scores_BHNM, neighbors, recall_target=self.recall_target))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ApproximateSettings(SearchSettings):
    """Settings of XLA's approximate top-k.

    Attributes:
        recall_target: expected share of the true neighbors found. Lower is faster on TPUs; other devices ignore it.
    """

    recall_target: float = 0.95
    writes_scores = False

    def __post_init__(self):
        self._check_recall_target(self.recall_target)

    def make(self, minimum_score, platform):
        return Approximate(minimum_score=minimum_score, recall_target=self.recall_target)

    @classmethod
    def auto_rank(cls, platform, slots, neighbors):
        return 1 if platform == "tpu" else 0
