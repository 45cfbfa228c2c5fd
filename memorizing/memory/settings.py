"""What can be set about the memory."""

import dataclasses
from typing import Literal

from memorizing.errors import InputError
from memorizing.memory.quantize import DTYPES, EightBits


@dataclasses.dataclass(frozen=True)
class MemorySettings:
    """The external memory. No parameter of a model depends on these, so they may differ between runs of one model.

    Attributes:
        size: slots per row and head (`M`), in tokens; 0 for no memory.
        neighbours: how many slots a query retrieves (`K`); nothing to `dense`, which attends to all.
        dtype: of the stored keys and values.
        key_dtype: of the stored keys, if it is to be another: 8 bits take half the room of bfloat16.
        search: how neighbours are found, see `memorizing.memory.search`; `auto` chooses by device and size. With
            `dense` nothing is searched: for a small memory, of which the backward pass keeps a copy.
        minimum_score: slots whose inner product with the query is lower do not count; None for no such bound.
        report_recall: whether to search again, exactly, for some queries of each segment, and to report which share of
            the true neighbours `search` had found; true among the keys as they are stored.
        block_size: slots that `blocked` and `binned` score at a time.
        recall_target: the share of the true neighbours that `pallas`, `binned` and `approximate` are laid out to find;
            less is faster.
        gpu_kernel: what compiles `pallas` for NVIDIA GPUs; `mosaic` is for keys of 16 bits on Hopper, others then take
            `triton`.
        proposer: a small copy of the keys in which `search` only proposes neighbours, while the keys themselves decide:
            `int8`, `float8`, or a `projection` to fewer features; None to search among the keys.
        proposals: how many are proposed for each query, if not more neighbours are wanted.
        projection_size: features of a projected copy.
        candidates: slots that `lsh` and `ivf` look at for each query.
        lsh_tables: of hashes that each slot has.
        lsh_bits: of a hash.
        lsh_probes: hashes near its own that a query looks at in each table.
        ivf_lists: into which `ivf` and `faiss` sort the slots, each with a centroid.
        ivf_probes: lists that a query looks at, those with the nearest centroids.
        faiss_index: the kind of index.
        faiss_effort: slots that a query visits in `hnsw` at least.
    """

    size: int = 8192
    neighbours: int = 32
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    key_dtype: Literal["bfloat16", "float32", EightBits] | None = None
    search: Literal["auto", "exact", "native", "blocked", "pallas", "binned", "approximate", "ivf", "lsh", "faiss",
                    "dense"] = "auto"  # fmt: skip
    minimum_score: float | None = None
    report_recall: bool = False
    block_size: int = 8192
    recall_target: float = 0.95
    gpu_kernel: Literal["triton", "mosaic"] = "triton"
    proposer: Literal[EightBits, "projection"] | None = None
    proposals: int = 128
    projection_size: int = 32
    candidates: int = 2048
    lsh_tables: int = 4
    lsh_bits: int = 10
    lsh_probes: int = 32
    ivf_lists: int = 128
    ivf_probes: int = 32
    faiss_index: Literal["hnsw", "ivf"] = "hnsw"
    faiss_effort: int = 128

    def __post_init__(self):
        if self.size < 0:
            raise InputError(f"Memory.size = {self.size}: must be 0 (no memory) or a number of tokens")
        if self.neighbours < 1:
            raise InputError(f"Memory.neighbours = {self.neighbours}: must be at least 1; the paper uses 32")
        if self.search == "dense" and (self.proposer is not None or self.report_recall):
            name = "report_recall" if self.report_recall else "proposer"
            raise InputError(
                f"Memory.{name} = {getattr(self, name)!r} with Memory.search = 'dense', which attends to all slots and "
                "searches nothing: leave one of the two out"
            )
        if self.size and self.neighbours > self.size and self.search != "dense":
            raise InputError(
                f"Memory.neighbours = {self.neighbours} is more than Memory.size = {self.size}: "
                f"retrieve fewer neighbours (at most {self.size}) or make the memory larger"
            )
        if self.block_size < 1:
            raise InputError(f"Memory.block_size = {self.block_size}: must be at least 1 slot; 8192 is a good start")
        if not 0 < self.recall_target <= 0.99:
            raise InputError(
                f"Memory.recall_target = {self.recall_target}: must be above 0 and at most 0.99, since beyond that "
                "approximate searches save nothing: for all of the neighbours set Memory.search = 'blocked'"
            )
        for name in ("proposals", "projection_size", "candidates", "lsh_tables", "lsh_bits", "lsh_probes", "ivf_lists",
                     "ivf_probes", "faiss_effort"):  # fmt: skip
            if getattr(self, name) < 1:
                raise InputError(f"Memory.{name} = {getattr(self, name)}: must be at least 1")
        if self.lsh_bits > 30:
            raise InputError(f"Memory.lsh_bits = {self.lsh_bits}: must be at most 30")
        if self.lsh_probes > 2**self.lsh_bits:
            raise InputError(
                f"Memory.lsh_probes = {self.lsh_probes} is more than the {2**self.lsh_bits} hashes of "
                f"Memory.lsh_bits = {self.lsh_bits}: probe at most so many, or use more bits"
            )
        if self.ivf_probes > self.ivf_lists:
            raise InputError(
                f"Memory.ivf_probes = {self.ivf_probes} is more than Memory.ivf_lists = {self.ivf_lists}: probe at "
                "most so many, or make more lists"
            )
        if self.proposer in DTYPES and self.key_dtype in DTYPES:
            raise InputError(
                f"Memory.proposer = {self.proposer!r} with Memory.key_dtype = {self.key_dtype!r}: the copy would be no "
                "smaller than the keys; propose by a 'projection', or set Memory.proposer = None"
            )
        if self.search in ("ivf", "lsh") and self.candidates < self.size:  # else all slots are looked at
            self._check_candidates()

    @property
    def retrieved(self) -> int:
        """How many slots a query attends to."""
        return self.size if self.search == "dense" else self.neighbours

    def _check_candidates(self) -> None:
        wanted = max(self.neighbours, self.proposals if self.proposer else 0)
        if self.candidates < min(wanted, self.size):
            name = "neighbours" if wanted == self.neighbours else "proposals"
            raise InputError(
                f"Memory.candidates = {self.candidates} is less than Memory.{name} = {wanted}: {self.search!r} finds "
                f"no more than it looks at; look at {wanted} or more, or want fewer"
            )
        name = "ivf_lists" if self.search == "ivf" else "lsh_probes"
        if getattr(self, name) > self.size:
            raise InputError(
                f"Memory.{name} = {getattr(self, name)} is more than Memory.size = {self.size}: set it to at most "
                f"{self.size} (its square root is a good start), or make the memory larger"
            )
