"""The backbone of pretrained models, as options: every way to run it gives the same, and every parameter counts.

That it computes what GPT-2 and Llama compute is shown in test_pretrained.py.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memorizing.config import ConfigError, load
from memorizing.errors import InputError
from memorizing.generation.decoding import close_segment, extend, open_segment
from memorizing.memory.settings import MemorySettings
from memorizing.model.carry import empty_carry
from memorizing.model.parameters import count_parameters
from memorizing.model.positions import frequencies
from memorizing.model.settings import ModelSettings
from memorizing.model.transformer import apply_model, create_model
from memorizing.parallel.mesh import PARAMETER_RULES, MeshSettings, make_mesh, shardings
from memorizing.shapes import Batch
from memorizing.training.flops import training_flops_per_token
from memorizing.training.optimizer import OptimizerSettings, make_optimizer

pytestmark = pytest.mark.large

N, ROWS, VOCABULARY = 8, 2, 24
TINY = ModelSettings(
    vocabulary_size=VOCABULARY, layers=3, embedding_size=16, heads=2, head_size=8, feed_forward_size=32,
    memory_layers=(3,), gate_bias=0.0, dtype="float32",
)  # fmt: skip
GPT = dataclasses.replace(
    TINY, norm="layer", norm_epsilon=1e-5, attention_bias="all", feed_forward="gelu_tanh", feed_forward_bias=True,
    positions="learned", max_positions=10, xl_cache=False, embedding_scale=1.0,
)  # fmt: skip
LLAMA = dataclasses.replace(
    TINY, attention_bias="qkv", feed_forward="swiglu", feed_forward_bias=True, query_key_norm=True, positions="rope",
    rope_theta=500.0, rope_scaling="llama3", rope_factor=4.0, rope_original_length=64, tie_embeddings=False,
)  # fmt: skip
MODELS = {"gpt": GPT, "llama": LLAMA}
MEMORY = MemorySettings(size=4 * N, neighbors=3, dtype="float32", search="exact")


@functools.cache
def created(name: str, **changes):
    """Returns the structure, and parameters that are neither 0 nor 1."""
    graph, parameters = create_model(dataclasses.replace(MODELS[name], **changes), MEMORY, seed=0)
    leaves, tree = jax.tree.flatten(parameters)
    rngs = jax.random.split(jax.random.key(1), len(leaves))
    drawn = [leaf + 0.2 * jax.random.normal(rng, leaf.shape) for rng, leaf in zip(rngs, leaves, strict=True)]
    return graph, jax.tree.unflatten(tree, drawn)


def segments() -> list[Batch]:
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (ROWS, 2 * N)).astype(np.int32)
    mask = np.ones((ROWS, N), bool)
    parts = [tokens[:, first : first + N] for first in range(0, 2 * N, N)]
    return [Batch(part, part, mask, np.full(ROWS, number == 0)) for number, part in enumerate(parts)]


def read(graph, parameters, model: ModelSettings):
    """Logits of all segments, and the last carry."""
    carry, logits = empty_carry(model, MEMORY, ROWS, N), []
    for batch in segments():
        one, carry = apply_model(graph, parameters, batch, carry)
        logits.append(one)
    return jnp.concatenate(logits, axis=1), carry


@functools.cache
def plainly(name: str):
    """Logits, and the gradient of a scalar of them."""
    graph, parameters = created(name)

    def scalar(parameters):
        logits, _ = read(graph, parameters, MODELS[name])
        return (logits * jnp.cos(jnp.arange(logits.size).reshape(logits.shape))).sum(), logits

    (_, logits), gradient = jax.jit(jax.value_and_grad(scalar, has_aux=True))(parameters)
    return np.asarray(logits), jax.device_get(gradient)


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_counts(name):
    _, gradient = plainly(name)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        place = jax.tree_util.keystr(path, simple=True, separator=".")
        # A bias of all keys alike changes no softmax, but for the gate's remote part, unless positions turn it.
        assert np.abs(leaf).max() > 1e-4 or place.endswith("key_bias_HD"), place


@pytest.mark.parametrize("name", MODELS)
def test_token_by_token_equals_the_whole(name):
    """Decodes several tokens first, as a prompt, then one by one."""
    (graph, parameters), model = created(name), MODELS[name]
    step = jax.jit(functools.partial(extend, graph, parameters))
    carry, found, places = empty_carry(model, MEMORY, ROWS, N), [], []
    for number, batch in enumerate(segments()):
        opened = open_segment(carry, N)
        logits, opened = step(batch.inputs_BN[:, :4], jnp.asarray(3), opened)
        found.append(logits)
        for place in range(3, N):
            logits, opened = step(batch.inputs_BN[:, place : place + 1], jnp.asarray(1), opened)
            found.append(logits)
        places += range(N * number + 2, N * number + N)
        carry = close_segment(opened, model, MEMORY)
    np.testing.assert_allclose(np.stack(found, axis=1), plainly(name)[0][:, places], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_the_same_on_a_mesh_with_layers_as_one_and_computed_again(name):
    """Logits and gradients; the mesh splits rows, heads and slots."""
    model = dataclasses.replace(MODELS[name], scan_layers=True, remat=True)
    graph, parameters = created(name, scan_layers=True, remat=True)
    mesh = make_mesh(MeshSettings(data=2, model=2, memory=2), jax.devices()[:8])
    parameters = jax.device_put(parameters, shardings(mesh, parameters, PARAMETER_RULES))

    def scalar(parameters):
        logits, _ = read(graph, parameters, model)
        return (logits * jnp.cos(jnp.arange(logits.size).reshape(logits.shape))).sum(), logits

    with jax.set_mesh(mesh):
        (_, logits), gradient = jax.jit(jax.value_and_grad(scalar, has_aux=True))(parameters)
    expected, expected_gradient = plainly(name)
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3, rtol=1e-3), gradient, expected_gradient)


def test_flops_and_parameters_by_hand():
    model = dataclasses.replace(LLAMA, memory_layers=(), layers=1)
    _, parameters = create_model(model, MemorySettings(size=0), seed=0)
    attention, forward, heads = 4 * 16 * 16, 3 * 16 * 32, 2 * N * 2 * 16
    biases, norms = 3 * 16 + 2 * 32 + 16, 3 * 16 + 2 * 8
    assert count_parameters(parameters) == 2 * VOCABULARY * 16 + attention + forward + biases + norms
    flops = training_flops_per_token(model, MemorySettings(size=0), N)
    assert flops == 6 * (attention + forward + heads + VOCABULARY * 16)


def test_weight_decay_skips_biases():
    _, parameters = created("llama")
    transformation = make_optimizer(
        OptimizerSettings(kind="adamw", schedule="constant", warmup_steps=0, learning_rate=1.0, weight_decay=0.5)
    )
    updates, _ = transformation.update(
        jax.tree.map(jnp.zeros_like, parameters), transformation.init(parameters), parameters
    )
    leaves = jax.tree_util.tree_leaves_with_path(updates)
    changed = {jax.tree_util.keystr(path[-1:], simple=True) for path, leaf in leaves if np.any(leaf)}
    assert "query_EHD" in changed and "predicted_VE" in changed
    assert not {name for name in changed if "bias" in name}


def test_scaled_angles_by_hand():
    """Covers pairs that turn often, seldom, and in between within 64 tokens."""
    plain = dataclasses.replace(LLAMA, rope_scaling="none", rope_theta=10_000.0)
    np.testing.assert_allclose(frequencies(plain), [1.0, 0.1, 0.01, 0.001])
    np.testing.assert_allclose(
        frequencies(dataclasses.replace(plain, rope_scaling="linear")), [0.25, 0.025, 0.0025, 0.00025]
    )
    # Turns: 64 / 2 pi = 10.19 (above 4: kept); 1.019 (a share of .0062 is kept); .1019 and less (divided by 4).
    kept = (6.4 / (2 * np.pi) - 1) / 3
    scaled = [1.0, 0.1 * kept + 0.025 * (1 - kept), 0.0025, 0.00025]
    np.testing.assert_allclose(frequencies(dataclasses.replace(plain, rope_scaling="llama3")), scaled)


def test_impossible_backbones_are_refused_with_a_way_out():
    with pytest.raises(InputError, match=r"Set Model.xl_cache = False \(to evaluate: --xl_cache=off\)"):
        dataclasses.replace(GPT, xl_cache=True)
    with pytest.raises(InputError, match="max_positions = 0"):
        dataclasses.replace(GPT, max_positions=0)
    with pytest.raises(InputError, match=r"rope_low_frequency = 5.0"):
        dataclasses.replace(LLAMA, rope_low_frequency=5.0)
    with pytest.raises(InputError, match=r"segment_length = 11.*Use at most 10"):
        empty_carry(GPT, MEMORY, 1, 11)
    bindings = [
        "Model.positions = 'rope'",
        "Model.max_positions = 512",
        "Memory.size = 0",
        "Batch.segment_length = 512",
    ]
    with pytest.raises((ConfigError, InputError), match=r"a token sees 513 tokens.*Use at most 511"):
        load([], bindings)
    load([], [*bindings, "Model.xl_cache = False"])
