"""What can be set about the memory.

What it keeps (the last of these settings, from `eviction` on) comes to either of two kinds of banks, see `addressed`.
"""

import dataclasses
from typing import Any, Literal

from memorizing.errors import InputError
from memorizing.memory.quantize import DTYPES, EightBits


@dataclasses.dataclass(frozen=True)
class MemorySettings:
    """The external memory. No parameter of a model depends on these, so they may differ between runs of one model.

    Attributes:
        size: slots per row and head (`M`), in tokens; 0 for no memory.
        neighbors: how many slots a query retrieves (`K`); nothing to `dense`, which attends to all.
        dtype: of the stored keys and values.
        key_dtype: of the stored keys, if it is to be another: 8 bits take half the room of bfloat16.
        search: how neighbors are found, see `memorizing.memory.search`; `auto` chooses by device and size. With
            `dense` nothing is searched: for a small memory, of which the backward pass keeps a copy.
        minimum_score: slots whose inner product with the query is lower do not count; None for no such bound.
        report_recall: whether to search again, exactly, for some queries of each segment, and to report which share of
            the true neighbors `search` had found; true among the keys as they are stored. In training also how many
            updates old the keys are that it found (the cost is that of the search again, for 8 queries a segment).
        block_size: slots that `blocked` and `binned` score at a time.
        recall_target: the share of the true neighbors that `pallas`, `binned` and `approximate` are laid out to find;
            less is faster.
        gpu_kernel: what compiles `pallas` for NVIDIA GPUs; `mosaic` is for keys of 16 bits on Hopper, others then take
            `triton`.
        proposer: a small copy of the keys in which `search` only proposes neighbors, while the keys themselves decide:
            `int8`, `float8`, a `projection` to fewer features, or the `learned` features of a model that has them
            (`Model.index_size`); None to search among the keys.
        proposals: how many are proposed for each query, if not more neighbors are wanted.
        projection_size: features of a projected copy.
        candidates: slots that `lsh` and `ivf` look at for each query.
        lsh_tables: of hashes that each slot has.
        lsh_bits: of a hash.
        lsh_probes: hashes near its own that a query looks at in each table.
        ivf_lists: into which `ivf` and `faiss` sort the slots, each with a centroid.
        ivf_probes: lists that a query looks at, those with the nearest centroids.
        faiss_index: the kind of index.
        faiss_effort: slots that a query visits in `hnsw` at least.
        eviction: which token has to go when the memory is full: the oldest (`fifo`); at random, such that all tokens of
            the document so far are kept with the same probability (`reservoir`; what is drawn depends on the row and on
            how many documents it has read); the one with the least attention so far, over heads and queries, where new
            ones begin with the mean of those held (`least_used`); or none, and nothing is written any more (`none`).
        maximum_age: tokens that were read longer ago than so many do not count, as seen from the beginning of the
            segment that reads; None for any age.
        write_every: only every so many-th token of the document is written, the first one first.
        sink: the first so many tokens that are written of a document stay, whatever `eviction` and `maximum_age` say.
        duplicate_score: a token is not written if its keys and those of a token that is kept have a larger cosine than
            this, in the mean over heads (see `memorizing.memory.duplicates`); None to write them all.
        writes: what is written when a segment is read: itself (`segment`); the segment before, which then falls out of
            the XL cache, so that no token is seen twice (`beyond_cache`; memory layers then see all of the cache from
            all of the segment); or nothing (`never`: a memory that came from elsewhere is only read).
        clear_at_documents: whether a row's memory is emptied when it begins another document. Else the memory is of all
            documents that the row has read, and what is said of a document here is meant of all these together.
    """

    size: int = 8192
    neighbors: int = 32
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    key_dtype: Literal["bfloat16", "float32", EightBits] | None = None
    search: Literal["auto", "exact", "native", "blocked", "pallas", "binned", "approximate", "ivf", "lsh", "faiss",
                    "dense"] = "auto"  # fmt: skip
    minimum_score: float | None = None
    report_recall: bool = False
    block_size: int = 8192
    recall_target: float = 0.95
    gpu_kernel: Literal["triton", "mosaic"] = "triton"
    proposer: Literal[EightBits, "projection", "learned"] | None = None
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
    eviction: Literal["fifo", "reservoir", "least_used", "none"] = "fifo"
    maximum_age: int | None = None
    write_every: int = 1
    sink: int = 0
    duplicate_score: float | None = None
    writes: Literal["segment", "beyond_cache", "never"] = "segment"
    clear_at_documents: bool = True

    def __post_init__(self):
        if self.size < 0:
            raise InputError(f"Memory.size = {self.size}: must be 0 (no memory) or a number of tokens")
        if self.neighbors < 1:
            raise InputError(f"Memory.neighbors = {self.neighbors}: must be at least 1; the paper uses 32")
        if self.search == "dense" and (self.proposer is not None or self.report_recall):
            name = "report_recall" if self.report_recall else "proposer"
            raise InputError(
                f"Memory.{name} = {getattr(self, name)!r} with Memory.search = 'dense', which attends to all slots and "
                "searches nothing: leave one of the two out"
            )
        if self.size and self.neighbors > self.size and self.search != "dense":
            raise InputError(
                f"Memory.neighbors = {self.neighbors} is more than Memory.size = {self.size}: "
                f"retrieve fewer neighbors (at most {self.size}) or make the memory larger"
            )
        if self.block_size < 1:
            raise InputError(f"Memory.block_size = {self.block_size}: must be at least 1 slot; 8192 is a good start")
        if not 0 < self.recall_target <= 0.99:
            raise InputError(
                f"Memory.recall_target = {self.recall_target}: must be above 0 and at most 0.99, since beyond that "
                "approximate searches save nothing: for all of the neighbors set Memory.search = 'blocked'"
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
        if self.proposer == "learned" and self.search in ("ivf", "lsh", "faiss"):
            raise InputError(
                f"Memory.proposer = 'learned' with Memory.search = {self.search!r}, which keeps an index of its own, "
                "while learned features are made anew at each reading: set Memory.search = 'auto', or propose by a "
                "'projection'"
            )
        if self.search in ("ivf", "lsh") and self.candidates < self.size:  # else all slots are looked at
            self._check_candidates()
        self._check_writing()

    @property
    def uses_slot_table(self) -> bool:
        """Whether rows need slots of their own (`memorizing.memory.slot_table`), for what a ring cannot express.

        Namely: to keep other tokens than the newest; to write in each row as many tokens as it happens to have.
        """
        is_writing_on = not self.clear_at_documents and self.writes != "never"
        is_ring = self.eviction == "fifo" and not self.sink and self.duplicate_score is None
        return not is_ring or is_writing_on or self.writes == "beyond_cache"

    def writing(self) -> dict[str, Any]:
        """The settings that say what is kept, but for those that have their defaults."""
        return {name: value for name in WRITING if (value := getattr(self, name)) != getattr(MemorySettings, name)}

    def _check_writing(self) -> None:
        if self.maximum_age is not None:
            if self.maximum_age < self.write_every:
                raise InputError(
                    f"Memory.maximum_age = {self.maximum_age} is less than Memory.write_every = {self.write_every}, so "
                    "no token would ever count: use more, or None for any age"
                )
            if self.eviction == "reservoir" or self.writes == "never":
                other = "eviction = 'reservoir'" if self.writes != "never" else "writes = 'never'"
                why = "keeps tokens of all ages alike" if self.writes != "never" else "has tokens that do not age"
                raise InputError(
                    f"Memory.maximum_age = {self.maximum_age} with Memory.{other}, which {why}: set Memory.maximum_age "
                    "= None, or change the other"
                )
        if self.write_every < 1:
            raise InputError(f"Memory.write_every = {self.write_every}: must be at least 1, for every token")
        if self.sink < 0 or (self.size and self.sink >= self.size):
            raise InputError(
                f"Memory.sink = {self.sink}: must be at least 0 (no token is sure to stay) and below Memory.size = "
                f"{self.size}"
            )
        if self.duplicate_score is not None and not 0 < self.duplicate_score < 1:
            raise InputError(
                f"Memory.duplicate_score = {self.duplicate_score}: must be above 0 and below 1, the cosine of equal "
                "keys; 0.95 is a good start, None writes all tokens"
            )

    @property
    def retrieved(self) -> int:
        """How many slots a query attends to."""
        return self.size if self.search == "dense" else self.neighbors

    def _check_candidates(self) -> None:
        wanted = max(self.neighbors, self.proposals if self.proposer else 0)
        if self.candidates < min(wanted, self.size):
            name = "neighbors" if wanted == self.neighbors else "proposals"
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


WRITING = ("eviction", "maximum_age", "write_every", "sink", "duplicate_score", "writes", "clear_at_documents")
"""Settings that say what is kept; so what lies in a memory depends on them."""


def at_memory_size(memory: MemorySettings, size: int) -> MemorySettings:
    """Returns the same memory with `size` slots. A small memory retrieves no more neighbors than it has slots."""
    return dataclasses.replace(memory, size=size, neighbors=min(memory.neighbors, size or memory.neighbors))
