"""Attention of one layer: local attention over the segment and the XL cache, and in memory layers the gate to memory.

    local   = attention(q, [cache; k], [cache; v]) with position bias
    remote  = attention(q, retrieved keys, retrieved values)          # memory_attention.py
    out     = g * remote + (1 - g) * local                            # gates/

Each token attends to itself and the `W` tokens before it; without a cache, to its segment so far. With
`Memory.writes = 'beyond_cache'` it attends to all of the cache, since the memory holds only what has left the cache.
N = W = 3:

              cache      segment
    query 0   x x x      x . .
    query 1   . x x      x x .
    query 2   . . x      x x x
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Bool, Float

from memorizing.memory.bank import Bank, ReadStats
from memorizing.memory.search import Search
from memorizing.memory.settings import MemorySettings
from memorizing.memory.writing import Tokens
from memorizing.model.attention_output import AttentionOutput, ScoreSummary
from memorizing.model.carry import Cache, LayerSegment
from memorizing.model.gates import GATES, gate_value, mix
from memorizing.model.groups import inner_products, weighted_sums
from memorizing.model.intermediates import Collect, LayerIntermediates, Lookups
from memorizing.model.layers import RMSNorm, normal_parameter
from memorizing.model.learned_index import LearnedIndex, first_index
from memorizing.model.memory_attention import ReadOptions, attend_to_memory
from memorizing.model.positions import SegmentSlice, angles, distances, frequencies, rotate, slice_rows
from memorizing.model.settings import ModelSettings
from memorizing.parallel.mesh import constrain
from memorizing.shapes import Array


class PartialInput(NamedTuple):
    """A layer's keys and values of a partial segment, and the slice of tokens that is read next."""

    segment: LayerSegment
    slice: SegmentSlice


class LayerInputs(NamedTuple):
    """Inputs of a layer next to the stream.

    Attributes:
        bias_PHNJ: bias of local attention scores, for each part of the rows; None if positions need none.
        cache: the layer's XL cache.
        cached_B: whether the row's cache may be read.
        bank: the external memory that the layer reads; None for none.
        mask_BN: the real tokens of the segment, for a learned index to learn from; None if nothing is learned.
        partial: tokens of the segment that were read earlier, in token-by-token decoding; None for a whole segment.
        search: finds the neighbors in the bank.
        memory: settings of the memory.
        negative_rows: see `attend_to_memory`.
        collect: intermediate values to return.
    """

    bias_PHNJ: Float[jax.Array, "P H N J"] | None
    cache: Cache
    cached_B: Bool[jax.Array, "B"]
    bank: Bank | None
    search: Search
    memory: MemorySettings
    mask_BN: Bool[Array, "B N"] | None = None
    partial: PartialInput | None = None
    negative_rows: int = 0
    collect: Collect = Collect()


class LayerMemoryUpdate(NamedTuple):
    """Data that a memory layer passes to its memory after reading a segment.

    Attributes:
        segment: keys and values of the segment, to be written once all layers have read the bank.
        cached: keys and values of the previous segment, which leave the XL cache now.
        read_stats: statistics of the layer's read.
        intermediates: values that the caller asked for.
    """

    segment: LayerSegment
    cached: Tokens
    read_stats: ReadStats
    intermediates: LayerIntermediates


