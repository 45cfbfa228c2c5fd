"""The model: a stack of layers that reads one segment and carries caches and memories to the next.

    graph, parameters = create_model(model, memory, seed)
    carry             = empty_carry(model, memory, rows, segment_length)
    logits, carry     = apply_model(graph, parameters, batch, carry)        # for each segment

All state beyond a segment is in `Carry`, passed in and returned. Training and evaluation differ only in the carry they
hold. Where to read next: `attention.py` (local attention and gate), then `memory_attention.py`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Int

from memorizing.memory.bank import clear, masked
from memorizing.memory.search_choice import make_search
from memorizing.memory.settings import MemorySettings
from memorizing.model.attention import Attention, LayerInputs, LayerMemoryUpdate
from memorizing.model.banks import Banks
from memorizing.model.carry import Cache, Carry, LayerSegment, next_cache
from memorizing.model.intermediates import COLLECT_NOTHING, Collect, Intermediates
from memorizing.model.layers import Embedding, FeedForward, make_norm
from memorizing.model.learned_index import GRADIENT
from memorizing.model.parameters import Parameters
from memorizing.model.positions import LearnedPositions, RelativeBias, SegmentSlice
from memorizing.model.retrieval import RETRIEVED
from memorizing.model.settings import ModelSettings
from memorizing.parallel.mesh import PARAMETER_RULES, constrain_tree
from memorizing.shapes import Array, Batch

type Dropout = Callable[[jax.Array, int], jax.Array]
"""Drops features of an array; the number tells apart the calls within a layer."""


def no_dropout(x: jax.Array, call: int) -> jax.Array:
    """Returns `x` unchanged."""
    return x


class Layer(nnx.Module):
    """Pre-norm attention and feed-forward, each added to the stream."""

    def __init__(self, settings: ModelSettings, number: int, rngs: nnx.Rngs):
        self.attention_norm = make_norm(settings)
        self.attention = Attention(settings, number in settings.memory_layers, rngs)
        self.feed_forward_norm = make_norm(settings)
        self.feed_forward = FeedForward(settings, rngs)

    def __call__(
        self, x_BNE: Float[jax.Array, "B N E"], inputs: LayerInputs, dropout: Dropout = no_dropout
    ) -> tuple[Float[jax.Array, "B N E"], LayerSegment, LayerMemoryUpdate | None]:
        """Returns the stream after this layer; for the rest see `Attention`."""
        attended_BNE, segment, update = self.attention(self.attention_norm(x_BNE), inputs)
        x_BNE = x_BNE + dropout(attended_BNE, 0)
        return x_BNE + dropout(self.feed_forward(self.feed_forward_norm(x_BNE)), 1), segment, update


type LayerFunction = Callable[..., tuple[jax.Array, Cache, LayerMemoryUpdate | None]]
"""A layer as a pure function of (parameters, stream, bias, cache, bank, layer index)."""


class Transformer(nnx.Module):
    """A decoder whose layers `settings.memory_layers` also attend to an external memory."""

    def __init__(self, settings: ModelSettings, memory: MemorySettings, rngs: nnx.Rngs):
        self.settings, self.memory = settings, memory
        self.embedding = Embedding(settings, rngs)
        tables = 0 if settings.positions != "t5" else 1 if settings.position_bias_shared else settings.layers
        self.biases = nnx.List(
            RelativeBias(settings.position_buckets, settings.position_max_distance, settings.heads)
            for _ in range(tables)
        )
        self.layers = nnx.List(Layer(settings, 1 + index, rngs) for index in range(settings.layers))
        self.final_norm = make_norm(settings)
        if settings.positions == "learned":
            self.places = LearnedPositions(settings.max_positions, settings.embedding_size, rngs)

    def embed(self, tokens_BN: Int[Array, "B N"], place: SegmentSlice | None = None) -> Float[jax.Array, "B N E"]:
        """Returns the input of the first layer for the tokens of a segment, or of a slice of it."""
        dtype = jnp.dtype(self.settings.dtype)
        x_BNE = self.embedding.read(tokens_BN, dtype)
        if self.settings.positions == "learned":
            x_BNE = x_BNE + self.places(tokens_BN.shape[1], dtype, place)
        return x_BNE

    def __call__(
        self,
        batch: Batch,
        carry: Carry,
        dropout_rng: jax.Array | None = None,
        collect: Collect = COLLECT_NOTHING,
        negative_rows: int = 0,
    ) -> tuple[Float[jax.Array, "B N V"], Carry, Intermediates]:
        """Reads one segment per row.

        A row that starts a document first clears its cache, and its memory if `Memory.clear_at_documents`.

        Args:
            batch: the segment.
            carry: state from the segment before.
            dropout_rng: random key for dropout; None for no dropout.
            collect: intermediate values to return.
            negative_rows: see `attend_to_memory`.

        Returns:
            Float32 logits of each target, the carry for the next segment, and the requested intermediates.
        """
        search = make_search(self.memory)
        cached_B = carry.cached_B & ~batch.starts_document_B
        make_inputs = functools.partial(
            LayerInputs,
            cached_B=cached_B,
            search=search,
            memory=self.memory,
            mask_BN=batch.mask_BN,
            negative_rows=negative_rows,
            collect=collect,
        )
        banks = self._banks_to_read(batch, carry)
        biases = [bias(batch.inputs_BN.shape[1], carry.caches[0].keys_BHWD.shape[2]) for bias in self.biases]
        shared_bias = biases[0] if len(biases) == 1 else None  # else one per layer, or none
        x_BNE, caches, intermediates = self.embed(batch.inputs_BN), [], {}
        for group in self._layer_groups():
            apply = self._layer_function(group[0], make_inputs, dropout_rng)
            layers = [
                (self._parameters(index), biases[index] if len(biases) > 1 else None, carry.caches[index], index)
                for index in group
            ]
            if len(group) > 1:
                x_BNE, group_caches = _scan_layers(apply, x_BNE, layers, shared_bias)
                caches += group_caches
                continue
            number, (parameters, bias, cache, index) = 1 + group[0], layers[0]
            bias = shared_bias if bias is None else bias
            x_BNE, cache, update = apply(parameters, x_BNE, bias, cache, banks.read_by(number), index)
            caches.append(cache)
            if update is not None:
                intermediates[number] = update.intermediates
                x_BNE = banks.update(number, update, x_BNE, search)
        logits_BNV = self.embedding.logits(self.final_norm(x_BNE))
        return logits_BNV, Carry(tuple(caches), jnp.ones_like(cached_B), banks.all()), intermediates

    def _banks_to_read(self, batch: Batch, carry: Carry) -> Banks:
        """Returns the carry's banks, cleared in rows that start a document if the settings say so."""
        banks = carry.banks
        if self.memory.clear_at_documents:
            banks = [clear(bank, batch.starts_document_B) for bank in banks]
        return Banks(self.settings, self.memory, [masked(bank, batch.mask_BN) for bank in banks])

    def _layer_function(
        self, first: int, make_inputs: Callable[..., LayerInputs], dropout_rng: jax.Array | None
    ) -> LayerFunction:
        """Returns the layer with index `first`, or any other of the same structure, as a pure function."""
        graph = nnx.split(self.layers[first])[0]

        def apply(parameters, x_BNE, bias_PHNJ, cache, bank, index):
            # The constraint makes gradients be summed over devices into the shards that each one holds.
            layer = nnx.merge(graph, constrain_tree(parameters, PARAMETER_RULES))
            dropout = _dropout(self.settings.dropout, dropout_rng, index)
            x_BNE, segment, update = layer(x_BNE, make_inputs(bias_PHNJ=bias_PHNJ, cache=cache, bank=bank), dropout)
            return x_BNE, next_cache(segment, cache), update

        if not self.settings.remat:
            return apply
        return jax.checkpoint(apply, policy=jax.checkpoint_policies.save_only_these_names(RETRIEVED, GRADIENT))

    def _layer_groups(self) -> list[list[int]]:
        """Returns the layers by index, in groups that are compiled once: adjacent layers without a memory."""
        groups: list[list[int]] = []
        for index in range(self.settings.layers):
            alone = not self.settings.scan_layers or self.layers[index].attention.has_memory
            if alone or not groups or self.layers[groups[-1][-1]].attention.has_memory:
                groups.append([])
            groups[-1].append(index)
        return groups

    def _parameters(self, index: int) -> Any:
        """Returns the parameters of a layer; with `scan_layers`, matrices are already in the dtype of activations."""
        parameters = nnx.to_pure_dict(nnx.split(self.layers[index])[1])
        if not self.settings.scan_layers:
            return parameters
        dtype = jnp.dtype(self.settings.dtype)
        return jax.tree.map(lambda leaf: leaf.astype(dtype) if leaf.ndim > 1 else leaf, parameters)


