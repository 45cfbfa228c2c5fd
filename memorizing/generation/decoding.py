"""Reading within a segment, a few tokens at a time: what generation needs, and training does not.

    opened         = open_segment(carry, N)
    logits, opened = extend(graph, parameters, inputs, count, opened)       # until N tokens are read
    carry          = close_segment(opened, model, memory)

Between two calls are kept the carry before the segment, and in each layer keys and values of the segment so far, in `N`
slots: so all calls of as many tokens have the same shapes. What comes out is what the whole segment read at once gives,
but for float rounding: a token sees the caches and the memory from before its segment, and its segment up to itself.
And but for a learned index (`Memory.proposer = 'learned'`): few queries search all keys, many what it proposes.
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
from memorizing.memory.writing import Tokens, write
from memorizing.model.attention import Segment, close
from memorizing.model.banks import Banks
from memorizing.model.carry import Carry
from memorizing.model.parameters import Parameters
from memorizing.model.positions import Part
from memorizing.model.settings import ModelSettings
from memorizing.shapes import Array


class PartialSegment(NamedTuple):
    """A segment that is being read.

    Attributes:
        carry: before it.
        segments: keys and values of its tokens, a layer each.
        position: how many of its tokens are read.
        noticed: what was noticed of each bank while they were.
    """

    carry: Carry
    segments: tuple[Segment, ...]
    position: Int[jax.Array, ""]
    read_stats: tuple[ReadStats, ...]


def open_segment(carry: Carry, segment_length: int) -> PartialSegment:
    """A segment of which nothing is read yet, of the document that `carry` is of."""

    def empty(cache) -> Segment:
        rows, heads, _, size = cache.keys_BHWD.shape
        nothing = jnp.zeros((rows, heads, segment_length, size), cache.keys_BHWD.dtype)
        last_key_BHD = jnp.where(carry.cached_B[:, None, None], cache.last_key_BHD, 0)
        return Segment(nothing, nothing, last_key_BHD)

    nothing = tuple(ReadStats(None, _unused(bank)) for bank in carry.banks)
    return PartialSegment(carry, tuple(map(empty, carry.caches)), jnp.zeros((), jnp.int32), nothing)


def _unused(bank: Bank) -> Int[jax.Array, "B M"] | None:
    used_BM = None if bank.slot_table is None else bank.slot_table.used_BM
    return None if used_BM is None else jnp.zeros(used_BM.shape, jnp.int32)


def extend(
    graph: nnx.GraphDef,
    parameters: Parameters,
    inputs_BN: Int[Array, "B N"],
    count: Int[Array, ""],
    opened: PartialSegment,
) -> tuple[Float[jax.Array, "B V"], PartialSegment]:
    """Reads the next `count` inputs of a segment: the first of those given, the others being padding.

    All of those given must fit into the segment. Returns float32 logits of the token after the last one read.
    """
    model = nnx.merge(graph, parameters)
    search, carry = make_search(model.memory), opened.carry
    segments, read_stats = (
        [],
        dict(zip(model.settings.bank_layers if carry.banks else (), opened.read_stats, strict=True)),
    )
    part = Part(opened.position, jnp.asarray(count), inputs_BN.shape[1])
    tokens, window = opened.segments[0].keys_BHND.shape[2], carry.caches[0].keys_BHWD.shape[2]
    biases = [bias(tokens, window, part) for bias in model.biases]
    mask_BN = jnp.broadcast_to(jnp.arange(part.tokens) < part.count, inputs_BN.shape)
    banks = Banks(model.settings, model.memory, [masked(bank, mask_BN) for bank in carry.banks])
    x_BNE = model.read(inputs_BN, part)
    for index, layer in enumerate(model.layers):
        bias = biases[index if len(biases) > 1 else 0] if biases else None
        bank, cache = banks.read_by(1 + index), carry.caches[index]
        x_BNE, segment, of_bank = layer.extend(
            x_BNE, bias, cache, carry.cached_B, bank, opened.segments[index], part, search, model.memory
        )
        segments.append(segment)
        if of_bank is not None:
            owner = model.settings.read_from[1 + index]
            read_stats[owner] = jax.tree.map(jnp.add, read_stats[owner], of_bank._replace(recall=None))
    last_B1E = lax.dynamic_slice_in_dim(x_BNE, part.count - 1, 1, axis=1)
    logits_BV = model.embedding.logits(model.final_norm(last_B1E))[:, 0]
    return logits_BV, PartialSegment(carry, tuple(segments), opened.position + part.count, tuple(read_stats.values()))


def close_segment(opened: PartialSegment, model: ModelSettings, memory: MemorySettings) -> Carry:
    """The carry behind a segment of which all `N` tokens are read: its keys and values go to caches and memory."""
    search, carry = make_search(memory), opened.carry
    every_BN = jnp.ones((len(carry.cached_B), opened.segments[0].keys_BHND.shape[2]), bool)
    caches = tuple(close(segment, cache) for segment, cache in zip(opened.segments, carry.caches, strict=True))
    banks = []
    for number, bank, read_stats in zip(
        model.bank_layers if carry.banks else (), carry.banks, opened.read_stats, strict=True
    ):
        segment, cached = (Tokens(*of[number - 1][:2]) for of in (opened.segments, carry.caches))
        banks.append(write(add(masked(bank, every_BN), read_stats), segment, cached, memory, search))
    return Carry(caches, jnp.ones_like(carry.cached_B), tuple(banks))
