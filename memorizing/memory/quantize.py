"""Quantizes keys to 8 bits. Each key has its own scale, so that its largest feature just fits.

scale = max |key| / largest number of the dtype,      vector = key / scale, rounded
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Float

EightBits = Literal["int8", "float8"]
"""Names of the 8-bit formats in settings."""

DTYPES: dict[str, jnp.dtype] = {"int8": jnp.dtype(jnp.int8), "float8": jnp.dtype(jnp.float8_e4m3fn)}
"""Array dtypes of the 8-bit formats, by name."""


def largest(dtype: jnp.dtype) -> float:
    """Returns the largest number of an 8-bit dtype. Its negative also fits."""
    return float(jnp.iinfo(dtype).max) if jnp.issubdtype(dtype, jnp.integer) else float(jnp.finfo(dtype).max)


def quantize(keys: Float[jax.Array, "*any D"], dtype: jnp.dtype) -> tuple[jax.Array, Float[jax.Array, "*any"]]:
    """Returns quantized vectors `[*any, D]` in `dtype` and their scales. Zeros stay zeros."""
    wide = keys.astype(jnp.float32)
    scales = jnp.abs(wide).max(-1) / largest(dtype)
    vectors = wide / jnp.where(scales > 0, scales, 1.0)[..., None]
    if jnp.issubdtype(dtype, jnp.integer):
        vectors = jnp.round(vectors)
    return vectors.astype(dtype), scales


def dequantize(vectors: jax.Array, scales: Float[jax.Array, "*any"]) -> Float[jax.Array, "*any D"]:
    """Returns float32 keys from quantized vectors `[*any, D]` and their scales."""
    return vectors.astype(jnp.float32) * scales[..., None]
