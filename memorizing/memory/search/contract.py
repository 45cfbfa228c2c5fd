"""What every search takes, keeps and returns.

    index entries, learned = search.entries(keys, learned)       # as a segment is written
    neighbors             = search(queries, keys, valid, K)     # as one is read

Most searches keep nothing beside the keys: their index is empty, and `entries` gives none.
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
from memorizing.memory.sections import Section


class Neighbors(NamedTuple):
    """The `K` best slots of each query, best first, equal scores by lower slot first.

    Where fewer than `K` slots are valid the rest have score `-inf`, and their slot means nothing.
    """

    scores_BHNK: Float[jax.Array, "B H N K"]
    slots_BHNK: Int[jax.Array, "B H N K"]


class Index(NamedTuple):
    """What a search keeps beside the keys. The letters at the end of each name say how it is spread over devices.

    Attributes:
        slots: by name, arrays `[B, H, M, ...]`: an entry for each slot, written together with its key.
        learned: by name, arrays without `M`: what was learned from all keys so far. Devices that each hold a part of
            the slots hold this alike.
    """

    slots: dict[str, jax.Array]
    learned: dict[str, jax.Array]


NO_INDEX = Index({}, {})


class Keys(NamedTuple):
    """What is searched.

    Attributes:
        vectors_BHMD: keys; or, in 8 bits, keys divided by their scale.
        scales_BHM: of keys in 8 bits; else None.
        index: what the search itself asked to be kept.
    """

    vectors_BHMD: Float[jax.Array, "B H M D"] | Int[jax.Array, "B H M D"]
    scales_BHM: Float[jax.Array, "B H M"] | None = None
    index: Index = NO_INDEX

    def plain(self) -> Float[jax.Array, "B H M D"]:
        """The keys at their own scale; in float32 where they are kept in 8 bits."""
        return self.vectors_BHMD if self.scales_BHM is None else dequantize(self.vectors_BHMD, self.scales_BHM)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """Finds, for each query, the `neighbors` valid slots of the same row and head with the largest inner product.

    Scores are float32 whatever the dtype of the keys. No gradient flows through a search. Rows and heads never mix.

    Attributes:
        minimum_score: slots whose inner product with the query is lower do not count; None for no such bound.
    """

    minimum_score: float | None = None

    @property
    def is_dense(self) -> bool:
        """Whether all valid slots are attended to, without selection; neighbors are then only told to who asks."""
        return False

    def __call__(
        self,
        queries_BHND: Float[jax.Array, "B H N D"],
        keys: Keys,
        valid_BM: Bool[jax.Array, "B M"],
        neighbors: int,
    ) -> Neighbors:
        """The neighbors; `neighbors` may not exceed the number of slots."""
        raise NotImplementedError

    def empty_index(self, rows: int, heads: int, slots: int, head_size: int) -> Index:
        """The index of a memory in which nothing has been written."""
        return NO_INDEX

    def entries(
        self, keys_BHND: Float[jax.Array, "B H N D"], learned: dict[str, jax.Array]
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """What to write for new keys, as arrays `[B, H, N, ...]` by name, and what has been learned with them."""
        return {}, learned


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchSettings(Section):
    """Settings of one search, and what the search states about itself. The table `SEARCHES` names the subclasses.

    The fields of a subclass are the settings of a gin section of its name: `IvfSettings.lists` is `Ivf.lists`.

    Attributes:
        is_exact: whether the search finds all true neighbors.
        selects: whether the search selects neighbors at all; False for dense attention over all slots.
        keeps_index: whether the search stores data of its own next to the keys.
        writes_scores: whether scores `[B, H, N, M]` go through device memory, whole or in blocks.
        platforms: platforms on which the search is a choice worth timing (`cpu`, `gpu`, `tpu`).
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
        """Returns how well the search suits a platform and size: `auto` takes the highest; 0 for never."""
        return 0

    @classmethod
    def missing_requirement(cls) -> str:
        """Returns what this machine lacks for a search that `auto` would otherwise take; empty if nothing."""
        return ""

    def check_size(self, slots: int, retrieved: Mapping[str, int]) -> None:
        """Checks the settings against the size of the memory and what is retrieved from it, by setting name.

        Raises:
            InputError: naming the setting, its value and values that work.
        """

    def cheaper(self) -> str | None:
        """Returns the change of settings that makes the search hold less in device memory; None if there is none."""
        return None

    def _check_block_size(self, block_size: int) -> None:
        if block_size < 1:
            raise InputError(
                f"{self.section()}.block_size = {block_size}: must be at least 1 slot. 8192 is a good start"
            )

    def _check_recall_target(self, recall_target: float) -> None:
        if not 0 < recall_target <= 0.99:
            raise InputError(
                f"{self.section()}.recall_target = {recall_target}: must be above 0 and at most 0.99. Beyond that an "
                "approximate search saves nothing: for all neighbors set Memory.search = 'blocked'"
            )

    def _check_candidates(self, candidates: int, slots: int, retrieved: Mapping[str, int], part: str) -> None:
        """Checks a search that looks at `candidates` slots only; `part` names the setting that divides the slots."""
        if candidates >= slots:  # then it looks at all slots
            return
        name, most = max(retrieved.items(), key=lambda item: item[1])
        if candidates < min(most, slots):
            raise InputError(
                f"{self.section()}.candidates = {candidates} is less than Memory.{name} = {most}. A query finds at "
                f"most the slots that it looks at. Set {self.section()}.candidates = {most} or more, or lower "
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
    """Scores in float32, with the precision of the keys where that is of 16 bits or more."""
    if scales_BHM is not None:
        # Queries keep their own precision: what is in 8 bits are the keys.
        vectors_BHMD = vectors_BHMD.astype(queries_BHND.dtype)
    # Scores are float32 from the start: more exact, and `top_k` on bfloat16 is many times slower on CPUs.
    scores_BHNM = jnp.einsum(
        "BHND,BHMD->BHNM", queries_BHND.astype(vectors_BHMD.dtype), vectors_BHMD, preferred_element_type=jnp.float32
    )
    return scores_BHNM if scales_BHM is None else scores_BHNM * scales_BHM[:, :, None, :]


def counted(
    scores_BHNM: Float[jax.Array, "B H N M"], valid_BM: Bool[jax.Array, "B M"], minimum_score: float | None
) -> Float[jax.Array, "B H N M"]:
    """The scores, `-inf` at slots that do not count."""
    counts_BHNM = valid_BM[:, None, None, :]
    if minimum_score is not None:
        counts_BHNM = counts_BHNM & (scores_BHNM >= minimum_score)
    return jnp.where(counts_BHNM, scores_BHNM, -jnp.inf)


def pad(part: jax.Array, sizes: dict[int, int], value: float = 0.0) -> jax.Array:
    """`part` made at least as long along each of these axes, by `value` behind it."""
    widths = [(0, max(sizes.get(axis, 0) - size, 0)) for axis, size in enumerate(part.shape)]
    return jnp.pad(part, widths, constant_values=jnp.asarray(value, part.dtype)) if any(map(any, widths)) else part


def just_below(minimum_score: float | None) -> float:
    """A bound that the scores from the minimum on are above, and no others; for kernels that keep what is larger."""
    if minimum_score is None:
        return -math.inf
    below = float(np.nextafter(np.float32(minimum_score), np.float32(-np.inf)))
    smallest = float(np.finfo(np.float32).tiny)
    if abs(below) < smallest:  # which chips, and CPUs as XLA sets them, take for zero
        return 0.0 if minimum_score > 0 else -smallest
    return below
