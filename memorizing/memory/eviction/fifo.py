"""Eviction rule `fifo`: the oldest token leaves (first in, first out)."""

import dataclasses

from memorizing.memory.eviction.contract import EvictionRule


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fifo(EvictionRule):
    """Evicts the oldest token."""

    fits_ring = True
