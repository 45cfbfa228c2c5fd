"""Searches that keep an index, through the bank that writes it: rings that turn, clears, drift, devices, the host."""

import functools
import importlib.util
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memorizing.errors import InputError
from memorizing.memory.bank import Bank, append, clear, empty_bank, valid
from memorizing.memory.search import Keys, Search
from memorizing.memory.search.blocked import Blocked
from memorizing.memory.search.exact import Exact
from memorizing.memory.search.faiss_host import Faiss, Host, stamps
from memorizing.memory.search.ivf import IVF
from memorizing.memory.search.lsh import LSH
from memorizing.memory.search.proposed import Proposed
from memorizing.memory.search.sharded import Sharded
from memorizing.memory.settings import MemorySettings
from memorizing.model.memory_attention import attend_to_memory
from memorizing.parallel.mesh import MeshSettings, make_mesh, shardings, spec, specs

EVERYTHING = 1 << 20

SCORING_ALL_SLOTS = {  # searches that score every slot
    "lsh": LSH(tables=2, bits=3, probes=8, candidates=EVERYTHING, bucket_size=EVERYTHING),
    "lsh, more bits than features": LSH(tables=1, bits=9, probes=512, candidates=EVERYTHING, bucket_size=EVERYTHING),
    "ivf": IVF(lists=12, probes=12, candidates=EVERYTHING),
    "int8": Proposed(kind="int8", candidates=EVERYTHING),
    "float8": Proposed(kind="float8", candidates=EVERYTHING),
    "projection": Proposed(kind="projection", projection_size=2, candidates=EVERYTHING, inner=Blocked(block_size=100)),
    "int8, ivf": Proposed(inner=IVF(lists=5, probes=5, candidates=EVERYTHING), candidates=EVERYTHING),
}
SCORING_FEW_SLOTS = {  # searches that score few slots
    "lsh": LSH(tables=3, bits=3, probes=2, candidates=12, bucket_size=5),
    "ivf": IVF(lists=4, probes=2, candidates=9),
    "int8": Proposed(candidates=6),
    "projection": Proposed(kind="projection", projection_size=2, candidates=6),
    "int8, ivf": Proposed(inner=IVF(lists=4, probes=2, candidates=16), candidates=6),
    "int8, lsh": Proposed(inner=LSH(tables=2, bits=3, probes=2, candidates=16), candidates=6),
}
HAS_FAISS = importlib.util.find_spec("faiss") is not None
needs_faiss = pytest.mark.skipif(not HAS_FAISS, reason="faiss-cpu is not installed")
if HAS_FAISS:
    SCORING_FEW_SLOTS |= {"hnsw": Faiss(kind="hnsw", effort=64), "faiss ivf": Faiss(kind="ivf", lists=4, probes=2)}


def bank_for(search: Search, rows: int, heads: int, slots: int, size: int, key_dtype: str | None = None) -> Bank:
    bank = empty_bank(rows, heads, size, MemorySettings(size=slots, neighbors=1, dtype="float32", key_dtype=key_dtype))
    return bank._replace(index=search.empty_index(rows, heads, slots, size))


@functools.cache
def compiled(search: Search, neighbors: int):
    write = jax.jit(lambda bank, keys: append(bank, keys, keys, search))
    return write, jax.jit(lambda queries, bank: search(queries, bank.keys, valid(bank), neighbors))


def filled(search: Search, keys: np.ndarray, slots: int, tokens: int, key_dtype: str | None = None) -> Bank:
    """Returns a bank after all keys were written, segment by segment."""
    bank = bank_for(search, *keys.shape[:2], slots, keys.shape[3], key_dtype)
    for first in range(0, keys.shape[2], tokens):
        bank = compiled(search, 1)[0](bank, jnp.asarray(keys[:, :, first : first + tokens]))
    return bank


def integers(*shape: int, seed: int = 0) -> np.ndarray:
    """Returns small integers, whose scores are exact and often equal."""
    return np.random.default_rng(seed).integers(-2, 3, shape).astype(np.float32)


def units(*shape: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=shape)
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def assert_same(found, expected) -> None:
    np.testing.assert_array_equal(found.scores_BHNK, expected.scores_BHNK)
    exists = np.asarray(expected.scores_BHNK) > -np.inf
    np.testing.assert_array_equal(np.asarray(found.slots_BHNK)[exists], np.asarray(expected.slots_BHNK)[exists])


