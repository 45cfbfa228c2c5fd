"""Properties of reading by segments: the same result, and no flow from the future or from other documents."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memorizing.memory.bank import valid
from memorizing.memory.settings import MemorySettings
from memorizing.model.carry import empty_carry
from memorizing.model.parameters import by_path
from memorizing.model.settings import ModelSettings
from memorizing.model.transformer import apply_model, constant_gates, create_model
from memorizing.shapes import BEGIN_TOKEN, Batch

VOCABULARY, TOKENS = 17, 8
MEMORY = MemorySettings(size=4 * TOKENS, neighbors=5, dtype="float32")
MODEL = ModelSettings(
    vocabulary_size=VOCABULARY, layers=3, embedding_size=16, heads=2, head_size=8, feed_forward_size=32,
    memory_layers=(2, 3), gate_bias=0.0, dtype="float32", position_max_distance=20,
)  # fmt: skip
VARIANTS = {
    "t5": MODEL,
    "no cache": dataclasses.replace(MODEL, xl_cache=False),
    "rope, key shift": dataclasses.replace(MODEL, positions="rope", key_shift=True),
    "a bias per layer": dataclasses.replace(MODEL, position_bias_shared=False),
}


@functools.cache
def built(model: ModelSettings, memory: MemorySettings = MEMORY):
    """Parameters, with position biases that are not 0, and the compiled model."""
    graph, parameters = create_model(model, memory, seed=0)
    for index, bias in parameters.get("biases", {}).items():
        bias["table_UH"] = jax.random.normal(jax.random.key(index), bias["table_UH"].shape)
    return parameters, jax.jit(functools.partial(apply_model, graph))


def as_segments(documents: list[np.ndarray]) -> list[Batch]:
    """Batches in which row `r` reads `documents[r]` (of equal length) from its start."""
    tokens = np.stack(documents)
    inputs = np.concatenate([np.full((len(tokens), 1), BEGIN_TOKEN), tokens[:, :-1]], axis=1).astype(np.int32)
    return [
        Batch(
            inputs[:, first : first + TOKENS],
            tokens[:, first : first + TOKENS].astype(np.int32),
            np.ones((len(tokens), TOKENS), bool),
            np.full(len(tokens), first == 0),
        )
        for first in range(0, tokens.shape[1], TOKENS)
    ]


def read(model: ModelSettings, batches: list[Batch], memory: MemorySettings = MEMORY, carry=None):
    """Logits of all segments joined, and the last carry."""
    parameters, run = built(model, memory)
    carry = carry or empty_carry(model, memory, len(batches[0].inputs_BN), TOKENS)
    logits = []
    for batch in batches:
        one, carry = run(parameters, batch, carry)
        logits.append(np.asarray(one))
    return np.concatenate(logits, axis=1), carry


def document(seed: int, segments: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, VOCABULARY, segments * TOKENS)


@pytest.mark.parametrize("name", VARIANTS)
def test_no_token_sees_the_future(name):
    original = document(0, 6)
    logits, _ = read(VARIANTS[name], as_segments([original]))
    for place in (0, 5, 7, 8, 20, 31, 46):
        changed = original.copy()
        changed[place] = 3 + (changed[place] - 2) % (VOCABULARY - 3)
        others, _ = read(VARIANTS[name], as_segments([changed]))
        np.testing.assert_array_equal(logits[0, : place + 1], others[0, : place + 1])
        assert not np.array_equal(logits[0, place + 1 :], others[0, place + 1 :])


def test_the_memory_reaches_further_than_the_cache():
    """The test above would pass without any memory: here an early token changes what is predicted much later."""
    original = document(0, 5)
    changed = original.copy()
    changed[2] = 3 + (changed[2] - 2) % (VOCABULARY - 3)
    for memory, sees in ((MEMORY, True), (dataclasses.replace(MEMORY, size=0), False)):
        model = dataclasses.replace(MODEL, layers=2, memory_layers=(2,))
        one, _ = read(model, as_segments([original]), memory)
        other, _ = read(model, as_segments([changed]), memory)
        assert np.array_equal(one[0, 3 * TOKENS + 2 :], other[0, 3 * TOKENS + 2 :]) != sees


@pytest.mark.parametrize("name", VARIANTS)
def test_a_document_is_read_as_if_alone_whatever_the_row_read_before(name):
    first, second, third = document(1, 2), document(2, 4), document(3, 4)
    neighbor = as_segments([document(4, 2)]) + as_segments([document(5, 6)]) + as_segments([document(6, 2)])
    row = as_segments([first]) + as_segments([second]) + as_segments([third])
    both = [
        jax.tree.map(lambda a, b: np.concatenate([a, b]), one, other) for one, other in zip(row, neighbor, strict=True)
    ]
    together, _ = read(VARIANTS[name], both)
    for start, text in ((0, first), (2, second), (6, third)):
        alone, _ = read(VARIANTS[name], as_segments([text]))
        np.testing.assert_allclose(together[0, start * TOKENS :][: len(text)], alone[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("positions", ["t5", "rope"])
@pytest.mark.parametrize("key_shift", [False, True])
def test_the_cache_makes_one_long_sliding_window(positions, key_shift):
    """One layer read in segments equals one attention over the whole text in which a token sees the `W` before it."""
    model = dataclasses.replace(MODEL, layers=1, memory_layers=(), positions=positions, key_shift=key_shift)
    memory = dataclasses.replace(MEMORY, size=0)
    text = document(7, 5)
    segmented, _ = read(model, as_segments([text]), memory)
    parameters, run = built(model, memory)
    whole = as_segments([text])
    joined = Batch(
        *(np.concatenate([getattr(b, name) for b in whole], axis=1) for name in Batch._fields[:3]), np.array([True])
    )
    for place in range(len(text)):
        first = max(place - TOKENS, 0)
        lead = first - 1 if key_shift and first else first  # the shift of the window's first key needs its predecessor
        window = Batch(joined.inputs_BN[:, lead : place + 1], joined.targets_BN[:, lead : place + 1],
                       joined.mask_BN[:, lead : place + 1], np.array([True]))  # fmt: skip
        if lead < first:  # read that predecessor as a segment of its own, which leaves only its key behind
            before = jax.tree.map(lambda leaf: leaf[:, :1] if leaf.ndim == 2 else leaf, window)
            no_cache = dataclasses.replace(model, xl_cache=False)
            _, carry = run(parameters, before, empty_carry(no_cache, memory, 1, 1))
            window = jax.tree.map(lambda leaf: leaf[:, 1:] if leaf.ndim == 2 else np.array([False]), window)
        else:
            carry = empty_carry(dataclasses.replace(model, xl_cache=False), memory, 1, 1)
        expected, _ = run(parameters, window, carry)
        np.testing.assert_allclose(segmented[0, place], expected[0, -1], rtol=1e-4, atol=1e-5)


def test_an_empty_memory_leaves_local_attention_alone():
    """However far its gate is open: the first segment reads the same with a memory as without one."""
    with_memory, _ = read(MODEL, as_segments([document(8, 1)]))
    without, _ = read(MODEL, as_segments([document(8, 1)]), dataclasses.replace(MEMORY, size=0))
    np.testing.assert_allclose(with_memory, without, rtol=1e-5, atol=1e-6)


def test_memories_fill_with_the_document_and_forget_the_oldest():
    _, carry = read(MODEL, as_segments([document(9, 3)]))
    assert [int(valid(bank).sum()) for bank in carry.banks] == [3 * TOKENS] * 2
    _, carry = read(MODEL, as_segments([document(9, 6)]))
    assert [int(valid(bank).sum()) for bank in carry.banks] == [MEMORY.size] * 2


@pytest.mark.parametrize("positions", ["t5", "rope"])
def test_with_beyond_cache_every_token_is_seen_once(positions):
    """A token is in the cache or in the memory, never in both, seen from every token of a segment."""
    model = dataclasses.replace(MODEL, layers=1, memory_layers=(1,), positions=positions)
    length = 4 * TOKENS
    memory = MemorySettings(size=length, neighbors=length, dtype="float32", writes="beyond_cache")
    text = np.random.default_rng(0).integers(3, VOCABULARY, length)
    others = [np.where(np.arange(length) == place, 3 + (text - 2) % (VOCABULARY - 3), text) for place in range(length)]
    batches, carry, logits = as_segments([text, *others]), None, []
    every = read(model, batches, dataclasses.replace(memory, writes="segment"))[1].banks[0].keys_BHMD[0]
    for number, batch in enumerate(batches):
        one, carry = read(model, [batch], memory, carry)
        logits.append(one)
        bank = carry.banks[0]
        slots = np.argsort(bank.slot_table.positions_BM[0])[length - number * TOKENS :]  # behind those that are empty
        joined = np.concatenate([bank.keys_BHMD[0][:, slots], carry.caches[0].keys_BHWD[0]], axis=1)
        np.testing.assert_allclose(joined, every[:, : (number + 1) * TOKENS], atol=1e-5)
        assert int(valid(bank)[0].sum()) == number * TOKENS
    joined = np.concatenate(logits, axis=1)
    difference = np.abs(joined - joined[:1]).max(-1)[1:]
    seen = difference > 1e-6  # [the token that is another, the logits behind its place]
    np.testing.assert_array_equal(seen, np.arange(length)[:, None] < np.arange(length))


def test_gradients_flow_to_queries_gates_and_the_local_path_but_not_into_the_memory():
    batches = as_segments([document(10, 3)])
    _, carry = read(MODEL, batches[:2])
    graph, parameters = create_model(MODEL, MEMORY, seed=0)

    def loss(parameters, carry):
        logits_BNV, new = apply_model(graph, parameters, batches[2], carry)
        return (logits_BNV**2).sum(), new

    def loss_of_what_is_written(parameters):
        _, new = apply_model(graph, parameters, batches[2], carry)
        return sum((bank.keys_BHMD**2).sum() + (bank.values_BHMD**2).sum() for bank in new.banks)

    floating = lambda carry: [bank.keys_BHMD for bank in carry.banks] + [bank.values_BHMD for bank in carry.banks]  # noqa: E731

    def loss_of_memory(held):
        count = len(carry.banks)
        banks = tuple(
            bank._replace(keys_BHMD=held[i], values_BHMD=held[count + i]) for i, bank in enumerate(carry.banks)
        )
        return loss(parameters, carry._replace(banks=banks))[0]

    assert all(not np.any(part) for part in jax.grad(loss_of_memory)(floating(carry)))
    assert all(not np.any(part) for part in jax.tree.leaves(jax.grad(loss_of_what_is_written)(parameters)))
    gradient, _ = jax.grad(loss, has_aux=True)(parameters, carry)
    attention = gradient["layers"][1]["attention"]
    for name in ("query_EHD", "key_EHD", "value_EHD", "out_HDE", "gate/bias_H", "scale_H"):
        assert np.any(by_path(attention)[name]), name

    # With gates wide open nothing local is left in memory layers: their keys and values then take no gradient at all.
    for layer in (1, 2):
        parameters["layers"][layer]["attention"]["gate"]["bias_H"] = jnp.full(2, 100.0)
    gradient, _ = jax.grad(loss, has_aux=True)(parameters, carry)
    attention = gradient["layers"][2]["attention"]
    assert np.any(attention["query_EHD"])
    assert not np.any(attention["key_EHD"]) and not np.any(attention["value_EHD"])


def test_remat_changes_nothing():
    batches = as_segments([document(11, 3)])
    _, carry = read(MODEL, batches[:2])
    gradients = []
    for remat in (False, True):
        graph, parameters = create_model(dataclasses.replace(MODEL, remat=remat), MEMORY, seed=0)
        loss = lambda parameters, graph=graph: apply_model(graph, parameters, batches[2], carry)[0].var()  # noqa: E731
        gradients.append(jax.grad(loss)(parameters))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *gradients)


@pytest.mark.parametrize(
    ("shared", "remat", "positions"), [(True, False, "t5"), (False, True, "t5"), (True, False, "rope")]
)
def test_layers_compiled_as_one_change_nothing(shared, remat, positions):
    """Dropout still drops different features in each layer."""
    model = dataclasses.replace(
        MODEL, layers=5, memory_layers=(3,), position_bias_shared=shared, remat=remat, positions=positions, dropout=0.2
    )
    batches = as_segments([document(11, 2)])
    found = []
    for scan_layers in (False, True):
        graph, parameters = create_model(dataclasses.replace(model, scan_layers=scan_layers), MEMORY, seed=0)

        def run(parameters, graph=graph):
            carry = empty_carry(model, MEMORY, 1, TOKENS)
            for number, batch in enumerate(batches):
                logits_BNV, carry = apply_model(graph, parameters, batch, carry, jax.random.key(number))
            return logits_BNV.var(), (logits_BNV, carry)

        found.append(jax.jit(jax.value_and_grad(run, has_aux=True))(parameters))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), *found)


def test_bfloat16_stays_near_float32():
    model = dataclasses.replace(MODEL, dtype="bfloat16")
    memory = dataclasses.replace(MEMORY, dtype="bfloat16")
    wide, _ = read(MODEL, as_segments([document(12, 3)]))
    narrow, carry = read(model, as_segments([document(12, 3)]), memory)
    assert narrow.dtype == np.float32 and carry.banks[0].keys_BHMD.dtype == jnp.bfloat16
    np.testing.assert_allclose(narrow[0, :TOKENS], wide[0, :TOKENS], atol=0.15)


def test_dropout_drops_in_training_only():
    model = dataclasses.replace(MODEL, dropout=0.5)
    graph, parameters = create_model(model, MEMORY, seed=0)
    batch, carry = as_segments([document(13, 1)])[0], empty_carry(model, MEMORY, 1, TOKENS)
    runs = [
        apply_model(graph, parameters, batch, carry, rng)[0] for rng in (None, jax.random.key(0), jax.random.key(1))
    ]
    plain, _ = read(dataclasses.replace(model, dropout=0.0), [batch])
    np.testing.assert_allclose(apply_model(graph, parameters, batch, carry)[0], runs[0])
    assert not np.allclose(runs[0], runs[1]) and not np.allclose(runs[1], runs[2])
    assert plain.shape == runs[0].shape


def test_parameters_do_not_depend_on_the_memory():
    sizes = [create_model(MODEL, dataclasses.replace(MEMORY, size=size), seed=3)[1] for size in (0, 64)]
    jax.tree.map(np.testing.assert_array_equal, *sizes)


def test_constant_gates_are_returned_by_layer_number():
    values = constant_gates(*create_model(MODEL, MEMORY, seed=0))
    assert {number: part.tolist() for number, part in values.items()} == {2: [0.5, 0.5], 3: [0.5, 0.5]}
