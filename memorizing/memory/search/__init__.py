"""The one door to all searches: `make_search(settings)` gives a `contract.Search`.

Searches are interchangeable: each takes queries, keys and validity and gives scores and slots.

    exact        all scores, then top-k: the definition, and the oracle of the others
    native       exact, for CPUs: a C++ kernel that keeps its scores in registers
    blocked      exact, for any device: streaming over blocks of slots
    pallas       approximate, for TPUs and NVIDIA GPUs: the best of each of many bins, in one kernel with the scores
    binned       the same algorithm for any device
    approximate  XLA's approximate top-k: fused with the scores on TPUs, exact on CPUs, brute force on GPUs
    auto         the fastest of these for the devices at hand
"""

from memorizing.errors import InputError
from memorizing.memory.search.approximate import Approximate
from memorizing.memory.search.binned import Binned
from memorizing.memory.search.blocked import Blocked
from memorizing.memory.search.contract import NO_INDEX, Index, Keys, Neighbours, Search
from memorizing.memory.search.exact import Exact
from memorizing.memory.search.native import Native, missing
from memorizing.memory.settings import MemorySettings
from memorizing.parallel.topology import platform_compiled_for

__all__ = ["NO_INDEX", "Index", "Keys", "Neighbours", "Search", "chosen", "make_search", "searched_by"]


def make_search(settings: MemorySettings) -> Search:
    """The search that the settings name, for the devices of the surrounding `jax.set_mesh`, or those here.

    Raises:
        InputError: when it needs what these devices or this machine do not have.
    """
    platform = platform_compiled_for()
    minimum, target, block_size = settings.minimum_score, settings.recall_target, settings.block_size
    match chosen(settings, platform):
        case "exact":
            return Exact(minimum_score=minimum)
        case "blocked":
            return Blocked(minimum_score=minimum, block_size=block_size)
        case "binned":
            return Binned(minimum_score=minimum, recall_target=target, block_size=block_size)
        case "approximate":
            return Approximate(minimum_score=minimum, recall_target=target)
        case "native":
            if platform != "cpu" or missing():
                why = missing() if platform == "cpu" else f"it is for CPUs, not for a {platform.upper()}"
                raise InputError(f"Memory.search = 'native': {why}; or use 'blocked', exact too")
            return Native(minimum_score=minimum)
        case "pallas" if platform == "tpu":
            from memorizing.memory.search.pallas_tpu import PallasTPU

            return PallasTPU(minimum_score=minimum, recall_target=target)
        case "pallas" if platform == "gpu":
            from memorizing.memory.search.pallas_gpu import PallasGPU

            return PallasGPU(minimum_score=minimum, recall_target=target)
        case name:
            raise InputError(
                f"Memory.search = {name!r}: these kernels are for TPUs and NVIDIA GPUs, not for a {platform.upper()}: "
                "'binned' finds the same on any device"
            )


def chosen(settings: MemorySettings, platform: str) -> str:
    """What `auto` means on a platform (`cpu`, `tpu`, `gpu`), or else the search that the settings name."""
    if settings.search != "auto":
        return settings.search
    if platform == "cpu":
        return "blocked" if missing() else "native"
    if platform == "tpu":
        # The kernel selects few neighbours itself and leaves many to a sort; XLA's does all with a sort.
        return "pallas" if settings.neighbours <= 64 else "approximate"
    return "exact" if settings.size <= SMALL else "pallas"


SMALL = 1024
"""Slots up to which a GPU has little to gain from a kernel."""


def searched_by(settings: MemorySettings, platform: str) -> str:
    """What a person is told of the search: which, and why not the one that the platform should have."""
    name = chosen(settings, platform)
    told = f"`{name}`" + (" (chosen for this device)" if settings.search == "auto" else "")
    if settings.search == "auto" and platform == "cpu" and missing():
        told += f"; `native` would be faster: {missing()}"
    return told