def _scan_layers(
    apply: LayerFunction, x_BNE: jax.Array, layers: list[tuple], shared_bias: jax.Array | None
) -> tuple[jax.Array, list[Cache]]:
    """Applies layers of the same structure, each (parameters, bias, cache, index), as one scan."""

    def step(x_BNE, layer):
        parameters, bias, cache, index = layer
        x_BNE, cache, _ = apply(parameters, x_BNE, shared_bias if bias is None else bias, cache, None, index)
        return x_BNE, cache

    x_BNE, stacked = jax.lax.scan(step, x_BNE, jax.tree.map(lambda *parts: jnp.stack(parts), *layers))
    return x_BNE, [jax.tree.map(lambda leaf, place=place: leaf[place], stacked) for place in range(len(layers))]


def _dropout(rate: float, rng: jax.Array | None, layer: int | jax.Array) -> Dropout:
    """Returns a function that drops features at `rate` and scales up the rest."""

    def dropout(x: jax.Array, call: int) -> jax.Array:
        if rng is None or rate == 0:
            return x
        keep = jax.random.bernoulli(jax.random.fold_in(rng, 2 * layer + call), 1 - rate, x.shape)
        return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)

    return dropout


def apply_model(
    graph: nnx.GraphDef,
    parameters: Parameters,
    batch: Batch,
    carry: Carry,
    dropout_rng: jax.Array | None = None,
) -> tuple[Float[jax.Array, "B N V"], Carry]:
    """Reads one segment per row, as a pure function of the parameters for `jax.jit` and `jax.grad`.

    Args:
        graph: structure of the model, from `create_model`.
        parameters: parameters of the model.
        batch: `B` rows of `N` tokens.
        carry: state from the segment before, or `empty_carry`.
        dropout_rng: random key for dropout in training; None for no dropout.

    Returns:
        Float32 logits of each target, `[B, N, V]`, and the carry for the next segment.
    """
    return apply_and_collect(graph, parameters, batch, carry, COLLECT_NOTHING, dropout_rng)[:2]


