"""Schedules against closed forms, AdamW with clipping against the same in numpy, and what decays in a real model."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from memorizing.errors import InputError
from memorizing.memory.settings import MemorySettings
from memorizing.model.parameters import by_path
from memorizing.model.settings import ModelSettings
from memorizing.model.transformer import abstract_model, create_model
from memorizing.training.learning_rate import SCHEDULES
from memorizing.training.optimizer import (
    OPTIMIZERS,
    OptimizerSettings,
    learning_rate,
    learning_rate_multipliers,
    make_optimizer,
    trainable_mask,
)


@pytest.mark.parametrize("warmup", [1, 10, 1000])
def test_rsqrt_rises_to_its_peak_and_falls_as_one_over_the_root_of_the_step(warmup):
    rate = learning_rate(OptimizerSettings(learning_rate=2.0, schedule="rsqrt", warmup_steps=warmup))
    for updates_done in (warmup, warmup + 1, 4 * warmup, 100_000):
        np.testing.assert_allclose(rate(updates_done), 2.0 / np.sqrt(updates_done), rtol=1e-5)
    rising = [float(rate(count)) for count in range(warmup)]
    np.testing.assert_allclose(rising, 2.0 / np.sqrt(warmup) * np.arange(1, warmup + 1) / warmup, rtol=1e-4)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0, 10])
def test_other_schedules_start_at_the_peak_and_end_as_stated(schedule, warmup):
    rate = learning_rate(
        OptimizerSettings(learning_rate=0.5, schedule=schedule, warmup_steps=warmup, decay_steps=warmup + 100)
    )
    down = {
        "cosine": lambda done: 0.25 * (1 + np.cos(np.pi * done)),
        "linear": lambda done: 0.5 * (1 - done),
        "constant": lambda done: 0.5,
    }[schedule]
    for after in (0, 1, 37, 50, 100):
        np.testing.assert_allclose(rate(warmup + after), down(after / 100), atol=1e-6)
    rising = [float(rate(count)) for count in range(warmup)]
    np.testing.assert_allclose(rising, 0.05 * np.arange(1, warmup + 1), rtol=1e-5)


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_adamw_is_its_equations_with_gradients_scaled_down_to_the_norm(clip_norm):
    """Three updates whose gradients have norms 5, 0.5 and 50: Adam sees their sizes relative to each other."""
    settings = OptimizerSettings(
        kind="adamw", learning_rate=0.1, schedule="linear", warmup_steps=2, decay_steps=10, clip_norm=clip_norm,
        weight_decay=0.5, beta1=0.8, beta2=0.9,
    )  # fmt: skip
    optimizer = make_optimizer(settings)
    parameters = {"matrix": jnp.array([[1.0, -2.0]]), "vector": jnp.array([3.0])}
    state = optimizer.init(parameters)
    theta, first, second = np.array([1.0, -2.0, 3.0]), np.zeros(3), np.zeros(3)
    for count, gradient in enumerate(np.array([[3.0, 0.0, 4.0], [0.3, 0.4, 0.0], [0.0, 30.0, -40.0]])):
        given = {"matrix": jnp.asarray(gradient[None, :2]), "vector": jnp.asarray(gradient[2:])}
        changes, state = optimizer.update(given, state, parameters)
        parameters = jax.tree.map(jnp.add, parameters, changes)

        norm = np.sqrt((gradient**2).sum())
        clipped = gradient * min(1.0, clip_norm / norm) if clip_norm else gradient
        first, second = 0.8 * first + 0.2 * clipped, 0.9 * second + 0.1 * clipped**2
        step = first / (1 - 0.8 ** (count + 1)) / (np.sqrt(second / (1 - 0.9 ** (count + 1))) + 1e-8)
        decay = 0.5 * theta * [1.0, 1.0, 0.0]  # of the matrix alone
        theta = theta - [0.05, 0.1, 0.1][count] * (step + decay)
    np.testing.assert_allclose(np.concatenate([parameters["matrix"][0], parameters["vector"]]), theta, rtol=1e-5)


def test_weight_decay_skips_norms_and_gates():
    """Zero gradients leave only weight decay: it scales all matrices alike and changes no vector."""
    model = ModelSettings(
        vocabulary_size=11, layers=1, embedding_size=4, heads=2, head_size=2, feed_forward_size=8, memory_layers=(1,),
        dtype="float32",
    )  # fmt: skip
    parameters = jax.tree.map(lambda leaf: leaf + 1.0, create_model(model, MemorySettings(size=0), seed=0)[1])
    settings = OptimizerSettings(kind="adamw", learning_rate=0.1, schedule="constant", warmup_steps=0, weight_decay=0.5)
    optimizer = make_optimizer(settings)
    changes, _ = optimizer.update(jax.tree.map(jnp.zeros_like, parameters), optimizer.init(parameters), parameters)
    shares = jax.tree.map(lambda change, leaf: np.asarray(change / leaf), changes, parameters)
    attention = shares["layers"][0]["attention"]
    for still in (attention["gate"]["bias_H"], attention["scale_H"], *jax.tree.leaves(shares["final_norm"])):
        np.testing.assert_array_equal(still, 0.0)
    for shrinking in (attention["query_EHD"], attention["out_HDE"], *jax.tree.leaves(shares["embedding"])):
        np.testing.assert_allclose(shrinking, -0.05, rtol=1e-5)


@pytest.mark.parametrize("kind", ["adamw", "adafactor"])
@pytest.mark.parametrize("only", [(), ("memory_layers",)])
def test_learning_rate_multipliers_scale_updates(kind, only):
    """Second updates, of a model of two layers: those of gates 16 times, of one matrix half, all others as without."""
    model = ModelSettings(
        vocabulary_size=11, layers=2, embedding_size=4, heads=2, head_size=2, feed_forward_size=8, memory_layers=(2,),
        dtype="float32",
    )  # fmt: skip
    parameters = create_model(model, MemorySettings(size=8, neighbors=4), seed=0)[1]
    gradient = jax.tree.map(
        lambda leaf: jnp.cos(jnp.arange(leaf.size, dtype=jnp.float32)).reshape(leaf.shape), parameters
    )

    def changes(*factors: tuple[str, float]) -> dict[str, np.ndarray]:
        settings = OptimizerSettings(
            kind=kind,
            schedule="constant",
            warmup_steps=0,
            trainable=only,
            learning_rate_multipliers=factors,
            weight_decay=0.1,
        )
        moves = trainable_mask(settings, parameters, model.memory_layers)
        optimizer = make_optimizer(
            settings, moves, learning_rate_multipliers(settings, parameters, model.memory_layers, moves)
        )
        state = optimizer.init(parameters)
        for _ in range(2):
            found, state = optimizer.update(gradient, state, parameters)
        return {path: np.asarray(leaf) for path, leaf in by_path(found).items()}

    plain = changes()
    found = changes(("memory_layers", 3.0), ("memory_layers", 1.0), ("gates", 16.0), ("*/1/feed_forward/in_EF", 0.5))
    expected = {"layers/1/attention/gate/bias_H": 16.0, "layers/1/feed_forward/in_EF": 0.5}
    for path, change in plain.items():
        np.testing.assert_allclose(found[path], change * expected.get(path, 1.0), rtol=1e-6, err_msg=path)
        assert np.abs(change).max() > 0, path


@pytest.mark.parametrize(
    ("factors", "words"),
    [
        ((("gates", 0.0),), "0.0 for 'gates' must be above 0 and finite"),
        (
            (("embedding/*", 16.0),),
            r"no parameter of 'embedding/\*' is trained\. Add it to Optimizer.trainable = \('layers/0/\*',\)",
        ),
        (
            (("gates", 16.0), ("layers/7/*", 2.0)),
            r"Optimizer.learning_rate_multipliers = .*'layers/7/\*' matches no parameter",
        ),
    ],
)
def test_learning_rate_multipliers_without_effect_are_refused(factors, words):
    """Returns the optimizer of a run that trains its layer only."""
    model = ModelSettings(vocabulary_size=11, layers=1, embedding_size=4, heads=2, head_size=2, memory_layers=(1,))
    parameters = abstract_model(model, MemorySettings(size=8, neighbors=4))[1]
    with pytest.raises(InputError, match=words):
        settings = OptimizerSettings(trainable=("layers/0/*",), learning_rate_multipliers=factors)
        learning_rate_multipliers(settings, parameters, (1,), trainable_mask(settings, parameters, (1,)))


def test_adafactor_moves_a_parameter_by_the_rate_times_its_own_size():
    """The paper's rate of 1.0 / sqrt(step) is relative: ten times as large a parameter makes ten times the steps."""
    settings = OptimizerSettings(learning_rate=0.01, schedule="constant", warmup_steps=0)
    optimizer = make_optimizer(settings)
    signs = jnp.array([1.0, -1.0, 1.0, -1.0])
    for size in (1.0, 10.0):
        parameters = {"vector": jnp.full(4, size)}
        changes, _ = optimizer.update({"vector": signs}, optimizer.init(parameters), parameters)
        np.testing.assert_allclose(changes["vector"], -0.01 * size * signs, rtol=1e-4)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_warms_up_to_its_largest_rate_and_ends_as_it_states(schedule):
    settings = OptimizerSettings(learning_rate=0.5, schedule=schedule, warmup_steps=10, decay_steps=100)
    rates = np.array([float(learning_rate(settings)(count)) for count in range(101)])
    assert np.isfinite(rates).all() and (rates[:100] > 0).all()
    assert (np.diff(rates[:10]) > 0).all() and rates[9:11].max() == rates.max()
    assert (rates[100] < 1e-6) == SCHEDULES[schedule].decays


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_optimizer_lowers_a_loss_and_leaves_other_parameters_alone(kind):
    settings = OptimizerSettings(kind=kind, learning_rate=0.05, schedule="constant", warmup_steps=0)
    parameters = {"a": jnp.full((4, 4), 3.0), "b": jnp.full((4, 4), 3.0)}
    optimizer = make_optimizer(settings, {"a": True, "b": False})

    def loss(parameters):
        return ((parameters["a"] - 1) ** 2).mean()

    @jax.jit
    def update(parameters, state):
        gradient = jax.grad(loss)(parameters) | {"b": jnp.zeros((4, 4))}
        changes, state = optimizer.update(gradient, state, parameters)
        return optax.apply_updates(parameters, changes), state

    state = optimizer.init(parameters)
    for _ in range(20):
        parameters, state = update(parameters, state)
    assert 0 <= loss(parameters) < 4
    np.testing.assert_array_equal(parameters["b"], 3.0)
