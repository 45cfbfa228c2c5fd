"""Properties that every gate must have: the shared suite of the table `GATES`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memorizing.errors import InputError
from memorizing.memory.settings import MemorySettings
from memorizing.model.carry import empty_carry
from memorizing.model.gates import GATES
from memorizing.model.intermediates import Collect
from memorizing.model.parameters import by_path
from memorizing.model.settings import ModelSettings
from memorizing.model.transformer import apply_and_collect, constant_gates, create_model
from memorizing.shapes import Batch
from memorizing.training.optimizer import OptimizerSettings, trainable_mask

ROWS, N = 2, 4
MEMORY = MemorySettings(size=8, neighbors=2, dtype="float32", search="exact")


def settings(gate: str) -> ModelSettings:
    return ModelSettings(
        vocabulary_size=11, layers=2, embedding_size=8, heads=2, head_size=4, feed_forward_size=8, memory_layers=(2,),
        dtype="float32", gate=gate, gate_bias=0.0,
    )  # fmt: skip


def segments(count: int):
    tokens_SBN = np.random.default_rng(0).integers(1, 11, (count, ROWS, N)).astype(np.int32)
    return [
        Batch(tokens_BN, np.roll(tokens_BN, -1, 1), np.ones((ROWS, N), bool), np.full(ROWS, number == 0))
        for number, tokens_BN in enumerate(tokens_SBN)
    ]


@pytest.fixture(scope="module", params=GATES)
def model(request):
    """A gate's name, the model, and the carry after a segment."""
    graph, parameters = create_model(settings(request.param), MEMORY, seed=0)
    call = jax.jit(lambda parameters, batch, carry: apply_and_collect(graph, parameters, batch, carry, Collect(True)))
    return request.param, graph, parameters, call


def test_the_gate_is_closed_without_a_memory_and_between_0_and_1_with_one(model):
    _, _, parameters, call = model
    first, second = segments(2)
    _, carry, intermediates = call(parameters, first, empty_carry(settings(model[0]), MEMORY, ROWS, N))
    assert not np.asarray(intermediates[2].gate_BHN).any()
    logits, _, intermediates = call(parameters, second, carry)
    gate_BHN = np.asarray(intermediates[2].gate_BHN)
    assert gate_BHN.shape == (ROWS, 2, N) and (gate_BHN > 0).all() and (gate_BHN < 1).all()
    assert np.isfinite(logits).all()


def test_the_gates_own_parameters_get_a_gradient_and_are_called_gates(model):
    gate, _, parameters, call = model
    first, second = segments(2)
    _, carry, _ = call(parameters, first, empty_carry(settings(gate), MEMORY, ROWS, N))

    def loss(parameters):
        logits_BNV = call(parameters, second, carry)[0]
        return -jax.nn.log_softmax(logits_BNV)[..., 3].mean()

    gradients = by_path(jax.grad(loss)(parameters))
    assert all(np.isfinite(gradient).all() for gradient in gradients.values())
    owned = {path for path in gradients if "/gate/" in path}
    assert all(jnp.abs(gradients[path]).max() > 0 for path in owned)
    if not owned:
        with pytest.raises(InputError, match="'gates' matches no parameter"):
            trainable_mask(OptimizerSettings(trainable=("gates",)), parameters, (2,))
    else:
        mask = by_path(trainable_mask(OptimizerSettings(trainable=("gates",)), parameters, (2,)))
        assert {path for path, is_trained in mask.items() if is_trained} == owned


def test_a_constant_gate_reports_the_value_that_tokens_get(model):
    gate, graph, parameters, call = model
    first, second = segments(2)
    rng = np.random.default_rng(1)  # some gates have weights of zero at first
    parameters = jax.tree.map_with_path(
        lambda path, leaf: leaf + rng.normal(size=leaf.shape) * ("gate" in jax.tree_util.keystr(path)), parameters
    )
    _, carry, _ = call(parameters, first, empty_carry(settings(gate), MEMORY, ROWS, N))
    gate_BHN = np.asarray(call(parameters, second, carry)[2][2].gate_BHN)
    constant = constant_gates(graph, parameters)
    if 2 in constant:
        np.testing.assert_allclose(gate_BHN, np.broadcast_to(np.asarray(constant[2]).reshape(1, -1, 1), gate_BHN.shape))
    else:
        assert gate_BHN.std() > 0  # depends on the token, or on what it found
