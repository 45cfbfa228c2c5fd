"""Grouped-query attention against a model of as many key heads, in which each group has copies of the same one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memorizing.errors import InputError
from memorizing.evaluation.lookups import read_document
from memorizing.generation.decoding import close_segment, extend, open_segment
from memorizing.memory.settings import MemorySettings
from memorizing.model.carry import empty_carry
from memorizing.model.settings import ModelSettings, split_sizes
from memorizing.model.transformer import apply_model, create_model
from memorizing.parallel.mesh import PARAMETER_RULES, MeshSettings, assemble, open_mesh, shardings
from memorizing.shapes import Batch

pytestmark = pytest.mark.large

N, SEGMENTS, ROWS, HEADS, GROUP = 8, 3, 2, 8, 4
MODEL = ModelSettings(
    vocabulary_size=32, layers=2, embedding_size=16, heads=HEADS, kv_heads=HEADS // GROUP, head_size=4,
    feed_forward_size=16, memory_layers=(2,), gate_bias=0.0, dtype="float32", key_shift=True,
)  # fmt: skip
WHOLE = dataclasses.replace(MODEL, kv_heads=None)
MEMORY = MemorySettings(size=2 * N, neighbors=3, dtype="float32", search="exact", report_recall=True)
TOKENS = np.random.default_rng(0).integers(3, 32, (ROWS, SEGMENTS * N)).astype(np.int32)
BATCHES = [
    Batch(part, (part + 1) % 32, np.ones((ROWS, N), bool), np.full(ROWS, number == 0))
    for number, part in enumerate(np.split(TOKENS, SEGMENTS, axis=1))
]
OF_KEYS = "key_EHD", "value_EHD", "shift_HD"


def of_key_heads(parameters: dict, change) -> dict:
    """The parameters with `change(name, leaf)` in place of those that are of keys and values."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: change(path[-1].key, leaf) if path[-1].key in OF_KEYS else leaf, parameters
    )


def repeated(parameters: dict) -> dict:
    return of_key_heads(
        parameters, lambda name, leaf: jnp.repeat(leaf, GROUP, axis=name.index("H") - name.index("_") - 1)
    )


def loss(graph, parameters, carry, batches=BATCHES):
    logits, read = [], []
    for batch in batches:
        logits_BNV, carry = apply_model(graph, parameters, batch, carry)
        logits.append(logits_BNV)
        read.append(carry)
    return (logits[-1] ** 2).sum(), (jnp.concatenate(logits, axis=1), carry)


@functools.cache
def made(settings: ModelSettings = MODEL):
    graph, parameters = create_model(settings, MEMORY, seed=0)
    parameters["biases"][0]["table_UH"] = jax.random.normal(
        jax.random.key(1), parameters["biases"][0]["table_UH"].shape
    )
    return graph, parameters


@functools.cache
def results():
    """Loss, logits and carry, and the gradient: of the grouped model, and of the one with copies."""
    found = []
    for settings, change in ((MODEL, lambda parameters: parameters), (WHOLE, repeated)):
        graph, _ = made(settings)
        run = jax.jit(jax.value_and_grad(functools.partial(loss, graph), has_aux=True))
        found.append(run(change(made()[1]), empty_carry(settings, MEMORY, ROWS, N)))
    return found


def test_a_group_reads_as_if_each_head_had_a_copy_of_its_keys():
    ((_, (logits, carry)), gradient), ((_, (expected, copies)), expected_gradient) = results()
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    for one, other in ((carry.caches[0].keys_BHWD, copies.caches[0].keys_BHWD),
                       (carry.banks[0].values_BHMD, copies.banks[0].values_BHMD)):  # fmt: skip
        assert one.shape[1] == HEADS // GROUP
        np.testing.assert_allclose(np.repeat(one, GROUP, axis=1), other, rtol=1e-4, atol=1e-5)
    for name in ("found_BH", "wanted_BH"):
        one, other = (np.asarray(getattr(each.banks[0].recall, name)) for each in (carry, copies))
        np.testing.assert_array_equal(one, other.reshape(ROWS, -1, GROUP).sum(-1))
    # What a key head learns is what its copies would, together.

    def together(name, leaf):
        axis = name.index("H") - name.index("_") - 1
        return leaf.reshape(*leaf.shape[:axis], -1, GROUP, *leaf.shape[axis + 1 :]).sum(axis + 1)

    summed = of_key_heads(expected_gradient, together)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4), gradient, summed)


