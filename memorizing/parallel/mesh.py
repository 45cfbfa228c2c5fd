"""The mesh of devices with its three axes, and the one table of rules from shape letters to axes.

    data      rows, and slices of every parameter and of the optimizer state (fully sharded data parallelism, FSDP)
    model     heads, feed-forward columns and the vocabulary (tensor parallelism)
    memory    slots of the memory, and tokens of a segment (so that these devices share the other work too)

The letters of an array are the part of its field's name after the last underscore (`keys_BHMD`, `length_B`).
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from memorizing.errors import InputError
from memorizing.sections import LARGEST_COUNT, check_range
from memorizing.shapes import Array

AXES = ("data", "model", "memory")

RULES: dict[str, str | tuple[str, ...]] = {
    "B": "data",
    "H": "model",
    "F": "model",
    "V": "model",
    "N": "memory",
    "W": "memory",
    "M": "memory",
}
"""Mesh axis of each shape letter; other letters are not split."""

PARAMETER_RULES: dict[str, str | tuple[str, ...]] = RULES | {"E": ("data", "memory")}
"""Rules for parameters and optimizer state: they have no rows, so the `data` and `memory` axes split `E`."""


@dataclasses.dataclass(frozen=True)
class MeshSettings:
    """Number of devices along each axis of the mesh.

    Attributes:
        data: devices that split rows, parameters and optimizer state (FSDP); 0 for all devices that other axes leave.
        model: devices that split heads, feed-forward columns and vocabulary (tensor parallelism).
        memory: devices that split the slots of a row's memory, for memories too large for one device.
    """

    data: int = 0
    model: int = 1
    memory: int = 1

    def __post_init__(self):
        check_range(self, 0, LARGEST_COUNT, "data")
        check_range(self, 1, LARGEST_COUNT, "model", "memory")


def make_mesh(settings: MeshSettings, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the mesh over all devices of all processes, or over `devices`, with network neighbors next to each other.

    Raises:
        InputError: if the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    others = settings.model * settings.memory
    data = settings.data or max(len(devices) // others, 1)
    if data * others != len(devices):
        ways = [f"Mesh.data = {len(devices) // others}"] if len(devices) % others == 0 else []
        fitting = [number for number in range(1, len(devices) + 1) if len(devices) % number == 0]
        ways.append(f"axes whose product is {len(devices)} (each one of {', '.join(map(str, fitting))})")
        raise InputError(
            f"Mesh.data = {settings.data}, Mesh.model = {settings.model}, Mesh.memory = {settings.memory} do not "
            f"multiply to {len(devices)} devices. Use {' or '.join(ways)}"
        )
    shape = (data, settings.model, settings.memory)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


class SplitSize(NamedTuple):
    """A size that the mesh splits: its shape letter, the setting that holds it, and its value."""

    letter: str
    setting: str
    size: int


def open_mesh(settings: MeshSettings, sizes: Iterable[SplitSize], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns a mesh over all devices of all processes, or over `devices`, that divides all `sizes`.

    Raises:
        InputError: if the axes do not multiply to the number of devices, or a size does not divide over its axes.
    """
    mesh = make_mesh(settings, devices)
    check_sizes(mesh, sizes)
    return mesh


