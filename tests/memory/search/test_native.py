"""Tests of errors that only the C++ kernels for CPUs could make. test_search.py tests what all searches share."""

import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memorizing.memory.quantize import DTYPES, quantize
from memorizing.memory.search.contract import Keys
from memorizing.memory.search.exact import Exact
from memorizing.memory.search.gather import gather, gather_keys
from memorizing.memory.search.native import Native, why_unavailable


def same(found, expected):
    np.testing.assert_array_equal(found.scores_BHNK, expected.scores_BHNK)
    exists = np.asarray(expected.scores_BHNK) > -np.inf
    np.testing.assert_array_equal(np.asarray(found.slots_BHNK)[exists], np.asarray(expected.slots_BHNK)[exists])


def test_the_kernels_compile():
    assert why_unavailable() == ""


@pytest.mark.parametrize("order", ["random", "rising", "falling", "equal", "two values"])
@pytest.mark.parametrize(
    ("queries", "slots", "neighbors"), [(1, 33, 1), (13, 1000, 7), (40, 3000, 32), (24, 2500, 256)]
)
def test_any_order_of_scores_gives_the_exact_neighbors(order, queries, slots, neighbors):
    """Buffers are pruned many times, and ties cross all borders of tiles and prunings."""
    rng = np.random.default_rng(slots)
    values = {
        "random": rng.integers(-40, 40, slots),
        "rising": np.arange(slots),
        "falling": -np.arange(slots),
        "equal": np.full(slots, 3),
        "two values": rng.integers(0, 2, slots),
    }[order]
    query = jnp.asarray(rng.integers(1, 4, (2, 1, queries, 1)), jnp.float32)
    keys, valid = Keys(jnp.asarray(np.tile(values, (2, 1, 1))[..., None], jnp.float32)), rng.random((2, slots)) < 0.9
    for minimum_score in (None, 2.0, 0.0):
        expected = Exact(minimum_score=minimum_score)(query, keys, jnp.asarray(valid), neighbors)
        same(Native(minimum_score=minimum_score)(query, keys, jnp.asarray(valid), neighbors), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "float8"])
@pytest.mark.parametrize("size", [1, 20, 64])
def test_keys_of_every_dtype_equal_exact_search(dtype, size):
    """Uses numbers whose sums are exact in any order."""
    rng = np.random.default_rng(size)
    queries = jnp.asarray(rng.choice([-3.0, -1.0, 1.0, 2.0], (2, 3, 30, size)), jnp.float32)  # `top_k` puts 0 before -0
    vectors = rng.choice([-2.0, -1.0, 0.5, 1.0, 3.0], (2, 3, 500, size))
    scales = jnp.asarray(rng.choice([0.25, 1.0, 2.0], (2, 3, 500)), jnp.float32) if dtype in DTYPES else None
    vectors = np.trunc(vectors) if dtype == "int8" else vectors
    keys = Keys(jnp.asarray(vectors, DTYPES.get(dtype, dtype)), scales)
    valid = jnp.asarray(rng.random((2, 500)) < 0.8)
    same(Native()(queries, keys, valid, 9), Exact()(queries, keys, valid, 9))
    same(Native()(queries.astype(jnp.bfloat16), keys, valid, 9), Exact()(queries.astype(jnp.bfloat16), keys, valid, 9))


def test_operands_of_different_sizes_are_rejected():
    """Reading beyond their ends would crash."""
    queries, valid = jnp.ones((1, 1, 4, 16)), jnp.ones((1, 8), bool)
    with pytest.raises(jax.errors.JaxRuntimeError, match="differ in their sizes"):
        jax.block_until_ready(Native()(queries, Keys(jnp.ones((1, 1, 8, 12))), valid, 2))


