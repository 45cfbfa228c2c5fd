"""Parameters of a model: a plain pytree of arrays, and their names as paths."""

from typing import Any

import jax

type Parameters = dict[str, Any]
"""Parameters by name, nested like the modules: a plain pytree, which costs less per call than NNX's own state."""


def count_parameters(parameters: Parameters) -> int:
    """Returns the number of learned values."""
    return sum(leaf.size for leaf in jax.tree.leaves(parameters))


def by_path(parameters: Any) -> dict[str, Any]:
    """Returns the leaves of a tree by path, such as `layers/8/attention/key_EHD`, in the tree's order."""
    leaves = jax.tree.leaves_with_path(parameters)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
