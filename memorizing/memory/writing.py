"""What becomes of a segment that was read: which of its tokens the memory is to keep, and where.

    read      all tokens of the segment, or with `writes = 'beyond_cache'` those of the one before, which now fall out
              of the XL cache; none of padding
    offered   every n-th of these (`write_every`), unless it is like one that is kept (`duplicate_score`)
    written   those for which the rule of eviction has a slot
    given up  what is older than `maximum_age` when the next segment reads, but for the sink

A ring takes its share of every segment as one run of slots (`bank.append`); all else goes by addresses.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float, Int

from memorizing.memory.bank import Bank, append, place
from memorizing.memory.duplicates import novel
from memorizing.memory.eviction import fair_start, taken_slots
from memorizing.memory.search import Search
from memorizing.memory.settings import MemorySettings
from memorizing.memory.slot_table import NOTHING, SlotTable
from memorizing.parallel.mesh import constrain


class Tokens(NamedTuple):
    """Keys and values of tokens that a layer has read, a segment of them."""

    keys_BHND: Float[jax.Array, "B H N D"]
    values_BHND: Float[jax.Array, "B H N D"]


def write(bank: Bank, segment: Tokens, cached: Tokens, memory: MemorySettings, search: Search) -> Bank:
    """The bank once a segment is read. `cached` is what the XL cache held meanwhile, the segment before.

    `search` is told of the keys: it may keep an index of them.
    """
    if memory.writes == "never":
        return bank
    every = memory.write_every
    if bank.slot_table is None:
        keys_BHND, values_BHND = (part[:, :, ::every] for part in segment)
        most = None if memory.maximum_age is None else memory.maximum_age // every
        return append(bank, keys_BHND, values_BHND, search, most)
    slot_table, tokens = _whole(bank.slot_table), segment.keys_BHND.shape[2]
    if memory.size < memory.sink + -(-tokens // every):
        raise ValueError(
            f"the {-(-tokens // every)} tokens of a segment that are written and Memory.sink = {memory.sink} do not "
            f"fit into Memory.size = {memory.size}"
        )
    coming_B = jnp.minimum(slot_table.coming_B, tokens)
    falls = memory.writes == "beyond_cache"
    if falls:  # written only when the segment is read, like what is written of it: else the bank would be copied
        segment, cached = lax.optimization_barrier((segment, cached))
    (keys_BHND, values_BHND), first_B, count_B = (
        (cached, slot_table.read_B - slot_table.cached_B, slot_table.cached_B)
        if falls
        else (segment, slot_table.read_B, coming_B)
    )
    positions_BN = first_B[:, None] + jnp.arange(tokens)
    offered_BN = (jnp.arange(tokens) < count_B[:, None]) & (positions_BN % every == 0)
    if memory.duplicate_score is not None:
        offered_BN = novel(keys_BHND, offered_BN, bank.keys, slot_table.held_BM, memory.duplicate_score)
    slots_BN = taken_slots(slot_table, offered_BN, memory)
    slot_table = _noted(slot_table, slots_BN, positions_BN)._replace(
        read_B=slot_table.read_B + coming_B,
        admitted_B=slot_table.admitted_B + offered_BN.sum(1, dtype=jnp.int32),
        cached_B=coming_B if falls else slot_table.cached_B,
    )
    if memory.maximum_age is not None:
        slot_table = _without_old(slot_table, memory.maximum_age, memory.sink)
    return place(bank, keys_BHND, values_BHND, slots_BN, slot_table, search)


def _whole(slot_table: SlotTable) -> SlotTable:
    """On every device all slots of its rows: a few bytes each, to be sorted."""
    used_BM = slot_table.used_BM
    return slot_table._replace(
        positions_BM=constrain(slot_table.positions_BM, "B_"),
        used_BM=None if used_BM is None else constrain(used_BM, "B_"),
    )


def _noted(slot_table: SlotTable, slots_BN: Int[jax.Array, "B N"], positions_BN: Int[jax.Array, "B N"]) -> SlotTable:
    """Tokens in the slots that they take."""

    def put(old_BM: jax.Array, new_BN: jax.Array) -> jax.Array:
        return jax.vmap(lambda old_M, new_N, slots_N: old_M.at[slots_N].set(new_N, mode="drop"))(
            old_BM, new_BN, slots_BN
        )

    noted = slot_table._replace(positions_BM=put(slot_table.positions_BM, positions_BN))
    if slot_table.used_BM is None:
        return noted
    start_BN = jnp.broadcast_to(fair_start(slot_table)[:, None], slots_BN.shape)
    return noted._replace(used_BM=put(slot_table.used_BM, start_BN))


def _without_old(slot_table: SlotTable, maximum_age: int, sink: int) -> SlotTable:
    slot_M = jnp.arange(slot_table.positions_BM.shape[1])
    is_old_BM: Bool[jax.Array, "B M"] = slot_table.read_B[:, None] - slot_table.positions_BM > maximum_age
    gone_BM = slot_table.held_BM & is_old_BM & (slot_M >= sink)
    return slot_table._replace(positions_BM=jnp.where(gone_BM, NOTHING, slot_table.positions_BM))
