"""The one door to all searches: `make_search(settings)` gives a `contract.Search`.

Searches are interchangeable: each takes queries, keys and validity and gives scores and slots.

    exact      all scores, then top-k: the definition, and the oracle of the others
    blocked    exact too, streaming over blocks of slots: the portable default
"""

from memorizing.memory.search.blocked import Blocked
from memorizing.memory.search.contract import NO_INDEX, Index, Keys, Neighbours, Search
from memorizing.memory.search.exact import Exact
from memorizing.memory.settings import MemorySettings

__all__ = ["NO_INDEX", "Index", "Keys", "Neighbours", "Search", "make_search"]


def make_search(settings: MemorySettings) -> Search:
    """The search that the settings name."""
    if settings.search == "exact":
        return Exact(minimum_score=settings.minimum_score)
    return Blocked(minimum_score=settings.minimum_score, block_size=settings.block_size)
