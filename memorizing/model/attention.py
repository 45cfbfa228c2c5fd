"""Attention of one layer: local attention over the segment and the XL cache, and in memory layers the gate to memory.

    local   = attention(q, [cache; k], [cache; v]) with position bias
    remote  = attention(q, retrieved keys, retrieved values)          # memory_attention.py
    out     = g * remote + (1 - g) * local                            # gates.py

Each token attends to itself and the `W` tokens before it (to all of the cache, where the memory holds just what is no
longer in it: `Memory.writes = 'beyond_cache'`); without a cache, to its segment so far. N = W = 3:

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
from memorizing.model.carry import Cache
from memorizing.model.gates import COMPARING, Read, Scores, compared, mixed, opened
from memorizing.model.groups import products, weighted_sums
from memorizing.model.layers import RMSNorm, normal_parameter
from memorizing.model.learned_index import LearnedIndex, first_index
from memorizing.model.memory_attention import attend_to_memory
from memorizing.model.positions import Part, angles, distances, frequencies, rotate, rows_of
from memorizing.model.settings import ModelSettings
from memorizing.parallel.mesh import constrain
from memorizing.shapes import Array


class Segment(NamedTuple):
    """Keys and values of one layer for a segment's tokens; and its last key before the shift.

    While the segment is read part by part, what lies behind the part read last means nothing, and no token sees it.
    """

    keys_BHND: Float[jax.Array, "B H N D"]
    values_BHND: Float[jax.Array, "B H N D"]
    last_key_BHD: Float[jax.Array, "B H D"]


class LayerMemoryUpdate(NamedTuple):
    """What a memory layer has to say of a segment: what is to be written, once all have read; and of its own reading.

    Attributes:
        segment: its keys and values.
        cached: those of the segment before, which leave the XL cache with this one.
        noticed: what the bank that was read keeps account of.
        gate_BHN: how far its gate was open; 0 where nothing was found.
    """

    segment: Segment
    cached: Tokens
    read_stats: ReadStats
    gate_BHN: Float[jax.Array, "B H N"]


class Attention(nnx.Module):
    """One layer's attention, local and (in memory layers) remote. Writes into no bank: others may read it too."""

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
        self.normalizes, self.gate_kind = has_memory and settings.normalize_memory_layers, settings.gate
        self.has_index = has_memory and settings.index_size > 0
        if has_memory:
            if self.has_index:
                first = first_index(kv_heads, size, settings.index_size)
                self.index_query_HDP, self.index_key_HDP = (nnx.Param(part) for part in first)
            if settings.key_shift:
                # Half of the heads start out seeing each key's predecessor and asking as keys are made, so that before
                # anything is learned they find what followed a token the last time. All may learn otherwise.
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
            if settings.gate in ("head", "token"):
                self.gate_H = nnx.Param(jnp.full(heads, settings.gate_bias, jnp.float32))
            if settings.gate == "token":  # starts as `head`
                self.gate_HD = nnx.Param(jnp.zeros((heads, size), jnp.float32))
            if settings.gate == "layer":
                self.gate = nnx.Param(jnp.asarray(settings.gate_bias, jnp.float32))

    def __call__(
        self,
        x_BNE: Float[jax.Array, "B N E"],
        bias_PHNJ: Float[jax.Array, "P H N J"] | None,
        cache: Cache,
        cached_B: Bool[jax.Array, "B"],
        bank: Bank | None,
        search: Search,
        memory: MemorySettings,
        negative_rows: int = 0,
        mask_BN: Bool[Array, "B N"] | None = None,
    ) -> tuple[Float[jax.Array, "B N E"], Cache, LayerMemoryUpdate | None]:
        """Reads a whole segment; also gives the cache behind it, and what is for the memory, where there is a bank."""
        before_BHD = jnp.where(cached_B[:, None, None], cache.last_key_BHD.astype(x_BNE.dtype), 0)
        query, segment = self._project(x_BNE, before_BHD)
        out, remembered = self._attend(
            query, segment, bias_PHNJ, cache, cached_B, bank, search, memory, None, negative_rows, mask_BN
        )
        return out, close(remembered.segment if remembered else segment, cache), remembered

    def extend(
        self,
        x_BNE: Float[jax.Array, "B N E"],
        bias_PHNJ: Float[jax.Array, "P H N J"] | None,
        cache: Cache,
        cached_B: Bool[jax.Array, "B"],
        bank: Bank | None,
        segment: Segment,
        part: Part,
        search: Search,
        memory: MemorySettings,
    ) -> tuple[Float[jax.Array, "B N E"], Segment, ReadStats | None]:
        """Reads a part of a segment, behind what was read of it before, and writes it into the `segment`.

        Cache and bank are those before the segment, and stay so until it is full; what is noticed of the bank is told.
        """
        query, new = self._project(x_BNE, segment.last_key_BHD, part.count - 1)
        keys_BHND, values_BHND = (
            lax.dynamic_update_slice_in_dim(old, written, part.first, axis=2)
            for old, written in zip(segment[:2], new[:2], strict=True)
        )
        segment = Segment(keys_BHND, values_BHND, new.last_key_BHD)
        out, remembered = self._attend(query, segment, bias_PHNJ, cache, cached_B, bank, search, memory, part)
        return out, remembered.segment if remembered else segment, remembered.read_stats if remembered else None

    def _project(self, x_BNE, before_BHD, last=-1):
        """Queries, and keys and values as they are attended to; `before_BHD` is the key of the token before."""
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
        return query, Segment(key, value, last_key_BHD)

    def _attend(
        self, query, segment, bias_PHNJ, cache, cached_B, bank, search, memory, part=None, negative_rows=0, mask_BN=None
    ):
        """What the queries read, here and in memory; and what is to be remembered of the segment, once that is read."""
        dtype, remembered = query.dtype, None
        keys_BHJD, values_BHJD = (
            jnp.concatenate([constrain(cached, "BH_D").astype(dtype), new], axis=2)
            for cached, new in zip(cache[:2], segment[:2], strict=True)
        )
        cached, sees_all = cache.keys_BHWD.shape[2], bank is not None and memory.writes == "beyond_cache"
        visible_BNJ = local_mask(keys_BHJD.shape[2] - cached, cached, cached_B, part, sees_all)
        local = self._local(query, keys_BHJD, values_BHJD, bias_PHNJ, cached, visible_BNJ, part)
        out = local.out_BHND
        if bank is not None:
            # Queried before this segment is written, so that nothing in the memory can leak the future.
            remote, found_BHN, read_stats = attend_to_memory(
                query,
                bank,
                search,
                memory.retrieved,
                index=LearnedIndex(self.index_query_HDP[...], self.index_key_HDP[...]) if self.has_index else None,
                mask_BN=mask_BN,
                write_every=memory.write_every,
                negative_rows=negative_rows,
            )
            if self.gate_kind not in COMPARING:
                remote = remote._replace(scores=None)
            # Written only when all is read: else the compiler, free to write first, would copy the memory to be safe.
            (remote, found_BHN), key, value = lax.optimization_barrier(
                ((remote, found_BHN), segment.keys_BHND, segment.values_BHND)
            )
            gate_BHN = opened(self._logit(query, local, remote), found_BHN)
            segment = segment._replace(keys_BHND=key, values_BHND=value)
            remembered = LayerMemoryUpdate(segment, Tokens(*cache[:2]), read_stats, gate_BHN)
            out = mixed(gate_BHN, remote.out_BHND, out)
        out = jnp.einsum("BHND,HDE->BNE", out, self.out_HDE[...].astype(dtype))
        if self.has_out_bias:
            out = out + self.out_bias_E[...].astype(dtype)
        return constrain(out, "BNE"), remembered

    def _logit(self, query_BHND, local, remote):
        """Of the gate, for each head and token, as far as they differ."""
        match self.gate_kind:
            case "head":
                return self.gate_H[...][:, None]
            case "layer":
                return self.gate[...]
            case "token":
                query, weight = query_BHND.astype(jnp.float32), self.gate_HD[...].astype(jnp.float32)
                return jnp.einsum("BHND,HD->BHN", query, weight) + self.gate_H[...][:, None]
            case kind:
                return compared(kind, local.scores, remote.scores)

    def _local(self, query_BHND, keys_BHJD, values_BHJD, bias_PHNJ, cached, visible_BNJ, part):
        if self.frequencies is not None:
            sine_Jd, cosine_Jd = angles(keys_BHJD.shape[2], self.frequencies)
            query_BHND = rotate(query_BHND, rows_of(sine_Jd[cached:], part), rows_of(cosine_Jd[cached:], part))
            keys_BHJD = rotate(keys_BHJD, sine_Jd, cosine_Jd)
        scores_BHNJ = products(query_BHND, keys_BHJD)
        if bias_PHNJ is not None:
            of_parts = scores_BHNJ.reshape(bias_PHNJ.shape[0], -1, *scores_BHNJ.shape[1:])
            scores_BHNJ = (of_parts + bias_PHNJ[:, None]).reshape(scores_BHNJ.shape)
        scores_BHNJ = jnp.where(visible_BNJ[:, None], scores_BHNJ, -jnp.inf)
        weights_BHNJ = jax.nn.softmax(scores_BHNJ, axis=-1)
        out_BHND = weighted_sums(weights_BHNJ.astype(values_BHJD.dtype), values_BHJD)
        if self.gate_kind not in COMPARING:
            return Read(out_BHND, None)
        return Read(out_BHND, Scores(scores_BHNJ.max(-1), jax.nn.logsumexp(scores_BHNJ, axis=-1)))


