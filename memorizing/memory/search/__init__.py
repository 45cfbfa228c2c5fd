"""The one door to all searches: `make_search(settings)` gives a function with the signature of `contract.Search`.

Searches are interchangeable: each takes queries, keys and validity and gives scores and slots.

    exact      all scores, then top-k: the definition, and the oracle of the others
    blocked    exact too, streaming over blocks of slots: the portable default
"""

import functools

from memorizing.memory.search.blocked import blocked_search
from memorizing.memory.search.contract import Neighbours, Search
from memorizing.memory.search.exact import exact_search
from memorizing.memory.settings import MemorySettings

__all__ = ["Neighbours", "Search", "make_search"]


def make_search(settings: MemorySettings) -> Search:
    """The search that the settings name."""
    if settings.search == "exact":
        return exact_search
    return functools.partial(blocked_search, block_size=settings.block_size)
