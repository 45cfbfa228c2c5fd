"""The one door to all searches: `make_search(settings)` gives a `contract.Search`.

Searches are interchangeable: each takes queries, keys and validity and gives scores and slots.

    exact        all scores, then top-k: the definition, and the oracle of the others
    native       exact, for CPUs: a C++ kernel that keeps its scores in registers
    blocked      exact, for any device: streaming over blocks of slots
    pallas       approximate, for TPUs and NVIDIA GPUs: the best of each of many bins, in one kernel with the scores
    binned       the same algorithm for any device
    approximate  XLA's approximate top-k: fused with the scores on TPUs, exact on CPUs, brute force on GPUs
    ivf, lsh     approximate, for any device, looking at some slots only: near centroids, or of like hashes
    faiss        the same with an index of faiss, on the host
    dense        none: all slots are attended to
    auto         the fastest of the first six for the devices at hand

Any of them can also search a small copy of the keys to propose neighbors, see `proposed.py`.
"""

import dataclasses

from memorizing.errors import InputError
from memorizing.memory.search.approximate import Approximate
from memorizing.memory.search.binned import Binned
from memorizing.memory.search.blocked import Blocked
from memorizing.memory.search.contract import NO_INDEX, Index, Keys, Neighbors, Search
from memorizing.memory.search.dense import Dense
from memorizing.memory.search.exact import Exact
from memorizing.memory.search.faiss_host import Faiss
from memorizing.memory.search.ivf import IVF
from memorizing.memory.search.lsh import LSH
from memorizing.memory.search.native import Native, why_unavailable
from memorizing.memory.search.proposed import Proposed
from memorizing.memory.settings import MemorySettings
from memorizing.parallel.topology import has_ampere, platform_compiled_for

__all__ = ["NO_INDEX", "Index", "Keys", "Neighbors", "Search", "chosen", "make_search", "searched_by"]

SMALL = 1024
"""Slots up to which a GPU has little to gain from a kernel."""


def make_search(settings: MemorySettings) -> Search:
    """The search that the settings name, for the devices of the surrounding `jax.set_mesh`, or those here.

    Raises:
        InputError: when it needs what these devices or this machine do not have.
    """
    if settings.proposer is not None:
        inner = dataclasses.replace(settings, proposer=None, minimum_score=None)
        return Proposed(
            minimum_score=settings.minimum_score,
            inner=make_search(inner),
            kind=settings.proposer,
            candidates=settings.proposals,
            projection_size=settings.projection_size,
        )
    platform = platform_compiled_for()
    minimum, target, block_size = settings.minimum_score, settings.recall_target, settings.block_size
    match chosen(settings, platform):
        case "exact":
            return Exact(minimum_score=minimum)
        case "dense":
            return Dense(minimum_score=minimum)
        case "blocked":
            return Blocked(minimum_score=minimum, block_size=block_size)
        case "binned":
            return Binned(minimum_score=minimum, recall_target=target, block_size=block_size)
        case "approximate":
            return Approximate(minimum_score=minimum, recall_target=target)
        case "native":
            if platform != "cpu" or why_unavailable():
                why = why_unavailable() if platform == "cpu" else f"it is for CPUs, not for a {platform.upper()}"
                raise InputError(f"Memory.search = 'native': {why}; or use 'blocked', exact too")
            return Native(minimum_score=minimum)
        case "ivf":
            lists, probes = settings.ivf_lists, settings.ivf_probes
            return IVF(minimum_score=minimum, lists=lists, probes=probes, candidates=settings.candidates)
        case "lsh":
            return LSH(
                minimum_score=minimum,
                tables=settings.lsh_tables,
                bits=settings.lsh_bits,
                probes=settings.lsh_probes,
                candidates=settings.candidates,
            )
        case "faiss":
            return Faiss(
                minimum_score=minimum,
                kind=settings.faiss_index,
                effort=settings.faiss_effort,
                lists=settings.ivf_lists,
                probes=settings.ivf_probes,
            )
        case "pallas" if platform == "tpu":
            from memorizing.memory.search.pallas_tpu import PallasTPU

            return PallasTPU(minimum_score=minimum, recall_target=target)
        case "pallas" if platform == "gpu":
            from memorizing.memory.search.pallas_gpu import PallasGPU

            return PallasGPU(minimum_score=minimum, recall_target=target, backend=settings.gpu_kernel)
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
        return "blocked" if why_unavailable() else "native"
    if platform == "tpu":
        # The kernel selects few neighbors itself and leaves many to a sort; XLA's does all with a sort.
        return "pallas" if settings.neighbors <= 64 else "approximate"
    if settings.size <= SMALL:
        return "exact"
    return "pallas" if has_ampere() else "binned"  # the same algorithm


def searched_by(settings: MemorySettings, platform: str) -> str:
    """What a person is told of the search: which, and why not the one that the platform should have."""
    name = chosen(settings, platform)
    told = f"`{name}`" + (" (chosen for this device)" if settings.search == "auto" else "")
    if settings.proposer:
        told += f" in a copy of the keys ({settings.proposer}), of which the keys themselves decide"
    if settings.search == "auto" and platform == "cpu" and why_unavailable():
        told += f"; `native` would be faster: {why_unavailable()}"
    return told
