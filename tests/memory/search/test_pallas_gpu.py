"""The GPU's search kernel: interpreted, against `Binned` and `Exact`; lowered for a GPU; and, marked `gpu`, on one."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, PartitionSpec, use_abstract_mesh

from memorizing.errors import InputError
from memorizing.memory.bank import Bank
from memorizing.memory.quantize import DTYPES, quantize
from memorizing.memory.search.binned import Binned, bins_for, expected_recall, top_winners
from memorizing.memory.search.contract import Keys
from memorizing.memory.search.exact import Exact
from memorizing.memory.search.pallas_gpu import PallasGPU, itinerary
from memorizing.memory.search.words import ordered, pack, scores_of, strides_of
from memorizing.model.memory_attention import attend_to_memory

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")

INTERPRETED = PallasGPU(interpret=True)


def whole_numbers(slots: int, share_valid: float, tokens: int = 5, features: int = 4, distinct: int | None = None):
    """Returns queries and keys with nonnegative integer scores, so that ties are frequent and nothing is rounded."""
    rng = np.random.default_rng(slots)
    queries = rng.integers(0, 3, (2, 1, tokens, features)).astype(np.float32)
    keys = rng.integers(0, 4, (2, 1, distinct or slots, features)).astype(np.float32)
    keys = keys[:, :, np.arange(slots) % keys.shape[2]]
    return jnp.asarray(queries), Keys(jnp.asarray(keys)), jnp.asarray(rng.random((2, slots)) < share_valid)


def normal(slots: int, dtype, tokens: int = 16, features: int = 32, rows: int = 2):
    """Returns normally distributed queries and keys."""
    rng = np.random.default_rng(1)
    queries = jnp.asarray(rng.normal(size=(rows, 1, tokens, features)), jnp.float32)
    keys = jnp.asarray(rng.normal(size=(rows, 1, slots, features)), jnp.float32)
    if dtype in DTYPES.values():
        return queries.astype(jnp.bfloat16), Keys(*quantize(keys, jnp.dtype(dtype))), jnp.ones((rows, slots), bool)
    return queries.astype(dtype), Keys(keys.astype(dtype)), jnp.ones((rows, slots), bool)


def assert_same(found, expected):
    """Asserts equal scores, and equal slots where a slot was found."""
    np.testing.assert_array_equal(found.scores_BHNK, expected.scores_BHNK)
    exists = np.asarray(expected.scores_BHNK) > -np.inf
    np.testing.assert_array_equal(np.asarray(found.slots_BHNK)[exists], np.asarray(expected.slots_BHNK)[exists])


def share_found(found, exact) -> float:
    """Returns the share of the exact neighbors that were found."""
    hits = (np.asarray(found.slots_BHNK)[..., :, None] == np.asarray(exact.slots_BHNK)[..., None, :]).any(-1)
    return float(hits.mean())


@pytest.mark.parametrize(
    ("slots", "share_valid", "neighbors", "distinct"),
    [
        (1024, 1.0, 32, None),
        (1000, 0.9, 7, None),  # the last stride is partial
        (640, 1.0, 1, 3),  # ties everywhere: the lowest slots win
        (100, 0.7, 100, None),  # more bins than slots
        (256, 0.02, 8, None),  # fewer valid slots than neighbors
        (256, 0.0, 3, None),
        (512, 0.8, 256, None),  # the top-k is sorted, not extracted
    ],
)
def test_the_triton_kernel_equals_binned(slots, share_valid, neighbors, distinct):
    queries, keys, valid = whole_numbers(slots, share_valid, distinct=distinct)
    assert_same(INTERPRETED(queries, keys, valid, neighbors), Binned()(queries, keys, valid, neighbors))


@pytest.mark.parametrize(
    ("slots", "share_valid", "tokens"),
    [(640, 1.0, 5), (640, 0.99, 130), (100, 0.0, 5)],  # one block of queries, two blocks, nothing to visit
)
def test_the_mosaic_kernel_equals_binned(slots, share_valid, tokens):
    queries, keys, valid = whole_numbers(slots, share_valid, tokens=tokens, features=64)
    queries, keys = queries.astype(jnp.bfloat16), Keys(keys.vectors_BHMD.astype(jnp.bfloat16))
    search = PallasGPU(backend="mosaic", interpret=True)
    assert_same(search(queries, keys, valid, 3), Binned()(queries, keys, valid, 3))


def test_scores_below_the_minimum_do_not_count():
    queries, keys, valid = whole_numbers(512, 0.9)
    assert_same(
        PallasGPU(minimum_score=9.0, interpret=True)(queries, keys, valid, 32),
        Binned(minimum_score=9.0)(queries, keys, valid, 32),
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.int8, jnp.float8_e4m3fn])
def test_recall_and_scores_of_each_dtype(dtype):
    queries, keys, valid = normal(2048, dtype)
    found, exact = INTERPRETED(queries, keys, valid, 32), Exact()(queries, keys, valid, 32)
    assert found.scores_BHNK.dtype == jnp.float32
    assert share_found(found, exact) >= expected_recall(bins_for(0.95, 32), 32) - 0.01
    scores = Exact()(queries, keys, valid, 2048)
    by_slot = np.zeros(scores.scores_BHNK.shape, np.float32)
    np.put_along_axis(by_slot, np.asarray(scores.slots_BHNK), np.asarray(scores.scores_BHNK), -1)
    true = np.take_along_axis(by_slot, np.asarray(found.slots_BHNK), -1)
    # Four strides take two bits. The order of a sum may differ by device, too.
    np.testing.assert_allclose(found.scores_BHNK, true, rtol=2**-21 + 1e-6)
    assert (np.diff(np.asarray(found.scores_BHNK)) <= 0).all()


def test_blocks_that_do_not_divide_are_padded():
    queries, keys, valid = normal(700, jnp.bfloat16, tokens=21, features=20, rows=1)
    search = PallasGPU(interpret=True, block_queries=16, block_bins=32)
    found, binned = search(queries, keys, valid, 4), Binned()(queries, keys, valid, 4)
    assert found.scores_BHNK.shape == (1, 1, 21, 4)
    assert (np.asarray(found.slots_BHNK) == np.asarray(binned.slots_BHNK)).mean() > 0.97  # near ties may differ


def test_the_itinerary_visits_each_stride_that_has_slots_once():
    states = np.random.default_rng(0).integers(0, 3, (24, 6))
    states[0] = 2
    valid_BSR = jnp.asarray(np.stack([states > 0, states > 1], -1))
    for state, run, others in zip(states, *map(np.asarray, itinerary(valid_BSR)), strict=True):
        first, length, count = run
        visited = [(first + at) % 6 for at in range(length)]
        assert all(state[stride] == 2 for stride in visited)
        assert sorted(visited + list(others[:count])) == [stride for stride in range(6) if state[stride]]


def test_one_run_takes_in_all_full_strides_of_a_ring_buffer():
    valid_BM = jnp.asarray([[age % 24 < 15 for age in range(24 + 5, 5, -1)]])
    (run,), (others,) = itinerary(valid_BM.reshape(1, 6, 4))
    is_full = np.asarray(valid_BM.reshape(6, 4)).all(1)
    assert run[1] == is_full.sum() == 3 and run[2] == 2, others


def test_words_order_scores_and_then_strides():
    scores = jnp.asarray([-jnp.finfo(jnp.float32).max / 4, -3.5, -1e-20, 0.0, 1e-20, 0.25, 7.0, 1e30])
    words = jnp.stack([ordered(pack(scores, jnp.int32(stride), 3), 3) for stride in reversed(range(6))], -1).reshape(-1)
    assert (np.diff(np.asarray(words)) > 0).all()
    np.testing.assert_allclose(
        scores_of(words, 3).reshape(-1, 6), scores[:, None] * jnp.ones(6), rtol=2**-20, atol=1e-23
    )
    assert (strides_of(words, 3).reshape(-1, 6) == jnp.arange(5, -1, -1)).all()


def test_the_kernel_works_inside_other_transformations():
    queries, keys, valid = whole_numbers(256, 0.8, tokens=16)
    expected = Binned()(queries, keys, valid, 2)

    def searched(queries):
        @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.nothing_saveable)
        def step(total, _):
            found = INTERPRETED(lax.stop_gradient(queries), keys, valid, 2)
            return total + (queries**2).sum() + found.scores_BHNK.sum(), found

        return lax.scan(step, 0.0, None, length=2)

    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("data")
    split = jax.shard_map(
        lambda *arguments: INTERPRETED(*arguments, 2), mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=False
    )
    assert_same(jax.jit(split)(queries, keys, valid), expected)
    (_, found), gradient = jax.jit(jax.value_and_grad(searched, has_aux=True))(queries)
    assert_same(jax.tree.map(lambda part: part[1], found), expected)
    np.testing.assert_allclose(gradient, 4 * queries)


# Without a GPU: checks of the program that XLA gets.


def lowered(function, *arguments) -> str:
    """Returns the StableHLO for an H200."""
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    mesh = AbstractMesh((1,), ("data",), axis_types=(AxisType.Auto,), abstract_device=device)
    checks = [export.DisabledSafetyCheck.custom_call(name) for name in ("__gpu$xla.gpu.triton", "mosaic_gpu_v2")]
    with use_abstract_mesh(mesh):
        return export.export(jax.jit(function), platforms=["cuda"], disabled_checks=checks)(*arguments).mlir_module()


def at_full_size(dtype, features: int = 128):
    """Returns abstract queries, keys and validity in the size for which the kernel is tuned."""
    of = jax.ShapeDtypeStruct
    scales = of((8, 8, 65536), jnp.float32) if dtype in DTYPES.values() else None
    queries = of((8, 8, 512, features), jnp.bfloat16 if scales is not None else dtype)
    return queries, Keys(of((8, 8, 65536, features), dtype), scales), of((8, 65536), bool)


@pytest.mark.parametrize(
    ("dtype", "features"),
    [
        (jnp.bfloat16, 32),
        (jnp.bfloat16, 64),
        (jnp.bfloat16, 128),
        (jnp.float32, 128),
        (jnp.int8, 64),
        (jnp.int8, 128),
        (jnp.float8_e4m3fn, 128),
    ],
)
def test_lowers_for_a_gpu_without_scores_of_all_slots_or_a_copy_of_keys(dtype, features):
    text = lowered(functools.partial(PallasGPU(), neighbors=32), *at_full_size(dtype, features))
    assert text.count("__gpu$xla.gpu.triton") == 2
    assert not re.search(r"512x65536|512x128x512x", text)
    assert "stablehlo.pad" not in text


def test_more_8_bit_keys_than_offsets_can_address_are_rejected():
    queries, keys, _ = at_full_size(jnp.int8)
    keys = Keys(*(jax.ShapeDtypeStruct((8, 8, 2**20, *part.shape[3:]), part.dtype) for part in keys[:2]))
    with pytest.raises(
        InputError, match=r"2,147,483,648 that this kernel can search\. .*Mesh\.memory.*Memory\.key_dtype"
    ):
        lowered(functools.partial(PallasGPU(), neighbors=32), queries, keys, jax.ShapeDtypeStruct((8, 2**20), bool))


@pytest.mark.parametrize("features", [32, 64, 256])
def test_the_mosaic_kernel_lowers_for_a_gpu(features):
    text = lowered(functools.partial(PallasGPU(backend="mosaic"), neighbors=32), *at_full_size(jnp.bfloat16, features))
    assert text.count("@mosaic_gpu_v2") == text.count("__gpu$xla.gpu.triton") == 1
    assert not re.search(r"512x65536|512x128x512x", text)
    assert "stablehlo.pad" not in text


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8])
def test_attention_to_the_memory_lowers_for_a_gpu(dtype):
    queries, keys, _ = at_full_size(dtype)
    whole = jax.ShapeDtypeStruct((), jnp.int32)
    values = jax.ShapeDtypeStruct(keys.vectors_BHMD.shape, queries.dtype)
    rows = jax.ShapeDtypeStruct((8,), jnp.int32)
    bank = Bank(keys.vectors_BHMD, values, whole, rows, keys.scales_BHM)
    text = lowered(lambda queries, bank: attend_to_memory(queries, bank, PallasGPU(), 32), queries, bank)
    assert text.count("__gpu$xla.gpu.triton") == 2
    assert not re.search(r"512x65536|512x128x512x", text)


# On a GPU.


@pytest.mark.gpu
@pytest.mark.parametrize("share_valid", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("slots", [4096, 1000])
@pytest.mark.parametrize("neighbors", [1, 7, 32, 64, 256])
@pytest.mark.parametrize(
    ("backend", "dtype"), [("triton", jnp.bfloat16), ("triton", jnp.float32), ("mosaic", jnp.bfloat16)]
)
def test_gpu_kernels_equal_binned(backend, dtype, neighbors, slots, share_valid):
    queries, keys, valid = whole_numbers(slots, share_valid, tokens=200, features=32)
    queries, keys = queries.astype(dtype), Keys(keys.vectors_BHMD.astype(dtype))
    search = PallasGPU(backend=backend)
    assert_same(search(queries, keys, valid, neighbors), Binned()(queries, keys, valid, neighbors))


@pytest.mark.gpu
@pytest.mark.parametrize("block_queries", [64, 128])
@pytest.mark.parametrize("features", [32, 64, 128, 256])
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("triton", dtype) for dtype in (jnp.bfloat16, jnp.float32, jnp.int8, jnp.float8_e4m3fn)]
    + [("mosaic", jnp.bfloat16)],
)
def test_gpu_recall_and_scores(backend, dtype, features, block_queries):
    queries, keys, valid = normal(16384, dtype, tokens=256, features=features)
    valid = valid.at[0, 100:300].set(False).at[1, 5000:].set(False)
    search = PallasGPU(backend=backend, block_queries=block_queries)
    with jax.default_matmul_precision("highest"):  # `Exact` of float32 would be in TF32
        found, exact = search(queries, keys, valid, 32), Exact()(queries, keys, valid, 32)
    assert share_found(found, exact) >= expected_recall(bins_for(0.95, 32), 32) - 0.01
    np.testing.assert_allclose(found.scores_BHNK[..., 0], exact.scores_BHNK[..., 0], rtol=1e-4)


@pytest.mark.gpu
def test_gpu_top_k_of_winners_is_exact():
    queries, keys, valid = normal(16384, jnp.bfloat16, tokens=256, features=64)
    binned = Binned()
    winners = binned.winners(queries, keys, valid, 512)
    found, expected = PallasGPU()(queries, keys, valid, 32), top_winners(winners, 32)
    assert (np.asarray(found.slots_BHNK) == np.asarray(expected.slots_BHNK)).mean() > 0.999  # near ties may differ
