"""What lies in the slots of a bank, and how new tokens get there: as a run of slots, or each at an address of its own.

Slots may be split over devices along the mesh axis `memory`. Every device is given all of the new tokens, and writes
those that come to its own slots: nothing of the bank travels. Who decides where tokens go: `bank.py` (the ring) and
`eviction.py` (addresses).
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
    """What lies in the slots, `[B, H, M, ...]`; or what is to be written there, `[B, H, N, ...]`."""

    keys_BHMD: jax.Array
    values_BHMD: jax.Array
    scales_BHM: jax.Array | None
    entries: dict[str, jax.Array]


def write_run(held: Stored, new: Stored, cursor: Int[jax.Array, ""]) -> Stored:
    """Writes `new` into the slots from `cursor` on, the same ones in all rows; it may not reach beyond the last."""
    return _on_each_device(_write_run, held, new, cursor, "")


def write_at(held: Stored, new: Stored, slots_BN: Int[jax.Array, "B N"]) -> Stored:
    """Writes each token of `new` into a slot of its own; those whose slot is `M` or beyond are not written.

    No two tokens of a row may have the same slot.
    """
    return _on_each_device(_write_at, held, new, slots_BN, "B")


def _on_each_device(write: Callable[..., Stored], held: Stored, new: Stored, where: jax.Array, letters: str) -> Stored:
    """Lets each device write into its own slots; `letters` say how `where` is spread over devices."""
    if (mesh := current_mesh()) is not None:
        write = jax.shard_map(
            functools.partial(write, axis="memory"),
            mesh=mesh,
            in_specs=(specs(held), jax.tree.map(lambda _: spec("BH"), new), spec(letters)),
            out_specs=specs(held),
        )
    return write(held, new, where)


def _write_run(held: Stored, new: Stored, cursor: jax.Array, axis: str | None = None) -> Stored:
    """With an `axis`, what lies on this device.

    Layouts, barriers and slices are such that TPUs do not copy the bank to the layout that a segment happens to have.
    """
    if axis is None or lax.axis_size(axis) == 1:

        def put(old: jax.Array, part: jax.Array) -> jax.Array:
            part = with_layout_constraint(part.astype(old.dtype), Layout(tuple(range(old.ndim))))
            return lax.dynamic_update_slice_in_dim(old, part, cursor, axis=2)

        return jax.tree.map(put, held, new)
    slots, tokens = held.keys_BHMD.shape[2], new.keys_BHMD.shape[2]
    start = cursor - lax.axis_index(axis) * slots  # in this device's slots; can lie before or behind them
    # A window over all that could be written here: a segment may reach over the border to the next device's slots.
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
    """With an `axis`, what lies on this device."""
    slots = held.keys_BHMD.shape[2]
    own_BN = slots_BN - (0 if axis is None else lax.axis_index(axis) * slots)
    own_BN = jnp.where((own_BN >= 0) & (own_BN < slots), own_BN, slots)  # a negative index would count from the end

    def put(old: jax.Array, part: jax.Array) -> jax.Array:
        of_row = lambda old, part, own_N: old.at[:, own_N].set(part.astype(old.dtype), mode="drop")  # noqa: E731
        return jax.vmap(of_row)(old, part, own_BN)

    return jax.tree.map(put, held, new)
