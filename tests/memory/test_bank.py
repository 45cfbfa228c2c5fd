"""The ring buffer against a Python deque, with clears at random."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memorizing.memory.bank import Bank, ages, append, clear, empty_bank, refill, reindexed, valid
from memorizing.memory.search import NO_INDEX, Search
from memorizing.memory.search.ivf import IVF, IvfSettings
from memorizing.memory.search.lsh import LSH, LshSettings
from memorizing.memory.search.proposed import Proposed
from memorizing.memory.search_choice import make_search
from memorizing.memory.settings import MemorySettings

ROWS, HEADS, SIZE, SEGMENT = 3, 2, 4, 4


def bank_of(rows: int, heads: int, slots: int, size: int) -> Bank:
    return empty_bank(rows, heads, size, MemorySettings(size=slots, neighbors=1, dtype="float32"))


def segment_of(number: int) -> np.ndarray:
    """Vectors that tell which write, row, head and token they are."""
    shape = (ROWS, HEADS, SEGMENT, SIZE)
    return (number * 1000 + np.arange(np.prod(shape)).reshape(shape)).astype(np.float32)


@settings(max_examples=60, deadline=None)
@given(
    segments=st.sampled_from([1, 2, 3]),
    clears=st.lists(st.lists(st.booleans(), min_size=ROWS, max_size=ROWS), min_size=1, max_size=9),
)
def test_a_bank_holds_what_a_deque_holds(segments, clears):
    slots = segments * SEGMENT
    bank = bank_of(ROWS, HEADS, slots, SIZE)
    model = [collections.deque(maxlen=slots) for _ in range(ROWS)]
    for number, cleared in enumerate(clears):
        bank = clear(bank, np.asarray(cleared))
        keys, values = segment_of(number), -segment_of(number)
        bank = append(bank, jnp.asarray(keys), jnp.asarray(values), Search())
        for row in range(ROWS):
            if cleared[row]:
                model[row].clear()
            model[row].extend(keys[row, :, token] for token in range(SEGMENT))
        by_age = np.argsort(np.asarray(ages(bank)))
        for row in range(ROWS):
            held = [slot for slot in by_age if valid(bank)[row, slot]]
            expected = np.stack(list(model[row])[::-1], axis=1)  # newest first
            np.testing.assert_array_equal(bank.keys_BHMD[row][:, held], expected)
            np.testing.assert_array_equal(bank.values_BHMD[row][:, held], -expected)


def test_an_empty_bank_has_no_valid_slot():
    assert not valid(bank_of(2, 1, 8, 4)).any()


def test_a_segment_that_would_wrap_around_is_refused():
    bank = bank_of(1, 1, 10, 4)
    with pytest.raises(ValueError, match=r"segment of 4 tokens must divide the 10 slots"):
        append(bank, jnp.zeros((1, 1, 4, 4)), jnp.zeros((1, 1, 4, 4)), Search())


@pytest.mark.parametrize("search", [LSH(candidates=8), IVF(lists=4, probes=2), Proposed(kind="int8")])
def test_a_rebuilt_index_equals_that_of_writing_again(search):
    """Holds even if part of the bank was never written, and if rows hold different parts."""
    settings = MemorySettings(size=32, neighbors=1, dtype="float32")
    bank = empty_bank(ROWS, HEADS, SIZE, settings)._replace(index=search.empty_index(ROWS, HEADS, 32, SIZE))
    for number in range(3):
        keys = np.random.default_rng(number).normal(size=(ROWS, HEADS, 8, SIZE)).astype(np.float32)
        bank = append(bank, jnp.asarray(keys), jnp.asarray(keys), search)
    found = reindexed(bank._replace(index=NO_INDEX), search, 8)
    assert jax.tree.structure(found) == jax.tree.structure(bank)
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5), found.index.learned, bank.index.learned
    )
    for name, entries in found.index.slots.items():
        np.testing.assert_array_equal(entries[:, :, :24], bank.index.slots[name][:, :, :24])
    cleared = clear(bank, np.array([True, False, False]))
    learned = reindexed(cleared._replace(index=NO_INDEX), search, 8).index.learned
    for part in learned.values():
        if part.ndim:  # nothing was learned from the row that holds nothing
            assert not np.any(part[0]) and np.any(part[1])


@pytest.mark.parametrize("kind", ["plain", "int8", "lsh", "ivf"])
def test_refilled_rows_hold_the_prebuilt_memory_and_others_stay(kind):
    """Wherever the two cursors stand; and the index knows of it: each key is its own nearest neighbor."""
    slots = 6 * SEGMENT
    memory = MemorySettings(
        size=slots, neighbors=1, dtype="float32", key_dtype="int8" if kind == "int8" else None,
        search=kind if kind in ("lsh", "ivf") else "exact",
        options=(
            LshSettings(tables=2, bits=1, probes=2, candidates=slots - 4),
            IvfSettings(lists=2, probes=2, candidates=slots - 4),
        ),
    )  # fmt: skip
    search = make_search(memory)
    bank, prebuilt = (empty_bank(rows, HEADS, SIZE, memory) for rows in (ROWS, 1))
    rng = np.random.default_rng(0)
    for number in range(8):
        part = rng.normal(size=(ROWS, HEADS, SEGMENT, SIZE)).astype(np.float32)
        part /= np.linalg.norm(part, axis=-1, keepdims=True)
        bank = append(bank, jnp.asarray(part), jnp.asarray(part), search)
        if number < 5:
            prebuilt = append(prebuilt, jnp.asarray(-part[:1]), jnp.asarray(-part[:1]), search)
    one = np.array([False, True, False])
    filled = jax.jit(lambda bank: refill(bank, one, prebuilt, search, SEGMENT))(bank)

    def newest_first(bank: Bank, row: int) -> list[np.ndarray]:
        order = np.argsort(ages(bank))[: int(bank.length_B[row])]
        parts = jax.tree.leaves((bank.keys_BHMD, bank.values_BHMD, bank.scales_BHM))
        return [np.asarray(part)[row][:, order] for part in parts]

    for row, (source, of) in enumerate([(bank, 0), (prebuilt, 0), (bank, 2)]):
        for found, expected in zip(newest_first(filled, row), newest_first(source, of), strict=True):
            np.testing.assert_array_equal(found, expected)
    assert filled.length_B.tolist() == [slots, 5 * SEGMENT, slots]
    untouched = refill(bank, np.array([False] * 3), prebuilt, search, SEGMENT)
    jax.tree.map(np.testing.assert_array_equal, untouched, bank)
    if kind in ("lsh", "ivf"):
        found = search(filled.keys_BHMD, filled.keys, valid(filled), 1).slots_BHNK[..., 0]
        is_own_BHM = np.asarray(found == np.arange(slots)) & np.asarray(valid(filled))[:, None]
        assert is_own_BHM.sum() > 0.75 * HEADS * np.asarray(filled.length_B).sum()
