"""Fingerprints against the same sum in Python, over meshes, and against changes that simpler sums would miss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from memorizing.storage.fingerprint import GOLDEN, fingerprints


def by_hand(words: list[int]) -> int:
    total = 0
    for place, word in enumerate(words):
        word = (word + place * GOLDEN) % 2**32
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            word = (word ^ word >> shift) * factor % 2**32
        total += word ^ word >> 16
    return total % 2**32


def random_words(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 2**32, shape, np.uint32)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (3, 4, 5)])
def test_the_fingerprint_is_the_sum_of_its_equation(shape):
    words = random_words(*shape)
    assert fingerprints({"a": [jnp.asarray(words)]}) == {"a/0": by_hand(words.reshape(-1).tolist())}


def test_every_kind_of_number_counts_by_its_bits():
    floats = random_words(12).view(np.float32)  # with NaNs, perhaps
    halves = floats.astype(jnp.bfloat16)
    found = fingerprints({"f": floats, "h": halves, "i": floats.view(np.int32), "b": floats > 0})
    assert found["f"] == found["i"] == by_hand(floats.view(np.uint32).tolist())
    assert found["h"] == by_hand(halves.view(np.uint16).tolist()) and found["b"] == by_hand((floats > 0).tolist())
    assert fingerprints([jnp.zeros(1)]) != fingerprints([-jnp.zeros(1)])


@pytest.mark.parametrize("axes", [("a", "b"), ("b", None), (None, ("a", "b"))])
def test_fingerprints_do_not_depend_on_how_the_array_is_split(axes):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    x = random_words(16, 24)
    split = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))
    assert fingerprints([split]) == fingerprints([x])


def test_every_change_changes_the_fingerprint():
    """A flipped bit in any word; and two of a kind, or words that change places, which cancel out in plain sums."""
    words, moments = random_words(40), np.random.default_rng(1)
    changed = [
        words ^ np.where(np.arange(40) == place, 1 << int(bit), 0).astype(np.uint32)
        for place, bit in enumerate(moments.integers(0, 32, 40))
    ]
    signs, swapped = words.copy(), words.copy()
    signs[[3, 30]] ^= np.uint32(1 << 31)
    swapped[[3, 30]] = words[[30, 3]]
    whole = jnp.stack([words, signs, swapped, np.roll(words, 1), *changed])
    found = fingerprints(list(whole))
    assert len(set(found.values())) == len(whole)
