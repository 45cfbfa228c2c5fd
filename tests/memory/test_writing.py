"""The content of a memory, slot by slot, compared with a plain Python memory of one row; and over devices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from memorizing.errors import InputError
from memorizing.memory.bank import Bank, ReadStats, add, clear, empty_bank, masked, tokens_ago, valid
from memorizing.memory.eviction.least_used import PARTS
from memorizing.memory.search import Search
from memorizing.memory.search.faiss_host import FaissSettings
from memorizing.memory.search.ivf import IvfSettings
from memorizing.memory.search.lsh import LshSettings
from memorizing.memory.search_choice import make_search
from memorizing.memory.settings import MemorySettings
from memorizing.memory.writing import Tokens, write_segment
from memorizing.parallel.mesh import MeshSettings, make_mesh, shardings

ROWS, HEADS, N, M, D = 2, 2, 4, 12, 4
KEPT = {
    "age": {"maximum_age": 6},
    "stride": {"write_every": 2},
    "stride and age": {"write_every": 2, "maximum_age": 7},
    "reservoir": {"eviction": "reservoir"},
    "reservoir and sink": {"eviction": "reservoir", "sink": 3, "write_every": 2},
    "least used": {"eviction": "least_used"},
    "least used and more": {"eviction": "least_used", "sink": 2, "maximum_age": 13},
    "least recently used": {"eviction": "least_recently_used"},
    "least recently used and more": {"eviction": "least_recently_used", "sink": 2, "maximum_age": 13, "write_every": 2},
    "none": {"eviction": "none"},
    "none and age": {"eviction": "none", "maximum_age": 9},
    "sink": {"sink": 5, "maximum_age": 10},
    "duplicates": {"duplicate_score": 0.75},
    "half duplicates": {"duplicate_score": 0.4, "eviction": "reservoir"},
    "beyond cache": {"writes": "beyond_cache"},
    "beyond cache and more": {"writes": "beyond_cache", "eviction": "least_used", "sink": 2, "write_every": 2},
    "all documents": {"clear_at_documents": False},
    "never": {"writes": "never"},
}


def memory_of(slots: int = M, **kept) -> MemorySettings:
    return MemorySettings(**{"size": slots, "neighbors": 1, "dtype": "float32", "search": "exact"} | kept)


@functools.cache
def drawn(row: int, document: int, count: int, stop: int) -> int:
    rng = functools.reduce(jax.random.fold_in, (row, document, count), jax.random.key(0))
    return int(jax.random.randint(rng, (), 0, stop))


class PlainRow:
    """One row's memory, token by token. A slot holds (position, name, keys, used) or None."""

    def __init__(self, memory: MemorySettings, row: int):
        self.memory, self.row, self.document = memory, row, -1
        self.read = 1
        self.clear()

    def clear(self):
        self.document += self.read > 0
        self.slots, self.read, self.admitted, self.cached = [None] * self.memory.size, 0, 0, []

    def write(self, names: list, keys: list, received_M: np.ndarray):
        memory = self.memory
        if memory.writes == "never":
            return
        if memory.eviction == "least_used":
            self.slots = [it and (*it[:3], it[3] + more) for it, more in zip(self.slots, received_M, strict=True)]
        if memory.eviction == "least_recently_used":
            self.slots = [
                it and (*it[:3], self.read if count else it[3])
                for it, count in zip(self.slots, received_M, strict=True)
            ]
        now = self.read
        tokens = [(self.read + number, *token) for number, token in enumerate(zip(names, keys, strict=True))]
        self.read += len(tokens)
        if memory.writes == "beyond_cache":
            tokens, self.cached = self.cached, tokens
        held = [it for it in self.slots if it]
        start = sum(it[3] for it in held) / len(held) if held and memory.eviction == "least_used" else 0.0
        if memory.eviction == "least_recently_used":
            start = now
        kept, offered = [it[2] for it in held], []
        for token in tokens:
            if token[0] % memory.write_every or self.is_like_any(token[2], kept):
                continue
            kept.append(token[2])
            offered.append((*token, start))
        for slot, token in zip(self.order(len(offered)), offered, strict=False):
            if slot is not None:
                self.slots[slot] = token
        self.admitted += len(offered)
        if memory.maximum_age is not None:
            for slot, it in enumerate(self.slots):
                if it and slot >= memory.sink and self.read - it[0] > memory.maximum_age:
                    self.slots[slot] = None

    def is_like_any(self, keys, others) -> bool:
        score = self.memory.duplicate_score
        return score is not None and any(
            np.mean([a @ b for a, b in zip(keys, it, strict=True)]) > score for it in others
        )

    def order(self, count: int) -> list:
        size, sink = self.memory.size, self.memory.sink
        if self.memory.eviction == "reservoir":
            slots = []
            for number in range(self.admitted, self.admitted + count):
                place = number if number < size else sink + drawn(self.row, self.document, number, number - sink + 1)
                slots.append(place if place < size else None)
            return slots
        free = [slot for slot in range(size) if self.slots[slot] is None]
        if self.memory.eviction == "none":
            return free
        return free + sorted(
            set(range(sink, size)) - set(free), key=lambda slot: (self.slots[slot][3], self.slots[slot][0])
        )

    def held(self) -> dict:
        return {it[0]: (it[1], it[3]) for it in self.slots if it}


