"""Settings of the model: `ModelSettings`, gin section `Model`. With the memory's settings they decide every shape."""

import dataclasses
from typing import Literal

from memorizing.errors import InputError
from memorizing.memory.settings import MemorySettings
from memorizing.model.gates import GATES
from memorizing.parallel.mesh import SplitSize
from memorizing.sections import LARGEST_COUNT, check_range

LARGEST_SCALE = 1_000_000
"""Largest scale of embeddings and queries."""


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """The decoder. Defaults are the paper's base model, about 200M parameters.

    Attributes:
        vocabulary_size: number of tokens in the vocabulary (`V`).
        layers: number of layers (`L`).
        embedding_size: width of the model (`E`).
        heads: number of query heads (`H`).
        head_size: features per head (`D`).
        feed_forward_size: width of the feed-forward layers (`F`).
        kv_heads: number of key and value heads, fewer than `heads` for grouped-query attention (arXiv 2305.13245); the
            memory then holds fewer heads, too. None for `heads`.
        memory_layers: layers that read and write a memory, counted from 1. The paper uses layer 9 of 12.
        xl_cache: whether each layer also attends to the keys and values of the previous segment (`W` = `N`, else 0).
        norm: normalization of activations: `rms` (no mean, no bias) or `layer` (LayerNorm, with both).
        norm_epsilon: number added to the mean square or the variance, so that it is never 0.
        attention_bias: projections of attention that have a bias: `none`, `qkv` (queries, keys, values) or `all` (the
            output, too).
        feed_forward: activation of the feed-forward layers: `relu`, `gelu` (exact), `gelu_tanh` (its approximation), or
            `swiglu` (gated, arXiv 2002.05202).
        feed_forward_bias: whether the feed-forward layers have a bias.
        query_key_norm: whether each head's queries and keys get an RMS norm, in all layers.
        positions: position encoding: `t5` (bucketed relative bias), `rope` (rotary), `learned` (a vector per place in a
            segment; allows no XL cache) or `none`. Retrieved tokens have no position in any of them.
        max_positions: with `learned` the number of positions; otherwise the largest number of tokens that a token may
            see locally, itself included. 0 for no limit.
        position_buckets: number of distance buckets of the `t5` bias.
        position_max_distance: distance in tokens from which on all distances share the last bucket of the `t5` bias.
        position_bias_shared: whether all layers share one `t5` table.
        rope_theta: base of the angles of `rope`.
        rope_scaling: how angles shrink for texts longer than those of pretraining: `linear` divides all by
            `rope_factor`; `llama3` divides low frequencies, keeps high ones and interpolates between (Llama 3.1).
        rope_factor: divisor of the angles with `rope_scaling`.
        rope_low_frequency: turns within `rope_original_length` below which `llama3` divides an angle.
        rope_high_frequency: turns within `rope_original_length` above which `llama3` keeps an angle.
        rope_original_length: length of the texts of pretraining, in tokens (`llama3`).
        tie_embeddings: whether one table serves for input tokens and for predictions.
        embedding_scale: factor of the input embeddings; None for `sqrt(E)`.
        banks_of: for each memory layer, the layer whose bank it reads; None for its own. With (9, 9, 9), layers
            (6, 9, 12) share the bank of layer 9. Only banks that a layer reads are written.
        gate: how memory and local context are mixed (see model/gates/): `head` (a learned number per head), `layer`
            (one per layer), `token` (depends on the query), `score` (compares best scores) or `joint` (one softmax).
        gate_bias: initial bias `b` of learned gates, whose value is `sigmoid(b)`: 0.12 for -2, 0.02 for -4.
        normalize_memory_layers: whether memory layers normalize queries and keys, which keeps the keys of older weights
            comparable. If not, scores are divided by `sqrt(D)`, as in other layers.
        query_scale: initial value of the learned scale of normalized queries in memory layers; None for `sqrt(D)`.
        index_size: features per head of a learned index of the memory, for
            `Memory.proposer = 'learned'`; 0 for none. It does not change how the other parameters are trained.
        key_shift: whether keys of memory layers also contain the previous token's key, `k_j + s * k_{j-1}`, with a
            learned `s` per head and feature. `s` starts at 1 in every second head, where queries and keys start with
            the same projection. Not in the paper: smeared keys (arXiv 2209.11895) let a small model learn within
            minutes to copy what follows a match.
        dropout: dropout rate of each sub-layer's output, in training.
        dtype: dtype of activations. Parameters, norms, softmax and loss are float32.
        scan_layers: whether consecutive layers without a memory compile as one repeated layer. Deep models then compile
            several times faster. Stacking the weights at each step costs a little time.
        remat: whether to recompute activations in the backward pass, layer by layer, to save memory.
    """

    vocabulary_size: int = 32_000
    layers: int = 12
    embedding_size: int = 1024
    heads: int = 8
    head_size: int = 128
    feed_forward_size: int = 4096
    kv_heads: int | None = None
    memory_layers: tuple[int, ...] = (9,)
    xl_cache: bool = True
    norm: Literal["rms", "layer"] = "rms"
    norm_epsilon: float = 1e-6
    attention_bias: Literal["none", "qkv", "all"] = "none"
    feed_forward: Literal["relu", "gelu", "gelu_tanh", "swiglu"] = "relu"
    feed_forward_bias: bool = False
    query_key_norm: bool = False
    positions: Literal["t5", "rope", "learned", "none"] = "t5"
    max_positions: int = 0
    position_buckets: int = 32
    position_max_distance: int = 128
    position_bias_shared: bool = True
    rope_theta: float = 10_000.0
    rope_scaling: Literal["none", "linear", "llama3"] = "none"
    rope_factor: float = 1.0
    rope_low_frequency: float = 1.0
    rope_high_frequency: float = 4.0
    rope_original_length: int = 8192
    tie_embeddings: bool = True
    embedding_scale: float | None = None
    banks_of: tuple[int, ...] | None = None
    gate: str = "head"
    gate_bias: float = -2.0
    normalize_memory_layers: bool = True
    query_scale: float | None = None
    index_size: int = 0
    key_shift: bool = False
    dropout: float = 0.0
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    remat: bool = False
    scan_layers: bool = False

    def __post_init__(self):
        check_range(self, 1, 10_000, "layers")
        check_range(self, 1, 2**16, "heads", "head_size")
        check_range(self, 1, 2**24, "embedding_size", "feed_forward_size")
        check_range(self, 1, 2**27, "vocabulary_size")
        check_range(self, 0, LARGEST_COUNT, "max_positions", "position_buckets", "position_max_distance")
        if self.gate not in GATES:
            raise InputError(f"Model.gate = {self.gate!r} is not a gate. Use one of {', '.join(map(repr, GATES))}")
        if not 0 <= self.index_size < self.head_size:
            raise InputError(
                f"Model.index_size = {self.index_size}: must be 0 (no index) or below Model.head_size = "
                f"{self.head_size}; a quarter of that is a good start"
            )
        if self.kv_heads is not None and (self.kv_heads < 1 or self.heads % self.kv_heads):
            fitting = [str(number) for number in range(1, self.heads + 1) if self.heads % number == 0]
            raise InputError(
                f"Model.kv_heads = {self.kv_heads} does not divide Model.heads = {self.heads}. Use "
                f"{', '.join(fitting)}, or None for one per head"
            )
        if not 0 <= self.dropout < 1:
            raise InputError(f"Model.dropout = {self.dropout}: must be at least 0 and below 1")
        self._check_memory_layers()
        self._check_positions()

    def _check_memory_layers(self) -> None:
        for layer in self.memory_layers:
            if not 1 <= layer <= self.layers:
                raise InputError(
                    f"Model.memory_layers = {self.memory_layers}: layer {layer} does not exist. Layers count from 1 "
                    f"to Model.layers = {self.layers}; use () for none"
                )
        if tuple(sorted(set(self.memory_layers))) != self.memory_layers:
            raise InputError(
                f"Model.memory_layers = {self.memory_layers}: must name layers once, in rising order. Sort them and "
                "remove duplicates"
            )
        if self.banks_of is not None and len(self.banks_of) != len(self.memory_layers):
            raise InputError(
                f"Model.banks_of = {self.banks_of}: must name a layer for each of Model.memory_layers = "
                f"{self.memory_layers}, or be None, so that each has its own bank"
            )
        for layer in self.banks_of or ():
            if layer not in self.memory_layers:
                raise InputError(
                    f"Model.banks_of = {self.banks_of}: layer {layer} has no bank. Use layers of "
                    f"Model.memory_layers = {self.memory_layers}"
                )

    def _check_positions(self) -> None:
        if self.position_buckets < 2 or self.position_buckets % 2:
            raise InputError(
                f"Model.position_buckets = {self.position_buckets}: must be even and at least 2; T5 uses 32"
            )
        if self.position_max_distance <= self.position_buckets // 2:
            raise InputError(
                f"Model.position_max_distance = {self.position_max_distance}: must exceed half of "
                f"Model.position_buckets = {self.position_buckets}, because near distances have their own buckets"
            )
        if self.positions == "rope" and self.head_size % 2:
            raise InputError(
                f"Model.head_size = {self.head_size}: must be even, because rotary positions rotate pairs of features"
            )
        if not 0 < self.norm_epsilon <= 1:
            raise InputError(
                f"Model.norm_epsilon = {self.norm_epsilon}: must be above 0 and at most 1, because a larger number "
                "shrinks every activation to zero. 1e-6 is usual"
            )
        for name in ("embedding_scale", "query_scale"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= LARGEST_SCALE:
                raise InputError(
                    f"Model.{name} = {value}: must be above 0 and at most {LARGEST_SCALE:,}, or activations overflow. "
                    f"None is the usual scale"
                )
        for name in ("rope_theta", "rope_factor", "rope_original_length"):
            if getattr(self, name) <= 0:
                raise InputError(f"Model.{name} = {getattr(self, name)}: must be above 0")
        if not 0 < self.rope_low_frequency < self.rope_high_frequency:
            raise InputError(
                f"Model.rope_low_frequency = {self.rope_low_frequency}: must be above 0, and below "
                f"Model.rope_high_frequency = {self.rope_high_frequency}"
            )
        if self.max_positions < (self.positions == "learned"):
            raise InputError(
                f"Model.max_positions = {self.max_positions} is too small: Model.positions = 'learned' needs at least "
                "Batch.segment_length"
            )
        if self.positions == "learned" and self.xl_cache:
            raise InputError(
                "Model.positions = 'learned' counts from the start of each segment, which is wrong for tokens of an XL"
                " cache. Set Model.xl_cache = False (to evaluate: --xl_cache=off), or use 't5' or 'rope'"
            )

    def check_segment_length(self, tokens: int, sees_all: bool = False) -> None:
        """Rejects segments in which a token sees more than `max_positions` tokens; with `sees_all`, the whole cache."""
        seen = tokens + (tokens if sees_all else 1) * self.xl_cache
        if self.max_positions and seen > self.max_positions:
            fits = self.max_positions // 2 if sees_all and self.xl_cache else self.max_positions - self.xl_cache
            raise InputError(
                f"Batch.segment_length = {tokens}: with Model.xl_cache = {self.xl_cache} a token sees {seen} tokens, "
                f"but the model has Model.max_positions = {self.max_positions}. Use at most {fits}"
            )

    @property
    def kv_head_count(self) -> int:
        """Heads of keys and values, and so of caches and banks."""
        return self.kv_heads or self.heads

    @property
    def read_from(self) -> dict[int, int]:
        """The layer whose bank each memory layer reads, by memory layer, lowest first."""
        return dict(zip(self.memory_layers, self.banks_of or self.memory_layers, strict=True))

    @property
    def bank_layers(self) -> tuple[int, ...]:
        """The layers that have a bank, lowest first."""
        return tuple(sorted(set(self.read_from.values())))

    @property
    def group(self) -> int:
        """Query heads that share a key head (`G`)."""
        return self.heads // self.kv_head_count


def split_sizes(
    model: ModelSettings, memory: MemorySettings, segment_length: int, rows: int, rows_setting: str = "Batch.size"
) -> list[SplitSize]:
    """Returns all sizes that a mesh splits, for `open_mesh`. `rows_setting` names the setting that decides `rows`."""
    return [
        SplitSize("B", rows_setting, rows),
        SplitSize("N", "Batch.segment_length", segment_length),
        SplitSize("M", "Memory.size", memory.size),
        SplitSize("H", "Model.heads", model.heads),
        SplitSize("F", "Model.feed_forward_size", model.feed_forward_size),
        SplitSize("V", "Model.vocabulary_size", model.vocabulary_size),
        SplitSize("E", "Model.embedding_size", model.embedding_size),
        SplitSize("H", "Model.kv_heads", model.kv_head_count),
    ]
