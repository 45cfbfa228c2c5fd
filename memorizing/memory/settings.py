"""What can be set about the memory."""

import dataclasses
from typing import Literal

from memorizing.errors import InputError


@dataclasses.dataclass(frozen=True)
class MemorySettings:
    """The external memory. No parameter of a model depends on these, so they may differ between runs of one model.

    Attributes:
        size: slots per row and head (`M`), in tokens; 0 for no memory.
        neighbours: how many slots a query retrieves (`K`).
        search: how they are found: `exact` or `blocked` (see `memorizing.memory.search`).
        block_size: slots that `blocked` scores at a time.
        dtype: of the stored keys and values.
    """

    size: int = 8192
    neighbours: int = 32
    search: Literal["exact", "blocked"] = "blocked"
    block_size: int = 8192
    dtype: Literal["bfloat16", "float32"] = "bfloat16"

    def __post_init__(self):
        if self.size < 0:
            raise InputError(f"Memory.size = {self.size}: must be 0 (no memory) or a number of tokens")
        if self.neighbours < 1:
            raise InputError(f"Memory.neighbours = {self.neighbours}: must be at least 1; the paper uses 32")
        if self.size and self.neighbours > self.size:
            raise InputError(
                f"Memory.neighbours = {self.neighbours} is more than Memory.size = {self.size}: "
                f"retrieve fewer neighbours (at most {self.size}) or make the memory larger"
            )
        if self.block_size < 1:
            raise InputError(f"Memory.block_size = {self.block_size}: must be at least 1 slot; 8192 is a good start")
