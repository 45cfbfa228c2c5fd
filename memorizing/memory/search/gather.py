"""Gathers the vectors of given slots, after a search.

On CPUs, XLA copies number by number; the kernel in `native.cc` copies whole vectors.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from memorizing.memory.quantize import dequantize
from memorizing.memory.search.contract import Keys
from memorizing.memory.search.native import why_unavailable
from memorizing.parallel.topology import platform_compiled_for


def gather(slots_BHMD: jax.Array, index_BHNK: Int[jax.Array, "B H N K"]) -> jax.Array:
    """Returns vectors `[B, H, N, K, D]` from `[B, H, M, D]`; an index outside the slots is clipped."""
    slots, size = slots_BHMD.shape[2:]
    index_GR = index_BHNK.reshape(index_BHNK.shape[0] * index_BHNK.shape[1], -1)
    kernel = _gather_natively if platform_compiled_for() == "cpu" and not why_unavailable() else _gather_by_xla
    found_GRD = kernel(slots_BHMD.reshape(-1, slots, size), index_GR)
    return found_GRD.reshape(*index_BHNK.shape, size)


def gather_keys(keys: Keys, index_BHNK: Int[jax.Array, "B H N K"]) -> Float[jax.Array, "B H N K D"]:
    """Returns the keys in these slots, with their scale applied."""
    vectors_BHNKD = gather(keys.vectors_BHMD, index_BHNK)
    if keys.scales_BHM is None:
        return vectors_BHNKD
    return dequantize(vectors_BHNKD, gather(keys.scales_BHM[..., None], index_BHNK)[..., 0])


def _gather_by_xla(tables_GMD: jax.Array, index_GR: jax.Array) -> jax.Array:
    return jnp.take_along_axis(tables_GMD, index_GR[..., None], axis=1, mode="clip")


def _gather_natively(tables_GMD: jax.Array, index_GR: jax.Array) -> jax.Array:
    shape = (*index_GR.shape, tables_GMD.shape[2])
    return jax.ffi.ffi_call("memorizing_gather", jax.ShapeDtypeStruct(shape, tables_GMD.dtype))(tables_GMD, index_GR)