def assert_sound(found, queries, bank: Bank) -> None:
    """Asserts that slots are valid and distinct, with their keys' scores, ordered by score, then slot."""
    scores, slots, is_valid = (np.asarray(part) for part in (*found, valid(bank)))
    all_scores = np.einsum("BHND,BHMD->BHNM", queries, np.asarray(bank.keys_BHMD))
    for place in np.ndindex(scores.shape[:3]):
        count = int((scores[place] > -np.inf).sum())
        held, chosen = scores[place][:count], slots[place][:count]
        assert (scores[place][count:] == -np.inf).all()
        assert is_valid[place[0], chosen].all() and len(set(chosen)) == count
        np.testing.assert_allclose(held, all_scores[place][chosen], rtol=1e-5, atol=1e-6)  # integers give equal scores
        assert sorted(zip(-held, chosen, strict=True)) == list(zip(-held, chosen, strict=True))


def recall(search: Search, bank: Bank, queries: np.ndarray, neighbors: int) -> float:
    expected = Exact()(jnp.asarray(queries), bank.keys, valid(bank), neighbors).slots_BHNK
    found = compiled(search, neighbors)[1](jnp.asarray(queries), bank)
    slots = np.where(np.asarray(found.scores_BHNK) > -np.inf, found.slots_BHNK, -1).reshape(-1, neighbors)
    shared = [
        np.intersect1d(*pair).size for pair in zip(np.asarray(expected).reshape(-1, neighbors), slots, strict=True)
    ]
    return float(np.mean(shared)) / neighbors


@pytest.mark.parametrize("name", SCORING_ALL_SLOTS)
@pytest.mark.parametrize(("neighbors", "minimum_score"), [(32, None), (256, 3.0)])
def test_searches_that_score_all_slots_equal_exact_search(name, neighbors, minimum_score):
    search = SCORING_ALL_SLOTS[name]
    queries, bank = jnp.asarray(integers(3, 2, 7, 4, seed=1)), filled(search, integers(3, 2, 480, 4), 320, 32)
    search = type(search)(**{**vars(search), "minimum_score": minimum_score})
    # Row 1 holds fewer slots than `neighbors`, row 2 none.
    for length in (320, 40):
        bank = bank._replace(length_B=jnp.array([length, min(length, 100), 0]))
        expected = Exact(minimum_score=minimum_score)(queries, bank.keys, valid(bank), neighbors)
        assert_same(compiled(search, neighbors)[1](queries, bank), expected)


@pytest.mark.parametrize("name", SCORING_FEW_SLOTS)
def test_scores_are_computed_from_the_stored_8_bit_keys(name):
    search, queries = SCORING_FEW_SLOTS[name], jnp.asarray(units(1, 2, 5, 8, seed=1))
    bank = filled(search, units(1, 2, 64, 8), 64, 16, "int8")
    found = compiled(search, 4)[1](queries, bank)
    everything = Exact()(queries, bank.keys, valid(bank), 64)
    for place in np.ndindex(found.scores_BHNK.shape):
        if found.scores_BHNK[place] > -np.inf:
            slots = np.asarray(everything.slots_BHNK)[place[:3]]
            expected = everything.scores_BHNK[place[:3]][int(np.flatnonzero(slots == found.slots_BHNK[place])[0])]
            np.testing.assert_allclose(found.scores_BHNK[place], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SCORING_FEW_SLOTS)
@settings(max_examples=8, deadline=None)
@given(
    clears=st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=12),
    seed=st.integers(0, 99),
)
def test_neighbors_are_valid_after_any_writes_and_clears(name, clears, seed):
    """The ring buffer is overwritten up to three times."""
    search, rows, heads, slots, tokens, size, neighbors = SCORING_FEW_SLOTS[name], 2, 2, 32, 8, 4, 6
    write, find = compiled(search, neighbors)
    bank = bank_for(search, rows, heads, slots, size)
    for number, cleared in enumerate(clears):
        bank = clear(bank, jnp.asarray(cleared))
        queries = integers(rows, heads, tokens, size, seed=1000 + number)
        assert_sound(find(jnp.asarray(queries), bank), queries, bank)
        bank = write(bank, jnp.asarray(integers(rows, heads, tokens, size, seed=100 * seed + number)))
    assert_sound(find(jnp.asarray(queries), bank), queries, bank)
    assert (np.asarray(find(jnp.asarray(queries), bank).scores_BHNK[..., 0]) > -np.inf).any()


def clustered(turn: float = 0.0, tokens: int = 1024, seed: int = 0) -> np.ndarray:
    """Returns keys around 40 directions in 32 features; `turn` rotates the directions in planes of two features."""
    rng = np.random.default_rng(seed)
    centres = units(1, 2, 40, 32, seed=5)
    near, far = centres[..., :16], centres[..., 16:]
    centres = np.concatenate(
        [near * np.cos(turn) - far * np.sin(turn), near * np.sin(turn) + far * np.cos(turn)], axis=-1
    )
    keys = centres[:, :, rng.integers(0, 40, tokens)] + 0.1 * rng.normal(size=(1, 2, tokens, 32))
    return (keys / np.linalg.norm(keys, axis=-1, keepdims=True)).astype(np.float32)


