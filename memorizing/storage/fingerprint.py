"""Checksums ("fingerprints") that detect corrupted checkpoint arrays.

Neither the compression of a checkpoint's files nor their format has a checksum over the data, so a byte that the disk
changed is read as another number without an error. The fingerprint of an array with words `w_i` is

    sum over i of mix(w_i + i * GOLDEN)     modulo 2^32

with murmur3's finalizer as `mix`, a one-to-one map of words. One changed word always changes the sum; several change it
with a probability of 1 - 2^-32. The order of a sum of integers does not matter, so an array has the same fingerprint
however it is sharded, and each device reads only its own shard.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

GOLDEN = 0x9E3779B9


def fingerprints(tree: Any) -> dict[str, int]:
    """Returns the fingerprint of each array by its path in the tree. Every process of a run must call it."""
    leaves = {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in jax.tree.leaves_with_path(tree)}
    return {name: int(number) for name, number in jax.device_get(_fingerprints(leaves)).items()}


@jax.jit
def _fingerprints(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: _fingerprint(x) for name, x in leaves.items()}


def _fingerprint(x: jax.Array) -> jax.Array:
    word = _words(x)
    for axis in range(x.ndim):
        place = lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        word += place * np.uint32(math.prod(x.shape[axis + 1 :]) * GOLDEN % 2**32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        word = (word ^ (word >> shift)) * np.uint32(factor)
    return jnp.sum(word ^ (word >> 16), dtype=jnp.uint32)


def _words(x: jax.Array) -> jax.Array:
    """Returns the bits of each element (at most 32) as an unsigned integer."""
    if x.dtype == jnp.bool:
        return x.astype(jnp.uint32)
    return lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
