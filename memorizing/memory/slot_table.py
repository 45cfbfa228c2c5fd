"""Which token lies in which slot, where rows have slots of their own: for all that a ring cannot express.

    slot           0   1   2   3   4   5            fifo with a sink of 2, after 9 tokens in 6 slots:
    position       0   1   6   7   8   5            slots 0 and 1 keep theirs, the next token takes slot 5

The position of a token is its place in what the row has read since its memory was last empty, `read_B` the place of the
token that comes next. Which slot a new token takes: `eviction.py`; which tokens get that far: `writing.py`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from memorizing.memory.settings import MemorySettings
from memorizing.shapes import Array

NOTHING = -1
"""The position of a slot that holds nothing."""


class SlotTable(NamedTuple):
    """What an addressed bank knows of its slots and rows.

    Attributes:
        positions_BM: of the token that each slot holds, or `NOTHING`.
        read_B: tokens that the row has read since its memory was last empty.
        admitted_B: how many of these were offered to the rule of eviction.
        documents_B: how often the row has begun anew.
        coming_B: how many tokens the segment has that reads next: behind them is padding, which is never written.
        cached_B: tokens of the XL cache that are still to be written (`writes = 'beyond_cache'`).
        used_BM: attention that each token has received, and what it was given at its start; None unless evicted by it.
    """

    positions_BM: Int[jax.Array, "B M"]
    read_B: Int[jax.Array, "B"]
    admitted_B: Int[jax.Array, "B"]
    documents_B: Int[jax.Array, "B"]
    coming_B: Int[jax.Array, "B"]
    cached_B: Int[jax.Array, "B"]
    used_BM: Float[jax.Array, "B M"] | None = None

    @property
    def held_BM(self) -> Bool[jax.Array, "B M"]:
        """Which slots hold a token."""
        return self.positions_BM != NOTHING


def new_slot_table(rows: int, settings: MemorySettings) -> SlotTable | None:
    """Before anything is read; None for a memory that is a ring. Until a mask is known, all that comes is tokens."""
    if not settings.uses_slot_table:
        return None
    none_B = lambda: jnp.zeros(rows, jnp.int32)  # noqa: E731  (an array each, since each may be donated)
    return SlotTable(
        positions_BM=jnp.full((rows, settings.size), NOTHING, jnp.int32),
        read_B=none_B(),
        admitted_B=none_B(),
        documents_B=none_B(),
        coming_B=jnp.full(rows, jnp.iinfo(jnp.int32).max, jnp.int32),
        cached_B=none_B(),
        used_BM=jnp.zeros((rows, settings.size), jnp.float32) if settings.eviction == "least_used" else None,
    )


def emptied_slot_table(like: SlotTable) -> SlotTable:
    """Addresses of these shapes before anything is read."""
    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)
    return nothing._replace(
        positions_BM=jnp.full(like.positions_BM.shape, NOTHING, jnp.int32),
        coming_B=jnp.full(like.coming_B.shape, jnp.iinfo(jnp.int32).max, jnp.int32),
    )


def cleared(slot_table: SlotTable, rows_B: Bool[Array, "B"]) -> SlotTable:
    """The rows where `rows_B` is True begin anew."""
    none_B = jnp.zeros_like(slot_table.read_B)
    begin_B = lambda value_B: jnp.where(rows_B, none_B, value_B)  # noqa: E731
    had_read_B = (slot_table.read_B > 0).astype(jnp.int32)
    return slot_table._replace(
        positions_BM=jnp.where(rows_B[:, None], NOTHING, slot_table.positions_BM),
        read_B=begin_B(slot_table.read_B),
        admitted_B=begin_B(slot_table.admitted_B),
        documents_B=slot_table.documents_B + jnp.where(rows_B, had_read_B, 0),
        cached_B=begin_B(slot_table.cached_B),
    )


def refilled(slot_table: SlotTable, rows_B: Bool[Array, "B"], prebuilt: SlotTable) -> SlotTable:
    """The rows where `rows_B` is True begin where `prebuilt`, of one row, has got to; without its XL cache."""

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.where(rows_B.reshape(-1, *(1,) * (old.ndim - 1)), new, old)

    begun = cleared(slot_table, rows_B)
    return jax.tree.map(put, slot_table, prebuilt)._replace(
        documents_B=begun.documents_B, coming_B=begun.coming_B, cached_B=begun.cached_B
    )
