"""Saves memory banks, and restores them with another size or for another search.

Arrays are saved by name, with a number for the kind of the index. An index of another kind is not restored.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from memorizing.errors import InputError
from memorizing.memory.bank import Bank, reindexed, resize
from memorizing.memory.search import NO_INDEX, Search
from memorizing.parallel.mesh import init_sharded, shardings

INDEX_KIND = "index_kind"
"""Name of the saved number that identifies the search that built the index."""


def by_name(bank: Bank) -> dict[str, Any]:
    """Returns the arrays of a bank by name, without its recall counts."""
    leaves = jax.tree.leaves_with_path(bank._replace(recall=None))
    named = {jax.tree_util.keystr(path[-1:], simple=True): leaf for path, leaf in leaves}
    if len(named) < len(leaves):
        raise ValueError(f"two arrays of a bank have the same name: {sorted(named)}")
    return named


def saved_form(bank: Bank, index_kind: int) -> dict[str, Any]:
    """Returns the arrays of a bank to save, by name."""
    return by_name(bank) | ({INDEX_KIND: np.asarray(index_kind, np.int32)} if bank.index.slots else {})


def restored_form(saved: dict[str, Any], like: Bank, index_kind: int) -> Bank:
    """Returns a bank from its saved arrays, with the index only if it is of `index_kind`."""
    if INDEX_KIND not in saved or int(saved[INDEX_KIND]) != index_kind:
        like = like._replace(index=NO_INDEX)
    like = like._replace(recall=None)
    return jax.tree.unflatten(jax.tree.structure(like), [saved[name] for name in by_name(like)])


def indexed(bank: Bank, search: Search, tokens: int, mesh: Mesh) -> Bank:
    """Returns the bank with a new index for `search`, built on the bank's devices, `tokens` tokens at a time."""
    index = functools.partial(reindexed, search=search, tokens=tokens)
    with jax.set_mesh(mesh):
        return jax.jit(index, out_shardings=shardings(mesh, jax.eval_shape(index, bank)))(bank)


def resized(bank: Bank, like: Bank, mesh: Mesh) -> Bank:
    """Returns a restored bank with as many slots as `like`, and with zero recall counts if `like` counts recall.

    A smaller bank keeps the newest tokens.

    Raises:
        InputError: if the size differs and the bank is not a ring buffer.
    """
    slots, before = like.keys_BHMD.shape[2], bank.keys_BHMD.shape[2]
    if before != slots:
        if bank.slot_table is not None:
            raise InputError(
                f"Memory.size = {slots}, but a memory of {before} was saved. With these settings (Memory.eviction, "
                "sink, duplicate_score, writes, clear_at_documents) a memory cannot change its size. Set Memory.size = "
                f"{before}, or start with an empty memory"
            )
        resize_to = functools.partial(resize, slots=slots, cursor=int(bank.cursor))
        where = shardings(mesh, jax.eval_shape(resize_to, bank))
        bank = jax.jit(resize_to, out_shardings=where)(bank)
    if like.recall is not None:
        counts = like.recall
        zeros = lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), counts)  # noqa: E731
        bank = bank._replace(recall=init_sharded(mesh, zeros, functools.partial(shardings, mesh)))
    return bank
