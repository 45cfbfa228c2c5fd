"""The external memory of one layer: a ring buffer of keys and values, one per row and head.

A single write cursor serves all rows; `length_B` says how many of the latest slots belong to each row's present
document. So clearing a row is one integer write, and a write is one contiguous update for all rows. Slot `m` is valid
for row `b` when its age, `(cursor - 1 - m) mod M`, is below `length_B[b]`:

    M = 8, cursor = 3, length = 5        slot   0 1 2 3 4 5 6 7
                                         age    2 1 0 7 6 5 4 3
                                         valid  x x x . . . x x

How the slots are searched: `memorizing.memory.search`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float, Int

from memorizing.shapes import Array


class Bank(NamedTuple):
    """Keys and values of earlier tokens, as they were computed then: they go stale, and take no gradient."""

    keys_BHMD: Float[jax.Array, "B H M D"]
    values_BHMD: Float[jax.Array, "B H M D"]
    cursor: Int[jax.Array, ""]
    length_B: Int[jax.Array, "B"]


def empty_bank(rows: int, heads: int, slots: int, head_size: int, dtype: jnp.dtype) -> Bank:
    """A bank in which no slot is valid."""
    shape = (rows, heads, slots, head_size)
    return Bank(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((), jnp.int32), jnp.zeros(rows, jnp.int32))


def clear(bank: Bank, rows_B: Bool[Array, "B"]) -> Bank:
    """Forgets everything in the rows where `rows_B` is True."""
    return bank._replace(length_B=jnp.where(rows_B, 0, bank.length_B))


def append(bank: Bank, keys_BHND: Float[jax.Array, "B H N D"], values_BHND: Float[jax.Array, "B H N D"]) -> Bank:
    """Writes a segment over the oldest slots. `N` must divide `M`, so that a write never wraps around."""
    slots, tokens = bank.keys_BHMD.shape[2], keys_BHND.shape[2]
    if slots % tokens:
        raise ValueError(f"a segment of {tokens} tokens must divide the {slots} slots of the memory")
    start = (0, 0, bank.cursor, 0)
    return Bank(
        lax.dynamic_update_slice(bank.keys_BHMD, lax.stop_gradient(keys_BHND).astype(bank.keys_BHMD.dtype), start),
        lax.dynamic_update_slice(
            bank.values_BHMD, lax.stop_gradient(values_BHND).astype(bank.values_BHMD.dtype), start
        ),
        (bank.cursor + tokens) % slots,
        jnp.minimum(bank.length_B + tokens, slots),
    )


def ages(bank: Bank) -> Int[jax.Array, "M"]:
    """How many tokens were written after each slot: 0 for the latest."""
    slots = bank.keys_BHMD.shape[2]
    return (bank.cursor - 1 - jnp.arange(slots)) % slots


def valid(bank: Bank) -> Bool[jax.Array, "B M"]:
    """Which slots hold a token of the row's present document."""
    return ages(bank)[None, :] < bank.length_B[:, None]
