"""Positions: T5's bucketed relative bias, rotary embedding (RoPE, arXiv 2104.09864), or learned positions (GPT-2).

Queries are the `N` tokens of the segment. Keys are the `W` tokens of the XL cache, then the segment itself. Query `i`
and key `j` are therefore `W + i - j` tokens apart. Retrieved tokens have no position.
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


class SegmentSlice(NamedTuple):
    """A slice of a segment that is read at once.

    Attributes:
        first: place of its first token in the segment.
        count: number of real tokens; the rest of the slice is padding.
        tokens: length of the slice, padding included.
    """

    first: Int[jax.Array, ""]
    count: Int[jax.Array, ""]
    tokens: int


def slice_rows(table: np.ndarray, place: SegmentSlice | None) -> Array:
    """Returns the rows of a slice, from a table with a row per token of a segment; None stands for all rows."""
    return table if place is None else lax.dynamic_slice_in_dim(jnp.asarray(table), place.first, place.tokens)


def distances(tokens: int, cached: int) -> Int[np.ndarray, "N J"]:
    """Returns how many tokens key `j` of `J = W + N` lies before query `i`; negative for the future."""
    return cached + np.arange(tokens)[:, None] - np.arange(cached + tokens)[None, :]


def buckets(distance: Int[np.ndarray, "*any"], count: int, max_distance: int) -> Int[np.ndarray, "*any"]:
    """Returns T5's buckets for causal attention: one for each of the first `count / 2` distances, then logarithmic.

    Distances from `max_distance` on share the last bucket. The future, which is masked, gets bucket 0.
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

    def __call__(self, tokens: int, cached: int, place: SegmentSlice | None = None) -> Float[jax.Array, "P H N J"]:
        """Returns the bias, once for each of the `P` parts into which devices split the rows (see `row_parts`).

        With a copy per part, each device reduces the gradient of its rows to a table before tables are summed.
        """
        bucket_NJ = slice_rows(buckets(distances(tokens, cached), self.table_UH.shape[0], self.max_distance), place)
        table_UH = self.table_UH[...]
        table_BUH = constrain(jnp.broadcast_to(table_UH, (row_parts(), *table_UH.shape)), "BUH")
        return jnp.moveaxis(table_BUH[:, bucket_NJ], -1, 1)


class LearnedPositions(nnx.Module):
    """A learned vector for each place in a segment."""

    def __init__(self, count: int, embedding_size: int, rngs: nnx.Rngs):
        self.table_TE = normal_parameter(rngs, (count, embedding_size), embedding_size)

    def __call__(self, tokens: int, dtype: jnp.dtype, place: SegmentSlice | None = None) -> Float[jax.Array, "N E"]:
        """Returns the vectors of the first `tokens` places, or of those from the start of the slice."""
        table_TE = constrain(self.table_TE[...].astype(dtype), "TE")
        first = 0 if place is None else place.first
        return lax.dynamic_slice_in_dim(table_TE, first, tokens)


def frequencies(settings: ModelSettings) -> tuple[float, ...]:
    """Returns the angle between neighboring tokens, in radians, for each pair of a head's features."""
    half = settings.head_size // 2
    plain_d = settings.rope_theta ** (-np.arange(half) / half)
    turns_d = settings.rope_original_length * plain_d / (2 * np.pi)
    low, high = settings.rope_low_frequency, settings.rope_high_frequency
    unscaled_d = {"none": 1.0, "linear": 0.0, "llama3": np.clip((turns_d - low) / (high - low), 0, 1)}[
        settings.rope_scaling
    ]
    return tuple((plain_d * (unscaled_d + (1 - unscaled_d) / settings.rope_factor)).tolist())


def angles(count: int, frequencies_d: tuple[float, ...]) -> tuple[Float[np.ndarray, "J d"], Float[np.ndarray, "J d"]]:
    """Returns sine and cosine of the rotation of each pair of features, at each of `count` positions."""
    angle_Jd = np.arange(count)[:, None] * np.asarray(frequencies_d)
    return np.sin(angle_Jd), np.cos(angle_Jd)


def rotate(
    x_BHJD: Float[jax.Array, "B H J D"], sine_Jd: Float[Array, "J d"], cosine_Jd: Float[Array, "J d"]
) -> Float[jax.Array, "B H J D"]:
    """Rotates each pair of features by an angle that grows with position: products then depend on distance only."""
    sine, cosine = (jnp.asarray(part, jnp.float32) for part in (sine_Jd, cosine_Jd))
    first, second = jnp.split(x_BHJD.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return turned.astype(x_BHJD.dtype)
