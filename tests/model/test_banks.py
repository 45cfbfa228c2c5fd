"""Layers that share a bank: all of them see the same slots, as they were before the segment; what is told of them."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest

from memorizing.errors import InputError
from memorizing.evaluation.lookups import read_document, segment_of
from memorizing.memory.bank import valid
from memorizing.memory.search.exact import Exact
from memorizing.memory.settings import MemorySettings
from memorizing.model.carry import empty_carry
from memorizing.model.intermediates import Collect
from memorizing.model.settings import ModelSettings
from memorizing.model.transformer import apply_and_collect, apply_model, create_model
from memorizing.shapes import Batch
from memorizing.storage.train_state import TrainState
from memorizing.training.reporter import gate_metrics
from memorizing.training.step import CallMetrics, make_train_call

N, SEGMENTS = 4, 3
TOKENS = np.random.default_rng(0).integers(3, 13, SEGMENTS * N - 1).astype(np.int32)
MODEL = ModelSettings(
    vocabulary_size=13, layers=3, embedding_size=8, heads=2, head_size=4, feed_forward_size=8,
    memory_layers=(1, 2, 3), banks_of=(2, 2, 3), gate_bias=-100.0, dtype="float32",
)  # fmt: skip
MEMORY = MemorySettings(size=2 * N, neighbors=3, dtype="float32", search="exact")


def test_layers_of_one_bank_see_the_same_slots_and_write_those_of_its_layer():
    """Gates are closed, so that writes do not depend on reads."""
    graph, parameters = create_model(MODEL, MEMORY, seed=0)
    apart, _ = create_model(dataclasses.replace(MODEL, banks_of=None), MEMORY, seed=0)
    carry, own = empty_carry(MODEL, MEMORY, 1, N), empty_carry(dataclasses.replace(MODEL, banks_of=None), MEMORY, 1, N)
    assert len(carry.banks) == 2 and len(own.banks) == 3
    for first in range(0, len(TOKENS), N):
        batch = segment_of(TOKENS, first, N)
        _, after, intermediates = apply_and_collect(graph, parameters, batch, carry, Collect(lookups=True))
        for (_, (queries_BHND, found)), bank in zip(intermediates.values(), (0, 0, 1), strict=True):
            expected = Exact()(queries_BHND, carry.banks[bank].keys, valid(carry.banks[bank]), MEMORY.neighbors)
            np.testing.assert_array_equal(found.slots_BHNK, expected.slots_BHNK)
            np.testing.assert_allclose(found.scores_BHNK, expected.scores_BHNK, rtol=1e-5)
        _, own = apply_model(apart, parameters, batch, own)
        carry = after
        for one, other in zip(carry.banks, own.banks[1:], strict=True):
            jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), one, other)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"banks_of": (2, 2)}, r"banks_of = \(2, 2\): must name a layer for each of Model.memory_layers = \(1, 2, 3\)"),
        ({"memory_layers": (1, 2), "banks_of": (3, 2)}, r"layer 3 has no bank\. Use layers of"),
    ],
)
def test_impossible_banks_of_are_refused(changes, words):
    with pytest.raises(InputError, match=words):
        dataclasses.replace(MODEL, **changes)


def told(model: ModelSettings, memory: MemorySettings):
    """Batches of the document, and the gates that the model tells of each."""
    graph, parameters = create_model(model, memory, seed=0)
    run = jax.jit(functools.partial(apply_and_collect, graph, parameters, collect=Collect(gates=True)))
    carry, batches, gates = empty_carry(model, memory, 1, N), [], []
    for first in range(0, len(TOKENS), N):
        batches.append(segment_of(TOKENS, first, N))
        _, carry, intermediates = run(batches[-1], carry)
        gates.append({layer: np.asarray(values.gate_BHN) for layer, values in intermediates.items()})
    return batches, gates


@pytest.mark.parametrize(("kind", "search"), [("score", "dense"), ("layer", "exact")])
def test_lookups_report_gates_and_all_slots_of_dense_attention(kind, search):
    model = dataclasses.replace(MODEL, gate=kind, gate_bias=0.0)
    memory = dataclasses.replace(MEMORY, search=search)
    _, gates = told(model, memory)
    parameters = create_model(model, memory, seed=0)[1]
    for number, segment in enumerate(read_document(model, memory, parameters, TOKENS, N)):
        count = len(segment.nats_N)
        for layer, looked in segment.layers.items():
            np.testing.assert_allclose(looked.gates_HN, gates[number][layer][0, :, :count], rtol=1e-5)
            held = min(segment.first, memory.size) if search == "dense" else memory.neighbors
            assert ((looked.places_HNK >= -1).sum(-1) == held).all()
            np.testing.assert_allclose(looked.weights_HNK.sum(-1), 1, rtol=1e-5)
    assert list(segment.layers) == [1, 2, 3]


def test_training_reports_the_mean_gate_value_of_tokens_that_found_something():
    """The last segment has padding, the first no memory: neither counts."""
    model = dataclasses.replace(MODEL, gate="joint")
    batches, gates = told(model, MEMORY)
    graph, parameters = create_model(model, MEMORY, seed=0)
    still = optax.sgd(0.0)
    call = make_train_call(graph, still)
    state = TrainState(parameters, still.init(parameters), np.zeros((), np.int32), empty_carry(model, MEMORY, 1, N))
    _, metrics = call(jax.device_put(state), Batch(*(np.stack(part) for part in zip(*batches, strict=True))))
    values = gate_metrics(jax.device_get(metrics))
    assert not metrics.gates and len(values) == 3 * 2
    for layer in MODEL.memory_layers:
        of_HT = np.concatenate([gates[1][layer][0], gates[2][layer][0, :, : N - 1]], axis=1)
        for head in range(2):
            assert values[f"gate_value/layer_{layer}/head_{head}"] == pytest.approx(of_HT[head].mean(), rel=1e-4)


def test_learned_gates_are_reported_by_head_or_by_layer():
    learned: dict = {2: np.array([0.25, 0.5]), 3: np.array(0.75)}
    nothing: dict = {name: {} for name in CallMetrics._fields if name != "gates"}
    metrics = CallMetrics(gates=learned, **nothing)
    assert gate_metrics(metrics) == {"gates/layer_2/head_0": 0.25, "gates/layer_2/head_1": 0.5, "gates/layer_3": 0.75}
