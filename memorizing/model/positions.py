"""How local attention knows distances: T5's bucketed relative bias, or rotary embedding (RoPE, arXiv 2104.09864).

Or places, by a learned vector for each, added to the tokens that are read (GPT-2).

Queries are the `N` tokens of the segment, keys the `W` tokens of the XL cache and then the segment itself, so query
`i` and key `j` are `W + i - j` tokens apart. Retrieved memories take part in neither: their distance is not encoded.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Float, Int

from memorizing.model.layers import normal_parameter
from memorizing.model.settings import ModelSettings
from memorizing.parallel.mesh import constrain, row_parts
from memorizing.shapes import Array


class Part(NamedTuple):
    """Some tokens of a segment, which are read at once: from `first` on, of which the first `count` are real."""

    first: Int[jax.Array, ""]
    count: Int[jax.Array, ""]
    tokens: int


def rows_of(table: np.ndarray, part: Part | None) -> Array:
    """Of a table with a row for each token of a segment those of a part; all of them for the segment as a whole."""
    return table if part is None else lax.dynamic_slice_in_dim(jnp.asarray(table), part.first, part.tokens)


def distances(tokens: int, cached: int) -> Int[np.ndarray, "N J"]:
    """How far key `j` of `J = W + N` lies before query `i`; negative for the future."""
    return cached + np.arange(tokens)[:, None] - np.arange(cached + tokens)[None, :]


def buckets(distance: Int[np.ndarray, "*any"], count: int, max_distance: int) -> Int[np.ndarray, "*any"]:
    """T5's buckets for causal attention: one for each of the first `count / 2` distances, then logarithmic.

    Distances from `max_distance` on share the last bucket; the future, which is masked anyway, the first.
    """
    distance = np.maximum(distance, 0)
    near = count // 2
    growth = np.log(np.maximum(distance, 1) / near) / np.log(max_distance / near)
    far = np.minimum(near + (growth * (count - near)).astype(np.int32), count - 1)
    return np.where(distance < near, distance, far).astype(np.int32)


class RelativeBias(nnx.Module):
    """A learned number per head and bucket of distance, added to the attention scores."""

    def __init__(self, count: int, max_distance: int, heads: int):
        self.max_distance = max_distance
        self.table_UH = nnx.Param(jnp.zeros((count, heads), jnp.float32))

    def __call__(self, tokens: int, cached: int, part: Part | None = None) -> Float[jax.Array, "P H N J"]:
        """One for each of the `P` parts into which devices split the rows (see `row_parts`), all equal.

        So each device sums the gradient of its own rows down to a table, and only tables are summed over devices.
        """
        bucket_NJ = rows_of(buckets(distances(tokens, cached), self.table_UH.shape[0], self.max_distance), part)
        table_UH = self.table_UH[...]
        table_BUH = constrain(jnp.broadcast_to(table_UH, (row_parts(), *table_UH.shape)), "BUH")
        return jnp.moveaxis(table_BUH[:, bucket_NJ], -1, 1)


class LearnedPositions(nnx.Module):
    """A vector for each place in a segment."""

    def __init__(self, count: int, embedding_size: int, rngs: nnx.Rngs):
        self.table_TE = normal_parameter(rngs, (count, embedding_size), embedding_size)

    def __call__(self, tokens: int, dtype: jnp.dtype, part: Part | None = None) -> Float[jax.Array, "N E"]:
        """Of the first `tokens` places, or of those of a part."""
        table_TE = constrain(self.table_TE[...].astype(dtype), "TE")
        first = 0 if part is None else part.first
        return lax.dynamic_slice_in_dim(table_TE, first, tokens)


def frequencies(settings: ModelSettings) -> tuple[float, ...]:
    """By how much each pair of a head's features is turned from one token to the next, in radians."""
    half = settings.head_size // 2
    plain_d = settings.rope_theta ** (-np.arange(half) / half)
    turns_d = settings.rope_original_length * plain_d / (2 * np.pi)
    low, high = settings.rope_low_frequency, settings.rope_high_frequency
    kept_d = {"none": 1.0, "linear": 0.0, "llama3": np.clip((turns_d - low) / (high - low), 0, 1)}[
        settings.rope_scaling
    ]
    return tuple((plain_d * (kept_d + (1 - kept_d) / settings.rope_factor)).tolist())


def angles(count: int, frequencies_d: tuple[float, ...]) -> tuple[Float[np.ndarray, "J d"], Float[np.ndarray, "J d"]]:
    """Sine and cosine of the angles by which pairs of features are turned, at each of `count` positions."""
    angle_Jd = np.arange(count)[:, None] * np.asarray(frequencies_d)
    return np.sin(angle_Jd), np.cos(angle_Jd)


def rotate(
    x_BHJD: Float[jax.Array, "B H J D"], sine_Jd: Float[Array, "J d"], cosine_Jd: Float[Array, "J d"]
) -> Float[jax.Array, "B H J D"]:
    """Turns each pair of features by an angle that grows with position, so that products depend on distance alone."""
    sine, cosine = (jnp.asarray(part, jnp.float32) for part in (sine_Jd, cosine_Jd))
    first, second = jnp.split(x_BHJD.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return turned.astype(x_BHJD.dtype)
