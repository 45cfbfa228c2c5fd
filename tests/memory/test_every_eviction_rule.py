"""Properties that every eviction rule must have: the shared suite of the table `EVICTION_RULES`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memorizing.memory.bank import add, empty_bank, masked
from memorizing.memory.eviction import EVICTION_RULES
from memorizing.memory.search.exact import Exact
from memorizing.memory.settings import MemorySettings
from memorizing.memory.slot_table import NOTHING
from memorizing.memory.writing import Tokens, write_segment
from memorizing.model.memory_attention import ReadOptions, attend_to_memory
from memorizing.parallel.mesh import MeshSettings, make_mesh, shardings

ROWS, HEADS, N, M, D, SINK = 2, 2, 4, 16, 4, 3
SEGMENTS = 9


def memory_of(eviction: str) -> MemorySettings:
    return MemorySettings(size=M, neighbors=3, dtype="float32", search="exact", eviction=eviction, sink=SINK)


def segments():
    rng = np.random.default_rng(0)
    for _ in range(SEGMENTS):
        queries, keys, values = rng.normal(size=(3, ROWS, HEADS, N, D)).astype(np.float32)
        yield queries, Tokens(keys, values), np.arange(N) < np.array([[N], [rng.integers(0, N + 1)]])


def read_and_write(bank, queries_BHND, segment, mask_BN, memory):
    """Returns the bank after a segment is read with a search, counted by the rule, and written."""
    bank, rule = masked(bank, mask_BN), memory.eviction_rule
    read = attend_to_memory(queries_BHND, bank, Exact(), memory.neighbors, options=ReadOptions(eviction=rule))
    return write_segment(add(bank, read.stats, rule), segment, memory, Exact())


@functools.cache
def banks(eviction: str) -> list:
    """Returns the bank after each segment."""
    memory, found = memory_of(eviction), []
    step = jax.jit(functools.partial(read_and_write, memory=memory))
    bank = empty_bank(ROWS, HEADS, D, memory)
    for each in segments():
        bank = step(bank, *each)
        found.append(jax.device_get(bank))
    return found


each_rule = pytest.mark.parametrize("eviction", EVICTION_RULES)


@each_rule
def test_a_slot_holds_one_token_and_the_sink_holds_the_first(eviction):
    for bank in banks(eviction):
        for positions_M, read in zip(bank.slot_table.positions_BM, bank.slot_table.read_B, strict=True):
            held = positions_M[positions_M != NOTHING]
            assert len(set(held.tolist())) == len(held) and (held < read).all()
            assert len(held) == min(read, M)  # free slots are taken first, and none becomes free
            assert set(range(min(SINK, read))) <= set(held.tolist())


@each_rule
def test_a_slot_holds_the_keys_and_values_of_its_token(eviction):
    values_BHTD = np.zeros((ROWS, HEADS, SEGMENTS * N, D), np.float32)
    read_B = np.zeros(ROWS, int)
    for _, segment, mask_BN in segments():
        for row, count in enumerate(mask_BN.sum(1)):
            values_BHTD[row, :, read_B[row] : read_B[row] + count] = segment.values_BHND[row, :, :count]
            read_B[row] += count
    last = banks(eviction)[-1]
    for row, positions_M in enumerate(last.slot_table.positions_BM):
        held_M = positions_M != NOTHING
        np.testing.assert_array_equal(last.values_BHMD[row][:, held_M], values_BHTD[row][:, positions_M[held_M]])


@each_rule
def test_devices_that_split_the_slots_hold_the_same_tokens(eviction):
    memory, mesh = memory_of(eviction), make_mesh(MeshSettings(data=2, model=2, memory=2), jax.devices()[:8])
    bank = empty_bank(ROWS, HEADS, D, memory)
    where = shardings(mesh, bank)
    step = jax.jit(functools.partial(read_and_write, memory=memory), out_shardings=where)
    with jax.set_mesh(mesh):
        bank = jax.device_put(bank, where)
        for each in segments():
            bank = step(bank, *each)
    np.testing.assert_array_equal(bank.slot_table.positions_BM, banks(eviction)[-1].slot_table.positions_BM)
    np.testing.assert_array_equal(bank.values_BHMD, banks(eviction)[-1].values_BHMD)


@each_rule
def test_a_restored_bank_continues_exactly(eviction):
    memory = memory_of(eviction)
    step = jax.jit(functools.partial(read_and_write, memory=memory))
    bank = jax.tree.map(jnp.asarray, banks(eviction)[SEGMENTS // 2])
    for each in list(segments())[SEGMENTS // 2 + 1 :]:
        bank = step(bank, *each)
    jax.tree.map(np.testing.assert_array_equal, bank, banks(eviction)[-1])
