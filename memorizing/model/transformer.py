"""The model: a stack of layers that reads one segment and carries caches and memories to the next.

    logits, carry = model(batch, carry)

Everything that lasts beyond a segment is in `Carry`, passed in and returned. Training and evaluation differ only in
the carry they hold: its shapes say how large the XL cache and the memory are, and without banks there is no memory.
Where to read next: `attention.py` (local attention and gate), then `memory_attention.py`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Int

from memorizing.memory.bank import clear, masked
from memorizing.memory.search import Search
from memorizing.memory.search_choice import make_search
from memorizing.memory.settings import MemorySettings
from memorizing.model.attention import Attention
from memorizing.model.banks import Banks
from memorizing.model.carry import Carry
from memorizing.model.layers import Embedding, FeedForward, make_norm
from memorizing.model.learned_index import GRADIENT
from memorizing.model.memory_attention import RETRIEVED
from memorizing.model.parameters import Parameters
from memorizing.model.positions import LearnedPositions, Part, RelativeBias
from memorizing.model.settings import ModelSettings
from memorizing.parallel.mesh import PARAMETER_RULES, constrain_tree
from memorizing.shapes import Array, Batch

type Gates = dict[int, Float[jax.Array, "B H N"]]
"""How far each memory layer's gate was open for each token, by the layer's number; 0 where nothing was found."""


class Layer(nnx.Module):
    """Pre-norm attention and feed-forward, each added to the stream."""

    def __init__(self, settings: ModelSettings, number: int, rngs: nnx.Rngs):
        self.attention_norm = make_norm(settings)
        self.attention = Attention(settings, number in settings.memory_layers, rngs)
        self.feed_forward_norm = make_norm(settings)
        self.feed_forward = FeedForward(settings, rngs)

    def __call__(self, x_BNE, bias_PHNJ, cache, cached_B, bank, drop, search, memory, negative_rows, mask_BN):
        added, cache, remembered = self.attention(
            self.attention_norm(x_BNE), bias_PHNJ, cache, cached_B, bank, search, memory, negative_rows, mask_BN
        )
        return self._added(x_BNE, added, drop), cache, remembered

    def extend(self, x_BNE, bias_PHNJ, cache, cached_B, bank, segment, part, search, memory):
        """Reads a part of a segment (see `Attention.extend`)."""
        added, segment, read_stats = self.attention.extend(
            self.attention_norm(x_BNE), bias_PHNJ, cache, cached_B, bank, segment, part, search, memory
        )
        return self._added(x_BNE, added, lambda x, place: x), segment, read_stats

    def _added(self, x_BNE, attended_BNE, drop):
        x_BNE = x_BNE + drop(attended_BNE, 0)
        return x_BNE + drop(self.feed_forward(self.feed_forward_norm(x_BNE)), 1)


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

    def read(self, tokens_BN: Int[Array, "B N"], part: Part | None = None) -> Float[jax.Array, "B N E"]:
        """What the first layer is given for the tokens of a segment, or for those of a part."""
        dtype = jnp.dtype(self.settings.dtype)
        x_BNE = self.embedding.read(tokens_BN, dtype)
        if self.settings.positions == "learned":
            x_BNE = x_BNE + self.places(tokens_BN.shape[1], dtype, part)
        return x_BNE

    def __call__(
        self,
        batch: Batch,
        carry: Carry,
        dropout_rng: jax.Array | None = None,
        search: Search | None = None,
        negative_rows: int = 0,
    ) -> tuple[Float[jax.Array, "B N V"], Carry, Gates]:
        """Reads one segment per row; returns float32 logits of each target, the carry for the next segment, and gates.

        Rows that start a document first forget the one before; its memory only if the settings say so. Without
        `dropout_rng` nothing is dropped. `search` is used in place of the one that the settings name. For
        `negative_rows` see `attend_to_memory`.
        """
        search = search or make_search(self.memory)
        cached_B = carry.cached_B & ~batch.starts_document_B
        kept = (
            [clear(bank, batch.starts_document_B) for bank in carry.banks]
            if self.memory.clear_at_documents
            else carry.banks
        )
        banks = Banks(self.settings, self.memory, [masked(bank, batch.mask_BN) for bank in kept])
        tokens, window = batch.inputs_BN.shape[1], carry.caches[0].keys_BHWD.shape[2]
        biases = [bias(tokens, window) for bias in self.biases]
        shared = biases[0] if len(biases) == 1 else None  # else one for each layer, or none
        x_BNE = self.read(batch.inputs_BN)
        caches, opened = [], {}
        for run in self._runs():
            number, graph = 1 + run[0], nnx.split(self.layers[run[0]])[0]

            def apply(parameters, x_BNE, bias_PHNJ, cache, bank, index, graph=graph):
                # So that gradients are summed over devices into the parts that each one keeps, not whole on all.
                module = nnx.merge(graph, constrain_tree(parameters, PARAMETER_RULES))
                drop = _dropout(self.settings.dropout, dropout_rng, index)
                fixed = (cached_B, bank, drop, search, self.memory, negative_rows, batch.mask_BN)
                return module(x_BNE, bias_PHNJ, cache, *fixed)

            if self.settings.remat:
                apply = jax.checkpoint(apply, policy=jax.checkpoint_policies.save_only_these_names(RETRIEVED, GRADIENT))
            each = [
                (self._parameters(index), biases[index] if len(biases) > 1 else None, carry.caches[index], index)
                for index in run
            ]
            if len(run) == 1:
                parameters, bias, cache, index = each[0]
                bias = shared if bias is None else bias
                x_BNE, cache, remembered = apply(parameters, x_BNE, bias, cache, banks.read_by(number), index)
                caches.append(cache)
                if remembered is not None:
                    opened[number] = remembered.gate_BHN
                    x_BNE = banks.remember(number, remembered, x_BNE, search)
                continue

            def step(x_BNE, inputs, apply=apply):
                parameters, bias, cache, index = inputs
                x_BNE, cache, _ = apply(parameters, x_BNE, shared if bias is None else bias, cache, None, index)
                return x_BNE, cache

            x_BNE, stacked = jax.lax.scan(step, x_BNE, jax.tree.map(lambda *parts: jnp.stack(parts), *each))
            caches += [jax.tree.map(lambda leaf, place=place: leaf[place], stacked) for place in range(len(run))]
        logits_BNV = self.embedding.logits(self.final_norm(x_BNE))
        return logits_BNV, Carry(tuple(caches), jnp.ones_like(cached_B), banks.all()), opened

    def _runs(self) -> list[list[int]]:
        """Layers by index, those that `scan_layers` compiles as one together: neighbors without a memory."""
        runs: list[list[int]] = []
        for index in range(self.settings.layers):
            alone = not self.settings.scan_layers or self.layers[index].attention.has_memory
            if alone or not runs or self.layers[runs[-1][-1]].attention.has_memory:
                runs.append([])
            runs[-1].append(index)
        return runs

    def _parameters(self, index: int) -> Any:
        """Of a layer; matrices in the dtype of activations already where layers are to be stacked."""
        parameters = nnx.to_pure_dict(nnx.split(self.layers[index])[1])
        if not self.settings.scan_layers:
            return parameters
        dtype = jnp.dtype(self.settings.dtype)
        return jax.tree.map(lambda leaf: leaf.astype(dtype) if leaf.ndim > 1 else leaf, parameters)


def _dropout(rate: float, rng: jax.Array | None, layer: int | jax.Array):
    """A function that drops features at `rate` and scales up the rest; `place` tells calls within a layer apart."""

    def drop(x, place: int):
        if rng is None or rate == 0:
            return x
        keep = jax.random.bernoulli(jax.random.fold_in(rng, 2 * layer + place), 1 - rate, x.shape)
        return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)

    return drop


def apply_model(
    graph: nnx.GraphDef,
    parameters: Parameters,
    batch: Batch,
    carry: Carry,
    dropout_rng: jax.Array | None = None,
    search: Search | None = None,
) -> tuple[Float[jax.Array, "B N V"], Carry]:
    """The model as a pure function of its parameters: what `jax.jit` and `jax.grad` are given."""
    return apply_and_tell(graph, parameters, batch, carry, dropout_rng, search)[:2]


def apply_and_tell(
    graph: nnx.GraphDef,
    parameters: Parameters,
    batch: Batch,
    carry: Carry,
    dropout_rng: jax.Array | None = None,
    search: Search | None = None,
    negative_rows: int = 0,
) -> tuple[Float[jax.Array, "B N V"], Carry, Gates]:
    """The same, telling how far gates were open; and, in training, with memories of other rows (`attend_to_memory`)."""
    return nnx.merge(graph, parameters)(batch, carry, dropout_rng, search, negative_rows)


def create_model(model: ModelSettings, memory: MemorySettings, seed: int) -> tuple[nnx.GraphDef, Parameters]:
    """Structure and freshly drawn parameters, which depend on `model` and `seed` alone."""
    graph, state = nnx.split(Transformer(model, memory, nnx.Rngs(seed)))
    return graph, nnx.to_pure_dict(state)


def abstract_model(model: ModelSettings, memory: MemorySettings) -> tuple[nnx.GraphDef, Parameters]:
    """Structure, and shapes and dtypes in place of parameters: nothing is computed or allocated."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Transformer(model, memory, nnx.Rngs(0))))
    return graph, nnx.to_pure_dict(state)


def gates(parameters: Parameters) -> dict[int, Float[jax.Array, "*H"]]:
    """How far the gates of each memory layer are open, by its number (the first is 1): of each head, or one for all.

    None of gates that depend on the token.
    """
    attentions = {1 + index: layer["attention"] for index, layer in parameters["layers"].items()}
    opened = {}
    for number, part in attentions.items():
        if "gate" in part or ("gate_H" in part and "gate_HD" not in part):
            opened[number] = jax.nn.sigmoid(part["gate"] if "gate" in part else part["gate_H"])
    return opened
