"""The external memory of one layer: a ring buffer of keys and values, one per row and head.

A single write cursor serves all rows; `length_B` says how many of the latest slots belong to each row's present
document. So clearing a row is one integer write, and a write is one contiguous update for all rows. Slot `m` is valid
for row `b` when its age, `(cursor - 1 - m) mod M`, is below `length_B[b]`:

    M = 8, cursor = 3, length = 5        slot   0 1 2 3 4 5 6 7
                                         age    2 1 0 7 6 5 4 3
                                         valid  x x x . . . x x

How the slots are searched: `memorizing.memory.search`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float, Int

from memorizing.parallel.mesh import current_mesh, spec
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
    stored = (lax.stop_gradient(keys_BHND), lax.stop_gradient(values_BHND))
    write = _write
    if (mesh := current_mesh()) is not None:
        held, written = (spec("BHMD"),) * 2, (spec("BH_D"),) * 2
        write = jax.shard_map(
            functools.partial(_write, axis="memory"), mesh=mesh, in_specs=(held, written, spec("")), out_specs=held
        )
    keys_BHMD, values_BHMD = write((bank.keys_BHMD, bank.values_BHMD), stored, bank.cursor)
    return Bank(keys_BHMD, values_BHMD, (bank.cursor + tokens) % slots, jnp.minimum(bank.length_B + tokens, slots))


def _write(held: tuple[jax.Array, ...], new: tuple[jax.Array, ...], cursor: jax.Array, axis: str | None = None):
    """Writes `new` `[B, H, N, D]` into slots from `cursor` on; with an `axis`, those that lie on this device."""
    if axis is None:
        return tuple(
            lax.dynamic_update_slice(old, part.astype(old.dtype), (0, 0, cursor, 0))
            for old, part in zip(held, new, strict=True)
        )
    slots, tokens = held[0].shape[2], new[0].shape[2]
    start = cursor - lax.axis_index(axis) * slots  # in this device's slots; can lie before or behind them
    # A window over all that could be written here: a segment may reach over the border to the next device's slots.
    size = min(tokens, slots)
    first = jnp.clip(start, 0, slots - size)
    place = first - start + jnp.arange(size)
    written = ((place >= 0) & (place < tokens))[:, None]
    results = []
    for old, part in zip(held, new, strict=True):
        before = lax.dynamic_slice_in_dim(old, first, size, axis=2)
        after = jnp.take(part, place, axis=2, mode="clip").astype(old.dtype)
        results.append(lax.dynamic_update_slice_in_dim(old, jnp.where(written, after, before), first, axis=2))
    return tuple(results)


def resize(bank: Bank, slots: int, cursor: int) -> Bank:
    """The bank in a ring of another size, oldest slot first: a smaller one keeps the newest tokens.

    `cursor` is that of the bank as a number: to turn a ring that is split over devices by a fixed way, each sends part
    of its slots to another; by a way known only when the program runs, all would be gathered on each.
    """
    held = bank.keys_BHMD.shape[2]
    turned = [jnp.roll(part, -cursor, axis=2) for part in (bank.keys_BHMD, bank.values_BHMD)]
    if slots > held:
        keys, values = (jnp.pad(part, ((0, 0), (0, 0), (0, slots - held), (0, 0))) for part in turned)
    else:
        keys, values = (part[:, :, held - slots :] for part in turned)
    return Bank(keys, values, jnp.asarray(min(held, slots) % slots, jnp.int32), jnp.minimum(bank.length_B, slots))


def ages(bank: Bank) -> Int[jax.Array, "M"]:
    """How many tokens were written after each slot: 0 for the latest."""
    slots = bank.keys_BHMD.shape[2]
    return (bank.cursor - 1 - jnp.arange(slots)) % slots


def valid(bank: Bank) -> Bool[jax.Array, "B M"]:
    """Which slots hold a token of the row's present document."""
    return ages(bank)[None, :] < bank.length_B[:, None]
