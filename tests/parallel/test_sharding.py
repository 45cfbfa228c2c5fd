"""Searches, writes, training and evaluation on meshes of eight devices against the same on one; what travels."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memorizing.data.batches import BatchSettings, batches
from memorizing.data.tokens import Tokenized, TokenSplit, write_split
from memorizing.data.vocabulary import ByteVocabulary
from memorizing.evaluation.figures import Summary
from memorizing.evaluation.perplexity import EvaluationSettings, TrainedModel, score_documents
from memorizing.memory.bank import Bank, append, clear, empty_bank, resize, valid
from memorizing.memory.search import Keys, Search
from memorizing.memory.search.binned import BinnedSettings
from memorizing.memory.search.blocked import BlockedSettings
from memorizing.memory.search.exact import Exact
from memorizing.memory.search.sharded import Sharded
from memorizing.memory.search_choice import make_search
from memorizing.memory.settings import MemorySettings
from memorizing.model.memory_attention import attend_to_memory
from memorizing.model.settings import ModelSettings, split_sizes
from memorizing.parallel.mesh import MeshSettings, assemble, local_rows, make_mesh, open_mesh, placed, shardings, spec
from memorizing.planning.collectives import collectives
from memorizing.planning.plan import compile_call
from memorizing.training.optimizer import OptimizerSettings
from memorizing.training.settings import RunSettings, TrainingSettings
from memorizing.training.state import StateFactory

pytestmark = pytest.mark.large

ONE = MeshSettings(data=1)
MESHES = {
    "data": MeshSettings(data=8),
    "model": MeshSettings(data=1, model=4),
    "memory": MeshSettings(data=1, memory=8),
    "all": MeshSettings(data=2, model=2, memory=2),
}


def mesh_of(settings: MeshSettings) -> jax.sharding.Mesh:
    devices = max(settings.data, 1) * settings.model * settings.memory
    return make_mesh(settings, jax.devices()[:devices])


@pytest.mark.parametrize("name", MESHES)
@pytest.mark.parametrize("search", ["exact", "blocked"])
def test_a_sharded_search_finds_the_same_slots_in_the_same_order(name, search):
    """Covers ties across devices, and more neighbors than a device has slots."""
    rng = np.random.default_rng(0)
    queries, keys = (rng.integers(-2, 3, (8, 4, size, 4)).astype(np.float32) for size in (8, 64))
    valid_BM = rng.random((8, 64)) < 0.6
    mesh = mesh_of(MESHES[name])
    inner = make_search(
        MemorySettings(size=64, search=search, options=(BlockedSettings(block_size=5), BinnedSettings(block_size=5)))
    )
    for neighbors in (1, 3, 16):
        found = jax.shard_map(
            lambda queries, keys, valid, k=neighbors: Sharded(inner=inner)(queries, Keys(keys), valid, k),
            mesh=mesh,
            in_specs=(spec("BH_D"), spec("BHMD"), spec("BM")),
            out_specs=spec("BH__"),
            check_vma=False,
        )(queries, keys, valid_BM)
        expected = Exact()(jnp.asarray(queries), Keys(jnp.asarray(keys)), jnp.asarray(valid_BM), neighbors)
        np.testing.assert_array_equal(found.scores_BHNK, expected.scores_BHNK)
        exists = np.asarray(expected.scores_BHNK) > -np.inf
        np.testing.assert_array_equal(np.asarray(found.slots_BHNK)[exists], np.asarray(expected.slots_BHNK)[exists])


def bank_after(writes: int, slots: int, tokens: int, mesh: jax.sharding.Mesh | None = None) -> Bank:
    """A bank into which segments of distinct numbers were written; row 1 was cleared once."""
    bank = empty_bank(2, 2, 2, MemorySettings(size=slots, neighbors=1, dtype="float32"))
    step = jax.jit(lambda bank, part: append(bank, part, -part, Search()))
    if mesh is not None:
        bank = jax.device_put(bank, shardings(mesh, bank))
    for number in range(writes):
        part = 100 * (number + 1) + np.arange(4 * tokens * 2, dtype=np.float32).reshape(2, 2, tokens, 2) / 1000
        if number == 1:
            bank = clear(bank, np.array([False, True]))
        if mesh is None:
            bank = step(bank, part)
        else:
            with jax.set_mesh(mesh):
                bank = step(bank, part)
    return bank


@pytest.mark.parametrize(("slots", "tokens"), [(64, 8), (24, 8), (48, 24), (16, 16), (40, 8), (24, 12)])
@pytest.mark.parametrize("settings", [MESHES["memory"], MESHES["all"], MeshSettings(data=2, memory=4)])
def test_writes_that_cross_devices_are_exact(slots, tokens, settings):
    """Segments shorter and longer than what one device holds, and that reach over its end."""
    for writes in (1, slots // tokens, slots // tokens + 1):
        expected, found = bank_after(writes, slots, tokens), bank_after(writes, slots, tokens, mesh_of(settings))
        jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize(("before", "after"), [(32, 64), (32, 8), (32, 24), (16, 80), (32, 32)])
@pytest.mark.parametrize("writes", [1, 3, 7])
def test_a_bank_of_another_size_holds_the_newest_tokens(before, after, writes):
    """Runs on one device and over eight; the bank then continues like one that had its size from the start."""
    bank = bank_after(writes, before, 8)
    found = resize(bank, after, int(bank.cursor))
    ages = lambda bank: (int(bank.cursor) - 1 - np.arange(bank.keys_BHMD.shape[2])) % bank.keys_BHMD.shape[2]  # noqa: E731
    for row in range(2):
        newest = int(min(bank.length_B[row], after))
        assert int(found.length_B[row]) == newest
        for part in ("keys_BHMD", "values_BHMD"):
            one, other = (
                np.asarray(getattr(each, part))[row][:, np.argsort(ages(each))[:newest]] for each in (bank, found)
            )
            np.testing.assert_array_equal(one, other)
    assert int(found.cursor) % 8 == 0 and int(valid(found).sum()) == int(found.length_B.sum())
    mesh = mesh_of(MESHES["memory"])
    where = shardings(mesh, found)
    split = jax.device_put(bank, shardings(mesh, bank))
    turned = jax.jit(functools.partial(resize, slots=after, cursor=int(bank.cursor)), out_shardings=where)(split)
    jax.tree.map(np.testing.assert_array_equal, turned, found)


VOCABULARY, TOKENS, ROWS = 264, 16, 8
MODEL = ModelSettings(
    vocabulary_size=VOCABULARY, layers=2, embedding_size=32, heads=4, head_size=8, feed_forward_size=32,
    memory_layers=(2,), dtype="float32", gate_bias=0.0, key_shift=True,
)  # fmt: skip
MEMORY = MemorySettings(size=4 * TOKENS, neighbors=4, dtype="float32")
BATCH = BatchSettings(size=ROWS, segment_length=TOKENS, segments_per_call=5)
OPTIMIZER = OptimizerSettings(kind="adamw", learning_rate=0.01, schedule="constant", warmup_steps=5)
TRAINING = TrainingSettings(steps=20, checkpoint_every=20)


@pytest.fixture(scope="module")
def split(tmp_path_factory) -> TokenSplit:
    encode = ByteVocabulary().encode
    texts = [" ".join(str(number * word % 37) for word in range(80 + 9 * number)) for number in range(11)]
    folder = tmp_path_factory.mktemp("tokens") / "train"
    write_split(folder, [Tokenized(str(n), "", "", encode(t), len(t)) for n, t in enumerate(texts)], np.uint16)
    return TokenSplit(folder)


OTHER_MODEL = dataclasses.replace(
    MODEL, kv_heads=2, memory_layers=(1, 2), banks_of=(1, 1), gate="token", normalize_memory_layers=False
)
OTHER_TRAINING = dataclasses.replace(TRAINING, negative_rows=2)


@functools.cache
def trained(
    settings: MeshSettings, split: TokenSplit, model: ModelSettings = MODEL, training: TrainingSettings = TRAINING
) -> tuple[np.ndarray, float]:
    """The loss of each of 20 steps, and the perplexity of the same documents after them."""
    devices = jax.devices()[: max(settings.data, 1) * settings.model * settings.memory]
    mesh = open_mesh(settings, split_sizes(model, MEMORY, TOKENS, ROWS), devices=devices)
    make = StateFactory(RunSettings(model, MEMORY, BATCH, OPTIMIZER, training), mesh)
    call = make.train_call()
    state, losses, own = make.state(), [], local_rows(mesh, ROWS)
    where = jax.tree.map(lambda leaf: leaf.sharding, state)
    for chunk in itertools.islice(batches(split, BATCH, 0, own), training.steps // BATCH.segments_per_call):
        with jax.set_mesh(mesh):
            state, metrics = call(state, assemble(mesh, chunk, ROWS, own, leading="S"))
        losses.append(np.asarray(metrics.segments.nats / metrics.segments.tokens))
    assert jax.tree.all(
        jax.tree.map(lambda leaf, before: leaf.sharding.is_equivalent_to(before, leaf.ndim), state, where)
    )
    summary = Summary()
    read_by = TrainedModel(model, MEMORY, TOKENS, state.parameters)
    settings = EvaluationSettings(batch_size=ROWS, segments_per_call=3)
    for scores in score_documents(read_by, split, settings, mesh):
        summary.add(scores, int(split.bytes[scores.document]))
    return np.concatenate(losses), summary.figures()["perplexity"]


@pytest.fixture(scope="module")
def on_one_device(split):
    return trained(ONE, split)


@pytest.mark.parametrize("name", MESHES)
def test_training_and_evaluation_are_the_same_on_every_mesh(name, split, on_one_device):
    losses, perplexity = trained(MESHES[name], split)
    expected, expected_perplexity = on_one_device
    assert len(losses) == 20 and losses[-1] < losses[0] - 1
    np.testing.assert_allclose(losses, expected, rtol=2e-4)
    assert math.isclose(perplexity, expected_perplexity, rel_tol=1e-3)


def test_gates_shared_banks_key_heads_and_negatives_are_the_same_on_a_mesh(split):
    (losses, perplexity), (expected, expected_perplexity) = (
        trained(settings, split, OTHER_MODEL, OTHER_TRAINING) for settings in (MESHES["all"], ONE)
    )
    assert losses[-1] < losses[0] - 1
    np.testing.assert_allclose(losses, expected, rtol=2e-4)
    assert math.isclose(perplexity, expected_perplexity, rel_tol=1e-3)
    assert not np.allclose(expected, trained(ONE, split, OTHER_MODEL)[0], rtol=1e-3)  # other rows' memories matter


def test_the_state_is_split_as_the_rules_say(split):
    mesh = mesh_of(MESHES["all"])
    state = StateFactory(RunSettings(MODEL, MEMORY, BATCH, OPTIMIZER, TRAINING), mesh).state()
    parts = lambda leaf: leaf.size // leaf.addressable_shards[0].data.size  # noqa: E731
    attention = state.parameters["layers"][1]["attention"]
    assert parts(attention["query_EHD"]) == 8 and parts(attention["gate"]["bias_H"]) == 1
    adam = state.optimizer[1][0]
    assert parts(adam.mu["layers"][1]["attention"]["query_EHD"]) == parts(adam.nu["embedding"]["table_VE"]) == 8
    assert parts(state.carry.banks[0].keys_BHMD) == parts(state.carry.caches[0].keys_BHWD) == 8
    assert parts(state.carry.banks[0].length_B) == 2


def compiled_search(slots: int, settings: MeshSettings) -> list:
    """Collectives of reading a memory of `slots` and writing into it, with the gradient of the query."""
    mesh = mesh_of(settings)
    memory = MemorySettings(size=slots, search="blocked")
    search = make_search(memory)
    bank = jax.eval_shape(lambda: empty_bank(8, 4, 32, memory))
    query = jax.ShapeDtypeStruct((8, 4, 64, 32), jnp.bfloat16)

    def read_and_write(query, bank):
        def loss(query):
            remote = attend_to_memory(query, bank, search, 32).output
            return (remote.out_BHND.astype(jnp.float32) ** 2).sum()

        return jax.grad(loss)(query), append(bank, query, query, search)

    arguments = (
        placed(query, jax.sharding.NamedSharding(mesh, spec("BHND"))),
        placed(bank, shardings(mesh, bank)),
    )
    with jax.set_mesh(mesh):
        text = jax.jit(read_and_write, donate_argnums=1).lower(*arguments).compile().as_text()
    return collectives(text)


@pytest.mark.parametrize("settings", [MESHES["memory"], MESHES["all"]])
def test_traffic_of_a_search_does_not_grow_with_the_memory(settings):
    small, large = (compiled_search(slots, settings) for slots in (8_192, 262_144))
    assert small and sum(each.total for each in small) == sum(each.total for each in large)
    for each in large:
        for _, shape in each.arrays:
            assert not any(size >= 262_144 // settings.memory for size in shape), each


def test_a_memory_with_addresses_is_neither_gathered_nor_copied_in_training():
    """Devices exchange one or two slot numbers per row, and only the segment's keys and values."""
    slots, mesh = 65_536, mesh_of(MESHES["all"])
    memory = MemorySettings(
        size=slots, neighbors=4, options=(BlockedSettings(block_size=512),), dtype="float32",
        eviction="least_used", duplicate_score=0.9,
        writes="beyond_cache", sink=4,
    )  # fmt: skip
    make = StateFactory(RunSettings(MODEL, memory, BATCH, OPTIMIZER, TRAINING), mesh)
    compiled = compile_call(make, make.abstract_state(1))
    for each in collectives(compiled.as_text()):
        for _, shape in each.arrays:
            assert max(shape, default=0) < slots // 2 or math.prod(shape) <= ROWS * slots, each
    share = 2 * ROWS * MODEL.heads * slots * MODEL.head_size * 4 // mesh.size
    assert compiled.memory_analysis().alias_size_in_bytes > share
    assert compiled.memory_analysis().temp_size_in_bytes < share / 2  # keys are of 8 numbers only: a sort counts


