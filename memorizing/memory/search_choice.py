"""The one door to the searches: makes the search that the settings name, for the devices at hand."""

import dataclasses

from memorizing.memory.search import SEARCHES, Search, SearchSettings
from memorizing.memory.search.proposed import Proposed
from memorizing.memory.settings import MemorySettings
from memorizing.parallel.topology import platform_compiled_for


def make_search(memory: MemorySettings) -> Search:
    """Returns the search that the settings name, for the devices of the surrounding `jax.set_mesh`, or the local ones.

    Raises:
        InputError: if the search needs something that these devices or this machine do not have.
    """
    if memory.proposer is not None:
        inner = dataclasses.replace(memory, proposer=None, minimum_score=None)
        return Proposed(
            minimum_score=memory.minimum_score,
            inner=make_search(inner),
            kind=memory.proposer,
            candidates=memory.proposals,
            projection_size=memory.projection_size,
        )
    platform = platform_compiled_for()
    return chosen_settings(memory, platform).make(memory.minimum_score, platform)


def chosen_search(memory: MemorySettings, platform: str) -> str:
    """Returns the name of the search on a platform (`cpu`, `tpu`, `gpu`): the one of highest rank for `auto`."""
    if memory.search != "auto":
        return memory.search
    return max(SEARCHES, key=lambda name: SEARCHES[name].auto_rank(platform, memory.size, memory.neighbors))


def chosen_settings(memory: MemorySettings, platform: str) -> SearchSettings:
    """Returns the settings of the search that is used on a platform."""
    return memory.section_of(SEARCHES[chosen_search(memory, platform)])


def describe_search(memory: MemorySettings, platform: str) -> str:
    """Returns the search's name for a person, and why `auto` could not take the fastest one."""
    description = f"`{chosen_search(memory, platform)}`" + (
        " (chosen for this device)" if memory.search == "auto" else ""
    )
    if memory.proposer:
        description += f" in a copy of the keys ({memory.proposer}) that proposes neighbors; the keys decide"
    for name, kind in SEARCHES.items():
        if memory.search == "auto" and platform in kind.platforms and (missing := kind.missing_requirement()):
            description += f"; `{name}` would be faster: {missing}"
    return description