@pytest.mark.parametrize("settings", [MeshSettings(data=1, model=2, memory=2), MeshSettings(data=2, memory=4)])
def test_a_mesh_changes_nothing(settings):
    mesh = open_mesh(
        settings,
        split_sizes(MODEL, MEMORY, N, ROWS),
        devices=jax.devices()[: settings.data * settings.model * settings.memory],
    )
    graph, parameters = made()
    carry = empty_carry(MODEL, MEMORY, ROWS, N)
    parameters, carry = (
        jax.device_put(part, shardings(mesh, part, *rules))
        for part, rules in ((parameters, [PARAMETER_RULES]), (carry, []))
    )
    batches = [assemble(mesh, batch, ROWS, list(range(ROWS))) for batch in BATCHES]
    with jax.set_mesh(mesh):
        run = jax.jit(jax.value_and_grad(functools.partial(loss, graph), has_aux=True))
        (_, (logits, carry)), gradient = run(parameters, carry, batches)
    ((_, (expected, expected_carry)), expected_gradient), _ = results()
    np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-4)
    jax.tree.map(np.testing.assert_array_equal, carry.banks[0].recall, expected_carry.banks[0].recall)
    near = lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-3, atol=2e-4)  # noqa: E731
    jax.tree.map(near, gradient, expected_gradient)


def test_a_mesh_that_does_not_divide_key_heads_is_refused():
    with pytest.raises(InputError, match=r"Model\.kv_heads = 2 does not divide over Mesh\.model = 4\. Use 4"):
        open_mesh(MeshSettings(data=2, model=4), split_sizes(MODEL, MEMORY, N, ROWS))
    with pytest.raises(InputError, match=r"Model\.kv_heads = 3 does not divide Model\.heads = 8\. Use 1, 2, 4, 8"):
        dataclasses.replace(MODEL, kv_heads=3)


def test_token_by_token_equals_the_whole():
    graph, parameters = made()
    run = jax.jit(functools.partial(extend, graph, parameters))
    end = jax.jit(functools.partial(close_segment, model=MODEL, memory=MEMORY))
    opened, logits = open_segment(empty_carry(MODEL, MEMORY, ROWS, N), N), []
    for token in TOKENS.T:
        if int(opened.position) == N:
            opened = open_segment(end(opened), N)
        one, opened = run(token[:, None], jnp.asarray(1), opened)
        logits.append(one)
    ((_, (expected, _)), _), _ = results()
    np.testing.assert_allclose(np.stack(logits, axis=1), expected, rtol=1e-4, atol=1e-4)


def test_lookups_are_reported_by_query_head():
    memory = dataclasses.replace(MEMORY, report_recall=False)
    grouped, copies = (
        [it.layers[2] for it in read_document(settings, memory, parameters, TOKENS[0], N) if it.layers]
        for settings, parameters in ((MODEL, made()[1]), (WHOLE, repeated(made()[1])))
    )
    for one, other in zip(grouped, copies, strict=True):
        assert one.places_HNK.shape[0] == HEADS
        np.testing.assert_array_equal(one.places_HNK, other.places_HNK)
        np.testing.assert_allclose(one.weights_HNK, other.weights_HNK, rtol=1e-3, atol=1e-5)


def test_untrained_shifted_heads_find_the_token_after_an_earlier_match():
    """Uses the second round of a text of different tokens; one of two key heads is shifted, for both its queries."""
    model = ModelSettings(
        vocabulary_size=256, layers=1, embedding_size=64, heads=8, kv_heads=4, head_size=32, feed_forward_size=16,
        memory_layers=(1,), dtype="float32", key_shift=True,
    )  # fmt: skip
    memory = MemorySettings(size=160, neighbors=2, dtype="float32", search="exact")
    parameters = create_model(model, memory, seed=5)[1]
    round_ = np.random.default_rng(1).permutation(np.arange(3, 256))[:80].astype(np.int32)
    share_H = np.zeros(8)
    for segment in read_document(model, memory, parameters, np.tile(round_, 2), N):
        if segment.first >= 88:  # the first of a round has another predecessor
            places_NHK = np.sort(segment.layers[1].places_HNK, axis=-1).swapaxes(0, 1)
            before_N = segment.first + np.arange(N) - 80 - 1
            share_H += (places_NHK == np.stack([before_N, before_N + 1], axis=-1)[:, None]).all(-1).mean(0) / 9
    shifted_H = np.repeat([False, True] * 2, 2)
    assert share_H[shifted_H].min() > 0.85 and share_H[~shifted_H].max() < 0.2, share_H
