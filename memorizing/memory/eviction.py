"""Which slot a new token takes, and so which token has to go: pure functions of a bank's addresses.

    fifo          a free slot, else that of the oldest token
    none          a free slot, else none at all
    least_used    a free slot, else that of the token with the least attention so far, of equal ones the oldest
    reservoir     token t of the document: slot t while there are such; later slot j drawn from 0 .. t, or none if that
                  is no slot. So all tokens so far are kept with the same probability (Vitter's algorithm R, 1985)

The first `sink` slots hold the first tokens of the document, which stay: the rules above are for the others. All tokens
of a segment are placed at once. In `least_used` they take the places of those that have the least attention before the
segment; in `reservoir`, in order, so that of several that draw the same slot the last one has it.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float, Int

from memorizing.memory.settings import MemorySettings
from memorizing.memory.slot_table import SlotTable


def taken_slots(
    slot_table: SlotTable, admitted_BN: Bool[jax.Array, "B N"], memory: MemorySettings
) -> Int[jax.Array, "B N"]:
    """The slot of each token of a segment, all different; `M` where a token is not `admitted`, or gets none."""
    slots = slot_table.positions_BM.shape[1]
    number_BN = jnp.cumsum(admitted_BN, axis=1, dtype=jnp.int32) - 1  # of a token among those admitted
    if memory.eviction == "reservoir":
        slots_BN = _drawn(slot_table, number_BN, memory.sink)
    else:
        order_BM, most_B = _leaving(slot_table, memory)
        slots_BN = jnp.take_along_axis(order_BM, jnp.clip(number_BN, 0, slots - 1), axis=1)
        slots_BN = jnp.where(number_BN < most_B[:, None], slots_BN, slots)
    return _last_wins(jnp.where(admitted_BN, slots_BN, slots), slots)


def fair_start(slot_table: SlotTable) -> Float[jax.Array, "B"]:
    """What a new token counts as used: the mean of those held, since nothing could read it yet.

    So a token stays as long as it is read more than the average of those that came with it and after it. Of tokens that
    nothing ever reads the oldest goes first.
    """
    assert slot_table.used_BM is not None
    held_BM = slot_table.held_BM
    return jnp.where(held_BM, slot_table.used_BM, 0).sum(1) / jnp.maximum(held_BM.sum(1), 1)


def _leaving(slot_table: SlotTable, memory: MemorySettings) -> tuple[Int[jax.Array, "B M"], Int[jax.Array, "B"]]:
    """Slots in the order in which they are to be taken, free ones first, and how many may be."""
    held_BM, positions_BM = slot_table.held_BM, slot_table.positions_BM
    slot_BM = lax.broadcasted_iota(jnp.int32, positions_BM.shape, 1)
    used_BM = jnp.zeros(positions_BM.shape) if slot_table.used_BM is None else slot_table.used_BM
    stays_BM = held_BM & ((slot_BM < memory.sink) | (memory.eviction == "none"))
    rank_BM = jnp.where(stays_BM, jnp.inf, jnp.where(held_BM, used_BM, -1.0))
    _, _, order_BM = lax.sort((rank_BM, positions_BM, slot_BM), num_keys=3)
    return order_BM, (~stays_BM).sum(1, dtype=jnp.int32)


def _drawn(slot_table: SlotTable, number_BN: Int[jax.Array, "B N"], sink: int) -> Int[jax.Array, "B N"]:
    """Slots by algorithm R. What is drawn follows from the row, its document's number and that of the token alone."""
    rows, slots = slot_table.positions_BM.shape
    count_BN = slot_table.admitted_B[:, None] + jnp.maximum(number_BN, 0)

    def draw(row: jax.Array, document: jax.Array, count_N: jax.Array) -> jax.Array:
        of_document = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), row), document)
        rng_N = jax.vmap(jax.random.fold_in, (None, 0))(of_document, count_N)
        return jax.vmap(lambda rng, stop: jax.random.randint(rng, (), 0, stop))(
            rng_N, jnp.maximum(count_N - sink, 0) + 1
        )

    drawn_BN = jax.vmap(draw)(jnp.arange(rows), slot_table.documents_B, count_BN)
    replaced_BN = jnp.where(drawn_BN < slots - sink, sink + drawn_BN, slots)
    return jnp.where(count_BN < slots, count_BN, replaced_BN)


def _last_wins(slots_BN: Int[jax.Array, "B N"], none: int) -> Int[jax.Array, "B N"]:
    """Of tokens with the same slot only the last keeps it."""
    tokens = slots_BN.shape[1]
    is_later_NN = jnp.arange(tokens)[:, None] < jnp.arange(tokens)
    is_lost_BN = ((slots_BN[:, :, None] == slots_BN[:, None, :]) & is_later_NN).any(2)
    return jnp.where(is_lost_BN, none, slots_BN)
