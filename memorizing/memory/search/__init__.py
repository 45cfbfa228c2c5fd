"""Nearest-neighbor searches over a memory: one contract (`contract.py`), a search a file, and the table of them.

    exact        computes all scores, then top-k: the definition, and the oracle of the others
    native       exact, for CPUs: a C++ kernel that keeps its scores in registers
    blocked      exact, for any device: streams over blocks of slots
    pallas       approximate, for TPUs and NVIDIA GPUs: one kernel computes the scores and keeps the best of each bin
    binned       the same algorithm for any device
    approximate  XLA's approximate top-k: fused with the scores on TPUs, exact on CPUs, brute force on GPUs
    ivf, lsh     approximate, for any device: look at some slots only, near centroids or with similar hashes
    faiss        the same with an index of Faiss in host memory
    dense        no search: attention over all slots

`memory/search_choice.py` makes the search that `Memory.search` names; `auto` takes the best of them for the device.
Each of them can also search a small copy of the keys to propose neighbors (`proposed.py`).
"""

from memorizing.memory.search.approximate import ApproximateSettings
from memorizing.memory.search.binned import BinnedSettings
from memorizing.memory.search.blocked import BlockedSettings
from memorizing.memory.search.contract import NO_INDEX, Index, Keys, Neighbors, Search, SearchSettings
from memorizing.memory.search.dense import DenseSettings
from memorizing.memory.search.exact import ExactSettings
from memorizing.memory.search.faiss_host import FaissSettings
from memorizing.memory.search.ivf import IvfSettings
from memorizing.memory.search.lsh import LshSettings
from memorizing.memory.search.native import NativeSettings
from memorizing.memory.search.pallas import PallasSettings

__all__ = ["NO_INDEX", "SEARCHES", "Index", "Keys", "Neighbors", "Search", "SearchSettings"]

SEARCHES: dict[str, type[SearchSettings]] = {
    "exact": ExactSettings,
    "native": NativeSettings,
    "blocked": BlockedSettings,
    "pallas": PallasSettings,
    "binned": BinnedSettings,
    "approximate": ApproximateSettings,
    "ivf": IvfSettings,
    "lsh": LshSettings,
    "faiss": FaissSettings,
    "dense": DenseSettings,
}
"""Searches by the name that `Memory.search` has for them."""
