"""Counting what a search finds, beside reading with it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memorizing.memory.bank import add, append, clear, empty_bank, masked, recall
from memorizing.memory.eviction.fifo import Fifo
from memorizing.memory.search.binned import Binned
from memorizing.memory.search.contract import Keys, Search
from memorizing.memory.search.exact import Exact
from memorizing.memory.settings import MemorySettings
from memorizing.model.learned_index import SAMPLED
from memorizing.model.memory_attention import attend_to_memory
from memorizing.parallel.mesh import MeshSettings, make_mesh, shardings

ROWS, HEADS, TOKENS, SIZE, SLOTS, NEIGHBORS = 2, 2, 16, 8, 1024, 48
MEMORY = MemorySettings(size=SLOTS, neighbors=NEIGHBORS, dtype="float32", report_recall=True)


def bank_and_query():
    keys, query = (
        jax.random.normal(jax.random.key(seed), (ROWS, HEADS, tokens, SIZE))
        for seed, tokens in ((0, SLOTS), (1, TOKENS))
    )
    bank = empty_bank(ROWS, HEADS, SIZE, MEMORY)
    return append(clear(bank, np.array([True, True])), keys, -keys, Search()), query


@pytest.mark.parametrize("devices", [1, 8])
def test_counts_are_those_of_the_sampled_queries(devices):
    bank, query = bank_and_query()
    search = Binned(recall_target=0.1)  # 128 bins: misses many of 48
    mesh = make_mesh(
        MeshSettings(data=2, model=2, memory=2) if devices == 8 else MeshSettings(), jax.devices()[:devices]
    )
    with jax.set_mesh(mesh):
        placed = jax.device_put(bank, shardings(mesh, bank))
        attend = jax.jit(lambda query, bank: attend_to_memory(query, bank, search, NEIGHBORS))
        counted = attend(query, placed).stats.recall
    places, parts = np.arange(SAMPLED) * TOKENS // SAMPLED, SLOTS // (2 if devices == 8 else 1)
    found, every = np.zeros((ROWS, HEADS)), jnp.ones((ROWS, SLOTS), bool)
    wanted = Exact()(query, Keys(bank.keys_BHMD), every, NEIGHBORS).slots_BHNK[:, :, places]
    candidates = []
    for first in range(0, SLOTS, parts):  # each device's own
        some = Keys(bank.keys_BHMD[:, :, first : first + parts])
        got = search(query[:, :, places], some, every[:, :parts], NEIGHBORS)
        candidates.append((got.scores_BHNK, got.slots_BHNK + first))
    scores, slots = (np.concatenate(part, axis=-1) for part in zip(*candidates, strict=True))
    best = np.take_along_axis(slots, np.argsort(-scores, axis=-1)[..., :NEIGHBORS], axis=-1)
    for row, head in np.ndindex(ROWS, HEADS):
        pairs = zip(np.asarray(wanted[row, head]), best[row, head], strict=True)
        found[row, head] = sum(len(set(one) & set(other)) for one, other in pairs)
    np.testing.assert_array_equal(counted.found_BH, found)
    ages = 1 + (int(bank.cursor) - 1 - best) % SLOTS // TOKENS  # in segments, of a ring that each fills by so many
    np.testing.assert_array_equal(counted.age_BH, ages.sum((2, 3)))
    np.testing.assert_array_equal(counted.retrieved_BH, counted.wanted_BH)
    np.testing.assert_array_equal(counted.wanted_BH, np.full((ROWS, HEADS), SAMPLED * NEIGHBORS))
    assert 0.3 < found.sum() / counted.wanted_BH.sum() < 0.99


def test_queries_of_padding_do_not_count():
    """Rows of all tokens, of 5 (of the sampled places 0, 2, 4, ..., three), and, without a mask, of all again."""
    bank, query = bank_and_query()
    attend = jax.jit(lambda bank: attend_to_memory(query, bank, Exact(), NEIGHBORS).stats.recall)
    every = SAMPLED * NEIGHBORS
    mask = np.arange(TOKENS) < np.array([[TOKENS], [5]])
    for asked, wanted in ((masked(bank, mask), [every, 3 * NEIGHBORS]), (bank, [every, every])):
        counted = attend(asked)
        np.testing.assert_array_equal(counted.wanted_BH, np.repeat(np.array(wanted)[:, None], HEADS, 1))
        np.testing.assert_array_equal(counted.found_BH, counted.wanted_BH)
    assert masked(bank._replace(recall=None), mask).recall is None


def test_rows_without_a_memory_have_no_neighbors_to_find():
    bank, query = bank_and_query()
    bank = clear(bank, np.array([False, True]))
    _, has_memory, read_stats, _ = attend_to_memory(query, bank, Exact(), NEIGHBORS)
    counted = read_stats.recall
    assert has_memory.all((1, 2)).tolist() == has_memory.any((1, 2)).tolist() == [True, False]
    assert (counted.wanted_BH[0] > 0).all() and (counted.wanted_BH[1] == 0).all()
    after = add(bank, read_stats, Fifo())
    assert recall(bank, after) == 1.0
    assert np.isnan(recall(after, after))
    assert recall(bank._replace(recall=None), after) is None


def test_recall_ignores_neighbors_below_the_minimum_score():
    bank, query = bank_and_query()
    counted = attend_to_memory(query, bank, Exact(minimum_score=4.0), NEIGHBORS).stats.recall
    np.testing.assert_array_equal(counted.found_BH, counted.wanted_BH)
    assert 0 < counted.wanted_BH.sum() < ROWS * HEADS * SAMPLED * NEIGHBORS


def test_recall_is_counted_only_if_asked_for():
    bank, query = bank_and_query()
    assert attend_to_memory(query, bank._replace(recall=None), Exact(), NEIGHBORS).stats.recall is None
