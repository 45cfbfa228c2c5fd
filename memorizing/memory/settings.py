"""Settings of the memory: `MemorySettings`, gin section `Memory`.

The settings from `eviction` on say what the memory keeps. See `uses_slot_table` for the two
kinds of banks that follow.
"""

import dataclasses
from typing import Any, Literal, TypeVar

from memorizing.errors import InputError
from memorizing.memory.eviction import EVICTION_RULES, EvictionRule
from memorizing.memory.quantize import DTYPES, EightBits
from memorizing.memory.search import SEARCHES
from memorizing.sections import LARGEST_COUNT, Section, check_range

SectionT = TypeVar("SectionT", bound=Section)


LARGEST_SCORE = 1_000_000
"""Largest size of `Memory.minimum_score`."""


@dataclasses.dataclass(frozen=True)
class MemorySettings:
    """The external memory. No parameter of a model depends on these, so they may differ between runs of one model.

    Attributes:
        size: slots per row and head (`M`), in tokens; 0 for no memory.
        neighbors: number of slots that a query retrieves (`K`). `dense` attends to all slots instead.
        dtype: dtype of the stored keys and values.
        key_dtype: dtype of the stored keys if it differs: 8 bits take half the space of bfloat16.
        search: name of the search (see `memorizing.memory.search`). `auto` chooses by device and size; `dense` attends
            to all slots of a small memory, and the backward pass keeps a copy of it.
        minimum_score: smallest inner product with the query at which a slot counts as a neighbor; None for no bound.
        report_recall: whether to measure recall: searches again, exactly, for 8 queries of each segment and reports the
            share of the true neighbors that `search` found, among the keys as they are stored. In training it also
            reports the age of the retrieved keys, in updates.
        proposer: small copy of the keys in which `search` proposes neighbors, while the keys themselves decide: `int8`,
            `float8`, a `projection` to fewer features, or the `learned` features of a model that has them
            (`Model.index_size`); None to search the keys.
        proposals: number of slots proposed for each query; at least `neighbors` are.
        projection_size: number of features of a projected copy.
        eviction: rule that frees a slot when the memory is full (see `memorizing.memory.eviction`). `fifo` evicts the
            oldest token, `least_used` the one with the least attention so far, `least_recently_used` the one whose
            last retrieval is longest ago; `reservoir` keeps a uniform random sample; `none` stops writing.
        maximum_age: age, in tokens, above which a token does not count, measured at the start of the segment that
            reads; None for any age.
        write_every: distance of the tokens that are written: every n-th token of the document, the first one included.
        sink: number of tokens at the start of a document that stay, whatever `eviction` and `maximum_age` say.
        duplicate_score: cosine of keys, in the mean over heads, above which a token counts as a duplicate of one in
            memory and is not written (see `memorizing.memory.duplicates`); None to write all tokens.
        writes: tokens written when a segment is read: those of the segment itself (`segment`); those of the segment
            before, which leave the XL cache, so that no token is seen twice (`beyond_cache`; memory layers then see the
            whole cache from the whole segment); or none (`never`: a memory from elsewhere is only read).
        clear_at_documents: whether a row's memory is emptied when the row starts another document. If not, the memory
            spans all documents that the row has read.
        options: settings of searches and eviction rules that differ from their defaults, each at most once (gin
            sections `Ivf`, `Lsh`, `LeastRecentlyUsed`, ...). Those of members that are not in use have no effect.
    """

    size: int = 8192
    neighbors: int = 32
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    key_dtype: Literal["bfloat16", "float32", EightBits] | None = None
    search: str = "auto"
    minimum_score: float | None = None
    report_recall: bool = False
    proposer: Literal[EightBits, "projection", "learned"] | None = None
    proposals: int = 128
    projection_size: int = 32
    eviction: str = "fifo"
    maximum_age: int | None = None
    write_every: int = 1
    sink: int = 0
    duplicate_score: float | None = None
    writes: Literal["segment", "beyond_cache", "never"] = "segment"
    clear_at_documents: bool = True
    options: tuple[Section, ...] = dataclasses.field(default=(), repr=False)

    def __post_init__(self):
        check_range(self, 0, LARGEST_COUNT, "size", "sink")
        if self.minimum_score is not None and not abs(self.minimum_score) <= LARGEST_SCORE:
            raise InputError(
                f"Memory.minimum_score = {self.minimum_score}: must be from -{LARGEST_SCORE:,} to {LARGEST_SCORE:,}, "
                "because no inner product of trained queries and keys is larger. None sets no bound"
            )
        check_range(self, 1, LARGEST_COUNT, "neighbors", "proposals", "projection_size", "write_every")
        self._check_search()
        self._check_writing()

    def section_of(self, kind: type[SectionT]) -> SectionT:
        """Returns the settings of a search or an eviction rule: those in `options`, or the defaults."""
        return next((options for options in self.options if type(options) is kind), kind())

    @property
    def eviction_rule(self) -> EvictionRule:
        """The rule that `eviction` names."""
        return self.section_of(EVICTION_RULES[self.eviction])

    def by_name(self) -> dict[str, Any]:
        """Returns the settings for JSON: those of this class by field, those in `options` by their gin names."""
        settings = dataclasses.asdict(dataclasses.replace(self, options=()))
        del settings["options"]
        for options in self.options:
            settings |= {f"{options.section()}.{name}": value for name, value in dataclasses.asdict(options).items()}
        return settings

    @property
    def selects(self) -> bool:
        """True if a search selects neighbors; False for attention over all slots."""
        return self.search == "auto" or SEARCHES[self.search].selects

    def _check_search(self) -> None:
        if self.search != "auto" and self.search not in SEARCHES:
            known = ", ".join(map(repr, ("auto", *SEARCHES)))
            raise InputError(f"Memory.search = {self.search!r}: must be one of {known}")
        if not self.selects and (self.proposer is not None or self.report_recall):
            name = "report_recall" if self.report_recall else "proposer"
            raise InputError(
                f"Memory.{name} = {getattr(self, name)!r} has no effect with Memory.search = {self.search!r}, which "
                "attends to all slots and searches nothing. Remove one of the two"
            )
        if self.size and self.neighbors > self.size and self.selects:
            raise InputError(
                f"Memory.neighbors = {self.neighbors} is more than Memory.size = {self.size}. "
                f"Retrieve at most {self.size} neighbors, or make the memory larger"
            )
        if self.proposer in DTYPES and self.key_dtype in DTYPES:
            raise InputError(
                f"Memory.proposer = {self.proposer!r} with Memory.key_dtype = {self.key_dtype!r}: the copy would be no "
                "smaller than the keys. Propose by a 'projection', or set Memory.proposer = None"
            )
        if self.search == "auto":
            return
        if self.proposer == "learned" and SEARCHES[self.search].keeps_index:
            raise InputError(
                f"Memory.proposer = 'learned' with Memory.search = {self.search!r}: this search stores an index, "
                "but learned features are computed at each read. Set Memory.search = 'auto', or propose by "
                "a 'projection'"
            )
        retrieved = {"neighbors": self.neighbors} | ({"proposals": self.proposals} if self.proposer else {})
        self.section_of(SEARCHES[self.search]).check_size(self.size, retrieved)

    @property
    def uses_slot_table(self) -> bool:
        """True if the memory needs a slot table (`memorizing.memory.slot_table`) because no ring buffer can hold it.

        A ring buffer holds the newest tokens, and the same number of new tokens in each row.
        """
        is_writing_on = not self.clear_at_documents and self.writes != "never"
        is_ring = self.eviction_rule.fits_ring and not self.sink and self.duplicate_score is None
        return not is_ring or is_writing_on or self.writes == "beyond_cache"

    def writing(self) -> dict[str, Any]:
        """Returns the settings that decide what the memory holds and differ from their defaults, by gin name."""
        settings = {name: value for name in WRITING if (value := getattr(self, name)) != getattr(MemorySettings, name)}
        rule = self.eviction_rule
        return settings | {
            f"{rule.section()}.{name}": value
            for name, value in dataclasses.asdict(rule).items()
            if value != getattr(type(rule), name)
        }

    def _check_writing(self) -> None:
        if self.eviction not in EVICTION_RULES:
            known = ", ".join(map(repr, EVICTION_RULES))
            raise InputError(f"Memory.eviction = {self.eviction!r}: must be one of {known}")
        if self.maximum_age is not None:
            if self.maximum_age < self.write_every:
                raise InputError(
                    f"Memory.maximum_age = {self.maximum_age} is less than Memory.write_every = {self.write_every}, so "
                    "no token would ever count. Use a larger age, or None for any age"
                )
            if not self.eviction_rule.allows_maximum_age or self.writes == "never":
                other = f"eviction = {self.eviction!r}" if self.writes != "never" else "writes = 'never'"
                why = "keeps tokens of all ages" if self.writes != "never" else "never writes, so tokens do not age"
                raise InputError(
                    f"Memory.maximum_age = {self.maximum_age} with Memory.{other}, which {why}. Set Memory.maximum_age "
                    "= None, or change the other"
                )
        if self.size and self.sink >= self.size:
            raise InputError(f"Memory.sink = {self.sink}: must be below Memory.size = {self.size}")
        if self.duplicate_score is not None and not 0 < self.duplicate_score < 1:
            raise InputError(
                f"Memory.duplicate_score = {self.duplicate_score}: must be above 0 and below 1. "
                "Start with 0.95, or use None to write all tokens"
            )

    @property
    def retrieved(self) -> int:
        """Number of slots that a query attends to."""
        return self.neighbors if self.selects else self.size


WRITING = ("eviction", "maximum_age", "write_every", "sink", "duplicate_score", "writes", "clear_at_documents")
"""Settings of `MemorySettings` that decide which tokens the memory holds."""


def at_memory_size(memory: MemorySettings, size: int) -> MemorySettings:
    """Returns the same memory with `size` slots. A small memory retrieves no more neighbors than it has slots."""
    return dataclasses.replace(memory, size=size, neighbors=min(memory.neighbors, size or memory.neighbors))
