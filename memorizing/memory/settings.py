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
        search: how they are found, see `memorizing.memory.search`; `auto` chooses by device and size.
        minimum_score: slots whose inner product with the query is lower do not count; None for no such bound.
        recall_target: the share of the true neighbours that approximate searches are laid out to find; less is faster.
        block_size: slots that `blocked` and `binned` score at a time.
        report_recall: whether to search again, exactly, for some queries of each segment, and to report which share of
            the true neighbours `search` had found.
        dtype: of the stored keys and values.
        key_dtype: of the stored keys, if it is to be another: 8 bits take half the room, and are searched faster.
    """

    size: int = 8192
    neighbours: int = 32
    search: Literal["auto", "exact", "native", "blocked", "pallas", "binned", "approximate"] = "auto"
    minimum_score: float | None = None
    recall_target: float = 0.95
    block_size: int = 8192
    report_recall: bool = False
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    key_dtype: Literal["bfloat16", "float32", "int8", "float8"] | None = None

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
        if not 0 < self.recall_target < 1:
            raise InputError(
                f"Memory.recall_target = {self.recall_target}: must be between 0 and 1, both excluded; for all of the "
                "neighbours set Memory.search = 'blocked'"
            )