SHARED = {"layers": 3, "memory_layers": (1, 2, 3), "banks_of": (2, 2, 2), "gate": "joint", "kv_heads": 2}


@pytest.mark.parametrize(("settings", "changes"), [
    (ONE, {}), (MESHES["all"], {}), (MESHES["all"], {"remat": True}), (ONE, SHARED), (MESHES["all"], SHARED),
])  # fmt: skip
def test_the_memory_is_neither_gathered_nor_copied_in_training(settings, changes):
    """No collective of the whole train call has an axis of a device's slots."""
    slots = 65_536
    mesh, memory = (
        mesh_of(settings),
        MemorySettings(size=slots, neighbors=4, options=(BlockedSettings(block_size=512),), dtype="float32"),
    )
    model = dataclasses.replace(MODEL, **changes)
    make = StateFactory(RunSettings(model, memory, BATCH, OPTIMIZER, TRAINING), mesh)
    compiled = compile_call(make, make.abstract_state(1))
    found = collectives(compiled.as_text())
    assert bool(found) == (mesh.size > 1)
    sizes = {size for each in found for _, shape in each.arrays for size in shape}
    assert max(sizes, default=0) < slots // settings.memory
    # Each device holds its share of the banks, and nothing beside it that is nearly as large.
    share = 2 * ROWS * model.kv_head_count * slots * model.head_size * 4 // mesh.size
    assert compiled.memory_analysis().alias_size_in_bytes > share
    assert compiled.memory_analysis().temp_size_in_bytes < share / 4
