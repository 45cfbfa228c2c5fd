"""The rules that decide which token leaves a full memory, by the name in `Memory.eviction`.

    fifo                  the oldest token leaves
    none                  no token leaves; writing stops
    least_used            the token with the least attention so far leaves
    least_recently_used   the token whose last retrieval is longest ago leaves
    reservoir             a uniform random sample of the document stays

To add a rule, write a subclass of `EvictionRule` in a file of its own and add a line to `EVICTION_RULES`.
"""

from memorizing.memory.eviction.contract import EvictionRule, assign_slots
from memorizing.memory.eviction.fifo import Fifo
from memorizing.memory.eviction.least_recently_used import LeastRecentlyUsed
from memorizing.memory.eviction.least_used import LeastUsed
from memorizing.memory.eviction.none import NoEviction
from memorizing.memory.eviction.reservoir import Reservoir

__all__ = ["EVICTION_RULES", "EvictionRule", "assign_slots"]

EVICTION_RULES: dict[str, type[EvictionRule]] = {
    "fifo": Fifo,
    "none": NoEviction,
    "least_used": LeastUsed,
    "least_recently_used": LeastRecentlyUsed,
    "reservoir": Reservoir,
}
