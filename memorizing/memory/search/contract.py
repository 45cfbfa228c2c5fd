"""The contract of all searches: what a search takes, stores and returns.

    index entries, learned = search.entries(keys, learned)      # while a segment is written
    neighbors             = search(queries, keys, valid, K)     # while a segment is read

Most searches store nothing next to the keys: their index is empty.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from memorizing.errors import InputError
from memorizing.memory.quantize import dequantize
from memorizing.sections import Section


class Neighbors(NamedTuple):
    """The `K` best slots of each query, best first; equal scores by lower slot first.

    If fewer than `K` slots are valid, the other scores are `-inf` and their slots are meaningless.
    """

    scores_BHNK: Float[jax.Array, "B H N K"]
    slots_BHNK: Int[jax.Array, "B H N K"]


class Index(NamedTuple):
    """Data that a search stores next to the keys. The letters that end each name say how the array is sharded.

    Attributes:
        slots: arrays `[B, H, M, ...]` by name, with an entry for each slot, written together with its key.
        learned: arrays without `M` by name, learned from all keys so far. Devices that hold different slots hold the
            same values.
    """

    slots: dict[str, jax.Array]
    learned: dict[str, jax.Array]


NO_INDEX = Index({}, {})


class Keys(NamedTuple):
    """Keys to search.

    Attributes:
        vectors_BHMD: keys, or keys divided by their scale if stored in 8 bits.
        scales_BHM: scales of 8-bit keys; None for other keys.
        index: the search's index.
    """

    vectors_BHMD: Float[jax.Array, "B H M D"] | Int[jax.Array, "B H M D"]
    scales_BHM: Float[jax.Array, "B H M"] | None = None
    index: Index = NO_INDEX

    def plain(self) -> Float[jax.Array, "B H M D"]:
        """Returns the keys with their scale applied; in float32 if they are stored in 8 bits."""
        return self.vectors_BHMD if self.scales_BHM is None else dequantize(self.vectors_BHMD, self.scales_BHM)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """Finds the `neighbors` valid slots of the same row and head with the largest inner product, for each query.

    Scores are float32, whatever the dtype of the keys. No gradient flows through a search.

    Attributes:
        minimum_score: smallest inner product with the query at which a slot counts; None for no bound.
    """

    minimum_score: float | None = None

    @property
    def is_dense(self) -> bool:
        """True for attention over all valid slots; neighbors are then computed only on request."""
        return False

    def __call__(
        self,
        queries_BHND: Float[jax.Array, "B H N D"],
        keys: Keys,
        valid_BM: Bool[jax.Array, "B M"],
        neighbors: int,
    ) -> Neighbors:
        """Returns the neighbors. `neighbors` may not exceed the number of slots."""
        raise NotImplementedError

    def empty_index(self, rows: int, heads: int, slots: int, head_size: int) -> Index:
        """Returns the index of an empty memory."""
        return NO_INDEX

    def entries(
        self, keys_BHND: Float[jax.Array, "B H N D"], learned: dict[str, jax.Array]
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """Returns the index entries of new keys, arrays `[B, H, N, ...]` by name, and the learned arrays after them."""
        return {}, learned


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchSettings(Section):
    """Settings of one search, and the properties that `auto` and `plan` need. `SEARCHES` names the subclasses.

    The fields of a subclass are the settings of a gin section of its name: `IvfSettings.lists` is `Ivf.lists`.

    Attributes:
        is_exact: whether the search finds all true neighbors.
        selects: whether the search selects neighbors at all; False for dense attention over all slots.
        keeps_index: whether the search stores an index next to the keys.
        writes_scores: whether scores `[B, H, N, M]` go through device memory, whole or in blocks.
        platforms: platforms on which the search is worth timing (`cpu`, `gpu`, `tpu`).
    """

    is_exact: ClassVar[bool] = False
    selects: ClassVar[bool] = True
    keeps_index: ClassVar[bool] = False
    writes_scores: ClassVar[bool] = True
    platforms: ClassVar[tuple[str, ...]] = ("cpu", "gpu", "tpu")

    def make(self, minimum_score: float | None, platform: str) -> Search:
        """Returns the search.

        Raises:
            InputError: if the search needs something that the platform or this machine does not have.
        """
        raise NotImplementedError

    @classmethod
    def auto_rank(cls, platform: str, slots: int, neighbors: int) -> int:
        """Returns the search's rank for a platform and size. `auto` takes the highest rank; 0 means never."""
        return 0

    @classmethod
    def missing_requirement(cls) -> str:
        """Returns what this machine lacks for a search that `auto` would otherwise take; empty if nothing."""
        return ""

    def check_size(self, slots: int, retrieved: Mapping[str, int]) -> None:
        """Checks the settings against the size of the memory and the numbers of retrieved slots, by setting name.

        Raises:
            InputError: names the setting, its value and values that work.
        """

    def cheaper(self) -> str | None:
        """Returns advice on a setting that makes the search use less device memory; None if there is none."""
        return None

    def _check_block_size(self, block_size: int) -> None:
        if block_size < 1:
            raise InputError(
                f"{self.section()}.block_size = {block_size}: must be at least 1 slot. 8192 is a good start"
            )

    def _check_recall_target(self, recall_target: float) -> None:
        if not 0 < recall_target <= 0.99:
            raise InputError(
                f"{self.section()}.recall_target = {recall_target}: must be above 0 and at most 0.99. For all "
                "neighbors, use an exact search: Memory.search = 'blocked'"
            )

    def _check_candidates(self, candidates: int, slots: int, retrieved: Mapping[str, int], part: str) -> None:
        """Checks a search that scores only `candidates` slots; `part` names the setting that divides the slots."""
        if candidates >= slots:  # then the search scores all slots
            return
        name, most = max(retrieved.items(), key=lambda item: item[1])
        if candidates < min(most, slots):
            raise InputError(
                f"{self.section()}.candidates = {candidates} is less than Memory.{name} = {most}. A query cannot find "
                f"more neighbors than it scores slots. Set {self.section()}.candidates = {most} or more, or lower "
                f"Memory.{name}"
            )
        if getattr(self, part) > slots:
            raise InputError(
                f"{self.section()}.{part} = {getattr(self, part)} is more than Memory.size = {slots}. Set it to at "
                f"most {slots} (the square root is a good start), or make the memory larger"
            )


