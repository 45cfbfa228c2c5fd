"""Gates against their formulas in NumPy; one softmax over everything against full attention; what may read what."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memorizing.errors import InputError
from memorizing.generation.decoding import close_segment, extend, open_segment
from memorizing.memory.bank import append, clear, empty_bank
from memorizing.memory.search_choice import make_search
from memorizing.memory.settings import MemorySettings
from memorizing.model.attention_output import AttentionOutput, ScoreSummary
from memorizing.model.carry import empty_carry
from memorizing.model.gates import GATES, gate_value, mix
from memorizing.model.intermediates import Collect
from memorizing.model.memory_attention import ReadOptions, attend_to_memory
from memorizing.model.parameters import by_path
from memorizing.model.positions import buckets
from memorizing.model.settings import ModelSettings
from memorizing.model.transformer import apply_and_collect, constant_gates, create_model
from memorizing.parallel.mesh import MeshSettings, make_mesh, shardings
from memorizing.shapes import Batch

ROWS, HEADS, N, SIZE, SLOTS, K = 4, 2, 4, 3, 8, 3
KINDS = "score", "joint"
RNG = np.random.default_rng(0)
QUERY, KEYS, VALUES = (RNG.normal(size=(ROWS, HEADS, count, SIZE)).astype(np.float32) for count in (N, SLOTS, SLOTS))
LOCAL = [RNG.normal(size=(ROWS, HEADS, count, SIZE)).astype(np.float32) for count in (N, N)]
LENGTHS = [SLOTS, SLOTS // 2, 0, SLOTS]
MINIMUM = 1.0


def memory(search: str = "exact", **settings) -> MemorySettings:
    own = {"size": SLOTS, "neighbors": K, "dtype": "float32", "search": search, "minimum_score": MINIMUM} | settings
    return MemorySettings(**own)


def bank_of(settings: MemorySettings):
    """Row 1 has the later half of its slots, row 2 nothing."""
    bank, search = empty_bank(ROWS, HEADS, SIZE, settings), make_search(settings)
    for half, forgets in ((slice(0, 4), []), (slice(4, 8), [1])):
        bank = clear(bank, np.isin(np.arange(ROWS), forgets))
        bank = append(bank, jnp.asarray(KEYS[:, :, half]), jnp.asarray(VALUES[:, :, half]), search)
    return clear(bank, np.arange(ROWS) == 2)


def attended(query, local_keys, bank, kind, settings, negative_rows):
    """A memory layer's attention without projections or positions: every token sees the local ones up to itself."""
    options = ReadOptions(negative_rows=negative_rows)
    remote, found_BHN, *_ = attend_to_memory(query, bank, make_search(settings), settings.retrieved, options=options)
    scores = jnp.where(np.tril(np.ones((N, N), bool)), jnp.einsum("BHND,BHJD->BHNJ", query, local_keys), -jnp.inf)
    out = jnp.einsum("BHNJ,BHJD->BHND", jax.nn.softmax(scores), LOCAL[1])
    local = AttentionOutput(out, ScoreSummary(scores.max(-1), jax.nn.logsumexp(scores, axis=-1)))
    gate_BHN = gate_value(GATES[kind](HEADS, SIZE, 0.0).logit(query, local, remote), found_BHN)
    return mix(gate_BHN, remote.out_BHND, out), gate_BHN


def by_hand(kind: str, neighbors: int, negative_rows: int):
    """The same with loops, in float64."""
    out, gates = np.zeros((ROWS, HEADS, N, SIZE)), np.zeros((ROWS, HEADS, N))
    for row, head, token in np.ndindex(ROWS, HEADS, N):
        query = QUERY[row, head, token].astype(np.float64)
        near = LOCAL[0][row, head, : token + 1] @ query
        found = []
        for other in [row, *((row + by) % ROWS for by in range(1, negative_rows + 1))]:
            slots = range(SLOTS - LENGTHS[other], SLOTS)
            pairs = [(KEYS[other, head, slot] @ query, VALUES[other, head, slot]) for slot in slots]
            pairs = [pair for pair in pairs if pair[0] >= MINIMUM]
            if other == row and not pairs:
                break
            found += sorted(pairs, key=lambda pair: -pair[0])[:neighbors]
        far = np.array([score for score, _ in found])
        average = lambda scores, values: np.exp(scores) @ np.array(values) / np.exp(scores).sum()  # noqa: E731
        local = average(near, LOCAL[1][row, head, : token + 1])
        gate, remote = 0.0, 0.0
        if found:
            remote = average(far, [value for _, value in found])
            gate = np.exp(far).sum() / (np.exp(far).sum() + np.exp(near).sum())
            if kind == "score":
                gate = np.exp(far.max()) / (np.exp(far.max()) + np.exp(near.max()))
        gates[row, head, token] = gate
        out[row, head, token] = gate * remote + (1 - gate) * local
    return out, gates


