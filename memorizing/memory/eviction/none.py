"""Eviction rule `none`: a full memory takes no more tokens."""

import dataclasses

from memorizing.memory.eviction.contract import EvictionRule


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoEviction(EvictionRule):
    """Evicts nothing: writing stops when all slots hold a token."""

    is_full_final = True
