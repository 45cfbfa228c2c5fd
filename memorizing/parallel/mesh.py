"""Which device holds what. The mesh has one axis, `data`: rows are spread over the devices, parameters are on all.

`RULES` says by the letters of a tensor's name (see `shapes.py`) which axis of the mesh splits which of its axes; the
letters of a leaf are the part of its field's name after the last underscore (`keys_BHMD`, `length_B`).
"""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from memorizing.errors import InputError
from memorizing.shapes import Array

RULES = {"B": "data"}
"""Shape letter to mesh axis; letters that are not here are not split."""


def make_mesh(rows: int, setting: str = "Batch.rows") -> Mesh:
    """A mesh over all devices; `setting` is what to call `rows` in an error.

    Raises:
        InputError: when the rows do not divide evenly over them.
    """
    devices = jax.devices()
    if rows % len(devices):
        fitting = [str(n) for n in (rows // len(devices) * len(devices), -(-rows // len(devices)) * len(devices)) if n]
        raise InputError(
            f"{setting} = {rows} does not divide over {len(devices)} devices: use {' or '.join(fitting)} rows, "
            "or fewer devices"
        )
    return Mesh(np.asarray(devices), ("data",))


def shard[T](mesh: Mesh, tree: T, leading: str = "") -> T:
    """Puts each leaf where the letters of its name say; `leading` are letters of axes before those.

    Leaves whose names have no letters, and letters without a rule, are held whole by every device.
    """

    def put(path: tuple, leaf: Array) -> jax.Array:
        name = jax.tree_util.keystr(path[-1:], simple=True)
        letters = leading + (name.rpartition("_")[2] if "_" in name else "")
        axes = [RULES.get(letter) for letter in letters] if letters.isupper() else []
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*axes)))

    return jax.tree_util.tree_map_with_path(put, tree)
