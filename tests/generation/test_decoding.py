"""Reading a segment token by token gives what reading it at once gives, and costs a fraction of reading it again."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memorizing.generation.decoding import close_segment, extend, open_segment
from memorizing.memory.search.ivf import IvfSettings
from memorizing.memory.search.lsh import LshSettings
from memorizing.memory.settings import MemorySettings
from memorizing.model.carry import empty_carry
from memorizing.model.settings import ModelSettings
from memorizing.model.transformer import apply_model, create_model
from memorizing.shapes import BEGIN_TOKEN, Batch

pytestmark = pytest.mark.large

N, SEGMENTS = 8, 4
MODEL = ModelSettings(
    vocabulary_size=17, layers=2, embedding_size=16, heads=2, head_size=8, feed_forward_size=32,
    memory_layers=(2,), gate_bias=1.0, dtype="float32", position_max_distance=20,
)  # fmt: skip
INPUTS = np.concatenate([[BEGIN_TOKEN], np.random.default_rng(0).integers(3, 17, N * SEGMENTS - 1)]).astype(np.int32)
VARIANTS = {
    f"{positions}{', XL cache' * xl}{', key shift' * shift}": dataclasses.replace(
        MODEL, positions=positions, xl_cache=xl, key_shift=shift, position_bias_shared=shift
    )
    for positions in ("t5", "rope")
    for xl in (False, True)
    for shift in (False, True)
}
OPTIONS = (IvfSettings(lists=2, probes=2, candidates=4 * N), LshSettings(candidates=4 * N))


def memory_of(size: int, **settings) -> MemorySettings:
    return MemorySettings(**{"size": size, "neighbors": 5, "dtype": "float32", "search": "exact"} | settings)


def created(model: ModelSettings, memory: MemorySettings):
    """Structure, and parameters with position biases that are not 0 and gates that are open."""
    graph, parameters = create_model(model, memory, seed=0)
    for index, bias in parameters.get("biases", {}).items():
        bias["table_UH"] = jax.random.normal(jax.random.key(index), bias["table_UH"].shape)
    return graph, parameters


def read_whole(model: ModelSettings, memory: MemorySettings):
    """Logits behind each input, by the call that training and evaluation make; and the carry before each segment."""
    graph, parameters = created(model, memory)
    run = jax.jit(functools.partial(apply_model, graph))
    carry, logits, carries = empty_carry(model, memory, 1, N), [], []
    for first in range(0, len(INPUTS), N):
        inputs = INPUTS[None, first : first + N]
        carries.append(carry)
        one, carry = run(parameters, Batch(inputs, inputs, np.ones((1, N), bool), np.array([first == 0])), carry)
        logits.append(one[0])
    return np.concatenate(logits), [*carries, carry]


@functools.cache
def calls(model: ModelSettings, memory: MemorySettings):
    graph, parameters = created(model, memory)
    return (
        jax.jit(functools.partial(extend, graph, parameters)),
        jax.jit(functools.partial(close_segment, model=model, memory=memory)),
    )


KEPT = [
    {"eviction": "reservoir", "sink": 2},
    {"eviction": "least_used"},
    {"eviction": "least_recently_used"},
    {"eviction": "none", "duplicate_score": 0.9},
    {"maximum_age": 12, "write_every": 2},
    {"writes": "beyond_cache", "eviction": "least_used"},
    {"writes": "never"},
    {"clear_at_documents": False},
]


@pytest.mark.parametrize("size", [0, 2 * N, 8 * N])
@pytest.mark.parametrize("name", VARIANTS)
def test_token_by_token_equals_the_whole(name, size):
    check_token_by_token(VARIANTS[name], memory_of(size))


@pytest.mark.parametrize("kept", KEPT, ids=repr)
def test_decoding_token_by_token_stores_the_same_tokens(kept):
    check_token_by_token(VARIANTS["t5, XL cache"], memory_of(2 * N, **kept))


def check_token_by_token(model: ModelSettings, memory: MemorySettings):
    expected, carries = read_whole(model, memory)
    run, end = calls(model, memory)
    opened, logits = open_segment(empty_carry(model, memory, 1, N), N), []
    for token in INPUTS:
        if int(opened.position) == N:
            opened = open_segment(end(opened), N)
        one, opened = run(token[None, None], jnp.asarray(1), opened)
        logits.append(one[0])
    np.testing.assert_allclose(np.stack(logits), expected, atol=1e-4, rtol=0)
    # And what is kept for later: caches and memory are those of the whole.
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=1e-4), end(opened), carries[-1])
    if memory.size and memory.writes != "never":  # the test would pass without a memory: it has to matter
        without, _ = read_whole(model, memory_of(0))
        assert np.abs(without - expected)[N:].max() > 1e-2


@pytest.mark.parametrize("name", ["t5, XL cache, key shift", "rope"])
@pytest.mark.parametrize("count", [1, 2, N - 1, N])
def test_reading_a_part_of_a_segment_equals_reading_the_whole(name, count):
    """Padding behind the part that is real leaves no trace, whatever its tokens."""
    model, memory = VARIANTS[name], memory_of(2 * N)
    expected, carries = read_whole(model, memory)
    run, _ = calls(model, memory)
    for segment in (0, 3):
        own = INPUTS[segment * N : (segment + 1) * N]
        padded = np.where(np.arange(N) < count, own, 5)[None].astype(np.int32)
        logits, opened = run(padded, jnp.asarray(count), open_segment(carries[segment], N))
        np.testing.assert_allclose(logits[0], expected[segment * N + count - 1], atol=1e-4, rtol=0)
        for place in range(count, N):
            logits, opened = run(own[None, place : place + 1], jnp.asarray(1), opened)
            np.testing.assert_allclose(logits[0], expected[segment * N + place], atol=1e-4, rtol=0)


@pytest.mark.parametrize("search", ["blocked", "native", "binned", "ivf", "lsh", "faiss"])
@pytest.mark.parametrize("key_dtype", [None, "int8"])
def test_every_search_serves_single_queries(search, key_dtype):
    if search == "faiss":
        pytest.importorskip("faiss")
    memory = memory_of(4 * N, search=search, key_dtype=key_dtype, options=OPTIONS)
    model = VARIANTS["t5, XL cache"]
    expected, carries = read_whole(model, memory)
    run, _ = calls(model, memory)
    opened = open_segment(carries[3], N)
    for place in range(3 * N, 4 * N):
        logits, opened = run(INPUTS[None, place : place + 1], jnp.asarray(1), opened)
        np.testing.assert_allclose(logits[0], expected[place], atol=1e-4, rtol=0)


def test_decoding_in_bfloat16_differs_by_rounding_only():
    model = dataclasses.replace(VARIANTS["t5, XL cache, key shift"], dtype="bfloat16")
    memory = memory_of(2 * N, dtype="bfloat16")
    expected, carries = read_whole(model, memory)
    run, _ = calls(model, memory)
    opened = open_segment(carries[2], N)
    for place in range(2 * N, 3 * N):
        logits, opened = run(INPUTS[None, place : place + 1], jnp.asarray(1), opened)
        np.testing.assert_allclose(logits[0], expected[place], atol=0.1, rtol=0)


def test_a_token_takes_a_tenth_of_the_arithmetic_of_its_segment_at_most():
    model = dataclasses.replace(MODEL, vocabulary_size=256, embedding_size=64, heads=4, head_size=16,
                                feed_forward_size=256)  # fmt: skip
    tokens, memory = 64, memory_of(512)
    graph, parameters = create_model(model, memory, seed=0)
    carry = empty_carry(model, memory, 1, tokens)
    inputs = np.zeros((1, tokens), np.int32)
    batch = Batch(inputs, inputs, np.ones((1, tokens), bool), np.array([False]))

    def flops(call, *arguments) -> float:
        return jax.jit(call).lower(*arguments).compile().cost_analysis()["flops"]

    again = flops(functools.partial(apply_model, graph), parameters, batch, carry)
    opened = open_segment(carry, tokens)
    one = flops(functools.partial(extend, graph), parameters, inputs[:, :1], jnp.asarray(1), opened)
    closing = flops(functools.partial(close_segment, model=model, memory=memory), opened)
    assert again > 10 * (one + closing / tokens)
    print(f"{again:,.0f} FLOPs to read a segment of {tokens}, {one:,.0f} to read a token behind it")