def close(segment: Segment, cache: Cache) -> Cache:
    """What one layer keeps of a segment that is full as its XL cache."""
    first = segment.keys_BHND.shape[2] - cache.keys_BHWD.shape[2]
    kept = Cache(segment.keys_BHND[:, :, first:], segment.values_BHND[:, :, first:], segment.last_key_BHD)
    return jax.tree.map(lambda new, old: lax.stop_gradient(new).astype(old.dtype), kept, cache)


def local_mask(
    tokens: int, cached: int, cached_B: Bool[jax.Array, "B"], part: Part | None = None, sees_all: bool = False
) -> Bool[jax.Array, "B N J"]:
    """Which keys each token of a segment (or of a part of it) may attend to: drawn at the top of this file.

    With `sees_all` each sees all of the cache.
    """
    distance_NJ = distances(tokens, cached)
    window_NJ = (distance_NJ >= 0) & (sees_all | (distance_NJ <= (cached or tokens)))
    from_cache_J = jnp.arange(cached + tokens) < cached
    return jnp.asarray(rows_of(window_NJ, part))[None] & (~from_cache_J[None, None, :] | cached_B[:, None, None])


def l2_normalize(x: Float[jax.Array, "*any D"]) -> Float[jax.Array, "*any D"]:
    """Scales vectors to length 1, computed in float32; the zero vector stays zero."""
    wide = x.astype(jnp.float32)
    return (wide * lax.rsqrt(jnp.sum(wide * wide, axis=-1, keepdims=True) + 1e-12)).astype(x.dtype)