@functools.cache
def step(memory: MemorySettings):
    search = make_search(memory)

    @jax.jit
    def run(bank: Bank, cached: Tokens, clears_B, mask_BN, segment: Tokens, received_BM) -> Bank:
        bank = masked(clear(bank, clears_B), mask_BN)
        return write_segment(
            add(bank, ReadStats(None, received_BM), memory.eviction_rule), segment, memory, search, cached
        )

    return run


def segments(seed: int, count: int, rows: int = ROWS):
    """Keys that are equal or at right angles, head by head; values that name their token; all else at random."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        keys = np.eye(D, dtype=np.float32)[rng.integers(0, D, (rows, HEADS, N))]
        name = np.arange(rows * N).reshape(rows, 1, N, 1) + 1000.0 * number
        values = np.broadcast_to(name, keys.shape).astype(np.float32)
        tokens_B, clears_B = rng.integers(0, N + 1, rows), rng.random(rows) < 0.15
        yield (
            Tokens(keys, values),
            tokens_B,
            clears_B,
            (rng.integers(1, 3 * PARTS, (rows, M)) * (rng.random((rows, M)) < 0.4)).astype(np.int32),
        )


def positions(bank: Bank, memory: MemorySettings, read: int, row: int) -> dict:
    """Returns the content of the row's valid slots, by the position that the bank reports."""
    ago_M, held_M = (np.asarray(part)[row] for part in (tokens_ago(bank, memory.write_every), valid(bank)))
    names_HM = np.asarray(bank.values_BHMD)[row, :, :, 0]
    np.testing.assert_array_equal(names_HM[0][held_M], names_HM[1][held_M])
    assert int(bank.length_B[row]) == held_M.sum()
    return {read - int(ago_M[slot]): float(names_HM[0, slot]) for slot in np.flatnonzero(held_M)}


