"""A memory's bank as it is saved, and as it is restored: into a ring of another size, or for another search.

Its arrays go by their names, and with them a number for what made the index: one of another kind is left out.
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
"""Beside the arrays of a bank that has an index: what made it."""


def by_name(bank: Bank) -> dict[str, Any]:
    """The arrays of a bank, but for what is counted about it."""
    leaves = jax.tree.leaves_with_path(bank._replace(recall=None))
    named = {jax.tree_util.keystr(path[-1:], simple=True): leaf for path, leaf in leaves}
    if len(named) < len(leaves):
        raise ValueError(f"two arrays of a bank have the same name, so one of them would be lost: {sorted(named)}")
    return named


def saved_form(bank: Bank, index_kind: int) -> dict[str, Any]:
    """What is saved of a bank, by name."""
    return by_name(bank) | ({INDEX_KIND: np.asarray(index_kind, np.int32)} if bank.index.slots else {})


def restored_form(saved: dict[str, Any], like: Bank, index_kind: int) -> Bank:
    """The other way round; without an index unless one of this kind was saved."""
    if INDEX_KIND not in saved or int(saved[INDEX_KIND]) != index_kind:
        like = like._replace(index=NO_INDEX)
    like = like._replace(recall=None)
    return jax.tree.unflatten(jax.tree.structure(like), [saved[name] for name in by_name(like)])


def indexed(bank: Bank, search: Search, tokens: int, mesh: Mesh) -> Bank:
    """A bank with the index that `search` keeps of it, made by segments of `tokens`, each part where it belongs."""
    index = functools.partial(reindexed, search=search, tokens=tokens)
    with jax.set_mesh(mesh):
        return jax.jit(index, out_shardings=shardings(mesh, jax.eval_shape(index, bank)))(bank)


def resized(bank: Bank, like: Bank, mesh: Mesh) -> Bank:
    """A restored bank with as many slots as `like`, and, if that counts what is found, with counts of 0.

    Raises:
        InputError: when the bank is no ring, of which the newest tokens could stay.
    """
    slots, before = like.keys_BHMD.shape[2], bank.keys_BHMD.shape[2]
    if before != slots:
        if bank.slot_table is not None:
            raise InputError(
                f"Memory.size = {slots}, but a memory of {before} was saved, and what of it another size would hold is "
                "not known with these settings of what is kept (Memory.eviction, sink, duplicate_score, writes, "
                f"clear_at_documents): set Memory.size = {before}, or begin with an empty memory"
            )
        resize_to = functools.partial(resize, slots=slots, cursor=int(bank.cursor))
        where = shardings(mesh, jax.eval_shape(resize_to, bank))
        bank = jax.jit(resize_to, out_shardings=where)(bank)
    if like.recall is not None:
        counts = like.recall
        nothing = lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), counts)  # noqa: E731
        bank = bank._replace(recall=init_sharded(mesh, nothing, functools.partial(shardings, mesh)))
    return bank
