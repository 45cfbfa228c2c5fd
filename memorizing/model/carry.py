"""The state that a model carries from one segment to the next: XL caches and external memories.

    logits, carry = model(batch, carry)

The shapes of a carry say how long the XL cache and how large the memory is. A carry without banks means no memory.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from memorizing.errors import InputError
from memorizing.memory.bank import Bank, empty_bank
from memorizing.memory.settings import MemorySettings
from memorizing.model.settings import ModelSettings


class Cache(NamedTuple):
    """What one layer keeps of the previous segment, without gradient: its XL cache, and its last key for the shift.

    Keys are kept before rotation; `last_key_BHD` also before the shift (see `Model.key_shift`).
    """

    keys_BHWD: Float[jax.Array, "B H W D"]
    values_BHWD: Float[jax.Array, "B H W D"]
    last_key_BHD: Float[jax.Array, "B H D"]


def empty_cache(rows: int, heads: int, window: int, head_size: int, dtype: jnp.dtype) -> Cache:
    """A cache of zeros; whether a row's is to be read is for the caller to know."""
    held = (rows, heads, window, head_size)
    return Cache(jnp.zeros(held, dtype), jnp.zeros(held, dtype), jnp.zeros((rows, heads, head_size), dtype))


class Carry(NamedTuple):
    """What a row remembers of its document.

    Attributes:
        caches: an XL cache per layer (of length 0 where the model has none).
        cached_B: whether the row's caches hold the segment before.
        banks: the external memories of the layers that have one (`ModelSettings.bank_layers`), lowest first; empty for
            no memory.
    """

    caches: tuple[Cache, ...]
    cached_B: Bool[jax.Array, "B"]
    banks: tuple[Bank, ...]


def empty_carry(model: ModelSettings, memory: MemorySettings, rows: int, segment_length: int) -> Carry:
    """The carry before any document is read.

    Raises:
        InputError: when the memory is to keep what falls out of an XL cache that there is not, or to be searched by an
            index that the model has not; when segments are longer than the model knows positions for.
    """
    model.check_segment_length(segment_length, memory.size > 0 and memory.writes == "beyond_cache")
    if memory.size and memory.writes == "beyond_cache" and not model.xl_cache:
        raise InputError(
            "Memory.writes = 'beyond_cache' keeps what falls out of the XL cache, but Model.xl_cache = False: read "
            "with an XL cache, or set Memory.writes = 'segment'"
        )
    if memory.size and memory.proposer == "learned" and not model.index_size:
        raise InputError(
            "Memory.proposer = 'learned', but the model has no index: train one with Model.index_size = "
            f"{max(model.head_size // 4, 1)} (beside the model, or later: configs/variants/learned_index.gin)"
        )
    dtype = jnp.dtype(model.dtype)
    window = segment_length if model.xl_cache else 0
    banks = len(model.bank_layers) if memory.size else 0
    return Carry(
        tuple(empty_cache(rows, model.kv_head_count, window, model.head_size, dtype) for _ in range(model.layers)),
        jnp.zeros(rows, bool),
        tuple(empty_bank(rows, model.kv_head_count, model.head_size, memory) for _ in range(banks)),
    )