@functools.cache
def compiled(kind: str, settings: MemorySettings, negative_rows: int, devices: int):
    """Output, gate, and gradients for query, local keys and the bank's keys and values."""
    bank, arrays = bank_of(settings), (jnp.asarray(QUERY), jnp.asarray(LOCAL[0]))

    def run(query, local_keys, stored):
        bank_now = bank._replace(keys_BHMD=stored[0], values_BHMD=stored[1])
        out, gate = attended(query, local_keys, bank_now, kind, settings, negative_rows)
        return (jnp.sin(out) * jnp.arange(N)[:, None]).sum(), (out, gate)

    mesh = make_mesh(
        MeshSettings(data=2, model=2, memory=2) if devices == 8 else MeshSettings(), jax.devices()[:devices]
    )
    bank = jax.device_put(bank, shardings(mesh, bank))
    with jax.set_mesh(mesh):
        call = jax.jit(jax.value_and_grad(run, argnums=(0, 1, 2), has_aux=True))
        (_, read), gradients = call(*arrays, (bank.keys_BHMD, bank.values_BHMD))
    return jax.device_get((read, gradients))


@pytest.mark.parametrize(("kind", "search", "negative_rows", "devices"), [
    ("score", "exact", 0, 8), ("joint", "exact", 2, 8), ("score", "dense", 0, 8), ("joint", "dense", 1, 1),
])  # fmt: skip
def test_gates_that_compare_scores_are_their_formulas(kind, search, negative_rows, devices):
    """Covers rows without tokens, queries that find nothing, slots over devices, and memories of other rows."""
    (out, gate), (of_query, of_local, of_memory) = compiled(kind, memory(search), negative_rows, devices)
    expected, expected_gate = by_hand(kind, SLOTS if search == "dense" else K, negative_rows)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(gate, expected_gate, rtol=1e-4, atol=1e-5)
    assert (gate[2] == 0).all() and (gate[0] == 0).any() and (gate[0] > 0).any()
    assert not np.any(of_memory[0]) and not np.any(of_memory[1])
    for gradient in (of_query, of_local):
        assert np.isfinite(gradient).all() and np.any(gradient[0])
    # On devices that each hold a part they are those of one; and those are the differences of the formula.
    _, alone = compiled(kind, memory(search), negative_rows, 1)
    near = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(near, (of_query, of_local), alone[:2])
    step, at = 1e-3, (0, 1, 3, 2)
    for array, gradient in ((QUERY, of_query), (LOCAL[0], of_local)):
        losses = []
        for moved in (step, -step):
            array[at] += moved
            read = by_hand(kind, SLOTS if search == "dense" else K, negative_rows)[0]
            array[at] -= moved
            losses.append((np.sin(read) * np.arange(N)[:, None]).sum())
        np.testing.assert_allclose(gradient[at], (losses[0] - losses[1]) / (2 * step), rtol=1e-2, atol=1e-3)


def test_dense_attention_is_exact_search_for_all_slots():
    for kind in KINDS:
        dense, exact = (
            compiled(kind, settings, 0, 1) for settings in (memory("dense"), memory("exact", neighbors=SLOTS))
        )
        jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5), dense, exact)
    with pytest.raises(InputError, match="'dense', which attends to all slots"):
        memory("dense", report_recall=True)


SEGMENTS, VOCABULARY = 3, 13
MODEL = ModelSettings(
    vocabulary_size=VOCABULARY, layers=2, embedding_size=8, heads=2, kv_heads=1, head_size=4, feed_forward_size=8,
    memory_layers=(1, 2), gate="joint", xl_cache=False, gate_bias=0.5, dtype="float32",
)  # fmt: skip
DOCUMENT = RNG.integers(3, VOCABULARY, SEGMENTS * N).astype(np.int32)
WHOLE = MemorySettings(size=SEGMENTS * N, neighbors=SEGMENTS * N, dtype="float32", search="exact")


def drawn(model: ModelSettings, memory: MemorySettings = WHOLE):
    """Structure and parameters, in which also what starts as zeros or ones differs from head to head."""
    graph, parameters = create_model(model, memory, seed=0)

    def stir(path, leaf):
        return leaf + jax.random.normal(jax.random.key(len(path) + leaf.size), leaf.shape) * (leaf.ndim < 3) * 0.5

    return graph, jax.tree_util.tree_map_with_path(stir, parameters)


def read_in_segments(model: ModelSettings, memory: MemorySettings = WHOLE):
    """Logits of all tokens, the last carry, and the gates of each segment."""
    graph, parameters = drawn(model, memory)
    run = jax.jit(functools.partial(apply_and_collect, graph, collect=Collect(gates=True)))
    carry, logits, told = empty_carry(model, memory, 1, N), [], []
    for first in range(0, len(DOCUMENT), N):
        part = DOCUMENT[None, first : first + N]
        batch = Batch(part, part, np.ones((1, N), bool), np.array([first == 0]))
        one, carry, intermediates = run(parameters, batch, carry)
        logits.append(one[0])
        told.append({number: values.gate_BHN for number, values in intermediates.items()})
    return np.concatenate(logits), carry, told


