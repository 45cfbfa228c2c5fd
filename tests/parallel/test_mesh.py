"""The table of rules: what is split over what, what collides, and what does not divide."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from memorizing.errors import InputError
from memorizing.memory.settings import MemorySettings
from memorizing.model.settings import ModelSettings, split_sizes
from memorizing.parallel.mesh import (
    PARAMETER_RULES,
    MeshSettings,
    assemble,
    local_rows,
    make_mesh,
    open_mesh,
    spec,
    specs,
)


def test_shape_letters_choose_mesh_axes():
    assert spec("BHMD") == PartitionSpec("data", "model", "memory", None)
    assert spec("EHD", PARAMETER_RULES) == PartitionSpec(("data", "memory"), "model", None)
    tree = {
        "out_FE": np.zeros((4, 8)),
        "scale_E": np.zeros(8),
        "table_VE": np.zeros(3),  # what Adafactor keeps of it has another shape
        "cursor": np.zeros(()),
    }
    assert specs(tree, PARAMETER_RULES) == {
        "out_FE": PartitionSpec("model", ("data", "memory")),
        "scale_E": PartitionSpec(),
        "table_VE": PartitionSpec(),
        "cursor": PartitionSpec(),
    }
    assert specs({"mask_BN": np.zeros((3, 4, 8))}, leading="S") == {"mask_BN": PartitionSpec(None, "data", "memory")}


@pytest.mark.parametrize(("letters", "rules"), [("BNM", {}), ("HF", {}), ("BE", PARAMETER_RULES)])
def test_two_letters_for_one_axis_are_refused(letters, rules):
    with pytest.raises(ValueError, match=rf"{letters}: two axes"):
        spec(letters, **({"rules": rules} if rules else {}))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"data": 3}, "do not multiply to 8 devices. Use Mesh.data = 8 or axes whose product is 8"),
        ({"model": 3}, "axes whose product is 8 (each one of 1, 2, 4, 8)"),
        ({"memory": 16}, "do not multiply to 8 devices"),
    ],
)
def test_mesh_axes_multiply_to_all_devices(settings, words):
    with pytest.raises(InputError) as caught:
        make_mesh(MeshSettings(**settings))
    assert words in str(caught.value)
    assert dict(make_mesh(MeshSettings(memory=2)).shape) == {"data": 4, "model": 1, "memory": 2}


@pytest.mark.parametrize(
    ("mesh", "model", "memory", "rows", "words"),
    [
        ({}, {}, 64, 12, "Batch.size = 12 does not divide over Mesh.data = 8. Use 8 or 16"),
        ({"memory": 8}, {}, 60, 8, "Memory.size = 60 does not divide over Mesh.memory = 8. Use 56 or 64"),
        ({"model": 8}, {"heads": 4}, 64, 8, "Model.heads = 4 does not divide over Mesh.model = 8. Use 8"),
        ({"model": 2}, {"vocabulary_size": 259}, 64, 8, "Model.vocabulary_size = 259 does not divide"),
        ({"model": 4}, {"feed_forward_size": 30}, 64, 8, "Model.feed_forward_size = 30 does not divide"),
        (
            {"memory": 2},
            {"embedding_size": 36},
            64,
            8,
            "Model.embedding_size = 36 does not divide over Mesh.data = 4 x Mesh.memory = 2. Use 32 or 40",
        ),
    ],
)
def test_sizes_that_do_not_divide_are_refused_with_those_that_would(mesh, model, memory, rows, words):
    settings = {"vocabulary_size": 264, "embedding_size": 32, "heads": 8, "feed_forward_size": 32, **model}
    with pytest.raises(InputError) as caught:
        open_mesh(MeshSettings(**mesh), split_sizes(ModelSettings(**settings), MemorySettings(size=memory), 16, rows))
    assert words in str(caught.value)


def test_wrong_axes_are_refused():
    for name, value in (("data", -1), ("model", 0), ("memory", 0)):
        with pytest.raises(InputError, match=rf"Mesh\.{name} = {value}"):
            MeshSettings(**{name: value})


def test_batches_are_assembled_from_the_rows_of_each_process():
    mesh = make_mesh(MeshSettings(memory=2))
    assert local_rows(mesh, 8) == list(range(8))
    whole = {"inputs_BN": np.arange(8 * 4).reshape(1, 8, 4), "starts_B": np.arange(8).reshape(1, 8)}
    found = assemble(mesh, whole, 8, list(range(8)), leading="S")
    jax.tree.map(np.testing.assert_array_equal, found, whole)
    assert found["inputs_BN"].sharding.spec == PartitionSpec(None, "data", "memory")