@pytest.mark.parametrize("kind", KEPT)
@examples(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_a_memory_holds_the_tokens_of_a_plain_python_memory(kind, seed):
    memory = memory_of(**KEPT[kind])
    bank, plain = empty_bank(ROWS, HEADS, D, memory), [PlainRow(memory, row) for row in range(ROWS)]
    cached, most_read = Tokens(*(np.zeros((ROWS, HEADS, N, D), np.float32) for _ in range(2))), 0
    for segment, tokens_B, clears_B, received_BM in segments(seed, 9):
        if not memory.uses_slot_table:  # in a ring only the end of a document is padded, which is then forgotten
            tokens_B = np.full(ROWS, N)
        mask_BN = np.arange(N) < tokens_B[:, None]
        bank = step(memory)(bank, cached, clears_B, mask_BN, segment, received_BM)
        cached = segment
        for row in range(ROWS):
            if clears_B[row]:
                plain[row].clear()
            names = segment.values_BHND[row, 0, : tokens_B[row], 0].tolist()
            plain[row].write(
                names,
                list(segment.keys_BHND[row].swapaxes(0, 1))[: tokens_B[row]],
                received_BM[row] / (PARTS if memory.eviction == "least_used" else 1),
            )
            most_read = max(most_read, plain[row].read)
            expected = plain[row].held()
            assert positions(bank, memory, plain[row].read, row) == {at: name for at, (name, _) in expected.items()}
            if memory.eviction in ("least_used", "least_recently_used"):
                used = {
                    int(at): use
                    for at, use in zip(
                        *(np.asarray(part)[row] for part in bank.slot_table[:1] + bank.slot_table[-1:]), strict=True
                    )
                }
                assert {at: used[at] for at in expected} == pytest.approx({at: it[1] for at, it in expected.items()})
    assert memory.writes == "never" or most_read > 0


@pytest.mark.parametrize(
    "kind",
    [
        "reservoir and sink",
        "least used and more",
        "least recently used and more",
        "half duplicates",
        "beyond cache and more",
    ],
)
@pytest.mark.parametrize(
    "mesh", [MeshSettings(data=2, model=2, memory=2), MeshSettings(data=1, memory=4)], ids=["all", "memory"]
)
def test_a_sharded_memory_holds_the_same_tokens(kind, mesh):
    memory = memory_of(**KEPT[kind], key_dtype="int8")
    devices = mesh.data * mesh.model * mesh.memory
    opened, run = make_mesh(mesh, jax.devices()[:devices]), step(memory)
    one = empty_bank(ROWS, HEADS, D, memory)
    where = shardings(opened, one)
    split, cached = jax.device_put(one, where), Tokens(*(np.zeros((ROWS, HEADS, N, D), np.float32) for _ in range(2)))
    for segment, tokens_B, clears_B, received_BM in segments(3, 7):
        rest = cached, clears_B, np.arange(N) < tokens_B[:, None], segment, received_BM
        one, cached = run(one, *rest), segment
        with jax.set_mesh(opened):
            split = jax.device_put(run(split, *rest), where)
        jax.tree.map(np.testing.assert_array_equal, split, one)
    assert one.length_B.sum() > 0


@pytest.mark.parametrize("search", ["lsh", "ivf", "faiss"])
def test_an_index_follows_tokens_replaced_in_any_slot(search):
    """Each key that is held is its own nearest neighbor among all, once all lists and buckets are looked into."""
    if search == "faiss":
        pytest.importorskip("faiss")
    memory = memory_of(8 * N, eviction="reservoir", search=search, options=(
        LshSettings(tables=4, bits=1, probes=2, candidates=8 * N - 1),
        IvfSettings(lists=2, probes=2, candidates=8 * N - 1),
        FaissSettings(lists=2, probes=2),
    ))  # fmt: skip
    bank, finder = empty_bank(ROWS, HEADS, D, memory), make_search(memory)
    run, rng = jax.jit(functools.partial(write_segment, memory=memory, search=finder)), np.random.default_rng(0)
    for _ in range(14):
        keys = rng.normal(size=(ROWS, HEADS, N, D)).astype(np.float32)
        keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
        bank = run(bank, Tokens(keys, keys))
    found = finder(bank.keys_BHMD, bank.keys, valid(bank), 1).slots_BHNK[..., 0]
    assert np.asarray(found == np.arange(8 * N)).mean() > 0.95
    assert np.asarray(bank.slot_table.positions_BM).max() > 8 * N  # some were replaced


def test_a_segment_that_does_not_fit_beside_the_sink_is_refused():
    memory = memory_of(sink=M - N + 1)
    part = Tokens(jnp.zeros((1, 1, N, D)), jnp.zeros((1, 1, N, D)))
    with pytest.raises(ValueError, match=r"4 tokens of a segment .* Memory.sink = 9 do not fit into Memory.size = 12"):
        write_segment(empty_bank(1, 1, D, memory), part, memory, Search())


@pytest.mark.parametrize(
    ("kept", "words"),
    [
        ({"maximum_age": 0}, "maximum_age = 0 is less than"),
        ({"maximum_age": 9, "eviction": "reservoir"}, "keeps tokens of all ages"),
        ({"maximum_age": 9, "writes": "never"}, "so tokens do not age"),
        ({"write_every": 0}, "write_every = 0"),
        ({"sink": M}, f"below Memory.size = {M}"),
        ({"duplicate_score": 1.0}, "duplicate_score = 1.0"),
        ({"eviction": "oldest"}, "Memory.eviction = 'oldest': must be one of 'fifo', 'none'"),
    ],
)
def test_contradictory_memory_settings_are_refused(kept, words):
    with pytest.raises(InputError, match=words):
        memory_of(**kept)


def test_defaults_add_nothing_to_a_bank():
    bank = empty_bank(1, 1, D, memory_of())
    assert bank.slot_table is None and not memory_of().writing() and len(jax.tree.leaves(bank)) == 4
    assert dataclasses.replace(memory_of(), sink=1, writes="never").writing() == {"sink": 1, "writes": "never"}
