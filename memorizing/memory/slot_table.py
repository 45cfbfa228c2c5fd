"""The table of tokens and their slots, for memories that a ring buffer cannot hold.

    slot           0   1   2   3   4   5            fifo with a sink of 2, after 9 tokens in 6 slots:
    position       0   1   6   7   8   5            slots 0 and 1 keep their tokens, the next token takes slot 5

A token's position counts the tokens that its row read before it since the row's memory was last empty. The rules in
`eviction/` choose the slot of a new token; `writing.py` chooses the tokens to write.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Int, Num

from memorizing.shapes import Array

NOTHING = -1
"""Position of a slot without a token."""


class SlotTable(NamedTuple):
    """The state of a bank's slots and rows.

    Attributes:
        positions_BM: position of the token in each slot, or `NOTHING`.
        read_B: number of tokens that the row read since its memory was last empty; the next token's position.
        admitted_B: number of these tokens that were offered to the eviction rule.
        documents_B: number of documents that the row finished.
        coming_B: number of real tokens in the next segment; padding follows them and is never written.
        cached_B: number of tokens in the XL cache that are not written yet (`Memory.writes = 'beyond_cache'`).
        usage_BM: usage of each slot as the eviction rule measures it; None if the rule measures none.
    """

    positions_BM: Int[jax.Array, "B M"]
    read_B: Int[jax.Array, "B"]
    admitted_B: Int[jax.Array, "B"]
    documents_B: Int[jax.Array, "B"]
    coming_B: Int[jax.Array, "B"]
    cached_B: Int[jax.Array, "B"]
    usage_BM: Num[jax.Array, "B M"] | None = None

    @property
    def held_BM(self) -> Bool[jax.Array, "B M"]:
        """True for slots that hold a token."""
        return self.positions_BM != NOTHING

    @property
    def tracked_usage_BM(self) -> Num[jax.Array, "B M"]:
        """Usage of each slot, for rules that measure it."""
        assert self.usage_BM is not None
        return self.usage_BM


def new_slot_table(rows: int, slots: int, usage_dtype: Any) -> SlotTable:
    """Returns a table without any token. Until a mask is known, every token of the next segment counts as real."""
    none_B = lambda: jnp.zeros(rows, jnp.int32)  # noqa: E731  (an array each, since each may be donated)
    return SlotTable(
        positions_BM=jnp.full((rows, slots), NOTHING, jnp.int32),
        read_B=none_B(),
        admitted_B=none_B(),
        documents_B=none_B(),
        coming_B=jnp.full(rows, jnp.iinfo(jnp.int32).max, jnp.int32),
        cached_B=none_B(),
        usage_BM=None if usage_dtype is None else jnp.zeros((rows, slots), usage_dtype),
    )


def emptied_slot_table(like: SlotTable) -> SlotTable:
    """Returns a table with the shapes of `like` and without any token."""
    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)
    return nothing._replace(
        positions_BM=jnp.full(like.positions_BM.shape, NOTHING, jnp.int32),
        coming_B=jnp.full(like.coming_B.shape, jnp.iinfo(jnp.int32).max, jnp.int32),
    )


def cleared(slot_table: SlotTable, rows_B: Bool[Array, "B"]) -> SlotTable:
    """Returns the table with the rows where `rows_B` is True emptied, ready for another document."""
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
    """Returns the table with a copy of `prebuilt` (one row) in the rows where `rows_B` is True, except its XL cache."""

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.where(rows_B.reshape(-1, *(1,) * (old.ndim - 1)), new, old)

    begun = cleared(slot_table, rows_B)
    return jax.tree.map(put, slot_table, prebuilt)._replace(
        documents_B=begun.documents_B, coming_B=begun.coming_B, cached_B=begun.cached_B
    )
