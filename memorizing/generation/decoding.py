"""Token-by-token reading within a segment, for generation.

    partial         = open_segment(carry, N)
    logits, partial = extend(graph, parameters, inputs, count, partial)     # until N tokens are read
    carry           = close_segment(partial, model, memory)

A partial segment holds the carry before it, and the keys and values that each layer has computed so far, in `N` slots.
All calls with the same number of tokens therefore have the same shapes. The logits equal those of reading the whole
segment at once, up to float rounding: a token attends to caches and memory from before its segment, and to the segment
up to itself. With a learned index (`Memory.proposer = 'learned'`) they can differ more: a few queries search all keys,
many queries search only the proposed ones.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Float, Int

from memorizing.memory.bank import Bank, ReadStats, add, masked
from memorizing.memory.search_choice import make_search
from memorizing.memory.settings import MemorySettings
from memorizing.memory.writing import Tokens, write_segment
from memorizing.model.attention import LayerInputs, PartialInput
from memorizing.model.banks import Banks
from memorizing.model.carry import Carry, LayerSegment, next_cache
from memorizing.model.parameters import Parameters
from memorizing.model.positions import SegmentSlice
from memorizing.model.settings import ModelSettings
from memorizing.shapes import Array


class PartialSegment(NamedTuple):
    """A segment whose first tokens have been read.

    Attributes:
        carry: the carry before the segment.
        segments: keys and values of the tokens read so far, one entry per layer.
        position: number of tokens read so far.
        read_stats: statistics of the reads so far, one entry per bank.
    """

    carry: Carry
    segments: tuple[LayerSegment, ...]
    position: Int[jax.Array, ""]
    read_stats: tuple[ReadStats, ...]


def open_segment(carry: Carry, segment_length: int) -> PartialSegment:
    """Returns an empty partial segment that continues the document in `carry`."""

    def empty(cache) -> LayerSegment:
        rows, heads, _, size = cache.keys_BHWD.shape
        zeros = jnp.zeros((rows, heads, segment_length, size), cache.keys_BHWD.dtype)
        last_key_BHD = jnp.where(carry.cached_B[:, None, None], cache.last_key_BHD, 0)
        return LayerSegment(zeros, zeros, last_key_BHD)

    stats = tuple(ReadStats(None, _zero_units(bank)) for bank in carry.banks)
    return PartialSegment(carry, tuple(map(empty, carry.caches)), jnp.zeros((), jnp.int32), stats)


def _zero_units(bank: Bank) -> Int[jax.Array, "B M"] | None:
    usage_BM = None if bank.slot_table is None else bank.slot_table.usage_BM
    return None if usage_BM is None else jnp.zeros(usage_BM.shape, jnp.int32)


def extend(
    graph: nnx.GraphDef,
    parameters: Parameters,
    inputs_BN: Int[Array, "B N"],
    count: Int[Array, ""],
    partial: PartialSegment,
) -> tuple[Float[jax.Array, "B V"], PartialSegment]:
    """Reads the first `count` tokens of `inputs_BN` into a partial segment; the other inputs are padding.

    All inputs, padding included, must fit into the segment.

    Returns:
        Float32 logits of the token after the last one read, and the partial segment with the new tokens.
    """
    model, carry = nnx.merge(graph, parameters), partial.carry
    place = SegmentSlice(partial.position, jnp.asarray(count), inputs_BN.shape[1])
    tokens, window = partial.segments[0].keys_BHND.shape[2], carry.caches[0].keys_BHWD.shape[2]
    biases = [bias(tokens, window, place) for bias in model.biases]
    mask_BN = jnp.broadcast_to(jnp.arange(place.tokens) < place.count, inputs_BN.shape)
    banks = Banks(model.settings, model.memory, [masked(bank, mask_BN) for bank in carry.banks])
    owners = model.settings.bank_layers if carry.banks else ()
    stats, segments = dict(zip(owners, partial.read_stats, strict=True)), []
    search, x_BNE = make_search(model.memory), model.embed(inputs_BN, place)
    for index, layer in enumerate(model.layers):
        inputs = LayerInputs(
            biases[index if len(biases) > 1 else 0] if biases else None,
            carry.caches[index],
            carry.cached_B,
            banks.read_by(1 + index),
            search,
            model.memory,
            partial=PartialInput(partial.segments[index], place),
        )
        x_BNE, segment, update = layer(x_BNE, inputs)
        segments.append(segment)
        if update is not None:
            owner = model.settings.read_from[1 + index]
            stats[owner] = jax.tree.map(jnp.add, stats[owner], update.read_stats._replace(recall=None))
    last_B1E = lax.dynamic_slice_in_dim(x_BNE, place.count - 1, 1, axis=1)
    logits_BV = model.embedding.logits(model.final_norm(last_B1E))[:, 0]
    position = partial.position + place.count
    return logits_BV, PartialSegment(carry, tuple(segments), position, tuple(stats.values()))


def close_segment(partial: PartialSegment, model: ModelSettings, memory: MemorySettings) -> Carry:
    """Writes a segment whose `N` tokens are all read to caches and memory, and returns the carry after it."""
    search, carry = make_search(memory), partial.carry
    every_BN = jnp.ones((len(carry.cached_B), partial.segments[0].keys_BHND.shape[2]), bool)
    caches = tuple(next_cache(*layer) for layer in zip(partial.segments, carry.caches, strict=True))
    owners, banks = model.bank_layers if carry.banks else (), []
    for number, bank, read_stats in zip(owners, carry.banks, partial.read_stats, strict=True):
        segment, cached = (Tokens(*layers[number - 1][:2]) for layers in (partial.segments, carry.caches))
        banks.append(
            write_segment(
                add(masked(bank, every_BN), read_stats, memory.eviction_rule), segment, memory, search, cached
            )
        )
    return Carry(caches, jnp.ones_like(carry.cached_B), tuple(banks))
