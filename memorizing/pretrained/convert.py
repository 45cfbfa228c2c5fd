"""Converts tensors of a checkpoint to parameters and back, by a table (tables.py).

Both directions only move numbers: transpose, split by heads, join. So export and import are inverses.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from memorizing.errors import InputError
from memorizing.model.parameters import Parameters, by_path
from memorizing.pretrained.config_json import Architecture
from memorizing.pretrained.tables import BUFFERS, CONV1D, LINEAR, TABLE, VECTOR, TensorRow
from memorizing.pretrained.tensors import Tensors

HEAD, TIED = "lm_head.weight", "embedding/table_VE"


class Place(NamedTuple):
    """A tensor of a model: its name and shape, and the parameters in it."""

    tensor: str
    shape: tuple[int, ...]
    parameters: tuple[str, ...]
    layout: str


def places(architecture: Architecture, like: Parameters) -> list[Place]:
    """Returns every tensor of the architecture for these parameters (or their shapes)."""
    leaves, found = by_path(like), []
    layers = len(like["layers"])
    for row in architecture.rows:
        for layer in range(layers if "{layer}" in row.tensor else 1):
            paths = tuple(path.format(layer=layer) for path in row.parameters)
            if all(path in leaves for path in paths):
                matrices = [_matrix_shape(path, leaves[path].shape, row) for path in paths]
                found.append(Place(row.tensor.format(layer=layer), _shape(matrices, row), paths, row.layout))
    return found


def _matrix_shape(path: str, shape: tuple[int, ...], row: TensorRow) -> tuple[int, ...]:
    """Returns the shape of a parameter as `[in, out]` or `[out]`: heads and their features as one axis."""
    if row.layout == VECTOR:
        return (math.prod(shape),)
    is_last = path.endswith("E") and len(shape) == 3  # [H, D, E]
    return (math.prod(shape[:-1]), shape[-1]) if is_last else (shape[0], math.prod(shape[1:]))


def _shape(matrices: list[tuple[int, ...]], row: TensorRow) -> tuple[int, ...]:
    shape = (*matrices[0][:-1], sum(matrix[-1] for matrix in matrices))
    return shape[::-1] if row.layout == LINEAR else shape


def check_tensors(tensors: Tensors, architecture: Architecture, wanted: list[Place]) -> dict[str, str]:
    """Returns the name in the files of each wanted tensor.

    Raises:
        InputError: names tensors that are missing, unknown, or of another shape or dtype.
    """
    prefix, given = architecture.prefix, tensors.names
    bare = not any(name.startswith(prefix) for name in given)  # a model saved without its head
    named = {place.tensor: place.tensor.removeprefix(prefix) if bare else place.tensor for place in wanted}
    table = next(place.tensor for place in wanted if place.parameters == (TIED,))
    if HEAD not in named and HEAD in given and named[table] not in given:
        named[table] = HEAD  # a tied model saved under the name of its head
    if missing := sorted(name for name in named.values() if name not in given):
        raise InputError(
            f"{tensors.folder}: {_some(missing)} missing, which config.json requires. Fetch the folder again"
        )
    surplus = {name for name in given - set(named.values()) if not re.fullmatch(BUFFERS, name)}
    if HEAD in surplus and HEAD not in named:
        tensors.check_dtype(HEAD)
        same = tensors.shape(HEAD) == tensors.shape(named[table])
        if not same or not np.array_equal(tensors.read(HEAD), tensors.read(named[table])):
            raise InputError(
                f"{tensors.folder}: {HEAD} differs from {named[table]}, but config.json has tie_word_embeddings = true"
            )
        surplus.discard(HEAD)
    if surplus:
        raise InputError(
            f"{tensors.folder}: {_some(sorted(surplus))} not part of a {architecture.model_type} with this config.json,"
            " so the model would not be the trained one. Fetch the folder again"
        )
    for place in wanted:
        name = named[place.tensor]
        tensors.check_dtype(name)
        if (shape := tensors.shape(name)) != place.shape:
            raise InputError(
                f"{tensors.folder}: the tensor {name} has shape {list(shape)}, but config.json requires "
                f"{list(place.shape)}. Fetch the folder again"
            )
    return named


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"the tensor{'s' * (len(names) > 1)} {', '.join(names[:3])}{more} {'are' if len(names) > 1 else 'is'}"


def to_parameters(place: Place, tensor: np.ndarray, like: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Returns the parameters in a tensor, by path."""
    matrix = tensor.T if place.layout == LINEAR else tensor
    first = 0
    for path in place.parameters:
        shape = like[path].shape
        if place.layout == TABLE:
            yield path, matrix
            continue
        width = math.prod(shape) // math.prod(matrix.shape[:-1])
        yield path, matrix[..., first : first + width].reshape(shape)
        first += width


def to_tensor(place: Place, leaves: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns the tensor that holds these parameters."""
    parts = [np.asarray(leaves[path]) for path in place.parameters]
    if place.layout == TABLE:
        return parts[0]
    inner = {VECTOR: (), LINEAR: place.shape[-1:], CONV1D: place.shape[:1]}[place.layout]
    joined = np.concatenate([part.reshape(*inner, -1) for part in parts], axis=-1)
    return joined.T if place.layout == LINEAR else joined


def layer_of(path: str) -> int | None:
    """Returns the number of a parameter's layer, from 1."""
    found = re.match(r"layers/(\d+)/", path)
    return int(found[1]) + 1 if found else None