FLOORS = {  # each search with its lowest allowed recall of 16 neighbors among 1024 slots
    "lsh": (LSH(tables=4, bits=6, probes=4, candidates=256), 0.85),
    "ivf": (IVF(lists=32, probes=8, candidates=256), 0.85),
    "int8": (Proposed(candidates=32), 0.99),
    "float8": (Proposed(kind="float8", candidates=32), 0.9),
    "projection": (Proposed(kind="projection", projection_size=16, candidates=128), 0.85),
}
if HAS_FAISS:
    FLOORS |= {
        "hnsw": (Faiss(kind="hnsw"), 0.9),
        "faiss ivf": (Faiss(kind="ivf", lists=32, probes=8), 0.9),
    }


@pytest.mark.parametrize("name", FLOORS)
def test_recall_on_clustered_keys(name):
    search, floor = FLOORS[name]
    bank = filled(search, clustered(), 1024, 64)
    found = recall(search, bank, clustered(tokens=64, seed=9), 16)
    assert found >= floor, found


def test_ivf_follows_keys_that_drift():
    """Recall after four turns of the ring, with slowly moving clusters, is about that of centroids learned from
    scratch."""
    search = FLOORS["ivf"][0]
    turns = np.linspace(0, np.pi, 64)
    drifting = np.concatenate([clustered(turn, 64, seed) for seed, turn in enumerate(turns)], axis=2)
    queries = clustered(np.pi, 64, 99)
    followed = filled(search, drifting, 1024, 64)
    fresh = filled(search, drifting[:, :, -1024:], 1024, 64)
    still = followed._replace(
        index=followed.index._replace(learned=filled(search, drifting[:, :, :1024], 1024, 64).index.learned)
    )
    found, expected, unmoved = (recall(search, bank, queries, 16) for bank in (followed, fresh, still))
    assert found >= expected - 0.1 and found > unmoved + 0.05, (found, expected, unmoved)


@pytest.mark.parametrize("search", [LSH(tables=1, probes=1, candidates=8), IVF(lists=4, probes=1, candidates=8)])
def test_a_bucket_larger_than_candidates_gives_its_newest_slots(search):
    """Writes a key and its negative in turns, 1.5 times around the ring: the newest slot is at its middle."""
    key = units(1, 1, 1, 8)
    bank = filled(search, np.concatenate([key, -key] * 48, axis=2), 64, 16)
    found = compiled(search, 8)[1](jnp.asarray(key), bank)
    np.testing.assert_array_equal(np.sort(found.slots_BHNK[0, 0, 0]), np.arange(16, 32, 2))


@pytest.mark.parametrize("name", SCORING_FEW_SLOTS)
def test_reading_and_writing_in_a_scan_under_a_gradient(name):
    """Trains with a donated bank; the gradient reaches the queries only through the retrieved values."""
    search = SCORING_FEW_SLOTS[name]
    queries, keys = units(6, 2, 2, 8, 4), units(6, 2, 2, 8, 4, seed=1)

    def loss(scale, bank):
        def step(bank, part):
            queries, keys = part
            read = attend_to_memory(scale * queries, bank, search, 4).output
            return append(bank, keys, keys, search), (read.out_BHND**2).sum()

        bank, losses = jax.lax.scan(step, bank, (queries, keys))
        return losses.sum(), bank

    call = jax.jit(jax.value_and_grad(loss, has_aux=True), donate_argnums=1)
    (_, bank), slope = call(3.0, bank_for(search, 2, 2, 32, 4))
    assert np.isfinite(slope) and slope != 0
    (again, _), _ = call(3.0, bank_for(search, 2, 2, 32, 4))
    (once_more, _), _ = call(3.0, bank_for(search, 2, 2, 32, 4))
    if not isinstance(search, Faiss):  # its results depend on earlier searches
        np.testing.assert_allclose(again, once_more, rtol=1e-6)
    assert_sound(compiled(search, 4)[1](jnp.asarray(queries[0]), bank), queries[0], bank)


MESHES = {"memory": MeshSettings(data=1, memory=8), "all": MeshSettings(data=2, model=2, memory=2)}


