"""The properties of eviction rules: equal chances for all tokens, and room for tokens that are read repeatedly."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from memorizing.errors import InputError
from memorizing.memory.bank import add, clear, empty_bank
from memorizing.memory.eviction.least_recently_used import LeastRecentlyUsed
from memorizing.memory.search import Search
from memorizing.memory.search.exact import Exact
from memorizing.memory.settings import MemorySettings
from memorizing.memory.writing import Tokens, write_segment
from memorizing.model.memory_attention import ReadOptions, attend_to_memory
from memorizing.parallel.mesh import MeshSettings, make_mesh, shardings


def track_read(bank, query_BHND, neighbors, rule):
    """Returns the bank after a read of its `neighbors` best slots."""
    read = attend_to_memory(query_BHND, bank, Exact(), neighbors, options=ReadOptions(eviction=rule))
    return add(bank, read.stats, rule)


@pytest.mark.parametrize("sink", [0, 2])
def test_a_reservoir_keeps_every_token_with_the_same_probability(sink):
    """Counts kept tokens after each write, over 10,000 documents: 5,000 rows that read two documents each."""
    rows, slots, tokens = 5_000, 6, 3
    memory = MemorySettings(size=slots, neighbors=1, dtype="float32", eviction="reservoir", sink=sink)
    part = Tokens(*(jnp.zeros((rows, 1, tokens, 1)) for _ in range(2)))
    run = jax.jit(functools.partial(write_segment, memory=memory, search=Search()))
    bank, kept = empty_bank(rows, 1, 1, memory), {}
    for _ in range(2):
        for number in range(1, 9):
            bank = run(bank, part)
            held_BM = np.sort(np.asarray(bank.slot_table.positions_BM), axis=1)
            kept.setdefault(number * tokens, []).append(held_BM)
        bank = clear(bank, np.ones(rows, bool))
    for read, documents in kept.items():
        held = np.concatenate(documents)
        counts = np.bincount(held[held >= 0], minlength=read)
        assert (counts[: min(sink, read)] == 2 * rows).all()
        if read <= slots:
            assert (counts == 2 * rows).all()
            continue
        own, chance = counts[sink:], (slots - sink) / (read - sink)
        # Each document keeps just as many, so that counts vary in one dimension less (and then as much less together).
        statistic = ((own - 2 * rows * chance) ** 2).sum() / (2 * rows * chance * (1 - chance)) * (1 - 1 / len(own))
        assert stats.chi2.sf(statistic, len(own) - 1) > 1e-4, (read, own)
        if read > 2 * slots:
            assert (documents[0] == documents[1]).all(1).mean() < 0.1


@pytest.mark.parametrize("eviction", ["fifo", "least_used", "least_recently_used"])
def test_a_token_that_is_read_often_stays_only_under_rules_of_use(eviction):
    """Its key is what all queries look for. Those that nothing looks for go in the order in which they came."""
    memory = MemorySettings(size=8, neighbors=2, dtype="float32", eviction=eviction)
    rng, bank = np.random.default_rng(0), empty_bank(1, 1, 8, memory)
    wanted = np.eye(8, dtype=np.float32)[0]

    @jax.jit
    def run(bank, keys):
        query = jnp.broadcast_to(30 * wanted, (1, 1, 2, 8))
        rule = memory.eviction_rule
        return write_segment(track_read(bank, query, 2, rule), Tokens(keys, keys), memory, Search())

    for number in range(12):
        keys = np.concatenate([np.zeros((2, 1)), 0.1 * rng.random((2, 7))], axis=1).astype(np.float32)
        if number == 1:
            keys[0] = wanted
        bank = run(bank, jnp.asarray(keys)[None, None])
    is_there = (np.asarray(bank.keys_BHMD[0, 0]) == wanted).all(1).any()
    assert is_there == (eviction != "fifo")
    if eviction != "fifo":
        newest = sorted(set(np.asarray(bank.slot_table.positions_BM[0]).tolist()) - {2})
        assert newest == list(range(17, 24))


def test_attention_received_is_that_of_the_softmax_also_over_devices():
    rows, heads, tokens, slots, size, neighbors = 2, 2, 8, 16, 4, 5
    memory = MemorySettings(size=slots, neighbors=neighbors, dtype="float32", eviction="least_used")
    rule, rng = memory.eviction_rule, np.random.default_rng(0)
    keys, query = (jnp.asarray(rng.normal(size=(rows, heads, count, size)), jnp.float32) for count in (slots, tokens))
    bank = write_segment(empty_bank(rows, heads, size, memory), Tokens(keys, keys), memory, Search())
    real_B = np.array([tokens, 3], np.int32)
    bank = bank._replace(slot_table=bank.slot_table._replace(coming_B=jnp.asarray(real_B)))
    expected_BM = np.zeros((rows, slots))
    for row, head, token in np.ndindex(rows, heads, tokens):
        scores = keys[row, head] @ query[row, head, token]
        best = np.argsort(-scores)[:neighbors]
        weights = np.exp(scores[best] - scores.max())
        if token < real_B[row]:
            expected_BM[row, best] += weights / weights.sum()
    for mesh in (MeshSettings(1), MeshSettings(data=2, model=2, memory=2)):
        opened = make_mesh(mesh, jax.devices()[: mesh.data * mesh.model * mesh.memory])
        with jax.set_mesh(opened):
            placed = jax.device_put(bank, shardings(opened, bank))
            received = jax.jit(track_read, static_argnums=(2, 3))(placed, query, neighbors, rule)
        np.testing.assert_allclose(received.slot_table.usage_BM, expected_BM, atol=1e-3)


@pytest.mark.parametrize("mesh", [MeshSettings(1), MeshSettings(data=2, model=2, memory=2)], ids=["one", "all"])
@pytest.mark.parametrize("minimum_share", [0.0, 0.3])
def test_a_retrieval_counts_above_the_minimum_share_of_attention(minimum_share, mesh):
    """Slots that some query of a real token retrieves with more attention get the time of this segment."""
    rows, heads, tokens, slots, size, neighbors = 2, 2, 8, 16, 4, 5
    rule = LeastRecentlyUsed(minimum_share=minimum_share)
    memory = MemorySettings(
        size=slots, neighbors=neighbors, dtype="float32", eviction="least_recently_used", options=(rule,)
    )
    rng = np.random.default_rng(1)
    keys, query = (jnp.asarray(rng.normal(size=(rows, heads, count, size)), jnp.float32) for count in (slots, tokens))
    bank = write_segment(empty_bank(rows, heads, size, memory), Tokens(keys, keys), memory, Search())
    real_B = np.array([tokens, 3], np.int32)
    bank = bank._replace(slot_table=bank.slot_table._replace(coming_B=jnp.asarray(real_B)))
    expected_BM = np.zeros((rows, slots), int)
    for row, head, token in np.ndindex(rows, heads, tokens):
        scores = keys[row, head] @ query[row, head, token]
        best = np.argsort(-scores)[:neighbors]
        weights = np.exp(scores[best] - scores.max())
        if token < real_B[row]:
            expected_BM[row, best[weights / weights.sum() > minimum_share]] = slots
    assert memory.eviction_rule == rule and 0 < (expected_BM > 0).sum() < expected_BM.size
    opened = make_mesh(mesh, jax.devices()[: mesh.data * mesh.model * mesh.memory])
    with jax.set_mesh(opened):
        placed = jax.device_put(bank, shardings(opened, bank))
        counted = jax.jit(track_read, static_argnums=(2, 3))(placed, query, neighbors, rule)
    np.testing.assert_array_equal(counted.slot_table.usage_BM, expected_BM)


@pytest.mark.parametrize("minimum_share", [-0.1, 1.0])
def test_a_minimum_share_that_is_no_share_is_refused(minimum_share):
    with pytest.raises(InputError, match=rf"LeastRecentlyUsed.minimum_share = {minimum_share}: must be at least 0"):
        LeastRecentlyUsed(minimum_share=minimum_share)
