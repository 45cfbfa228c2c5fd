"""Queries and keys of a trained run: documents are read until the memory is full, then one more segment asks.

    segment 0 ... M/N - 1     written to the memory: the keys
    segment M/N               the queries of the memory layer, with a full memory

Trained queries are not distributed like keys, which misleads indexes that are built from keys alone.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from memorizing.benchmarks.choices import Shape, searched_sizes
from memorizing.benchmarks.vectors import Vectors, plain_dtype
from memorizing.data.batches import read_batch
from memorizing.data.tokens import TokenSplit
from memorizing.errors import InputError
from memorizing.evaluation.evaluate import restore
from memorizing.evaluation.perplexity import EvaluationSettings, TrainedModel
from memorizing.files import AnyPath
from memorizing.memory.bank import valid
from memorizing.memory.settings import MemorySettings
from memorizing.model.carry import Carry, empty_carry
from memorizing.model.groups import by_key_head
from memorizing.model.intermediates import Collect, Lookups
from memorizing.model.parameters import Parameters
from memorizing.model.settings import ModelSettings, split_sizes
from memorizing.model.transformer import abstract_model, apply_and_collect, apply_model
from memorizing.parallel.mesh import MeshSettings, open_mesh
from memorizing.shapes import Batch
from memorizing.storage.workdir import readable_tokens


def memory_lookups(graph: nnx.GraphDef, parameters: Parameters, batch: Batch, carry: Carry) -> tuple[Lookups, ...]:
    """Returns what each memory layer asks its memory for and finds, lowest first, by key head (see model/groups.py)."""

    @jax.jit
    def collect(parameters: Parameters, batch: Batch, carry: Carry) -> tuple[Lookups, ...]:
        intermediates = apply_and_collect(graph, parameters, batch, carry, Collect(lookups=True))[2]
        found = tuple(layer.lookups for layer in intermediates.values() if layer.lookups is not None)
        group = found[0].queries_BHND.shape[1] // carry.banks[0].keys_BHMD.shape[1] if found else 1
        return jax.tree.map(lambda part: by_key_head(part, group), found)

    return collect(parameters, batch, carry)


def trained_vectors(trained: TrainedModel, split: TokenSplit, shape: Shape, dtype: str, origin: str) -> Vectors:
    """Returns vectors of the first memory layer: the `shape.B` longest documents of a split, read with exact search.

    Raises:
        InputError: if the model has other sizes than the shape, or documents are too short to fill the memory.
    """
    model, memory, segment_length, parameters = trained
    for letter, size in searched_sizes(model, segment_length).items():
        if getattr(shape, letter) != size:
            raise InputError(f"--shapes: {letter}{getattr(shape, letter)} in {shape}, but the run has {letter}{size}")
    if not model.memory_layers:
        raise InputError("--workdir: the run has no memory layer (Model.memory_layers = ()). Choose another run")
    if shape.M % segment_length:
        nearest = max(shape.M // segment_length, 1) * segment_length
        raise InputError(
            f"--shapes: M{shape.M} in {shape} is not a multiple of the segment length {segment_length}. Use M{nearest}"
        )
    segments = shape.M // segment_length
    longest = np.argsort(-split.lengths, kind="stable")[: shape.B]
    shortest = int(split.lengths[longest[-1]]) // segment_length if len(longest) == shape.B else 0
    if shortest <= segments:
        raise InputError(
            f"--shapes: {shape} needs {shape.B} documents of {(segments + 1) * segment_length:,} tokens, but one of "
            f"the longest in {split.folder} has {shortest * segment_length:,}. Use "
            f"M{max(shortest - 1, 0) * segment_length} or fewer rows"
        )
    dtype = plain_dtype(dtype)
    changes: dict[str, Any] = {"dtype": dtype, "key_dtype": None, "search": "blocked", "minimum_score": None}
    memory = dataclasses.replace(memory, size=shape.M, neighbors=shape.K, **changes)
    graph, _ = abstract_model(dataclasses.replace(model, remat=False, dropout=0.0), memory)

    @functools.partial(jax.jit, donate_argnums=1)
    def read(parameters: Parameters, carry: Carry, batch: Batch) -> Carry:
        return apply_model(graph, parameters, batch, carry)[1]

    def batch_of(segment: int) -> Batch:
        return _on_device(read_batch(split, [(int(document), segment) for document in longest], segment_length))

    carry = empty_carry(model, memory, shape.B, segment_length)
    for segment in range(segments):
        carry = read(parameters, carry, batch_of(segment))
    queries, _ = memory_lookups(graph, parameters, batch_of(segments), carry)[0]
    bank = carry.banks[model.bank_layers.index(model.read_from[model.memory_layers[0]])]
    return Vectors(queries.astype(dtype), bank.keys.plain().astype(dtype), valid(bank), origin)


def run_vectors(
    workdir: AnyPath,
    model: ModelSettings,
    memory: MemorySettings,
    segment_length: int,
    evaluation: EvaluationSettings,
    data: str,
) -> Callable[[Shape, str], Vectors]:
    """Returns a function that draws vectors of the newest checkpoint in `workdir`, from a split of `evaluation`.

    Raises:
        InputError: if there is no checkpoint, or no tokens that the model can read.
    """
    tokens = readable_tokens(workdir, evaluation.data or data, model)
    mesh = open_mesh(MeshSettings(), split_sizes(model, memory, segment_length, 1), devices=jax.devices()[:1])
    parameters, step = restore(workdir, model, mesh)
    origin = f"trained ({workdir.name}, step {step})"
    trained = TrainedModel(model, memory, segment_length, parameters)
    return lambda shape, dtype: trained_vectors(trained, tokens.split(evaluation.split), shape, dtype, origin)


def _on_device(parts: Iterable[Any]) -> Batch:
    return Batch(*map(jnp.asarray, parts))
