"""Writes new tokens into the slots of a bank: as one run of slots, or each token into its own slot.

Slots may be split over devices along the mesh axis `memory`. Every device gets all new tokens and writes those that
belong to its slots, so the bank itself never travels. `bank.py` (ring buffer) and `eviction/` choose the slots.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Int

from memorizing.parallel.mesh import current_mesh, spec, specs


class Stored(NamedTuple):
    """Data in the slots, `[B, H, M, ...]`, or data to write there, `[B, H, N, ...]`."""

    keys_BHMD: jax.Array
    values_BHMD: jax.Array
    scales_BHM: jax.Array | None
    entries: dict[str, jax.Array]


def write_run(held: Stored, new: Stored, cursor: Int[jax.Array, ""]) -> Stored:
    """Returns `held` with `new` written to the slots from `cursor` on, in all rows. `new` must fit before the end."""
    return _on_each_device(_write_run, held, new, cursor, "")


def write_at(held: Stored, new: Stored, slots_BN: Int[jax.Array, "B N"]) -> Stored:
    """Returns `held` with each token of `new` in its own slot. Tokens with slot `M` or above are not written.

    No two tokens of a row may have the same slot.
    """
    return _on_each_device(_write_at, held, new, slots_BN, "B")


def _on_each_device(write: Callable[..., Stored], held: Stored, new: Stored, where: jax.Array, letters: str) -> Stored:
    """Runs `write` on each device for its local slots; `letters` say how `where` is sharded."""
    if (mesh := current_mesh()) is not None:
        write = jax.shard_map(
            functools.partial(write, axis="memory"),
            mesh=mesh,
            in_specs=(specs(held), jax.tree.map(lambda _: spec("BH"), new), spec(letters)),
            out_specs=specs(held),
        )
    return write(held, new, where)


def _write_run(held: Stored, new: Stored, cursor: jax.Array, axis: str | None = None) -> Stored:
    """Writes a run of slots; with an `axis`, only those of this device.

    Layouts, barriers and slices keep TPUs from copying the bank to the layout of the segment.
    """
    if axis is None or lax.axis_size(axis) == 1:

        def put(old: jax.Array, part: jax.Array) -> jax.Array:
            part = with_layout_constraint(part.astype(old.dtype), Layout(tuple(range(old.ndim))))
            return lax.dynamic_update_slice_in_dim(old, part, cursor, axis=2)

        return jax.tree.map(put, held, new)
    slots, tokens = held.keys_BHMD.shape[2], new.keys_BHMD.shape[2]
    start = cursor - lax.axis_index(axis) * slots  # relative to this device's slots; may lie outside them
    # The window covers all slots that may be written here: a segment may cross the border between two devices.
    size = min(tokens, slots)
    first = jnp.clip(start, 0, slots - size)
    place = first - start + jnp.arange(size)
    written = (place >= 0) & (place < tokens)

    def write(old: jax.Array, part: jax.Array) -> jax.Array:
        before = lax.optimization_barrier(lax.dynamic_slice_in_dim(old, first, size, axis=2))
        padded = jnp.pad(part, [(size, size) if axis == 2 else (0, 0) for axis in range(part.ndim)])
        after = lax.dynamic_slice_in_dim(padded, first - start + size, size, axis=2).astype(old.dtype)
        mask = written.reshape(-1, *(1,) * (old.ndim - 3))
        return lax.dynamic_update_slice_in_dim(old, jnp.where(mask, after, before), first, axis=2)

    return jax.tree.map(write, held, new)


def _write_at(held: Stored, new: Stored, slots_BN: jax.Array, axis: str | None = None) -> Stored:
    """Writes each token into its slot; with an `axis`, only slots of this device."""
    slots = held.keys_BHMD.shape[2]
    local_BN = slots_BN - (0 if axis is None else lax.axis_index(axis) * slots)
    local_BN = jnp.where(
        (local_BN >= 0) & (local_BN < slots), local_BN, slots
    )  # because a negative index counts from the end

    def put(old: jax.Array, part: jax.Array) -> jax.Array:
        of_row = lambda old, part, local_N: old.at[:, local_N].set(part.astype(old.dtype), mode="drop")  # noqa: E731
        return jax.vmap(of_row)(old, part, local_BN)

    return jax.tree.map(put, held, new)
