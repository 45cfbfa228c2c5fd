"""The train call against doing the same by hand: scanned or one by one, updated or added up, with memory or none."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from memorizing.memory.settings import MemorySettings
from memorizing.model.carry import empty_carry
from memorizing.model.settings import ModelSettings
from memorizing.model.transformer import apply_model, create_model
from memorizing.shapes import Batch
from memorizing.storage.train_state import TrainState
from memorizing.training.loss import score
from memorizing.training.step import StepOptions, make_train_call

ROWS, TOKENS, SEGMENTS, VOCABULARY = 2, 8, 4, 11
MODEL = ModelSettings(
    vocabulary_size=VOCABULARY, layers=2, embedding_size=16, heads=2, head_size=8, feed_forward_size=32,
    memory_layers=(2,), dtype="float32",
)  # fmt: skip
MEMORY = MemorySettings(size=2 * TOKENS, neighbors=4, dtype="float32")


@functools.cache
def graph_and_parameters():
    return create_model(MODEL, MEMORY, seed=0)


def batches(count: int = SEGMENTS) -> Batch:
    """Segments `[S, B, N]` of random tokens; the last is half padding, and row 1 starts a document in the middle."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, VOCABULARY, (2, count, ROWS, TOKENS)).astype(np.int32)
    mask = np.ones((count, ROWS, TOKENS), bool)
    mask[-1, 0, TOKENS // 2 :] = False
    starts = np.zeros((count, ROWS), bool)
    starts[0], starts[count // 2, 1] = True, True
    return Batch(tokens[0], tokens[1], mask, starts)


def new_state(optimizer: optax.GradientTransformation) -> TrainState:
    parameters = jax.tree.map(jnp.array, graph_and_parameters()[1])  # a copy: the call takes the buffers it is given
    carry = empty_carry(MODEL, MEMORY, ROWS, TOKENS)
    return TrainState(parameters, optimizer.init(parameters), jnp.zeros((), jnp.int32), carry)


def assert_near(one, other) -> None:
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), one, other)


def test_a_scanned_call_is_its_segments_one_by_one():
    optimizer = optax.adam(0.01)
    call = make_train_call(graph_and_parameters()[0], optimizer)
    scanned, together = call(new_state(optimizer), batches())
    state, alone = new_state(optimizer), []
    for segment in range(SEGMENTS):
        state, metrics = call(state, jax.tree.map(lambda leaf, at=segment: leaf[at : at + 1], batches()))
        alone.append(metrics.segments)
    assert_near(scanned, state)
    assert_near(together.segments, jax.tree.map(lambda *parts: np.concatenate(parts), *alone))
    assert int(scanned.step) == SEGMENTS


def test_each_segment_makes_an_update_from_its_own_gradient():
    """Computed by hand for gradient descent: no gradient crosses segments; the loss is the mean over real tokens."""
    graph, parameters = graph_and_parameters()
    carry = empty_carry(MODEL, MEMORY, ROWS, TOKENS)
    rate, losses, norms, right = 0.1, [], [], []
    for segment in range(SEGMENTS):
        batch = jax.tree.map(lambda leaf, at=segment: leaf[at], batches())

        def loss(parameters, batch=batch, carry=carry):
            logits_BNV, after = apply_model(graph, parameters, batch, carry)
            logs = jax.nn.log_softmax(logits_BNV)
            picked = jnp.take_along_axis(logs, batch.targets_BN[..., None], axis=-1)[..., 0]
            correct = ((logits_BNV.argmax(-1) == batch.targets_BN) & batch.mask_BN).sum()
            return -(picked * batch.mask_BN).sum() / batch.mask_BN.sum(), (after, correct)

        (value, (carry, correct)), gradient = jax.value_and_grad(loss, has_aux=True)(parameters)
        parameters = jax.tree.map(lambda p, g: p - rate * g, parameters, gradient)
        losses.append(float(value))
        right.append(int(correct))
        norms.append(np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(gradient))))
    optimizer = optax.sgd(rate)
    state, metrics = make_train_call(graph, optimizer)(new_state(optimizer), batches())
    assert_near(state.parameters, parameters)
    assert_near(state.carry, carry)
    np.testing.assert_allclose(metrics.segments.nats / metrics.segments.tokens, losses, rtol=1e-5)
    np.testing.assert_allclose(metrics.segments.gradient_norm, norms, rtol=1e-4)
    np.testing.assert_array_equal(metrics.segments.correct, right)
    assert sum(right) > 0
    np.testing.assert_array_equal(metrics.segments.tokens, [16, 16, 16, 12])


def test_accumulated_gradients_make_one_update():
    graph, parameters = graph_and_parameters()

    def loss(parameters):
        carry, total = empty_carry(MODEL, MEMORY, ROWS, TOKENS), 0.0
        for segment in range(SEGMENTS):
            batch = jax.tree.map(lambda leaf, at=segment: leaf[at], batches())
            logits_BNV, carry = apply_model(graph, parameters, batch, jax.lax.stop_gradient(carry))
            total += score(logits_BNV, batch).nats_BN.sum()
        return total / batches().mask_BN.sum()

    gradient = jax.grad(loss)(parameters)
    optimizer = optax.sgd(0.1)
    state, metrics = make_train_call(graph, optimizer, StepOptions(accumulate=True))(new_state(optimizer), batches())
    assert_near(state.parameters, jax.tree.map(lambda p, g: p - 0.1 * g, parameters, gradient))
    np.testing.assert_allclose(metrics.segments.gradient_norm, optax.tree.norm(gradient), rtol=1e-4)


def test_a_state_without_banks_trains_without_memory():
    optimizer = optax.sgd(0.1)
    call = make_train_call(graph_and_parameters()[0], optimizer)
    state = new_state(optimizer)
    state, metrics = call(state._replace(carry=state.carry._replace(banks=())), batches())
    assert state.carry.banks == () and float(metrics.memory_fill) == 0
    untouched = graph_and_parameters()[1]["layers"][1]["attention"]["gate"]["bias_H"]
    np.testing.assert_array_equal(state.parameters["layers"][1]["attention"]["gate"]["bias_H"], untouched)
    _, metrics = call(new_state(optimizer), batches())
    # Row 0 wrote 4 segments into a memory of 2; row 1 forgot half-way and wrote 2.
    assert float(metrics.memory_fill) == 1.0
    np.testing.assert_allclose(metrics.gates[2], 1 / (1 + np.exp(2.0)), rtol=0.05)


def test_losses_of_padding_are_zero():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(ROWS, TOKENS, VOCABULARY)), jnp.float32)
    batch = jax.tree.map(lambda leaf: leaf[-1], batches())
    predictions = score(logits, batch)
    assert not predictions.nats_BN[~batch.mask_BN].any() and not predictions.correct_BN[~batch.mask_BN].any()
    expected = (
        np.log(np.exp(logits).sum(-1)) - np.take_along_axis(np.asarray(logits), batch.targets_BN[..., None], -1)[..., 0]
    )
    np.testing.assert_allclose(predictions.nats_BN[batch.mask_BN], expected[batch.mask_BN], rtol=1e-5)
