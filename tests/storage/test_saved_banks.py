"""A run that is saved and restored keeps in its memory what the uninterrupted one does, bit for bit; on a mesh too."""

import functools

import jax
import numpy as np
import pytest

from memorizing.data.batches import BatchSettings
from memorizing.errors import InputError
from memorizing.memory.settings import MemorySettings
from memorizing.model.settings import ModelSettings
from memorizing.parallel.mesh import MeshSettings, make_mesh, shardings
from memorizing.shapes import Batch
from memorizing.storage.checkpoints import Checkpoints
from memorizing.training.optimizer import OptimizerSettings
from memorizing.training.settings import RunSettings, TrainingSettings
from memorizing.training.state import StateFactory

pytestmark = pytest.mark.large

ROWS, N, S, VOCABULARY = 4, 8, 6, 18
MODEL = ModelSettings(
    vocabulary_size=VOCABULARY, layers=1, embedding_size=16, heads=2, head_size=8, feed_forward_size=16,
    memory_layers=(1,), dtype="float32", gate_bias=0.0,
)  # fmt: skip
KEPT = {
    "reservoir": {"eviction": "reservoir", "sink": 2, "duplicate_score": 0.99, "clear_at_documents": False},
    "least used": {"eviction": "least_used", "writes": "beyond_cache", "maximum_age": 5 * N},
    "least recently used": {"eviction": "least_recently_used", "maximum_age": 5 * N},
}


def memory_of(kind: str, size: int = 3 * N) -> MemorySettings:
    return MemorySettings(size=size, neighbors=4, dtype="float32", search="blocked", **KEPT[kind])


def maker(memory: MemorySettings, mesh: MeshSettings = MeshSettings(1)) -> StateFactory:  # noqa: B008
    opened = make_mesh(mesh, jax.devices()[: mesh.data * mesh.model * mesh.memory])
    optimizer = OptimizerSettings(kind="adamw", learning_rate=0.01, schedule="constant", warmup_steps=1)
    batch = BatchSettings(size=ROWS, segment_length=N, segments_per_call=S)
    training = TrainingSettings(steps=2 * S, checkpoint_every=S)
    return StateFactory(RunSettings(MODEL, memory, batch, optimizer, training), opened)


@functools.cache
def call(kind: str):
    return maker(memory_of(kind)).train_call()


def batches(seed: int) -> Batch:
    """Documents that begin anywhere, behind padding."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(3, VOCABULARY, (2, S, ROWS, N)).astype(np.int32)
    starts = rng.random((S, ROWS)) < 0.3
    lengths = np.where(np.roll(starts, -1, 0), rng.integers(1, N + 1, (S, ROWS)), N)
    return Batch(*tokens, np.arange(N) < lengths[..., None], starts)


@pytest.mark.parametrize("kind", KEPT)
def test_a_restored_run_is_the_uninterrupted_one(kind, tmp_path):
    make, run = maker(memory_of(kind)), call(kind)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        state, _ = run(make.state(), batches(0))
        checkpoints.save(S, state)
        checkpoints.finish()
        expected, _ = run(state, batches(1))
        restored = checkpoints.restore(S, make.abstract_state(S), make.mesh)
        found, _ = run(restored, batches(1))
        jax.tree.map(np.testing.assert_array_equal, found, expected)
        assert int(found.carry.banks[0].slot_table.positions_BM.max()) > 2 * N
        with pytest.raises(InputError, match=r"Memory.size = 48, but a memory of 24 was saved"):
            other = maker(memory_of(kind, 6 * N))
            checkpoints.restore(S, other.abstract_state(S), other.mesh)
        empty = other.state().carry.banks[0]
        dropped = checkpoints.restore(S, other.abstract_state(S), other.mesh, reset_memory=True).carry.banks[0]
        jax.tree.map(np.testing.assert_array_equal, dropped, empty)
        assert not dropped.slot_table.held_BM.any()


@pytest.mark.parametrize("kind", KEPT)
def test_a_sharded_run_holds_and_learns_the_same(kind):
    make = maker(memory_of(kind), MeshSettings(data=2, model=2, memory=2))
    expected, losses = call(kind)(maker(memory_of(kind)).state(), batches(0))
    with jax.set_mesh(make.mesh):
        segments = jax.device_put(batches(0), shardings(make.mesh, batches(0), leading="S"))
        found, over_devices = make.train_call()(make.state(), segments)
    np.testing.assert_allclose(over_devices.segments.nats, losses.segments.nats, rtol=2e-4)
    one, other = (state.carry.banks[0] for state in (expected, found))
    for name in ("positions_BM", "read_B", "admitted_B", "documents_B", "cached_B"):
        np.testing.assert_array_equal(getattr(one.slot_table, name), getattr(other.slot_table, name))
    np.testing.assert_allclose(other.values_BHMD, one.values_BHMD, atol=1e-3)