def inner_products(
    queries_BHND: Float[jax.Array, "B H N D"],
    vectors_BHMD: jax.Array,
    scales_BHM: Float[jax.Array, "B H M"] | None = None,
) -> Float[jax.Array, "B H N M"]:
    """Returns scores in float32, computed in the precision of the keys, or in that of the queries if keys are 8-bit."""
    if scales_BHM is not None:
        # Queries keep their precision; only keys have 8 bits.
        vectors_BHMD = vectors_BHMD.astype(queries_BHND.dtype)
    # Float32 scores are more exact, and `top_k` on bfloat16 is many times slower on CPUs.
    scores_BHNM = jnp.einsum(
        "BHND,BHMD->BHNM", queries_BHND.astype(vectors_BHMD.dtype), vectors_BHMD, preferred_element_type=jnp.float32
    )
    return scores_BHNM if scales_BHM is None else scores_BHNM * scales_BHM[:, :, None, :]


def counted(
    scores_BHNM: Float[jax.Array, "B H N M"], valid_BM: Bool[jax.Array, "B M"], minimum_score: float | None
) -> Float[jax.Array, "B H N M"]:
    """Returns the scores, with `-inf` at slots that do not count."""
    counts_BHNM = valid_BM[:, None, None, :]
    if minimum_score is not None:
        counts_BHNM = counts_BHNM & (scores_BHNM >= minimum_score)
    return jnp.where(counts_BHNM, scores_BHNM, -jnp.inf)


def pad(part: jax.Array, sizes: dict[int, int], value: float = 0.0) -> jax.Array:
    """Returns the array padded at the end with `value` to at least these sizes, by axis."""
    widths = [(0, max(sizes.get(axis, 0) - size, 0)) for axis, size in enumerate(part.shape)]
    return jnp.pad(part, widths, constant_values=jnp.asarray(value, part.dtype)) if any(map(any, widths)) else part


def just_below(minimum_score: float | None) -> float:
    """Returns the largest float32 below the minimum, for kernels that keep scores strictly above a bound."""
    if minimum_score is None:
        return -math.inf
    below = float(np.nextafter(np.float32(minimum_score), np.float32(-np.inf)))
    smallest = float(np.finfo(np.float32).tiny)
    if abs(below) < smallest:  # a subnormal, which accelerators and CPUs under XLA flush to zero
        return 0.0 if minimum_score > 0 else -smallest
    return below
