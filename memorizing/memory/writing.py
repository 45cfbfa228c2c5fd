"""Writes a segment that was read into the memory: chooses the tokens and their slots.

    candidates   all real tokens of the segment; with `Memory.writes = 'beyond_cache'`, those of the segment before,
                 which leave the XL cache now
    admitted     every n-th candidate (`write_every`), unless a stored token is like it (`duplicate_score`)
    written      admitted tokens for which the eviction rule has a slot
    expired      tokens outside the sink that will be older than `maximum_age` when the next segment reads

A ring buffer takes each segment as one run of slots (`bank.append`); other memories use a slot table.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float, Int

from memorizing.memory.bank import Bank, append, place
from memorizing.memory.duplicates import novel
from memorizing.memory.eviction import EvictionRule, assign_slots
from memorizing.memory.search import Search
from memorizing.memory.settings import MemorySettings
from memorizing.memory.slot_table import NOTHING, SlotTable
from memorizing.parallel.mesh import constrain


class Tokens(NamedTuple):
    """Keys and values of a segment of `N` tokens in one layer."""

    keys_BHND: Float[jax.Array, "B H N D"]
    values_BHND: Float[jax.Array, "B H N D"]


def write_segment(
    bank: Bank, segment: Tokens, memory: MemorySettings, search: Search, cached: Tokens | None = None
) -> Bank:
    """Returns the bank after a segment is read and written.

    Args:
        search: gets the new keys, because it may keep an index.
        cached: tokens of the segment before, which the XL cache held; needed for `Memory.writes = 'beyond_cache'`.

    Raises:
        ValueError: if a segment's tokens and the sink do not fit into the memory, or `cached` is missing.
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
    is_late = memory.writes == "beyond_cache"
    (keys_BHND, values_BHND), first_B, count_B = segment, slot_table.read_B, coming_B
    if is_late:
        if cached is None:
            raise ValueError("Memory.writes = 'beyond_cache' writes the segment before: pass it as `cached`")
        # Writing waits until this segment has been read, or the compiler would copy the bank.
        _, (keys_BHND, values_BHND) = lax.optimization_barrier((segment, cached))
        first_B, count_B = slot_table.read_B - slot_table.cached_B, slot_table.cached_B
    positions_BN = first_B[:, None] + jnp.arange(tokens)
    admitted_BN = (jnp.arange(tokens) < count_B[:, None]) & (positions_BN % every == 0)
    if memory.duplicate_score is not None:
        admitted_BN = novel(keys_BHND, admitted_BN, bank.keys, slot_table.held_BM, memory.duplicate_score)
    rule = memory.eviction_rule
    slots_BN = assign_slots(rule, slot_table, admitted_BN, memory.sink)
    slot_table = _with_tokens(slot_table, slots_BN, positions_BN, rule)._replace(
        read_B=slot_table.read_B + coming_B,
        admitted_B=slot_table.admitted_B + admitted_BN.sum(1, dtype=jnp.int32),
        cached_B=coming_B if is_late else slot_table.cached_B,
    )
    if memory.maximum_age is not None:
        slot_table = _without_old(slot_table, memory.maximum_age, memory.sink)
    return place(bank, keys_BHND, values_BHND, slots_BN, slot_table, search)


def _whole(slot_table: SlotTable) -> SlotTable:
    """Returns the table with all slots of a row on each of its devices, to be sorted; a few bytes per slot."""
    usage_BM = slot_table.usage_BM
    return slot_table._replace(
        positions_BM=constrain(slot_table.positions_BM, "B_"),
        usage_BM=None if usage_BM is None else constrain(usage_BM, "B_"),
    )


def _with_tokens(
    slot_table: SlotTable, slots_BN: Int[jax.Array, "B N"], positions_BN: Int[jax.Array, "B N"], rule: EvictionRule
) -> SlotTable:
    """Returns the table with a segment's tokens in their slots."""

    def put(old_BM: jax.Array, new_BN: jax.Array) -> jax.Array:
        return jax.vmap(lambda old_M, new_N, slots_N: old_M.at[slots_N].set(new_N, mode="drop"))(
            old_BM, new_BN, slots_BN
        )

    written = slot_table._replace(positions_BM=put(slot_table.positions_BM, positions_BN))
    if slot_table.usage_BM is None:
        return written
    usage_BN = jnp.broadcast_to(rule.new_usage(slot_table)[:, None], slots_BN.shape)
    return written._replace(usage_BM=put(slot_table.usage_BM, usage_BN))


def _without_old(slot_table: SlotTable, maximum_age: int, sink: int) -> SlotTable:
    """Returns the table without the tokens outside the sink that are older than `maximum_age`, in tokens."""
    slot_M = jnp.arange(slot_table.positions_BM.shape[1])
    is_old_BM: Bool[jax.Array, "B M"] = slot_table.read_B[:, None] - slot_table.positions_BM > maximum_age
    expired_BM = slot_table.held_BM & is_old_BM & (slot_M >= sink)
    return slot_table._replace(positions_BM=jnp.where(expired_BM, NOTHING, slot_table.positions_BM))