def check_sizes(mesh: Mesh | AbstractMesh, sizes: Iterable[SplitSize]) -> None:
    """Raises an error if a size does not divide over the axes of the mesh that split it.

    Raises:
        InputError: names the setting, the axes, and the nearest sizes that divide.
    """
    for letter, setting, size in sizes:
        axes = PARAMETER_RULES[letter]
        axes = (axes,) if isinstance(axes, str) else axes
        parts = int(np.prod([mesh.shape[axis] for axis in axes]))
        if size % parts:
            fitting = [str(near) for near in (size // parts * parts, -(-size // parts) * parts) if near]
            over = " x ".join(f"Mesh.{axis} = {mesh.shape[axis]}" for axis in axes)
            raise InputError(
                f"{setting} = {size} does not divide over {over}. Use {' or '.join(fitting)}, or fewer parts"
            )


def spec(letters: str, rules: Mapping[str, Any] = RULES) -> PartitionSpec:
    """Returns the partition of an array with these shape letters.

    Raises:
        ValueError: if two of the letters go to the same axis of the mesh.
    """
    parts = [rules.get(letter) for letter in letters]
    used = [axis for part in parts if part for axis in ((part,) if isinstance(part, str) else part)]
    if len(set(used)) < len(used):
        raise ValueError(f"{letters}: two axes of this array would be split over the same axis of the mesh: {parts}")
    return PartitionSpec(*parts)


def specs(tree: Any, rules: Mapping[str, Any] = RULES, leading: str = "") -> Any:
    """Returns the `spec` of each leaf of a tree by the letters of its name, after the letters `leading`.

    Every device holds a whole copy of leaves whose names have no letters, or another number of letters than axes (what
    Adafactor stores instead of a matrix). So it does of parameters with one axis, which cost more to gather than to
    hold.
    """

    def of(path: tuple, leaf: Array | jax.ShapeDtypeStruct) -> PartitionSpec:
        name = jax.tree_util.keystr(path[-1:], simple=True)
        letters = name.rpartition("_")[2] if "_" in name else ""
        if not letters.isupper() or len(leading + letters) != len(leaf.shape):
            return PartitionSpec()
        if rules is PARAMETER_RULES and len(letters) == 1:
            return PartitionSpec()
        return spec(leading + letters, rules)

    return jax.tree_util.tree_map_with_path(of, tree)


def shardings(mesh: Mesh, tree: Any, rules: Mapping[str, Any] = RULES, leading: str = "") -> Any:
    """Returns the `specs` of a tree as shardings on a mesh."""
    return jax.tree.map(lambda each: NamedSharding(mesh, each), specs(tree, rules, leading))


def placed(tree: Any, where: Any) -> Any:
    """Returns the shapes and dtypes of a tree with the shardings `where`, for a restore or a compilation."""
    describe = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)  # noqa: E731
    return jax.tree.map(describe, tree, where)


def current_mesh() -> AbstractMesh | None:
    """Returns the mesh of the surrounding `jax.set_mesh`; None if there is none or it has one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def row_parts() -> int:
    """Returns the number of parts into which the current mesh splits the rows."""
    mesh = current_mesh()
    return 1 if mesh is None else mesh.shape[str(RULES["B"])]


def constrain(x: jax.Array, letters: str) -> jax.Array:
    """Tells the compiler how the current mesh splits an activation with these letters."""
    return x if current_mesh() is None else jax.lax.with_sharding_constraint(x, spec(letters))


def local_rows(mesh: Mesh, rows: int) -> list[int]:
    """Returns the rows that this process's devices hold. The process only has to read these."""
    places = NamedSharding(mesh, spec("B")).addressable_devices_indices_map((rows,))
    return sorted({row for place in places.values() if place for row in range(rows)[place[0]]})


def assemble[T](mesh: Mesh, tree: T, rows: int, own: Sequence[int], leading: str = "") -> T:
    """Returns arrays of all `rows` rows from the local rows of each process (see `local_rows`), split by their letters.

    The axis of rows is the first after `leading`.
    """
    axis, wheres = len(leading), shardings(mesh, tree, RULES, leading)

    def put(leaf: np.ndarray, where: NamedSharding) -> jax.Array:
        shape = (*leaf.shape[:axis], rows, *leaf.shape[axis + 1 :])

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            wanted = np.searchsorted(own, np.arange(rows)[index[axis]])
            return leaf.take(wanted, axis)[(*index[:axis], slice(None), *index[axis + 1 :])]

        return jax.make_array_from_callback(shape, where, part)

    return jax.tree.map(put, tree, wheres)


def constrain_tree[T](tree: T, rules: Mapping[str, Any] = RULES) -> T:
    """Applies `constrain` to each leaf of a tree, by the letters of its name."""
    return tree if current_mesh() is None else jax.lax.with_sharding_constraint(tree, specs(tree, rules))


def everywhere[T](tree: T) -> T:
    """Tells the compiler that every device holds the whole array, so that every process can read it."""
    return tree if current_mesh() is None else jax.lax.with_sharding_constraint(tree, PartitionSpec())


def init_sharded[T](mesh: Mesh, make: Callable[[], T], where: Callable[[T], Any]) -> T:
    """Returns the result of `make`, with each part created on its own device: never whole on a device or host.

    `where` returns the shardings of the leaves, given a tree of their shapes.
    """
    with jax.set_mesh(mesh):
        return jax.jit(make, out_shardings=where(jax.eval_shape(make)))()
