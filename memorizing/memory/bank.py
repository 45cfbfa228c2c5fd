"""The external memory of one layer: a ring buffer of keys and values, one per row and head.

All rows share one write cursor; `length_B` counts the latest slots that belong to each row's current document.
Clearing a row is therefore one integer write, and writing is one contiguous update for all rows. Slot `m` is valid for
row `b` when its age, `(cursor - 1 - m) mod M`, is below `length_B[b]`:

    M = 8, cursor = 3, length = 5        slot   0 1 2 3 4 5 6 7
                                         age    2 1 0 7 6 5 4 3
                                         valid  x x x . . . x x

Memories that a ring buffer cannot hold have a slot table for each row instead (`slot_table.py`). `writing.py` chooses
the tokens to write; `search/` finds neighbors.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float, Int

from memorizing.memory.eviction import EvictionRule
from memorizing.memory.quantize import DTYPES, quantize
from memorizing.memory.search import NO_INDEX, Index, Keys, Search
from memorizing.memory.search_choice import make_search
from memorizing.memory.settings import MemorySettings
from memorizing.memory.slot_table import SlotTable, cleared, emptied_slot_table, new_slot_table, refilled
from memorizing.memory.slots import Stored, write_at, write_run
from memorizing.shapes import Array


class Recall(NamedTuple):
    """Counts that measure the search's recall for sampled queries, since the bank was created.

    The counts overflow after two billion neighbors (millions of segments); differences stay correct.

    Attributes:
        found_BH: true neighbors that the search found.
        wanted_BH: true neighbors, found by an exact search.
        retrieved_BH: slots that the search retrieved, true neighbors or not.
        age_BH: sum of the ages of the retrieved slots, in segments; 1 for the segment before.
        tokens_B: number of real tokens in the next segment; queries of padding do not count.
    """

    found_BH: Int[jax.Array, "B H"]
    wanted_BH: Int[jax.Array, "B H"]
    retrieved_BH: Int[jax.Array, "B H"]
    age_BH: Int[jax.Array, "B H"]
    tokens_B: Int[jax.Array, "B"]


class Bank(NamedTuple):
    """Keys and values of earlier tokens. They stay as they were computed, so they go stale; no gradient reaches them.

    Attributes:
        keys_BHMD: keys, or keys divided by their scale if stored in 8 bits.
        values_BHMD: values.
        cursor: next slot that a ring buffer writes.
        length_B: number of slots that may be read; in a ring buffer the latest ones.
        scales_BHM: scales of 8-bit keys; None for other keys.
        index: data that the search stores next to the keys.
        recall: recall counts, if `Memory.report_recall`; else None.
        slot_table: position of each slot's token, if `MemorySettings.uses_slot_table`; else None.
        visible_B: number of newest tokens that the next segment may read; None for all.
    """

    keys_BHMD: Float[jax.Array, "B H M D"] | Int[jax.Array, "B H M D"]
    values_BHMD: Float[jax.Array, "B H M D"]
    cursor: Int[jax.Array, ""]
    length_B: Int[jax.Array, "B"]
    scales_BHM: Float[jax.Array, "B H M"] | None = None
    index: Index = NO_INDEX
    recall: Recall | None = None
    slot_table: SlotTable | None = None
    visible_B: Int[jax.Array, "B"] | None = None

    @property
    def keys(self) -> Keys:
        """The keys and the index, as a search takes them."""
        return Keys(self.keys_BHMD, self.scales_BHM, self.index)


def empty_bank(rows: int, heads: int, head_size: int, settings: MemorySettings) -> Bank:
    """Returns a bank without any token."""
    shape = (rows, heads, settings.size, head_size)
    key_dtype = settings.key_dtype or settings.dtype
    return Bank(
        jnp.zeros(shape, DTYPES.get(key_dtype, key_dtype)),
        jnp.zeros(shape, settings.dtype),
        jnp.zeros((), jnp.int32),
        jnp.zeros(rows, jnp.int32),
        jnp.zeros(shape[:3], jnp.float32) if key_dtype in DTYPES else None,
        make_search(settings).empty_index(*shape),
        no_recall(rows, heads) if settings.report_recall else None,
        new_slot_table(rows, settings.size, settings.eviction_rule.usage_dtype) if settings.uses_slot_table else None,
    )


def emptied(like: Bank) -> Bank:
    """Returns a bank with the shapes of `like` and without any token."""
    bank = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)
    if bank.recall is not None:
        bank = bank._replace(recall=no_recall(*bank.keys_BHMD.shape[:2]))
    if bank.slot_table is not None:
        bank = bank._replace(slot_table=emptied_slot_table(bank.slot_table))
    return bank


def no_recall(rows: int, heads: int) -> Recall:
    """Returns counts of zero. Until a mask is known, every query is included."""
    nothing = lambda: jnp.zeros((rows, heads), jnp.int32)  # noqa: E731  (separate arrays, because each may be donated)
    return Recall(nothing(), nothing(), nothing(), nothing(), jnp.full(rows, jnp.iinfo(jnp.int32).max, jnp.int32))


def masked(bank: Bank, mask_BN: Bool[Array, "B N"]) -> Bank:
    """Returns the bank for a segment whose real tokens are those where the mask is True; padding follows them."""
    if bank.recall is None and bank.slot_table is None:
        return bank
    tokens_B = mask_BN.sum(1, dtype=jnp.int32)
    recall, slot_table = bank.recall, bank.slot_table
    return bank._replace(
        recall=None if recall is None else recall._replace(tokens_B=tokens_B),
        slot_table=None if slot_table is None else slot_table._replace(coming_B=tokens_B),
    )


def clear(bank: Bank, rows_B: Bool[Array, "B"]) -> Bank:
    """Returns the bank with the rows where `rows_B` is True emptied."""
    return bank._replace(
        length_B=jnp.where(rows_B, 0, bank.length_B),
        slot_table=None if bank.slot_table is None else cleared(bank.slot_table, rows_B),
    )


class ReadStats(NamedTuple):
    """Statistics of one read of a bank; None for what the bank does not track.

    Attributes:
        recall: counts of neighbors.
        units_BM: units that each slot received under the eviction rule (`EvictionRule.retrieval_units`), summed over
            heads and queries.
    """

    recall: Recall | None
    units_BM: Int[jax.Array, "B M"] | None


def add(bank: Bank, read_stats: ReadStats, rule: EvictionRule) -> Bank:
    """Returns the bank with the statistics of a read added, by each layer that reads it, before the next write."""
    recall, slot_table = bank.recall, bank.slot_table
    if recall is not None and read_stats.recall is not None:
        recall = jax.tree.map(jnp.add, recall, read_stats.recall)
    if slot_table is not None and slot_table.usage_BM is not None and read_stats.units_BM is not None:
        slot_table = slot_table._replace(usage_BM=rule.usage_after_read(slot_table, read_stats.units_BM))
    return bank._replace(recall=recall, slot_table=slot_table)


def refill(bank: Bank, rows_B: Bool[Array, "B"], prebuilt: Bank, search: Search, tokens: int) -> Bank:
    """Returns the bank with a copy of `prebuilt`, a bank of one row, in the rows where `rows_B` is True.

    The copy is rotated so that its newest token is the latest written, and the index of `search` is built again from
    segments of `tokens`. Both pass over all slots, and only run if there is such a row.
    """

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        new = jnp.roll(new, bank.cursor - prebuilt.cursor, axis=2)
        return jnp.where(rows_B.reshape(-1, *(1,) * (old.ndim - 1)), new, old)

    def put_all() -> Bank:
        filled = _with(bank, jax.tree.map(put, _stored(bank), _stored(prebuilt)))
        slot_table = bank.slot_table
        if slot_table is not None and prebuilt.slot_table is not None:
            slot_table = refilled(slot_table, rows_B, prebuilt.slot_table)
        length_B = jnp.where(rows_B, prebuilt.length_B, bank.length_B)
        filled = filled._replace(length_B=length_B, slot_table=slot_table)
        return reindexed(filled, search, tokens) if bank.index.slots else filled

    return lax.cond(rows_B.any(), put_all, lambda: bank)


def append(
    bank: Bank,
    keys_BHND: Float[jax.Array, "B H N D"],
    values_BHND: Float[jax.Array, "B H N D"],
    search: Search,
    most: int | None = None,
) -> Bank:
    """Returns the bank with a segment written over the oldest slots of the ring buffer.

    Args:
        search: gets the new keys, because it may keep an index.
        most: largest number of tokens that may be read afterwards; None for all slots.

    Raises:
        ValueError: if `N` does not divide `M`, so that a write would wrap around.
    """
    slots, tokens = bank.keys_BHMD.shape[2], keys_BHND.shape[2]
    if slots % tokens:
        raise ValueError(f"a segment of {tokens} tokens must divide the {slots} slots of the memory")
    new, learned = _to_store(bank, keys_BHND, values_BHND, search)
    held = write_run(_stored(bank, bank.index.slots), new, bank.cursor)
    return _with(bank, held, learned)._replace(
        cursor=(bank.cursor + tokens) % slots,
        length_B=jnp.minimum(bank.length_B + tokens, slots if most is None else min(most, slots)),
    )


def place(
    bank: Bank,
    keys_BHND: Float[jax.Array, "B H N D"],
    values_BHND: Float[jax.Array, "B H N D"],
    slots_BN: Int[jax.Array, "B N"],
    slot_table: SlotTable,
    search: Search,
) -> Bank:
    """Returns the bank with each token of a segment in its slot (see `write_at`), and with the new `slot_table`."""
    new, learned = _to_store(bank, keys_BHND, values_BHND, search)
    held = write_at(_stored(bank, bank.index.slots), new, slots_BN)
    length_B = slot_table.held_BM.sum(1, dtype=jnp.int32)
    return _with(bank, held, learned)._replace(length_B=length_B, slot_table=slot_table)


def _to_store(bank: Bank, keys_BHND, values_BHND, search: Search) -> tuple[Stored, dict[str, jax.Array]]:
    """Returns the data to store for new tokens, and the learned part of the index after them."""
    keys_BHND, values_BHND = lax.stop_gradient((keys_BHND, values_BHND))
    entries, learned = search.entries(keys_BHND, bank.index.learned)
    new = Stored(keys_BHND, values_BHND, None, entries)
    if bank.scales_BHM is not None:
        vectors, scales = quantize(keys_BHND, bank.keys_BHMD.dtype)
        new = new._replace(keys_BHMD=vectors, scales_BHM=scales)
    return new, learned


def _stored(bank: Bank, entries: dict[str, jax.Array] | None = None) -> Stored:
    return Stored(bank.keys_BHMD, bank.values_BHMD, bank.scales_BHM, entries or {})


def _with(bank: Bank, held: Stored, learned: dict[str, jax.Array] | None = None) -> Bank:
    """Returns the bank with this data in its slots, and with its index if `learned` is given."""
    return bank._replace(
        keys_BHMD=held.keys_BHMD,
        values_BHMD=held.values_BHMD,
        scales_BHM=held.scales_BHM,
        index=bank.index if learned is None else Index(held.entries, learned),
    )


def reindexed(bank: Bank, search: Search, tokens: int) -> Bank:
    """Returns the bank with the index of `search`, built by writing its segments of `tokens` again.

    The index learns nothing from slots that hold no token of a row's document.
    """
    rows, heads, slots, size = bank.keys_BHMD.shape

    def write(index: Index, number: jax.Array) -> tuple[Index, None]:
        start = (bank.cursor + number * tokens) % slots  # oldest first
        part = lambda array, axis: lax.dynamic_slice_in_dim(array, start, tokens, axis)  # noqa: E731
        held = jax.tree.map(lambda array: part(array, 2), Keys(bank.keys_BHMD, bank.scales_BHM))
        keys_BHND = held.plain().astype(jnp.float32)
        entries, learned = search.entries(keys_BHND, index.learned)
        holds_B = part(valid(bank), 1).any(1)

        def learn(new: jax.Array, old: jax.Array) -> jax.Array:
            holds = holds_B.reshape(-1, *(1,) * (new.ndim - 1)) if new.ndim else holds_B.any()
            return jnp.where(holds, new, old)

        stored = jax.tree.map(
            lambda old, new: lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), start, 2), index.slots, entries
        )
        return Index(stored, jax.tree.map(learn, learned, index.learned)), None

    empty = search.empty_index(rows, heads, slots, size)
    return bank._replace(index=lax.scan(write, empty, jnp.arange(slots // tokens))[0])


def resize(bank: Bank, slots: int, cursor: int) -> Bank:
    """Returns the bank as a ring buffer of another size, oldest slot first. A smaller one keeps the newest tokens.

    `cursor` is the bank's cursor as a Python number. With a constant rotation each device sends part of its slots to
    another device; with one known only at run time, every device would gather all slots.
    """
    held = bank.keys_BHMD.shape[2]

    def turn(part: jax.Array) -> jax.Array:
        part = jnp.roll(part, -cursor, axis=2)
        if slots > held:
            return jnp.pad(part, ((0, 0), (0, 0), (0, slots - held), *((0, 0),) * (part.ndim - 3)))
        return part[:, :, held - slots :]

    turned = _with(bank, jax.tree.map(turn, _stored(bank, bank.index.slots)), bank.index.learned)
    return turned._replace(
        cursor=jnp.asarray(min(held, slots) % slots, jnp.int32), length_B=jnp.minimum(bank.length_B, slots)
    )


def size(banks: Sequence[Bank]) -> int:
    """Returns the number of slots of a model's banks; 0 without banks."""
    return banks[0].keys_BHMD.shape[2] if banks else 0


