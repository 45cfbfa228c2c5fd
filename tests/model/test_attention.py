"""One attention layer against its formulas, written out in float64 with loops over rows, heads and tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from memorizing.memory.bank import append, clear, empty_bank
from memorizing.memory.search import Search
from memorizing.memory.search_choice import make_search
from memorizing.memory.settings import MemorySettings
from memorizing.model.attention import Attention, LayerInputs
from memorizing.model.carry import empty_cache, next_cache
from memorizing.model.positions import RelativeBias, angles, buckets, frequencies, rotate
from memorizing.model.settings import ModelSettings

ROWS, TOKENS, HEADS, SIZE, EMBEDDING, SLOTS, NEIGHBORS = 2, 6, 2, 4, 8, 24, 5
SETTINGS = ModelSettings(
    vocabulary_size=10, layers=1, embedding_size=EMBEDDING, heads=HEADS, head_size=SIZE, memory_layers=(1,),
    gate_bias=-0.5, dtype="float32", key_shift=True,
)  # fmt: skip
MEMORY = MemorySettings(size=SLOTS, neighbors=NEIGHBORS, search="exact", dtype="float32")


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def softmax(x: np.ndarray) -> np.ndarray:
    weights = np.exp(x - x.max())
    return weights / weights.sum()


def written_out(layer: Attention, x, bias, cache, cached, memory):
    """Section 4 of the paper's method, token by token. `memory[row]` is a list of (key, value), each `[H, D]`."""
    wq, wk, wv, wo, scale, gate_bias, shift = (
        np.asarray(part[...], np.float64)
        for part in (
            layer.query_EHD, layer.key_EHD, layer.value_EHD, layer.out_HDE, layer.scale_H, layer.gate.bias_H,
            layer.shift_HD,
        )
    )  # fmt: skip
    gate = 1 / (1 + np.exp(-gate_bias))
    out = np.zeros((ROWS, TOKENS, EMBEDDING))
    for row in range(ROWS):
        raw = np.einsum("NE,EHD->NHD", x[row], wk)
        before = np.concatenate(
            [cache.last_key_BHD[row][None] if cached[row] else np.zeros((1, HEADS, SIZE)), raw[:-1]]
        )
        k = unit(raw + shift * before)
        v, q = np.einsum("NE,EHD->NHD", x[row], wv), unit(np.einsum("NE,EHD->NHD", x[row], wq)) * scale[:, None]
        window = cache.keys_BHWD.shape[2]
        for token in range(TOKENS):
            for head in range(HEADS):
                scores, values = [], []
                for place in range(window + token + 1):
                    distance = window + token - place
                    if distance > (window or TOKENS) or (place < window and not cached[row]):
                        continue
                    from_cache = place < window
                    key = cache.keys_BHWD[row, head, place] if from_cache else k[place - window, head]
                    values.append(cache.values_BHWD[row, head, place] if from_cache else v[place - window, head])
                    scores.append(q[token, head] @ key + bias[head, token, place])
                local = softmax(np.array(scores)) @ np.array(values)
                if memory[row]:
                    nearest = sorted(memory[row], key=lambda pair: -(q[token, head] @ pair[0][head]))[:NEIGHBORS]
                    weights = softmax(np.array([q[token, head] @ key[head] for key, _ in nearest]))
                    remote = sum(weight * value[head] for weight, (_, value) in zip(weights, nearest, strict=True))
                    local = gate[head] * remote + (1 - gate[head]) * local
                out[row, token] += local @ wo[head]
    return out


@pytest.mark.parametrize("window", [0, TOKENS])
def test_a_memory_layer_is_its_formula(window):
    layer = Attention(SETTINGS, True, nnx.Rngs(0))
    layer.scale_H[...] = jnp.array([3.0, 1.5])
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    bias = normal(HEADS, TOKENS, window + TOKENS)
    cache = empty_cache(ROWS, HEADS, window, SIZE, jnp.dtype("float32"))
    cache = jax.tree.map(lambda leaf: jnp.asarray(normal(*leaf.shape)), cache)
    cached = np.array([True, False])

    # Row 0 has fewer tokens than slots; row 1 was cleared last and has none.
    bank = empty_bank(ROWS, HEADS, SIZE, MEMORY)
    memory = [[], []]
    for cleared in ([False, False], [True, False], [False, False]):
        keys, values = unit(normal(ROWS, HEADS, TOKENS, SIZE)).astype(np.float32), normal(ROWS, HEADS, TOKENS, SIZE)
        bank = append(clear(bank, np.array(cleared)), jnp.asarray(keys), jnp.asarray(values), Search())
        for row in range(ROWS):
            memory[row] = [] if cleared[row] else memory[row]
            memory[row] += [(keys[row, :, token], values[row, :, token]) for token in range(TOKENS)]
    bank = clear(bank, np.array([False, True]))
    memory[1] = []

    x = normal(ROWS, TOKENS, EMBEDDING)
    inputs = LayerInputs(jnp.asarray(bias)[None], cache, jnp.asarray(cached), bank, make_search(MEMORY), MEMORY)
    out, segment, update = layer(jnp.asarray(x), inputs)
    expected = written_out(layer, x.astype(np.float64), bias, jax.tree.map(np.asarray, cache), cached, memory)
    np.testing.assert_allclose(out, expected, rtol=2e-4, atol=2e-5)
    if window:  # what is to be written to the memory is what the cache keeps
        np.testing.assert_array_equal(update.segment.keys_BHND, next_cache(segment, cache).keys_BHWD)


def test_relative_bias_looks_up_the_bucket_of_each_distance():
    bias = RelativeBias(8, 32, heads=1)
    bias.table_UH[...] = jnp.arange(8.0)[:, None]
    looked_up = np.asarray(bias(tokens=3, cached=3))[0, 0]
    for query in range(3):
        for key in range(6):
            assert looked_up[query, key] == buckets(np.asarray(3 + query - key), 8, 32)


def test_buckets_are_exact_near_and_logarithmic_far():
    # By hand for 8 buckets up to 32: 4 + floor(4 * log(d / 4) / log(8)).
    assert buckets(np.array([-3, 0, 1, 3, 4, 6, 7, 11, 12, 19, 20, 31, 32, 1000]), 8, 32).tolist() == [
        0, 0, 1, 3, 4, 4, 5, 5, 6, 6, 7, 7, 7, 7
    ]  # fmt: skip


def test_rotated_products_depend_on_distance_alone():
    rng = np.random.default_rng(0)
    query, key = (jnp.asarray(np.tile(rng.normal(size=(1, 1, 1, 8)), (1, 1, 6, 1)), jnp.float32) for _ in range(2))
    sine_Jd, cosine_Jd = angles(10, frequencies(ModelSettings(head_size=8)))
    query, key = rotate(query, sine_Jd[4:], cosine_Jd[4:]), rotate(key, sine_Jd[:6], cosine_Jd[:6])
    products = jnp.einsum("BHND,BHMD->NM", query, key)
    for offset in range(-5, 6):
        diagonal = np.diagonal(products, offset)
        np.testing.assert_allclose(diagonal, diagonal[0], rtol=1e-4, atol=1e-4)
