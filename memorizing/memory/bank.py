"""The external memory of one layer: a ring buffer of keys and values, one per row and head.

A single write cursor serves all rows; `length_B` says how many of the latest slots belong to each row's present
document. So clearing a row is one integer write, and a write is one contiguous update for all rows. Slot `m` is valid
for row `b` when its age, `(cursor - 1 - m) mod M`, is below `length_B[b]`:

    M = 8, cursor = 3, length = 5        slot   0 1 2 3 4 5 6 7
                                         age    2 1 0 7 6 5 4 3
                                         valid  x x x . . . x x

Where the settings want what a ring cannot express, each row has slots of its own instead (`addresses.py`).

What is written of a segment: `writing.py`. How the slots are searched: `memorizing.memory.search`.
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
    """Counts of sampled queries since the bank was made: neighbors that there were, that were found, and their ages.

    They overflow after two thousand million neighbors, which is after millions of segments; differences stay right.

    Attributes:
        found_BH: neighbors that were found.
        wanted_BH: neighbors that there were.
        retrieved_BH: slots that were retrieved, whether they are true neighbors or not.
        age_BH: how many segments ago these were written, added up: 1 for the segment before.
        tokens_B: how many tokens the segment has that reads next: queries behind them are padding, and do not count.
    """

    found_BH: Int[jax.Array, "B H"]
    wanted_BH: Int[jax.Array, "B H"]
    retrieved_BH: Int[jax.Array, "B H"]
    age_BH: Int[jax.Array, "B H"]
    tokens_B: Int[jax.Array, "B"]


class Bank(NamedTuple):
    """Keys and values of earlier tokens, as they were computed then: they go stale, and take no gradient.

    Attributes:
        keys_BHMD: keys; or, in 8 bits, keys divided by their scale.
        values_BHMD: values.
        cursor: the slot that a ring writes next.
        length_B: how many slots can be read; in a ring the latest ones.
        scales_BHM: of keys in 8 bits; else None.
        index: what the search keeps beside the keys.
        recall: what is counted about the search, if `Memory.report_recall`; else None.
        addresses: which token lies in which slot, if `Memory.addressed`; else None.
        visible_B: how many of the latest tokens in memory the next segment may read, at most; None for all.
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
        """What is searched."""
        return Keys(self.keys_BHMD, self.scales_BHM, self.index)


def empty_bank(rows: int, heads: int, head_size: int, settings: MemorySettings) -> Bank:
    """A bank in which no slot is valid."""
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
    """A bank of these shapes in which no slot is valid."""
    bank = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)
    if bank.recall is not None:
        bank = bank._replace(recall=no_recall(*bank.keys_BHMD.shape[:2]))
    if bank.slot_table is not None:
        bank = bank._replace(slot_table=emptied_slot_table(bank.slot_table))
    return bank


def no_recall(rows: int, heads: int) -> Recall:
    """Before anything is counted; until a mask is known, all queries are of tokens."""
    nothing = lambda: jnp.zeros((rows, heads), jnp.int32)  # noqa: E731  (an array each, since each may be donated)
    return Recall(nothing(), nothing(), nothing(), nothing(), jnp.full(rows, jnp.iinfo(jnp.int32).max, jnp.int32))


def masked(bank: Bank, mask_BN: Bool[Array, "B N"]) -> Bank:
    """The bank as it is to be read by a segment that has tokens where the mask is True, and padding behind them."""
    if bank.recall is None and bank.slot_table is None:
        return bank
    tokens_B = mask_BN.sum(1, dtype=jnp.int32)
    recall, slot_table = bank.recall, bank.slot_table
    return bank._replace(
        recall=None if recall is None else recall._replace(tokens_B=tokens_B),
        slot_table=None if slot_table is None else slot_table._replace(coming_B=tokens_B),
    )


def clear(bank: Bank, rows_B: Bool[Array, "B"]) -> Bank:
    """Forgets everything in the rows where `rows_B` is True."""
    return bank._replace(
        length_B=jnp.where(rows_B, 0, bank.length_B),
        slot_table=None if bank.slot_table is None else cleared(bank.slot_table, rows_B),
    )


class ReadStats(NamedTuple):
    """What is noticed while a bank is read, to be added to it; None of what the bank does not keep.

    Attributes:
        recall: counts of neighbors.
        units_BM: units of the eviction rule that each slot received, summed over heads and queries
            (`EvictionRule.retrieval_units`).
    """

    recall: Recall | None
    units_BM: Int[jax.Array, "B M"] | None


def add(bank: Bank, read_stats: ReadStats, rule: EvictionRule) -> Bank:
    """The bank with what was noticed while it was read, by one layer or by several: before it is written again."""
    recall, slot_table = bank.recall, bank.slot_table
    if recall is not None and read_stats.recall is not None:
        recall = jax.tree.map(jnp.add, recall, read_stats.recall)
    if slot_table is not None and slot_table.usage_BM is not None and read_stats.units_BM is not None:
        slot_table = slot_table._replace(usage_BM=rule.usage_after_read(slot_table, read_stats.units_BM))
    return bank._replace(recall=recall, slot_table=slot_table)