def apply_and_collect(
    graph: nnx.GraphDef,
    parameters: Parameters,
    batch: Batch,
    carry: Carry,
    collect: Collect,
    dropout_rng: jax.Array | None = None,
    negative_rows: int = 0,
) -> tuple[Float[jax.Array, "B N V"], Carry, Intermediates]:
    """Reads one segment as `apply_model` does, and also returns the values that `collect` requests.

    `negative_rows` adds the memories of other rows, in training: see `attend_to_memory`.
    """
    return nnx.merge(graph, parameters)(batch, carry, dropout_rng, collect, negative_rows)


def create_model(model: ModelSettings, memory: MemorySettings, seed: int) -> tuple[nnx.GraphDef, Parameters]:
    """Returns the structure of a model and freshly drawn parameters, which depend on `model` and `seed` only."""
    graph, state = nnx.split(Transformer(model, memory, nnx.Rngs(seed)))
    return graph, nnx.to_pure_dict(state)


def abstract_model(model: ModelSettings, memory: MemorySettings) -> tuple[nnx.GraphDef, Parameters]:
    """Returns the structure of a model, and shapes and dtypes instead of parameters; allocates nothing."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Transformer(model, memory, nnx.Rngs(0))))
    return graph, nnx.to_pure_dict(state)


def constant_gates(graph: nnx.GraphDef, parameters: Parameters) -> dict[int, Float[jax.Array, "*H"]]:
    """Returns the gate values of the memory layers, by number from 1: per head, or one value for all heads.

    Gates that depend on the token are left out.
    """
    layers = nnx.merge(graph, parameters).layers
    values = {
        1 + index: layer.attention.gate.constant() for index, layer in enumerate(layers) if layer.attention.has_memory
    }
    return {number: value for number, value in values.items() if value is not None}
