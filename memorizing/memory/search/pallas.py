"""The fused kernels for TPUs and NVIDIA GPUs behind one name, and their settings."""

import dataclasses
from typing import Literal

from memorizing.errors import InputError
from memorizing.memory.search.contract import SearchSettings
from memorizing.parallel.topology import has_ampere

MOST_NEIGHBORS = 64
"""Largest number of neighbors that the TPU kernel selects itself; for more, XLA sorts the winners."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PallasSettings(SearchSettings):
    """Settings of the Pallas kernels.

    Attributes:
        recall_target: expected share of the true neighbors found; it sets the number of bins. Lower is faster.
        gpu_kernel: compiler of the kernel on NVIDIA GPUs. `mosaic` needs 16-bit keys and a Hopper GPU; other keys
            use `triton`.
    """

    recall_target: float = 0.95
    gpu_kernel: Literal["triton", "mosaic"] = "triton"
    writes_scores = False
    platforms = ("gpu", "tpu")

    def __post_init__(self):
        self._check_recall_target(self.recall_target)

    def make(self, minimum_score, platform):
        if platform == "tpu":
            from memorizing.memory.search.pallas_tpu import PallasTPU

            return PallasTPU(minimum_score=minimum_score, recall_target=self.recall_target)
        if platform == "gpu":
            from memorizing.memory.search.pallas_gpu import PallasGPU

            return PallasGPU(minimum_score=minimum_score, recall_target=self.recall_target, backend=self.gpu_kernel)
        raise InputError(
            f"Memory.search = 'pallas': the kernels run on TPUs and NVIDIA GPUs, not on a {platform.upper()}. "
            "'binned' finds the same neighbors on any device"
        )

    @classmethod
    def auto_rank(cls, platform, slots, neighbors):
        if platform == "tpu":
            return 2 if neighbors <= MOST_NEIGHBORS else 0
        return 2 if platform == "gpu" and has_ampere() else 0
