"""The one door to all searches: `make_search(settings)` gives a `contract.Search`.

Searches are interchangeable: each takes queries, keys and validity and gives scores and slots.

    exact        all scores, then top-k: the definition, and the oracle of the others
    native       exact, for CPUs: a C++ kernel that keeps its scores in registers
    blocked      exact, for any device: streaming over blocks of slots
    approximate  XLA's approximate top-k: for TPUs, where it is fused with the product of the scores
    binned       approximate, streaming: the best of each of many bins; what the kernels compute, for any device
    auto         the best of these for the device at hand
"""

from memorizing.errors import InputError
from memorizing.memory.search.approximate import Approximate
from memorizing.memory.search.auto import Auto
from memorizing.memory.search.binned import Binned
from memorizing.memory.search.blocked import Blocked
from memorizing.memory.search.contract import NO_INDEX, Index, Keys, Neighbours, Search
from memorizing.memory.search.exact import Exact
from memorizing.memory.search.native import Native, missing
from memorizing.memory.settings import MemorySettings

__all__ = ["NO_INDEX", "Index", "Keys", "Neighbours", "Search", "chosen", "make_search", "searched_by"]


def make_search(settings: MemorySettings) -> Search:
    """The search that the settings name.

    Raises:
        InputError: when it needs what this machine does not have.
    """
    if settings.search == "auto":
        by_platform = {platform: _named(chosen(settings, platform), settings) for platform in ("cpu", "tpu", "cuda")}
        return Auto(by_platform=tuple(by_platform.items()), otherwise=_named("blocked", settings))
    return _named(settings.search, settings)


def chosen(settings: MemorySettings, platform: str) -> str:
    """What `auto` means on a platform (`cpu`, `tpu`, `cuda`, ...), or else the search that the settings name."""
    if settings.search != "auto":
        return settings.search
    if platform == "cpu":
        return "blocked" if missing() else "native"
    return {"tpu": "approximate"}.get(platform, "blocked")


def searched_by(settings: MemorySettings, platform: str) -> str:
    """What a person is told of the search: which, and why not the one that the platform should have."""
    name = chosen(settings, platform)
    told = f"`{name}`" + (" (chosen for this device)" if settings.search == "auto" else "")
    if settings.search == "auto" and platform == "cpu" and missing():
        told += f"; `native` would be faster: {missing()}"
    return told


def _named(name: str, settings: MemorySettings) -> Search:
    minimum, target, block_size = settings.minimum_score, settings.recall_target, settings.block_size
    if name == "native" and missing():
        raise InputError(f"Memory.search = 'native': {missing()}; or use 'blocked', exact too")
    searches = {
        "exact": lambda: Exact(minimum_score=minimum),
        "native": lambda: Native(minimum_score=minimum),
        "blocked": lambda: Blocked(minimum_score=minimum, block_size=block_size),
        "approximate": lambda: Approximate(minimum_score=minimum, recall_target=target),
        "binned": lambda: Binned(minimum_score=minimum, recall_target=target, block_size=block_size),
    }
    return searches[name]()
