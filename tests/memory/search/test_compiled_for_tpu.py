"""Searches compiled for TPUs without a TPU: no scores in memory, no copy of the keys, and the compiler's estimate.

The estimate of the kernel is its own `cost`, which counts what the compiler scheduled; that of `Approximate` leaves
out the work of its sort.
"""

import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import pytest

from memorizing.data.batches import BatchSettings
from memorizing.memory.bank import Bank, append
from memorizing.memory.search import Keys
from memorizing.memory.search.approximate import Approximate
from memorizing.memory.search.pallas_tpu import PallasTPU
from memorizing.memory.settings import MemorySettings
from memorizing.model.memory_attention import attend_to_memory
from memorizing.model.settings import ModelSettings, split_sizes
from memorizing.parallel.mesh import MeshSettings, make_mesh, open_mesh
from memorizing.parallel.topology import topology_devices
from memorizing.planning.plan import compile_call
from memorizing.training.settings import RunSettings
from memorizing.training.state import StateFactory

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu: ACCELERATOR=tpu bash launch/setup.sh"
)
ROWS, HEADS, TOKENS, SLOTS, NEIGHBORS = 8, 8, 512, 65_536, 32
TOPOLOGIES = ["v5e:2x2", "v5p:2x2x1"]


device_of = functools.cache(
    lambda topology: topology_devices(topology)[0]
)  # cached, because JAX takes new ones for other devices


def of(topology: str, shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.SingleDeviceSharding(device_of(topology)))


def operands(topology: str, dtype=jnp.bfloat16, features: int = 128):
    scales = of(topology, (ROWS, HEADS, SLOTS), jnp.float32) if jnp.dtype(dtype).itemsize == 1 else None
    queries = of(topology, (ROWS, HEADS, TOKENS, features), dtype if jnp.dtype(dtype).itemsize == 4 else jnp.bfloat16)
    keys = Keys(of(topology, (ROWS, HEADS, SLOTS, features), dtype), scales)
    return queries, keys, of(topology, (ROWS, SLOTS), jnp.bool_)


def compiled(function, *arguments) -> jax.stages.Compiled:
    return jax.jit(function).trace(*arguments).lower().compile()


def buffers(program: jax.stages.Compiled) -> list[str]:
    """Returns the types of the main computation's results. Results inside a fusion are never in memory."""
    main = program.as_text().partition("\nENTRY ")[2]
    return [match[1] for match in re.finditer(r"^ +(?:ROOT )?%\S+ = (.*?) (?!parameter)[\w-]+\(", main, re.MULTILINE)]


def scores_in(program: jax.stages.Compiled) -> list[str]:
    return [each for each in buffers(program) if re.search(rf"\[[\d,]*{TOKENS},{SLOTS}\]", each)]


def estimate(program: jax.stages.Compiled) -> float:
    return program.cost_analysis()["optimal_seconds"]


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_the_kernel_takes_little_longer_than_its_product(topology):
    arguments = operands(topology)

    def product(queries_BHND, keys, valid_BM):  # takes the maximum, so that scores need not be written
        return jnp.einsum("BHND,BHMD->BHNM", queries_BHND, keys.vectors_BHMD, preferred_element_type=jnp.float32).max(
            -1
        )

    program = compiled(lambda *given: PallasTPU()(*given, NEIGHBORS), *arguments)
    assert not scores_in(program)
    assert program.memory_analysis().temp_size_in_bytes < 32 * 2**20
    assert 1 < estimate(program) / estimate(compiled(product, *arguments)) < 1.5
    assert estimate(program) < estimate(compiled(lambda *given: Approximate()(*given, NEIGHBORS), *arguments))


@pytest.mark.parametrize(
    ("topology", "dtype", "features"),
    [
        ("v5e:2x2", jnp.int8, 128),
        ("v5e:2x2", jnp.float8_e4m3fn, 64),
        ("v5p:2x2x1", jnp.bfloat16, 64),
    ],
)
def test_keys_of_other_kinds_are_not_copied(topology, dtype, features):
    program = compiled(lambda *given: PallasTPU()(*given, NEIGHBORS), *operands(topology, dtype, features))
    assert not scores_in(program)
    assert program.memory_analysis().temp_size_in_bytes < 32 * 2**20


@pytest.mark.parametrize(("dtype", "minimum_score"), [(jnp.bfloat16, None), (jnp.int8, 0.5)])
def test_masked_and_scaled_scores_of_approximate_are_never_written(dtype, minimum_score):
    search = Approximate(minimum_score=minimum_score)
    program = compiled(lambda *given: search(*given, NEIGHBORS), *operands(TOPOLOGIES[0], dtype))
    assert "PartialReduce" in program.as_text()
    assert not scores_in(program)
    assert program.memory_analysis().temp_size_in_bytes < 2**30


def test_reading_and_writing_a_memory_makes_no_scores():
    topology = TOPOLOGIES[0]
    queries, keys, _ = operands(topology)
    bank = Bank(keys.vectors_BHMD, keys.vectors_BHMD, of(topology, (), jnp.int32), of(topology, (ROWS,), jnp.int32))
    search = PallasTPU()

    def step(bank, queries_BHND):
        read = attend_to_memory(queries_BHND, bank, search, NEIGHBORS).output
        return append(bank, queries_BHND, queries_BHND, search), read

    with jax.set_mesh(make_mesh(MeshSettings(), [device_of(topology)])):  # sets the platform to compile for
        assert not scores_in(compiled(step, bank, queries))


def test_a_train_call_does_not_copy_its_memory():
    """Neither gathering nor writing needs a copy of the memory in another layout."""
    model = ModelSettings(
        vocabulary_size=512,
        layers=1,
        embedding_size=128,
        heads=8,
        head_size=128,
        feed_forward_size=128,
        memory_layers=(1,),
    )
    memory = MemorySettings(size=8192, neighbors=2, search="approximate")  # compiles faster than the kernel
    batch = BatchSettings(size=8, segment_length=128, segments_per_call=2)
    mesh = open_mesh(MeshSettings(), split_sizes(model, memory, 128, 8), devices=topology_devices("v5e:2x2"))
    make = StateFactory(RunSettings(model, memory, batch), mesh)
    text = compile_call(make, make.abstract_state(1)).as_text()
    bank = r"= bf16\[2,8,8192,128\]\S* "
    assert re.search(bank + "dynamic-update-slice", text)
    assert not re.findall(bank + r"(?:copy|transpose)\(.*", text)
