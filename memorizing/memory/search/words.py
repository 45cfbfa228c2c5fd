"""Packs a score and a stride into one 32-bit word, so that the best slot of a bin is one float maximum in a kernel.

    float32      sign, exponent, mantissa of 23 bits                 score   0 10000001 0100000 00000000 00000000
    word         its lowest bits number the stride, from above       word    0 10000001 0100000 00000000 01111100

With `b` bits for the stride a score keeps `23 - b` bits of its mantissa: it is rounded toward zero, by less than
`2^(b-23)` of itself. Of equal positive scores, the word of the lower stride is larger and wins the tie. For negative
scores the higher stride wins, until the words are `ordered`.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Int

LOWEST = float(jnp.finfo(jnp.float32).min)
"""Word of a bin without a slot. `-inf` would not do: with a stride in its lowest bits, it is NaN."""

TINY = 2.0**-100
"""Added to every score, so that a score of zero is not subnormal: some devices flush subnormals to zero, stride
included."""


def stride_bits_for(slots: int, bins: int) -> int:
    """Returns the number of bits that number the strides over all bins."""
    return (-(-slots // bins) - 1).bit_length()


def pack(scores: Float[jax.Array, "*any"], stride: Int[jax.Array, ""], stride_bits: int) -> Float[jax.Array, "*any"]:
    """Returns scores with the stride in their lowest bits: larger by score, then by lower stride."""
    low = (1 << stride_bits) - 1
    bits = lax.bitcast_convert_type(scores + TINY, jnp.int32)
    return lax.bitcast_convert_type((bits & ~low) | (low - stride), jnp.float32)


def ordered(words: Float[jax.Array, "*any"], stride_bits: int) -> Int[jax.Array, "*any"]:
    """Returns words as integers: larger by score, then by lower stride, also for negative scores."""
    bits = lax.bitcast_convert_type(words, jnp.int32)
    # Inverts the magnitude of negative numbers, except for the stride.
    return jnp.where(bits < 0, bits ^ (0x7FFFFFFF & -(1 << stride_bits)), bits)


def scores_of(words: Int[jax.Array, "*any"], stride_bits: int) -> Float[jax.Array, "*any"]:
    """Returns the scores of ordered words; `-inf` for bins without a slot."""
    high = -(1 << stride_bits)
    bits = jnp.where(words < 0, words ^ 0x7FFFFFFF, words) & high
    scores = lax.bitcast_convert_type(bits, jnp.float32)
    return jnp.where(scores > LOWEST / 2, scores - TINY, -jnp.inf)


def strides_of(words: Int[jax.Array, "*any"], stride_bits: int) -> Int[jax.Array, "*any"]:
    """Returns the strides of ordered words."""
    low = (1 << stride_bits) - 1
    return low - (words & low)