class Attention(nnx.Module):
    """One layer's attention: local, and in memory layers also remote."""

    def __init__(self, settings: ModelSettings, has_memory: bool, rngs: nnx.Rngs):
        embedding, heads, size = settings.embedding_size, settings.heads, settings.head_size
        kv_heads = settings.kv_head_count
        self.frequencies = frequencies(settings) if settings.positions == "rope" else None
        self.query_EHD = normal_parameter(rngs, (embedding, heads, size), embedding)
        self.key_EHD = normal_parameter(rngs, (embedding, kv_heads, size), embedding)
        self.value_EHD = normal_parameter(rngs, (embedding, kv_heads, size), embedding)
        self.out_HDE = normal_parameter(rngs, (heads, size, embedding), heads * size)
        self.has_bias, self.has_out_bias = settings.attention_bias != "none", settings.attention_bias == "all"
        if self.has_bias:
            self.query_bias_HD, self.key_bias_HD, self.value_bias_HD = (
                nnx.Param(jnp.zeros(weight.shape[1:], jnp.float32))
                for weight in (self.query_EHD, self.key_EHD, self.value_EHD)
            )
        if self.has_out_bias:
            self.out_bias_E = nnx.Param(jnp.zeros(embedding, jnp.float32))
        self.norms_heads = settings.query_key_norm
        if self.norms_heads:
            self.query_norm, self.key_norm = (RMSNorm(size, settings.norm_epsilon) for _ in range(2))
        self.has_memory, self.shifts_keys = has_memory, has_memory and settings.key_shift
        self.normalizes = has_memory and settings.normalize_memory_layers
        self.has_index = has_memory and settings.index_size > 0
        if has_memory:
            if self.has_index:
                first = first_index(kv_heads, size, settings.index_size)
                self.index_query_HDP, self.index_key_HDP = (nnx.Param(part) for part in first)
            if settings.key_shift:
                # Half of the heads start with keys that include their predecessor, and queries made like keys: even
                # untrained, they find what followed a token the last time. Training may change both.
                shifted_H = jnp.arange(kv_heads) % 2
                self.shift_HD = nnx.Param(jnp.tile(shifted_H.astype(jnp.float32)[:, None], size))
                self.query_EHD[...] = jnp.where(
                    jnp.repeat(shifted_H, settings.group)[:, None],
                    jnp.repeat(self.key_EHD[...], settings.group, axis=1),
                    self.query_EHD[...],
                )
            if self.normalizes:
                scale = size**0.5 if settings.query_scale is None else settings.query_scale
                self.scale_H = nnx.Param(jnp.full(heads, scale, jnp.float32))
            self.gate = GATES[settings.gate](heads, size, settings.gate_bias)

    def __call__(
        self, x_BNE: Float[jax.Array, "B N E"], inputs: LayerInputs
    ) -> tuple[Float[jax.Array, "B N E"], LayerSegment, LayerMemoryUpdate | None]:
        """Reads a segment, or the next slice of a partial one. Writes into no bank: other layers may read it too.

        Returns:
            The layer's addition to the stream; keys and values of the segment read so far; and what to write to the
            memory, None without a bank.
        """
        query, segment = self._project_segment(x_BNE, inputs)
        keys_BHJD, values_BHJD = (
            jnp.concatenate([constrain(cached, "BH_D").astype(query.dtype), new], axis=2)
            for cached, new in zip(inputs.cache[:2], segment[:2], strict=True)
        )
        local = self._attend_locally(query, keys_BHJD, values_BHJD, inputs)
        out_BHND, update = local.out_BHND, None
        if inputs.bank is not None:
            out_BHND, update = self._attend_remotely(query, segment, local, inputs.bank, inputs)
            segment = update.segment
        out_BNE = jnp.einsum("BHND,HDE->BNE", out_BHND, self.out_HDE[...].astype(query.dtype))
        if self.has_out_bias:
            out_BNE = out_BNE + self.out_bias_E[...].astype(query.dtype)
        return constrain(out_BNE, "BNE"), segment, update

    def _project_segment(self, x_BNE, inputs: LayerInputs) -> tuple[Float[jax.Array, "B H N D"], LayerSegment]:
        """Returns the queries, and keys and values of the segment so far."""
        if inputs.partial is None:
            last_key_BHD = inputs.cache.last_key_BHD.astype(x_BNE.dtype)
            return self._project(x_BNE, jnp.where(inputs.cached_B[:, None, None], last_key_BHD, 0))
        before, place = inputs.partial
        query, new = self._project(x_BNE, before.last_key_BHD, place.count - 1)
        keys_BHND, values_BHND = (
            lax.dynamic_update_slice_in_dim(old, written, place.first, axis=2)
            for old, written in zip(before[:2], new[:2], strict=True)
        )
        return query, LayerSegment(keys_BHND, values_BHND, new.last_key_BHD)

    def _project(self, x_BNE, before_BHD, last=-1):
        """Projects to queries, and to keys and values ready for attention.

        `before_BHD` is the key of the token before the first, `last` the place of the last real token.
        """
        dtype = x_BNE.dtype
        query, key, value = (
            jnp.einsum("BNE,EHD->BHND", x_BNE, weight[...].astype(dtype))
            for weight in (self.query_EHD, self.key_EHD, self.value_EHD)
        )
        if self.has_bias:
            biases_HD = (self.query_bias_HD, self.key_bias_HD, self.value_bias_HD)
            query, key, value = (
                part + bias_HD[...].astype(dtype)[:, None, :]
                for part, bias_HD in zip((query, key, value), biases_HD, strict=True)
            )
        if self.norms_heads:
            query, key = self.query_norm(query), self.key_norm(key)
        query = constrain(query, "BHND")
        # Every token's key and value are needed by all later ones: not split over the segment.
        key, value = constrain(key, "BH_D"), constrain(value, "BH_D")
        last_key_BHD = lax.stop_gradient(key[:, :, last])
        if self.shifts_keys:
            before = jnp.concatenate([before_BHD[:, :, None], key[:, :, :-1]], axis=2)
            key = key + self.shift_HD[...].astype(dtype)[:, None, :] * before
        if self.normalizes:
            # Normalized keys stay comparable with queries of later weights, which is what a stale memory needs.
            query = l2_normalize(query) * self.scale_H[...].astype(dtype)[:, None, None]
            key = l2_normalize(key)
        else:
            query = query * query.shape[-1] ** -0.5
        return query, LayerSegment(key, value, last_key_BHD)

    def _attend_remotely(
        self, query_BHND, segment: LayerSegment, local: AttentionOutput, bank: Bank, inputs: LayerInputs
    ) -> tuple[Float[jax.Array, "B H N D"], LayerMemoryUpdate]:
        """Mixes what the memory holds into the local output; also returns what to write to the memory."""
        memory, collect = inputs.memory, inputs.collect
        # The bank is read before this segment is written, so that nothing in the memory can leak the future.
        read = attend_to_memory(
            query_BHND,
            bank,
            inputs.search,
            memory.retrieved,
            index=LearnedIndex(self.index_query_HDP[...], self.index_key_HDP[...]) if self.has_index else None,
            mask_BN=inputs.mask_BN,
            options=ReadOptions(memory.write_every, memory.eviction_rule, inputs.negative_rows, collect.lookups),
        )
        remote = read.output if self.gate.compares_scores else read.output._replace(scores=None)
        # The compiler could write the segment first, and would then copy the memory: the barrier forbids that.
        (remote, found_BHN), key, value = lax.optimization_barrier(
            ((remote, read.found_BHN), segment.keys_BHND, segment.values_BHND)
        )
        gate_BHN = gate_value(self.gate.logit(query_BHND, local, remote), found_BHN)
        segment = segment._replace(keys_BHND=key, values_BHND=value)
        intermediates = LayerIntermediates(
            gate_BHN if collect.gates else None,
            None if read.neighbors is None else Lookups(lax.stop_gradient(query_BHND), read.neighbors),
        )
        update = LayerMemoryUpdate(segment, Tokens(*inputs.cache[:2]), read.stats, intermediates)
        return mix(gate_BHN, remote.out_BHND, local.out_BHND), update

    def _attend_locally(self, query_BHND, keys_BHJD, values_BHJD, inputs: LayerInputs) -> AttentionOutput:
        """Attends to the XL cache and the segment."""
        cached = inputs.cache.keys_BHWD.shape[2]
        place = None if inputs.partial is None else inputs.partial.slice
        sees_all = inputs.bank is not None and inputs.memory.writes == "beyond_cache"
        visible_BNJ = local_mask(keys_BHJD.shape[2] - cached, cached, inputs.cached_B, place, sees_all)
        if self.frequencies is not None:
            sine_Jd, cosine_Jd = angles(keys_BHJD.shape[2], self.frequencies)
            query_BHND = rotate(query_BHND, slice_rows(sine_Jd[cached:], place), slice_rows(cosine_Jd[cached:], place))
            keys_BHJD = rotate(keys_BHJD, sine_Jd, cosine_Jd)
        scores_BHNJ = inner_products(query_BHND, keys_BHJD)
        if (bias_PHNJ := inputs.bias_PHNJ) is not None:
            by_part = scores_BHNJ.reshape(bias_PHNJ.shape[0], -1, *scores_BHNJ.shape[1:])
            scores_BHNJ = (by_part + bias_PHNJ[:, None]).reshape(scores_BHNJ.shape)
        scores_BHNJ = jnp.where(visible_BNJ[:, None], scores_BHNJ, -jnp.inf)
        weights_BHNJ = jax.nn.softmax(scores_BHNJ, axis=-1)
        out_BHND = weighted_sums(weights_BHNJ.astype(values_BHJD.dtype), values_BHJD)
        if inputs.bank is None or not self.gate.compares_scores:
            return AttentionOutput(out_BHND, None)
        return AttentionOutput(out_BHND, ScoreSummary(scores_BHNJ.max(-1), jax.nn.logsumexp(scores_BHNJ, axis=-1)))


def local_mask(
    tokens: int, cached: int, cached_B: Bool[jax.Array, "B"], place: SegmentSlice | None = None, sees_all: bool = False
) -> Bool[jax.Array, "B N J"]:
    """Returns which keys each token of a segment (or of a slice of it) may attend to; drawn at the top of this file.

    With `sees_all`, each token sees all of the cache.
    """
    distance_NJ = distances(tokens, cached)
    window_NJ = (distance_NJ >= 0) & (sees_all | (distance_NJ <= (cached or tokens)))
    from_cache_J = jnp.arange(cached + tokens) < cached
    return jnp.asarray(slice_rows(window_NJ, place))[None] & (~from_cache_J[None, None, :] | cached_B[:, None, None])


def l2_normalize(x: Float[jax.Array, "*any D"]) -> Float[jax.Array, "*any D"]:
    """Scales vectors to length 1, computed in float32; the zero vector stays zero."""
    wide = x.astype(jnp.float32)
    return (wide * lax.rsqrt(jnp.sum(wide * wide, axis=-1, keepdims=True) + 1e-12)).astype(x.dtype)
