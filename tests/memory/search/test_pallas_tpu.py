"""The TPU kernel, interpreted on a CPU, against `Binned`, which finds the same slots, and `Exact`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from memorizing.memory.bank import append, empty_bank
from memorizing.memory.quantize import DTYPES, quantize
from memorizing.memory.search import Keys
from memorizing.memory.search.binned import Binned, bins_for, expected_recall
from memorizing.memory.search.exact import Exact
from memorizing.memory.search.pallas_tpu import PallasTPU, selects_inside, strides_of_block
from memorizing.memory.settings import MemorySettings
from memorizing.model.memory_attention import attend_to_memory

pytestmark = pytest.mark.large

QUICK = {"xla_backend_optimization_level": 0}
"""Optimizing programs that run once would take most of the time."""


def found(search, queries, keys, valid, neighbors):
    call = jax.jit(lambda *arguments: search(*arguments, neighbors), compiler_options=QUICK)
    return call(queries, keys, valid)


def inputs(shape, share_valid: float = 0.7, seed: int = 0, dtype=jnp.float32):
    """Returns small integers as vectors: scores are exact in any order of summation, and ties are frequent."""
    rows, heads, tokens, slots, features = shape
    rng = np.random.default_rng(seed)
    queries = jnp.asarray(rng.integers(-2, 3, (rows, heads, tokens, features)), dtype)
    keys = jnp.asarray(rng.integers(-2, 3, (rows, heads, slots, features)), dtype)
    return queries, keys, jnp.asarray(rng.random((rows, slots)) < share_valid)


def assert_equal(ours, reference):
    np.testing.assert_array_equal(ours.scores_BHNK, reference.scores_BHNK)
    exists = np.asarray(reference.scores_BHNK) > -np.inf
    np.testing.assert_array_equal(np.asarray(ours.slots_BHNK)[exists], np.asarray(reference.slots_BHNK)[exists])
    assert ours.scores_BHNK.dtype == jnp.float32 and ours.slots_BHNK.dtype == jnp.int32


@pytest.mark.parametrize(
    ("shape", "neighbors", "slot_block"),
    [  # rows, heads, queries, slots, features
        ((2, 2, 5, 1024, 8), 1, 4096),  # one block
        ((2, 2, 130, 1024, 4), 3, 256),  # four blocks of slots, two of queries
        ((1, 3, 4, 1000, 16), 5, 256),  # slots that do not divide
        ((1, 1, 9, 70, 8), 8, 4096),  # fewer slots than bins
        ((1, 1, 3, 1024, 128), 2, 512),  # features as wide as a register
        ((1, 1, 2, 1100, 128), 12, 256),  # the same, not dividing
        ((1, 2, 6, 2048, 8), 32, 1024),
        ((1, 1, 2, 6000, 4), 256, 4096),  # too many neighbors for the kernel to select
    ],
)
def test_the_kernel_finds_the_slots_of_binned(shape, neighbors, slot_block):
    queries, keys, valid = inputs(shape, seed=neighbors)
    search = PallasTPU(query_block=128, slot_block=slot_block, interpret=True)
    assert_equal(
        found(search, queries, Keys(keys), valid, neighbors),
        Binned(block_size=slot_block)(queries, Keys(keys), valid, neighbors),
    )


@pytest.mark.parametrize("share_valid", [0.0, 0.01])
def test_sparse_and_empty_memories_equal_binned(share_valid):
    queries, keys, valid = inputs((2, 1, 3, 512, 8), share_valid)
    assert (np.asarray(valid).sum(1) < 8).all()
    ours = found(PallasTPU(slot_block=256, interpret=True), queries, Keys(keys), valid, 8)
    assert_equal(ours, Binned()(queries, Keys(keys), valid, 8))
    assert (np.asarray(ours.scores_BHNK) == -np.inf).sum() > 0


@pytest.mark.parametrize("minimum_score", [0.0, 5.0])
def test_scores_below_the_minimum_do_not_count(minimum_score):
    queries, keys, valid = inputs((1, 2, 4, 300, 4))
    ours = found(PallasTPU(interpret=True, minimum_score=minimum_score), queries, Keys(keys), valid, 4)
    assert_equal(ours, Binned(minimum_score=minimum_score)(queries, Keys(keys), valid, 4))
    scores = np.asarray(ours.scores_BHNK)
    assert scores[scores > -np.inf].min() >= minimum_score


@pytest.mark.parametrize(
    ("dtype", "features"), [("bfloat16", 8), ("bfloat16", 128), ("int8", 8), ("int8", 128), ("float8", 8)]
)
def test_keys_of_every_dtype_equal_binned(dtype, features):
    queries, keys, valid = inputs((2, 3, 4, 700, features), dtype=jnp.bfloat16)
    held = Keys(*quantize(keys, jnp.dtype(DTYPES[dtype]))) if dtype in DTYPES else Keys(keys)
    ours = found(PallasTPU(slot_block=256, interpret=True), queries, held, valid, 2)
    reference = Binned()(queries, held, valid, 2)
    # Quantized keys are not integers, so the order of a sum may change its last digits.
    np.testing.assert_allclose(ours.scores_BHNK, reference.scores_BHNK, rtol=1e-5, atol=1e-5)
    if dtype == "bfloat16":
        assert_equal(ours, reference)


def test_recall_equals_the_expected_recall():
    rng = np.random.default_rng(3)
    queries = jnp.asarray(rng.normal(size=(1, 2, 128, 16)), jnp.float32)
    keys = Keys(jnp.asarray(rng.normal(size=(1, 2, 4096, 16)), jnp.float32))
    valid = jnp.ones((1, 4096), bool)
    ours = np.asarray(found(PallasTPU(slot_block=2048, interpret=True), queries, keys, valid, 16).slots_BHNK)
    exact = np.asarray(Exact()(queries, keys, valid, 16).slots_BHNK)
    recall = np.mean([len(set(one) & set(other)) / 16 for one, other in zip(ours[0, 0], exact[0, 0], strict=True)])
    assert recall > expected_recall(bins_for(0.95, 16), 16) - 0.01


@pytest.mark.parametrize("memory", [1, 2])
def test_the_kernel_works_in_shard_map_scan_and_gradients(memory):
    """Takes the gradient of a read as a train step does: through remat, inside a scan over segments."""
    settings = MemorySettings(size=256, neighbors=1, dtype="float32")
    queries, keys, _ = inputs((2, 2, 8, 64, 4))
    segments = keys.reshape(2, 2, 8, 8, 4).transpose(2, 0, 1, 3, 4)
    mesh = jax.make_mesh((1, 1, memory), ("data", "model", "memory"), (jax.sharding.AxisType.Auto,) * 3)

    def gradients(search):
        def segment(bank, keys_BHND):
            read = jax.checkpoint(lambda queries: attend_to_memory(queries, bank, search, 1).output.out_BHND.sum())
            return append(bank, keys_BHND, keys_BHND, search), jax.value_and_grad(read)(queries)

        return jax.jit(lambda bank: jax.lax.scan(segment, bank, segments)[1], compiler_options=QUICK)

    with jax.set_mesh(mesh):
        bank = jax.device_put(empty_bank(2, 2, 4, settings), jax.NamedSharding(mesh, PartitionSpec()))
        ours, reference = gradients(PallasTPU(interpret=True))(bank), gradients(Binned())(bank)
    for one, other in zip(ours, reference, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    assert np.abs(np.asarray(ours[0])).max() > 0


def test_a_score_equal_to_the_minimum_counts():
    keys = jnp.asarray([[[[0.1, 0.0], [0.3, 0.0], [0.2, 0.0]]]], jnp.float32)
    search = PallasTPU(interpret=True, minimum_score=0.2)
    ours = found(search, jnp.asarray([[[[1.0, 0.0]]]]), Keys(keys), jnp.ones((1, 3), bool), 3)
    np.testing.assert_array_equal(ours.scores_BHNK[0, 0, 0], np.float32([0.3, 0.2, -np.inf]))
    np.testing.assert_array_equal(ours.slots_BHNK[0, 0, 0, :2], [1, 2])


def test_blocks_divide_the_slots_if_possible():
    assert strides_of_block(65_536, 512, 4096) == 8
    assert strides_of_block(3 * 2048, 512, 4096) == 6
    assert strides_of_block(1000, 128, 512) == 4
    assert strides_of_block(70, 128, 4096) == 1
    assert selects_inside(512, 32) and not selects_inside(4096, 256) and not selects_inside(128, 32)
