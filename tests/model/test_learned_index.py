"""The learned index: what it is taught, that nothing else notices, and that what it proposes gets better."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from scipy.special import log_softmax, softmax

from memorizing.errors import InputError
from memorizing.memory.bank import append, empty_bank, valid
from memorizing.memory.search import Keys
from memorizing.memory.search.blocked import Blocked, BlockedSettings
from memorizing.memory.search.contract import NO_INDEX
from memorizing.memory.search.exact import Exact
from memorizing.memory.search.proposed import Proposed
from memorizing.memory.search_choice import make_search
from memorizing.memory.settings import MemorySettings
from memorizing.model.attention import l2_normalize
from memorizing.model.carry import empty_carry
from memorizing.model.learned_index import SAMPLED, LearnedIndex, first_index, index_loss, sampled
from memorizing.model.memory_attention import attend_to_memory
from memorizing.model.settings import ModelSettings
from memorizing.model.transformer import abstract_model, create_model
from memorizing.parallel.mesh import PARAMETER_RULES, MeshSettings, make_mesh, shardings
from memorizing.shapes import Batch
from memorizing.storage.train_state import TrainState
from memorizing.training.optimizer import OptimizerSettings, make_optimizer, trainable_mask
from memorizing.training.step import make_train_call

pytestmark = pytest.mark.large

ROWS, HEADS, TOKENS, SLOTS, SIZE, NEIGHBORS = 2, 2, 16, 64, 16, 4
SEARCH = Proposed(kind="learned", candidates=8, inner=Blocked(block_size=32))
MODEL = ModelSettings(
    vocabulary_size=11, layers=2, embedding_size=16, heads=4, kv_heads=2, head_size=8, feed_forward_size=16,
    memory_layers=(2,), dtype="float32", gate_bias=0.0, index_size=4,
)  # fmt: skip
MEMORY = MemorySettings(size=64, neighbors=4, dtype="float32", search="blocked", proposer="learned", proposals=8)


def bank_and_query(seed: int = 0, written: int = 32, key_dtype=None):
    """A bank whose last slots are empty, and queries of unit length times 4."""
    settings = MemorySettings(size=SLOTS, neighbors=NEIGHBORS, dtype="float32", key_dtype=key_dtype)
    rngs = jax.random.split(jax.random.key(seed), 3)
    keys, values = (jax.random.normal(rng, (ROWS, HEADS, written, SIZE)) for rng in rngs[:2])
    bank = append(empty_bank(ROWS, HEADS, SIZE, settings), l2_normalize(keys), values, Exact())
    return bank, 4 * l2_normalize(jax.random.normal(rngs[2], (ROWS, HEADS, TOKENS, SIZE)))


def indexed(keys: Keys, index: LearnedIndex) -> Keys:
    return keys._replace(index=NO_INDEX._replace(learned=index._asdict()))


@pytest.mark.parametrize("key_dtype", [None, "int8"])
def test_the_index_loss_is_a_cross_entropy_over_valid_slots(key_dtype):
    bank, query = bank_and_query(key_dtype=key_dtype)
    bank = bank._replace(length_B=jnp.asarray([0, 30]))  # one row has nothing to ask
    index = first_index(HEADS, SIZE, 4)
    asks_BN = jnp.arange(TOKENS) < jnp.asarray([TOKENS, 9])[:, None]
    found = index_loss(index, query, bank.keys, valid(bank), asks_BN)
    keys, held = np.asarray(bank.keys.plain())[1], np.asarray(valid(bank))[1]
    weight = np.asarray(index.index_query_HDP)
    total = 0.0
    for head in range(HEADS):
        own, asked = keys[head][held], np.asarray(query)[1, head, :9]
        logits = (asked @ weight[head]) @ (own @ weight[head]).T
        total -= (softmax(asked @ own.T, axis=-1) * log_softmax(logits, axis=-1)).sum()
    assert held.sum() == 30 and found == pytest.approx(total / (HEADS * 9), rel=2e-2 if key_dtype else 1e-5)
    assert index_loss(index, query, bank.keys, jnp.zeros_like(valid(bank)), asks_BN) == 0


def test_an_index_of_all_features_finds_the_exact_neighbors():
    bank, query = bank_and_query()
    index = first_index(HEADS, SIZE, SIZE)  # orthonormal, so that nothing is lost
    search = dataclasses.replace(SEARCH, candidates=NEIGHBORS)
    found = search(query, indexed(bank.keys, index), valid(bank), NEIGHBORS)
    wanted = Exact()(query, bank.keys, valid(bank), NEIGHBORS)
    np.testing.assert_array_equal(found.slots_BHNK, wanted.slots_BHNK)
    np.testing.assert_allclose(found.scores_BHNK, wanted.scores_BHNK, rtol=1e-6)


def test_few_queries_search_the_keys_directly():
    bank, query = bank_and_query()
    index, minimum = first_index(HEADS, SIZE, 4), 1.0
    search = dataclasses.replace(SEARCH, candidates=NEIGHBORS, minimum_score=minimum)
    keys = indexed(bank.keys, index)
    few, many = (search(part, keys, valid(bank), NEIGHBORS) for part in (query[:, :, :5], query))
    wanted = Exact(minimum_score=minimum)(query, bank.keys, valid(bank), NEIGHBORS)
    np.testing.assert_allclose(few.scores_BHNK, wanted.scores_BHNK[:, :, :5], rtol=1e-6)
    assert np.isneginf(few.scores_BHNK).any()
    assert (np.asarray(many.slots_BHNK) != np.asarray(wanted.slots_BHNK)).any()


def test_a_learned_index_starts_as_the_random_projection():
    _, query = bank_and_query()
    keys = l2_normalize(jax.random.normal(jax.random.key(5), (ROWS, HEADS, SLOTS, SIZE))).astype(jnp.bfloat16)
    fixed = Proposed(kind="projection", projection_size=4, candidates=8)
    entries, _ = fixed.entries(keys, {})
    counts = jnp.ones((ROWS, SLOTS), bool)
    one = fixed(query, Keys(keys, None, NO_INDEX._replace(slots=entries)), counts, NEIGHBORS)
    other = SEARCH(query, indexed(Keys(keys), first_index(HEADS, SIZE, 4)), counts, NEIGHBORS)
    assert (np.asarray(one.slots_BHNK) == np.asarray(other.slots_BHNK)).mean() > 0.9  # they round differently


def attended(query, bank, index):
    search = dataclasses.replace(SEARCH, candidates=SLOTS)  # with any index the same is found
    mask = None if index is None else jnp.ones((ROWS, TOKENS), bool)
    read = attend_to_memory(query, bank, search if index else Blocked(), NEIGHBORS, index=index, mask_BN=mask)
    return read.output.out_BHND


@pytest.mark.parametrize("devices", [1, 8])
def test_the_index_loss_sends_gradient_to_the_index_only(devices):
    bank, query = bank_and_query()
    index = first_index(HEADS, SIZE, 4)
    asked = query[:, :, sampled(TOKENS)]
    assert asked.shape[2] == SAMPLED
    everything = (asked, bank.keys, valid(bank), jnp.ones((ROWS, SAMPLED), bool))
    wanted = jax.grad(lambda index: ROWS * TOKENS * index_loss(index, *everything))(index)
    loss = lambda query, index, bank: (attended(query, bank, index) ** 2).sum()  # noqa: E731
    of_query = jax.grad(loss)(query, None, bank)
    with jax.set_mesh(
        mesh := make_mesh(MeshSettings(2, 2, 2) if devices == 8 else MeshSettings(), jax.devices()[:devices])
    ):
        placed = (
            jax.device_put(index, shardings(mesh, index, PARAMETER_RULES)),
            jax.device_put(bank, shardings(mesh, bank)),
        )
        query_everywhere = jax.device_put(query, NamedSharding(mesh, PartitionSpec()))
        out, (found_query, found_index) = jax.jit(jax.value_and_grad(loss, (0, 1)))(query_everywhere, *placed)
    assert float(out) == pytest.approx(float(loss(query, None, bank)), rel=1e-5)
    np.testing.assert_allclose(found_query, of_query, rtol=1e-4, atol=1e-5)
    for found, expected in zip(found_index, wanted, strict=True):
        assert np.abs(expected).max() > 0.1
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_the_index_learns_which_features_matter():
    """Queries have two features, keys noise in all others: random features find little, learned ones nearly all."""
    settings = dict(candidates=8, inner=Blocked())

    def drawn(rng):
        one, other = jax.random.split(rng)
        query = jax.random.normal(one, (ROWS, HEADS, TOKENS, SIZE)) * jnp.where(jnp.arange(SIZE) < 2, 3.0, 0.0)
        return query, Keys(jax.random.normal(other, (ROWS, HEADS, 256, SIZE))), jnp.ones((ROWS, 256), bool)

    def recall(index):
        query, keys, counts = drawn(jax.random.key(99))
        wanted = Exact()(query, keys, counts, NEIGHBORS).slots_BHNK
        found = Proposed(kind="learned", **settings)(query, indexed(keys, index), counts, NEIGHBORS).slots_BHNK
        return float((wanted[..., None] == found[..., None, :]).any(-1).mean())

    optimizer = optax.adam(0.02)

    def step(carried, rng):
        index, state = carried
        query, keys, counts = drawn(rng)
        everyone = jnp.ones((ROWS, TOKENS), bool)
        changes, state = optimizer.update(jax.grad(index_loss)(index, query, keys, counts, everyone), state)
        return (optax.apply_updates(index, changes), state), None

    first = first_index(HEADS, SIZE, 4)
    rngs = jax.random.split(jax.random.key(1), 300)
    (index, _), _ = jax.jit(lambda: jax.lax.scan(step, (first, optimizer.init(first)), rngs))()
    assert recall(first) < 0.5 and recall(index) > 0.95


def trained_calls(model: ModelSettings, memory: MemorySettings, only: tuple[str, ...] = ()) -> tuple:
    """States and losses of three calls of four segments, with a clip that takes effect."""
    graph, parameters = create_model(model, memory, 0)
    settings = OptimizerSettings(
        kind="adamw", learning_rate=0.01, schedule="constant", warmup_steps=0, clip_norm=0.5, trainable=only
    )
    moves = trainable_mask(settings, parameters, model.memory_layers)
    optimizer = make_optimizer(settings, moves)
    state = TrainState(
        parameters, optimizer.init(parameters), jnp.zeros((), jnp.int32), empty_carry(model, memory, 2, 16)
    )
    call, losses = make_train_call(graph, optimizer, trainable=moves), []
    for seed in range(3):
        tokens = np.random.default_rng(seed).integers(0, 11, (4, 2, 16)).astype(np.int32)
        batch = Batch(tokens, np.roll(tokens, -1, 2), np.ones((4, 2, 16), bool), np.zeros((4, 2), bool))
        state, metrics = call(state, batch, ())
        losses += [metrics.segments.nats, metrics.segments.gradient_norm]
    return state.parameters, np.concatenate(losses)


@pytest.mark.parametrize("remat", [False, True])
def test_other_parameters_train_as_without_an_index(remat):
    model = dataclasses.replace(MODEL, remat=remat)
    searched = dataclasses.replace(MEMORY, proposer=None)
    with_index, losses = trained_calls(model, searched)
    without, expected = trained_calls(dataclasses.replace(model, index_size=0), searched)
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
    own = with_index["layers"][1]["attention"]
    index = LearnedIndex(own.pop("index_query_HDP"), own.pop("index_key_HDP"))
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7), with_index, without)
    for learned, first in zip(index, first_index(2, 8, 4), strict=True):
        assert np.abs(learned - first).max() > 1e-3


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_padding_trains_no_index(kv_heads):
    """Padding changes no index, and its movement only by rounding."""
    model = dataclasses.replace(MODEL, kv_heads=kv_heads)
    graph, parameters = create_model(model, MEMORY, 0)
    moves = trainable_mask(OptimizerSettings(trainable=("index",)), parameters, (2,))
    optimizer = optax.sgd(1.0)
    call = make_train_call(graph, optimizer, trainable=moves)
    found = []
    for filler in (0, 5):
        copied = jax.tree.map(jnp.array, parameters)
        state = TrainState(copied, optimizer.init(copied), jnp.zeros((), jnp.int32), empty_carry(model, MEMORY, 2, 16))
        tokens = np.random.default_rng(0).integers(0, 11, (4, 2, 16)).astype(np.int32)
        mask = np.arange(16) < np.asarray([16, 6])[:, None]
        tokens = np.where(mask, tokens, filler)
        batch = Batch(tokens, tokens, np.broadcast_to(mask, tokens.shape), np.zeros((4, 2), bool))
        starts = batch._replace(starts_document_B=np.asarray([[True, True], *[[False, True]] * 3]))
        found.append(call(state, starts, ())[0].parameters["layers"][1]["attention"]["index_key_HDP"])
    np.testing.assert_array_equal(*found)
    assert np.abs(found[0] - first_index(kv_heads, 8, 4).index_key_HDP).max() > 1e-4


@pytest.mark.parametrize("remat", [False, True])
def test_training_an_index_does_not_copy_the_memory(remat):
    """Temporaries beside those of a step without an index: features and their gradient, but not keys or values."""
    memory = dataclasses.replace(MEMORY, size=1 << 15, search="blocked", options=(BlockedSettings(block_size=512),))
    held = {}
    for index_size in (0, 1):
        model = dataclasses.replace(MODEL, heads=2, head_size=32, remat=remat, index_size=index_size)
        optimizer = optax.sgd(0.1)
        plain = dataclasses.replace(memory, proposer="learned" if index_size else None)
        graph, parameters = create_model(model, plain, 0)
        carry = empty_carry(model, plain, 2, 16)
        state = TrainState(parameters, optimizer.init(parameters), jnp.zeros((), jnp.int32), carry)
        batch = Batch(*[np.zeros((4, 2, 16), np.int32)] * 2, np.ones((4, 2, 16), bool), np.zeros((4, 2), bool))
        compiled = make_train_call(graph, optimizer).lower(state, batch, ()).compile()
        held[index_size] = compiled.memory_analysis().temp_size_in_bytes
    keys = carry.banks[0].keys_BHMD.nbytes
    assert held[0] < 0.5 * keys and held[1] < held[0] + 1.5 * keys


def test_the_index_can_be_the_only_trained_part():
    before = create_model(MODEL, MEMORY, 0)[1]
    after, _ = trained_calls(MODEL, MEMORY, ("index",))
    moved = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for (path, one), other in zip(jax.tree.leaves_with_path(before), jax.tree.leaves(after), strict=True)
        if np.abs(one - other).max() > 0
    }
    assert moved == {"layers/1/attention/index_query_HDP", "layers/1/attention/index_key_HDP"}


def test_impossible_index_settings_are_refused():
    with pytest.raises(InputError, match=r"Model.index_size = 9: .* below Model.head_size = 8"):
        dataclasses.replace(MODEL, index_size=9)
    with pytest.raises(InputError, match=r"but Model.index_size = 0. Train an index with Model.index_size = 2"):
        empty_carry(dataclasses.replace(MODEL, index_size=0), MEMORY, 1, 16)
    with pytest.raises(InputError, match=r"'learned' with Memory.search = 'ivf'.* Memory.search = 'auto'"):
        dataclasses.replace(MEMORY, search="ivf")
    with pytest.raises(InputError, match=r"'index' matches no parameter.*`index` needs Model.index_size"):
        parameters = abstract_model(dataclasses.replace(MODEL, index_size=0), MEMORY)[1]
        trainable_mask(OptimizerSettings(trainable=("index",)), parameters, (2,))
    assert make_search(MEMORY).empty_index(1, 2, 64, 8) == NO_INDEX
