"""Every search against brute force in numpy: masks, ties, fewer valid slots than K, sizes that do not divide."""

from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memorizing.memory.search import Keys
from memorizing.memory.search.blocked import Blocked, BlockedSettings, group_size
from memorizing.memory.search.exact import Exact
from memorizing.memory.search_choice import chosen_search, make_search
from memorizing.memory.settings import MemorySettings

SEARCHES = {
    "exact": Exact(),
    "native": make_search(MemorySettings(search="native")),
    "auto": make_search(MemorySettings(search="auto")),
    "blocked, one block": Blocked(block_size=4096),
    "blocked, 128": Blocked(block_size=128),
    "blocked, not dividing": Blocked(block_size=100),
}


def brute_force(queries, keys, valid, neighbors):
    """Returns neighbors by brute force: best first, equal scores by lower slot, -inf beyond the valid slots."""
    scores = np.einsum("BHND,BHMD->BHNM", queries.astype(np.float64), keys.astype(np.float64))
    scores = np.where(valid[:, None, None, :], scores, -np.inf)
    slots = np.argsort(-scores, axis=-1, kind="stable")[..., :neighbors]
    return np.take_along_axis(scores, slots, axis=-1), slots


def inputs(slots: int, share_valid: float, distinct: int | None, seed: int):
    """Returns small integers as vectors, so that scores are exact and ties frequent; `distinct` keys differ."""
    rng = np.random.default_rng(seed)
    queries = rng.integers(-2, 3, (2, 2, 5, 4)).astype(np.float32)
    keys = rng.integers(-2, 3, (2, 2, distinct or slots, 4)).astype(np.float32)
    keys = keys[:, :, np.arange(slots) % keys.shape[2]]
    return queries, keys, rng.random((2, slots)) < share_valid


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("slots", [64, 384, 1000])
@pytest.mark.parametrize("neighbors", [1, 3, 32])
@pytest.mark.parametrize(("share_valid", "distinct"), [(1.0, None), (0.5, None), (0.02, None), (0.0, None), (0.7, 1)])
def test_searches_equal_brute_force(name, slots, neighbors, share_valid, distinct):
    queries, keys, valid = inputs(slots, share_valid, distinct, seed=slots + neighbors)
    found = SEARCHES[name](jnp.asarray(queries), Keys(jnp.asarray(keys)), jnp.asarray(valid), neighbors)
    scores, chosen = brute_force(queries, keys, valid, neighbors)
    np.testing.assert_array_equal(found.scores_BHNK, scores)
    exists = scores > -np.inf
    np.testing.assert_array_equal(np.asarray(found.slots_BHNK)[exists], chosen[exists])


def test_selection_in_two_stages_is_exact_at_full_size():
    assert group_size(64 * 48, 32) == 8
    rng = np.random.default_rng(0)
    queries, keys = rng.normal(size=(1, 1, 7, 16)), rng.normal(size=(1, 1, 64 * 48, 16))
    queries, keys, valid = jnp.float32(queries), jnp.float32(keys), jnp.asarray(rng.random((1, 64 * 48)) < 0.9)
    reference = Exact()(queries, Keys(keys), valid, 32)
    for block_size in (64 * 48, 64 * 40):
        found = Blocked(block_size=block_size)(queries, Keys(keys), valid, 32)
        np.testing.assert_array_equal(found.slots_BHNK, reference.slots_BHNK)


def test_scores_are_float32_for_bfloat16_keys():
    queries, keys, valid = (jnp.asarray(part) for part in inputs(128, 1.0, None, seed=1))
    for search in SEARCHES.values():
        assert search(queries, Keys(keys.astype(jnp.bfloat16)), valid, 4).scores_BHNK.dtype == jnp.float32


def test_the_settings_choose_the_search():
    queries, keys, valid = (jnp.asarray(part) for part in inputs(256, 0.5, None, seed=2))
    for name in ("auto", "exact", "native", "blocked"):
        search = make_search(MemorySettings(size=256, search=name, options=(BlockedSettings(block_size=64),)))
        np.testing.assert_array_equal(
            search(queries, Keys(keys), valid, 8).slots_BHNK, Exact()(queries, Keys(keys), valid, 8).slots_BHNK
        )


@pytest.mark.parametrize(
    ("capability", "search"),
    [
        ("9.0", "pallas"),
        ("8.0", "pallas"),
        ("12.0", "pallas"),
        ("7.5", "binned"),
        ("gfx90a", "binned"),
        (None, "pallas"),
    ],
)
def test_auto_takes_the_kernel_only_on_gpus_that_can_run_it(capability, search, monkeypatch):
    """A capability of None means that this machine has no GPU and compiles for another one."""
    here = Mock(jax.Device, platform="gpu" if capability else "cpu", compute_capability=capability)
    monkeypatch.setattr(jax, "local_devices", lambda: [here])
    assert chosen_search(MemorySettings(size=65_536), "gpu") == search
    assert chosen_search(MemorySettings(size=65_536, search="pallas"), "gpu") == "pallas"
    assert chosen_search(MemorySettings(size=512), "gpu") == "exact"
