"""Approximate search over blocks: each bin of slots keeps its best slot, then an exact top-k of these winners.

    bin r of R      slots r, r + R, r + 2R, ...                    M = 12, R = 4:   0 1 2 3 | 0 1 2 3 | 0 1 2 3
    winners         for each query and bin the best valid slot     a block of slots is one elementwise maximum
    top-K           of the R winners, exact

Only the best slot of each bin can be found. If K neighbors fall into R bins at random, the expected recall is `(R / K)
(1 - (1 - 1/R)^K)`: 64% for R = K = 32, 97% for R = 512. Adjacent tokens are in different bins, so that a passage that
is retrieved as a whole does not compete with itself.

The kernels (`pallas_gpu.py`, `pallas_tpu.py`) use the same algorithm; this version runs on any device and is their
reference. Equal scores are won by the lower slot, within a bin and among the winners.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from memorizing.memory.search.contract import Keys, Neighbors, Search, SearchSettings, counted, inner_products, pad

LANES = 128
"""Divisor of the number of bins: the width of a TPU's vector registers, and of efficient tiles on GPUs."""


def expected_recall(bins: int, neighbors: int) -> float:
    """Returns the expected share of neighbors that are the best of their bin, if neighbors fall into bins at random."""
    return bins / neighbors * (1 - (1 - 1 / bins) ** neighbors)


def bins_for(recall_target: float, neighbors: int) -> int:
    """Returns the smallest power of two from `LANES` on whose `expected_recall` reaches `recall_target` (< 1)."""
    bins = LANES
    while bins < neighbors or expected_recall(bins, neighbors) < recall_target:
        bins *= 2
    return bins


@dataclasses.dataclass(frozen=True, kw_only=True)
class Binned(Search):
    """Finds the best slot of each of many bins, block by block.

    Attributes:
        recall_target: expected recall, which sets the number of bins. Measure the recall of real queries.
        block_size: number of slots scored at a time.
    """

    recall_target: float = 0.95
    block_size: int = 8192

    def __call__(self, queries_BHND, keys: Keys, valid_BM, neighbors: int) -> Neighbors:
        bins = bins_for(self.recall_target, neighbors)
        return top_winners(self.winners(queries_BHND, keys, valid_BM, bins), neighbors)

    def winners(self, queries_BHND, keys: Keys, valid_BM, bins: int) -> Neighbors:
        """Returns the best slot of each bin, `[B, H, N, bins]`, in the order of bins; score `-inf` for a bin without a
        slot."""
        slots = valid_BM.shape[1]
        steps = max(1, min(self.block_size, slots) // bins)  # passes over all bins in one block
        block_size = steps * bins
        blocks = -(-slots // block_size)
        padded = blocks * block_size
        vectors_BHMD, valid_BM = pad(keys.vectors_BHMD, {2: padded}), pad(valid_BM, {1: padded})
        scales_BHM = None if keys.scales_BHM is None else pad(keys.scales_BHM, {2: padded})

        def search_block(best: Neighbors, block: jax.Array) -> tuple[Neighbors, None]:
            part = functools.partial(lax.dynamic_slice_in_dim, start_index=block * block_size, slice_size=block_size)
            scores_BHNM = inner_products(
                queries_BHND, part(vectors_BHMD, axis=2), None if scales_BHM is None else part(scales_BHM, axis=2)
            )
            scores_BHNM = counted(scores_BHNM, part(valid_BM, axis=1), self.minimum_score)
            binned_BHNSR = scores_BHNM.reshape(*scores_BHNM.shape[:3], steps, bins)
            found = binned_BHNSR.max(-2)
            slots = block * block_size + binned_BHNSR.argmax(-2) * bins + jnp.arange(bins)
            is_better = found > best.scores_BHNK
            return Neighbors(
                jnp.where(is_better, found, best.scores_BHNK), jnp.where(is_better, slots, best.slots_BHNK)
            ), None

        shape = (*queries_BHND.shape[:3], bins)
        nothing = Neighbors(jnp.full(shape, -jnp.inf, jnp.float32), jnp.zeros(shape, jnp.int32))
        return lax.scan(search_block, nothing, jnp.arange(blocks))[0]


def top_winners(winners: Neighbors, neighbors: int) -> Neighbors:
    """Returns the best `neighbors` winners; equal scores by lower slot first."""
    # Winners are in the order of bins, not of slots, so they are sorted by score and slot.
    scores, slots = lax.sort((-winners.scores_BHNK, winners.slots_BHNK), dimension=-1, num_keys=2)
    return Neighbors(-scores[..., :neighbors], slots[..., :neighbors])


@dataclasses.dataclass(frozen=True, kw_only=True)
class BinnedSettings(SearchSettings):
    """Settings of the binned search.

    Attributes:
        recall_target: expected share of the true neighbors found; it sets the number of bins. Lower is faster.
        block_size: number of slots scored at a time.
    """

    recall_target: float = 0.95
    block_size: int = 8192

    def __post_init__(self):
        self._check_recall_target(self.recall_target)
        self._check_block_size(self.block_size)

    def make(self, minimum_score, platform):
        return Binned(minimum_score=minimum_score, recall_target=self.recall_target, block_size=self.block_size)

    @classmethod
    def auto_rank(cls, platform, slots, neighbors):
        return 1 if platform == "gpu" else 0
