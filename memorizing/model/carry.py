"""The state that a model carries from one segment to the next: XL caches and external memories.

    logits, carry = model(batch, carry)

The shapes of a carry say how long the XL cache and how large the memory is. A carry without banks means no memory.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float

from memorizing.errors import InputError
from memorizing.memory.bank import Bank, empty_bank
from memorizing.memory.settings import MemorySettings
from memorizing.model.settings import ModelSettings


class Cache(NamedTuple):
    """The XL cache of one layer: keys and values of the previous segment, without gradient.

    Attributes:
        keys_BHWD: keys before rotation.
        values_BHWD: values.
        last_key_BHD: key of the last token, before rotation and before the shift (see `Model.key_shift`).
    """

    keys_BHWD: Float[jax.Array, "B H W D"]
    values_BHWD: Float[jax.Array, "B H W D"]
    last_key_BHD: Float[jax.Array, "B H D"]


def empty_cache(rows: int, heads: int, window: int, head_size: int, dtype: jnp.dtype) -> Cache:
    """Returns a cache of zeros. `Carry.cached_B` says whether a row's cache may be read."""
    shape = (rows, heads, window, head_size)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((rows, heads, head_size), dtype))


class LayerSegment(NamedTuple):
    """Keys and values of one layer for the tokens of a segment, and its last key before the shift.

    In a partial segment, the entries behind the last token read are undefined, and no token attends to them.
    """

    keys_BHND: Float[jax.Array, "B H N D"]
    values_BHND: Float[jax.Array, "B H N D"]
    last_key_BHD: Float[jax.Array, "B H D"]


def next_cache(segment: LayerSegment, cache: Cache) -> Cache:
    """Returns the XL cache after a whole segment, without gradient, in the dtypes and the size of `cache`."""
    first = segment.keys_BHND.shape[2] - cache.keys_BHWD.shape[2]
    new = Cache(segment.keys_BHND[:, :, first:], segment.values_BHND[:, :, first:], segment.last_key_BHD)
    return jax.tree.map(lambda new, old: lax.stop_gradient(new).astype(old.dtype), new, cache)


class Carry(NamedTuple):
    """State between two segments: what each row has read of its document.

    Attributes:
        caches: one XL cache per layer; of length 0 if `Model.xl_cache` is off.
        cached_B: whether the row's caches hold the previous segment of its document.
        banks: one external memory for each of `ModelSettings.bank_layers`, lowest layer first; empty if no memory.
    """

    caches: tuple[Cache, ...]
    cached_B: Bool[jax.Array, "B"]
    banks: tuple[Bank, ...]


def empty_carry(model: ModelSettings, memory: MemorySettings, rows: int, segment_length: int) -> Carry:
    """Returns the carry of `rows` rows before they read their first segment of `segment_length` tokens.

    Raises:
        InputError: if `Memory.writes` needs an XL cache that the model lacks, if `Memory.proposer` needs a learned
            index that the model lacks, or if segments are longer than the model has positions.
    """
    model.check_segment_length(segment_length, memory.size > 0 and memory.writes == "beyond_cache")
    if memory.size and memory.writes == "beyond_cache" and not model.xl_cache:
        raise InputError(
            "Memory.writes = 'beyond_cache' writes tokens as they leave the XL cache, but Model.xl_cache = False. "
            "Evaluate with an XL cache, or set Memory.writes = 'segment'."
        )
    if memory.size and memory.proposer == "learned" and not model.index_size:
        raise InputError(
            "Memory.proposer = 'learned' needs a learned index, but Model.index_size = 0. Train an index with "
            f"Model.index_size = {max(model.head_size // 4, 1)}, together with the model or afterwards "
            "(configs/variants/learned_index.gin)."
        )
    dtype = jnp.dtype(model.dtype)
    window = segment_length if model.xl_cache else 0
    banks = len(model.bank_layers) if memory.size else 0
    return Carry(
        tuple(empty_cache(rows, model.kv_head_count, window, model.head_size, dtype) for _ in range(model.layers)),
        jnp.zeros(rows, bool),
        tuple(empty_bank(rows, model.kv_head_count, model.head_size, memory) for _ in range(banks)),
    )
