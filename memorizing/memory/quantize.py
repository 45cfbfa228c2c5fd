"""Keys in 8 bits: each is stored divided by a scale of its own, so that its largest feature just fits.

scale = max |key| / largest number of the dtype,      vector = key / scale, rounded
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Float

EightBits = Literal["int8", "float8"]
"""What keys can be stored as, in 8 bits: the names that settings have for it."""

DTYPES: dict[str, jnp.dtype] = {"int8": jnp.dtype(jnp.int8), "float8": jnp.dtype(jnp.float8_e4m3fn)}
"""What arrays are then, by these names."""


def largest(dtype: jnp.dtype) -> float:
    """The largest number of an 8-bit dtype; of int8 also its negative is one."""
    return float(jnp.iinfo(dtype).max) if jnp.issubdtype(dtype, jnp.integer) else float(jnp.finfo(dtype).max)


def quantize(keys: Float[jax.Array, "*any D"], dtype: jnp.dtype) -> tuple[jax.Array, Float[jax.Array, "*any"]]:
    """Vectors `[*any, D]` in `dtype`, and the scales that make them keys again. Zeros stay zeros."""
    wide = keys.astype(jnp.float32)
    scales = jnp.abs(wide).max(-1) / largest(dtype)
    vectors = wide / jnp.where(scales > 0, scales, 1.0)[..., None]
    if jnp.issubdtype(dtype, jnp.integer):
        vectors = jnp.round(vectors)
    return vectors.astype(dtype), scales


def dequantize(vectors: jax.Array, scales: Float[jax.Array, "*any"]) -> Float[jax.Array, "*any D"]:
    """The keys that vectors `[*any, D]` stand for, but for what was rounded off; in float32."""
    return vectors.astype(jnp.float32) * scales[..., None]