def as_ring(bank: Bank) -> Bank:
    """Returns a bank with a slot table as a ring buffer, its tokens in order of position; without an index."""
    if bank.slot_table is None:
        return bank
    order_BM = jnp.argsort(bank.slot_table.positions_BM, axis=1)  # empty slots first

    def ordered(part: jax.Array) -> jax.Array:
        return jnp.take_along_axis(part, order_BM.reshape(order_BM.shape[0], 1, -1, *(1,) * (part.ndim - 3)), axis=2)

    return _with(bank, jax.tree.map(ordered, _stored(bank)))._replace(
        cursor=jnp.zeros_like(bank.cursor), index=NO_INDEX, slot_table=None
    )


def ages(bank: Bank) -> Int[jax.Array, "M"]:
    """Returns the age of each slot of a ring buffer, in slots: 0 for the latest."""
    slots = bank.keys_BHMD.shape[2]
    return (bank.cursor - 1 - jnp.arange(slots)) % slots


def readable(bank: Bank) -> Int[jax.Array, "B"]:
    """Returns the number of newest tokens that the next segment may read."""
    return bank.length_B if bank.visible_B is None else jnp.minimum(bank.length_B, bank.visible_B)


def valid(bank: Bank) -> Bool[jax.Array, "B M"]:
    """Returns True for slots that the next segment may read: visible tokens of the row's current document."""
    if bank.slot_table is None:
        return ages(bank)[None, :] < readable(bank)[:, None]
    held_BM = bank.slot_table.held_BM
    if bank.visible_B is None:
        return held_BM
    newer_BM = jnp.argsort(jnp.argsort(-bank.slot_table.positions_BM))  # number of newer tokens
    return held_BM & (newer_BM < bank.visible_B[:, None])