@pytest.mark.parametrize(
    ("name", "mesh"),
    [(name, "memory") for name in ("lsh", "ivf", "int8", "projection", *(["hnsw"] if HAS_FAISS else []))]
    + [("int8, ivf", "all")],
)
def test_searches_of_sharded_slots_equal_those_on_one_device(name, mesh):
    """Entries are written where their keys are, and each device searches its own slots."""
    mesh, search = make_mesh(MESHES[mesh], jax.devices()[:8]), SCORING_ALL_SLOTS.get(name) or SCORING_FEW_SLOTS[name]
    keys, queries = integers(2, 2, 192, 4), integers(2, 2, 8, 4, seed=1)
    bank = bank_for(search, 2, 2, 128, 4)
    bank = jax.device_put(bank, shardings(mesh, bank))
    write = jax.jit(lambda bank, keys: append(bank, keys, keys, search))
    with jax.set_mesh(mesh):
        for first in range(0, 192, 16):
            bank = write(bank, jnp.asarray(keys[:, :, first : first + 16]))
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), bank, filled(search, keys, 128, 16)
    )
    bank = bank._replace(length_B=jnp.array([128, 50]))
    found = jax.jit(
        jax.shard_map(
            lambda queries, keys, valid: Sharded(inner=search)(queries, keys, valid, 20),
            mesh=mesh,
            in_specs=(spec("BH_D"), specs(bank.keys), spec("BM")),
            out_specs=spec("BH__"),
            check_vma=False,
        )
    )(queries, bank.keys, valid(bank))
    bank = jax.tree.map(jnp.asarray, jax.device_get(bank))
    assert_sound(found, queries, bank)
    if name in SCORING_ALL_SLOTS:
        assert_same(found, Exact()(jnp.asarray(queries), Keys(bank.keys_BHMD), valid(bank), 20))


def test_different_keys_have_different_stamps():
    keys = jnp.asarray(np.concatenate([units(1, 1, 4096, 8), integers(1, 1, 4096, 8)], axis=2))
    different = len(np.unique(np.asarray(keys[0, 0]), axis=0))
    assert len(np.unique(stamps(keys))) == different
    assert len(np.unique(stamps(keys.astype(jnp.bfloat16)))) >= 0.9 * different


@needs_faiss
@pytest.mark.parametrize("kind", ["hnsw", "ivf"])
def test_faiss_keeps_the_indexes_of_banks_apart(kind):
    """Two banks take turns, as in evaluation during training. Neither index is built again after its first search."""
    search = Faiss(kind=kind, lists=8, probes=8, host=Host())
    write, _ = compiled(search, 8)
    banks, made = [bank_for(search, 1, 1, 64, 8) for _ in range(2)], []
    for number in range(12):
        for which in range(2):
            banks[which] = write(banks[which], jnp.asarray(units(1, 1, 16, 8, seed=2 * number + which)))
            assert recall(search, banks[which], units(1, 1, 16, 8, seed=999), 8) > 0.95
        made.append(list(search.host.banks))
    # After one segment, two banks look like one bank before and after a write. They are distinct from the second on.
    assert all(known == made[1] for known in made[1:]) and len(made[1]) == 2


@needs_faiss
@pytest.mark.parametrize("kind", ["hnsw", "ivf"])
def test_faiss_rebuilds_the_index_in_another_process(kind):
    """Another process has no index yet, and builds it without evicted and cleared slots."""
    search = Faiss(kind=kind, lists=9, probes=9, host=Host())  # differs from other tests, so it is compiled anew
    bank = filled(search, units(2, 2, 160, 8), 128, 32)
    queries = units(2, 2, 32, 8, seed=1)
    bank = bank._replace(length_B=jnp.array([128, 50]))
    before = recall(search, bank, queries, 8)
    known = search.host.banks[:]
    search.host.banks.clear()
    assert before > 0.95 and recall(search, bank, queries, 8) > 0.95
    assert search.host.banks and search.host.banks[0] not in known


@needs_faiss
def test_faiss_holds_one_bank_per_call_and_device(monkeypatch):
    """Indexes of other banks are built again, which is slow but correct."""
    monkeypatch.setattr(jax, "local_device_count", lambda: 1)
    search = Faiss(host=Host())
    banks = [filled(search, units(1, 1, 64, 8, seed=seed), 64, 16) for seed in (1, 2)]
    for bank in banks * 2:
        assert recall(search, bank, units(1, 1, 16, 8, seed=3), 8) > 0.95
        assert len(search.host.banks) == 1
    two_layers = jax.jit(lambda queries, banks: [search(queries, bank.keys, valid(bank), 8) for bank in banks])
    made = []
    for _ in range(3):
        jax.block_until_ready(two_layers(jnp.asarray(units(1, 1, 16, 8, seed=3)), banks))
        made.append(set(search.host.banks))
    assert made[0] >= made[1] == made[2] and len(made[1]) <= 3


def test_without_faiss_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(InputError, match="pip install faiss-cpu"):
        Faiss()