def refill(bank: Bank, rows_B: Bool[Array, "B"], prebuilt: Bank, search: Search, tokens: int) -> Bank:
    """Where `rows_B` is True, rows forget everything and hold what `prebuilt` does: a bank alike, but of one row.

    Its slots are turned so that its newest token is the latest written. That is a pass over all slots, as is making
    the index of `search` anew, by segments of `tokens`; both only where there is such a row.
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
    """Writes a segment over the oldest slots of a ring. `N` must divide `M`, so that a write never wraps around.

    Of `most` tokens at most can be read then. `search` is told of the keys: it may keep an index of them.
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
    """Writes each token of a segment into its slot (see `write_at`); `addresses` is what is known of all slots then."""
    new, learned = _to_store(bank, keys_BHND, values_BHND, search)
    held = write_at(_stored(bank, bank.index.slots), new, slots_BN)
    length_B = slot_table.held_BM.sum(1, dtype=jnp.int32)
    return _with(bank, held, learned)._replace(length_B=length_B, slot_table=slot_table)


def _to_store(bank: Bank, keys_BHND, values_BHND, search: Search) -> tuple[Stored, dict[str, jax.Array]]:
    """What is to be written of new tokens, and what `search` has learned from them."""
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
    """The bank with this in its slots; and with an index of it, if something was learned."""
    return bank._replace(
        keys_BHMD=held.keys_BHMD,
        values_BHMD=held.values_BHMD,
        scales_BHM=held.scales_BHM,
        index=bank.index if learned is None else Index(held.entries, learned),
    )


def reindexed(bank: Bank, search: Search, tokens: int) -> Bank:
    """The same bank with the index that `search` keeps of it, as if its segments of `tokens` were written again.

    Nothing is learned from slots that hold nothing of a row's document.
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
    """The bank in a ring of another size, oldest slot first: a smaller one keeps the newest tokens.

    `cursor` is that of the bank as a number: to turn a ring that is split over devices by a fixed way, each sends part
    of its slots to another; by a way known only when the program runs, all would be gathered on each.
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
    """How many slots the banks of a model have; 0 where there are none."""
    return banks[0].keys_BHMD.shape[2] if banks else 0


def as_ring(bank: Bank) -> Bank:
    """A bank with addresses as a ring: what its slots hold, in order of position; without an index."""
    if bank.slot_table is None:
        return bank
    order_BM = jnp.argsort(bank.slot_table.positions_BM, axis=1)  # those that hold nothing first

    def ordered(part: jax.Array) -> jax.Array:
        return jnp.take_along_axis(part, order_BM.reshape(order_BM.shape[0], 1, -1, *(1,) * (part.ndim - 3)), axis=2)

    return _with(bank, jax.tree.map(ordered, _stored(bank)))._replace(
        cursor=jnp.zeros_like(bank.cursor), index=NO_INDEX, slot_table=None
    )


def ages(bank: Bank) -> Int[jax.Array, "M"]:
    """How many slots of a ring were written after each: 0 for the latest."""
    slots = bank.keys_BHMD.shape[2]
    return (bank.cursor - 1 - jnp.arange(slots)) % slots


def readable(bank: Bank) -> Int[jax.Array, "B"]:
    """How many of the latest tokens the next segment may read."""
    return bank.length_B if bank.visible_B is None else jnp.minimum(bank.length_B, bank.visible_B)


def valid(bank: Bank) -> Bool[jax.Array, "B M"]:
    """Which slots the next segment may read: those that hold a token of the row's present document, if `visible_B`."""
    if bank.slot_table is None:
        return ages(bank)[None, :] < readable(bank)[:, None]
    held_BM = bank.slot_table.held_BM
    if bank.visible_B is None:
        return held_BM
    newer_BM = jnp.argsort(jnp.argsort(-bank.slot_table.positions_BM))  # how many tokens held are newer
    return held_BM & (newer_BM < bank.visible_B[:, None])


def tokens_ago(bank: Bank, write_every: int) -> Int[jax.Array, "B M"]:
    """How many tokens before the one that the row reads next the token of each slot was read: 1 for the last one.

    The one place that knows which token a slot holds; it means nothing for slots that may not be read.
    """
    if bank.slot_table is not None:
        return bank.slot_table.read_B[:, None] - bank.slot_table.positions_BM
    return jnp.broadcast_to(write_every * (ages(bank) + 1), (len(bank.length_B), bank.keys_BHMD.shape[2]))


def recall(before: Bank, after: Bank) -> Float[jax.Array, ""] | None:
    """The share of true neighbors that were found between two states of a bank; None if it does not count."""
    return _ratio(before, after, "found_BH", "wanted_BH")


def mean_age(before: Bank, after: Bank) -> Float[jax.Array, ""] | None:
    """How many segments ago what was retrieved between two states of a bank had been written; None as in `recall`."""
    return _ratio(before, after, "age_BH", "retrieved_BH")


def _ratio(before: Bank, after: Bank, above: str, below: str) -> Float[jax.Array, ""] | None:
    if before.recall is None or after.recall is None:
        return None
    # Differences first, which stay right when counts overflow; then as floats, which do not.
    above_BH, below_BH = (getattr(after.recall, name) - getattr(before.recall, name) for name in (above, below))
    over, under = above_BH.sum(dtype=jnp.float32), below_BH.sum(dtype=jnp.float32)
    return jnp.where(under > 0, over / jnp.maximum(under, 1), jnp.nan)
