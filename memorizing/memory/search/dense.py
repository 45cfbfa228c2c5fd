"""Dense attention over all valid slots instead of a search, for small memories, as in the authors' later code.

Called as a search, it returns all slots by score, to show what was attended to.
"""

import dataclasses

from memorizing.memory.search.contract import SearchSettings
from memorizing.memory.search.exact import Exact


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dense(Exact):
    """Makes `attend_to_memory` attend to all valid slots."""

    @property
    def is_dense(self) -> bool:
        return True


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseSettings(SearchSettings):
    """Dense attention has no settings."""

    is_exact = True
    selects = False
    platforms = ()

    def make(self, minimum_score, platform):
        return Dense(minimum_score=minimum_score)