def tokens_ago(bank: Bank, write_every: int) -> Int[jax.Array, "B M"]:
    """Returns the age of each slot's token, in tokens: 1 for the token that the row read last.

    Ages of slots that may not be read (see `valid`) are meaningless.
    """
    if bank.slot_table is not None:
        return bank.slot_table.read_B[:, None] - bank.slot_table.positions_BM
    return jnp.broadcast_to(write_every * (ages(bank) + 1), (len(bank.length_B), bank.keys_BHMD.shape[2]))


def recall(before: Bank, after: Bank) -> Float[jax.Array, ""] | None:
    """Returns the recall of the search between two states of a bank; None if the bank does not count it."""
    return _ratio(before, after, "found_BH", "wanted_BH")


def mean_age(before: Bank, after: Bank) -> Float[jax.Array, ""] | None:
    """Returns the mean age of the slots retrieved between two states of a bank, in segments; None as in `recall`."""
    return _ratio(before, after, "age_BH", "retrieved_BH")


def _ratio(before: Bank, after: Bank, above: str, below: str) -> Float[jax.Array, ""] | None:
    if before.recall is None or after.recall is None:
        return None
    # Take differences first: they stay correct when counts overflow. Then convert to float, which cannot overflow.
    above_BH, below_BH = (getattr(after.recall, name) - getattr(before.recall, name) for name in (above, below))
    over, under = above_BH.sum(dtype=jnp.float32), below_BH.sum(dtype=jnp.float32)
    return jnp.where(under > 0, over / jnp.maximum(under, 1), jnp.nan)