def fully_attended(normalizes: bool):
    """The model as one attention over the whole document, in float64: positions within a segment alone."""
    _, parameters = drawn(dataclasses.replace(MODEL, normalize_memory_layers=normalizes))
    parameters = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), parameters)
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    rms = lambda x, norm: x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * norm["scale_E"]  # noqa: E731
    place = np.arange(len(DOCUMENT))
    is_local = place[:, None] // N == place // N
    distance = np.where(is_local, place[:, None] - place, 0)
    bias_HNJ = np.where(is_local, parameters["biases"][0]["table_UH"][buckets(distance, 32, 128)].transpose(2, 0, 1), 0)
    x = parameters["embedding"]["table_VE"][DOCUMENT] * MODEL.embedding_size**0.5
    for layer in parameters["layers"].values():
        own, before = layer["attention"], rms(x, layer["attention_norm"])
        q, k, v = (np.einsum("NE,EHD->HND", before, own[name]) for name in ("query_EHD", "key_EHD", "value_EHD"))
        q, k = (unit(q) * own["scale_H"][:, None, None], unit(k)) if normalizes else (q / 2, k)
        scores = np.where(place[:, None] >= place, np.einsum("HND,JD->HNJ", q, k[0]) + bias_HNJ, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        x = x + np.einsum("HNJ,JD,HDE->NE", weights, v[0], own["out_HDE"])
        forward = layer["feed_forward"]
        x = x + np.maximum(rms(x, layer["feed_forward_norm"]) @ forward["in_EF"], 0) @ forward["out_FE"]
    return rms(x, parameters["final_norm"]) @ parameters["embedding"]["table_VE"].T


@pytest.mark.parametrize(("search", "normalizes"), [("exact", True), ("dense", False)])
def test_joint_with_the_whole_document_in_memory_is_full_attention(search, normalizes):
    """A memory that holds all, all of which is retrieved; queries and keys normalized, and scaled as elsewhere."""
    model = dataclasses.replace(MODEL, normalize_memory_layers=normalizes)
    logits, _, _ = read_in_segments(model, dataclasses.replace(WHOLE, search=search))
    np.testing.assert_allclose(logits, fully_attended(normalizes), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("kind", "change"), [
    ("token", {"banks_of": (1, 1)}), ("layer", {}), ("score", {"search": "dense"}), ("joint", {"banks_of": (2, 2)}),
])  # fmt: skip
def test_token_by_token_equals_the_whole(kind, change):
    memory = dataclasses.replace(WHOLE, search=change.pop("search", "exact"), size=2 * N, neighbors=3)
    model = dataclasses.replace(MODEL, gate=kind, **change)
    expected, carry, told = read_in_segments(model, memory)
    graph, parameters = drawn(model, memory)
    run = jax.jit(functools.partial(extend, graph, parameters))
    end = jax.jit(functools.partial(close_segment, model=model, memory=memory))
    opened, logits = open_segment(empty_carry(model, memory, 1, N), N), []
    for token in DOCUMENT:
        if int(opened.position) == N:
            opened = open_segment(end(opened), N)
        one, opened = run(token[None, None], jnp.asarray(1), opened)
        logits.append(one[0])
    np.testing.assert_allclose(np.stack(logits), expected, atol=1e-4, rtol=0)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=1e-4), end(opened), carry)
    # In the first segment nothing is found; later, gates that depend on the token differ from token to token.
    assert list(told[0]) == [1, 2] and not any(np.any(gate) for gate in told[0].values())
    spread = np.ptp(told[-1][2], axis=-1)
    assert (spread == 0).all() if kind == "layer" else (spread > 1e-3).all()
    if kind == "layer":
        learned = constant_gates(graph, parameters)[2]
        np.testing.assert_allclose(told[-1][2], np.full((1, 2, N), learned), rtol=1e-5)
    else:
        assert constant_gates(graph, parameters) == {}


def test_defaults_have_the_parameters_and_the_carry_that_they_had():
    model = dataclasses.replace(MODEL, gate="head", kv_heads=None)
    _, parameters = create_model(model, WHOLE, seed=0)
    names = {name: leaf.shape for name, leaf in by_path(parameters["layers"][0]["attention"]).items()}
    projections = dict.fromkeys(("query_EHD", "key_EHD", "value_EHD"), (8, 2, 4))
    assert names == {**projections, "out_HDE": (2, 4, 8), "scale_H": (2,), "gate/bias_H": (2,)}
    carry = empty_carry(model, WHOLE, 1, N)
    assert [leaf.shape for leaf in jax.tree.leaves(carry.banks[0])] == [(1, 2, 12, 4), (1, 2, 12, 4), (), (1,)]
    assert [leaf.shape for leaf in jax.tree.leaves(carry.caches[0])] == [(1, 2, 0, 4), (1, 2, 0, 4), (1, 2, 4)]
    assert len(jax.tree.leaves(carry)) == 2 * 4 + 2 * 3 + 1