def test_every_float8_number_is_read_exactly():
    bits = np.arange(256, dtype=np.uint8)
    numbers = jnp.asarray(bits).view(jnp.float8_e4m3fn).astype(jnp.float32)
    finite = np.isfinite(numbers)
    keys = Keys(jnp.asarray(bits).view(jnp.float8_e4m3fn).reshape(1, 1, 256, 1), jnp.ones((1, 1, 256)))
    found = Native()(jnp.ones((1, 1, 1, 1)), keys, jnp.ones((1, 256), bool), 256)
    np.testing.assert_array_equal(found.scores_BHNK[0, 0, 0, : finite.sum()], np.sort(numbers[finite])[::-1])
    assert not np.isfinite(found.scores_BHNK[0, 0, 0, finite.sum() :]).any()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8])
def test_gathered_vectors_are_those_in_the_slots(dtype):
    rng = np.random.default_rng(0)
    tables = jnp.asarray(rng.integers(-100, 100, (2, 3, 50, 5)), dtype)
    index = rng.integers(0, 50, (2, 3, 700, 4))
    found = np.asarray(jax.jit(gather)(tables, jnp.asarray(index, jnp.int32)))
    for row, head in np.ndindex(2, 3):
        np.testing.assert_array_equal(found[row, head], np.asarray(tables)[row, head][index[row, head]])


def test_keys_in_8_bits_are_gathered_at_their_scale():
    keys = jax.random.normal(jax.random.key(0), (1, 2, 16, 8))
    index = jnp.arange(16).reshape(1, 1, 4, 4).repeat(2, axis=1)
    vectors, scales = quantize(keys, DTYPES["int8"])
    gathered = gather_keys(Keys(vectors, scales), index).reshape(keys.shape)
    np.testing.assert_allclose(gathered, keys, atol=float(jnp.abs(keys).max()) / 127 / 2 * 1.001)
    assert np.abs(np.asarray(gathered - keys)).max() > 0


IMPORTS = """
from memorizing.memory.search_choice import chosen_search, make_search
from memorizing.memory.settings import MemorySettings as S
"""


def run_code(code: str, tmp_path, **environment) -> subprocess.CompletedProcess:
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), **environment}
    return subprocess.run([sys.executable, "-c", IMPORTS + code], capture_output=True, text=True, env=environment)


def test_without_a_compiler_another_exact_search_takes_over(tmp_path):
    result = run_code(
        "print(chosen_search(S(), 'cpu')); make_search(S(search='native'))", tmp_path, CXX="no-such-compiler"
    )
    assert result.stdout.strip() == "blocked"
    for part in ("Memory.search = 'native'", "no-such-compiler", "CXX", "'blocked'"):
        assert part in result.stderr


def test_cxx_may_have_arguments_and_no_home_folder_is_needed(tmp_path):
    result = run_code("print(chosen_search(S(), 'cpu'))", tmp_path, CXX="env c++")
    assert result.stdout.strip() == "native", result.stderr
    (library,) = (tmp_path / "memorizing").iterdir()
    library.write_bytes(b"")  # as after a full disk
    assert run_code("print(chosen_search(S(), 'cpu'))", tmp_path, CXX="env c++").stdout.strip() == "native"
    result = run_code("print(chosen_search(S(), 'cpu'))", tmp_path / "memorizing" / library.name)
    assert result.stdout.strip() == "native", result.stderr


def test_the_error_names_a_compiler_that_fails(tmp_path):
    result = run_code("make_search(S(search='native'))", tmp_path, CXX=shutil.which("false"))
    assert "Memory.search = 'native'" in result.stderr and "false" in result.stderr


def test_the_kernels_are_compiled_only_once(tmp_path):
    for _ in range(2):
        assert run_code("print(chosen_search(S(), 'cpu'))", tmp_path).stdout.strip() == "native"
    (library,) = (tmp_path / "memorizing").iterdir()
    written = library.stat().st_mtime_ns
    run_code("print(chosen_search(S(), 'cpu'))", tmp_path)
    assert library.stat().st_mtime_ns == written
