"""Attention over what the external memory retrieves: search, gather, softmax over the `K` found.

    idx     = top-K over valid slots of  stop_gradient(q) . memory_k      # per row, head and token
    remote  = softmax(q . memory_k[idx]) memory_v[idx]                    # gradient flows to q alone

No position bias: a memory is found by what it holds. What is done with `remote`: the gate in `attention.py`.

Where slots are split over devices, each gathers and attends to those of the `K` that it holds, and the sums of the
softmax are added up over devices: neither keys nor values of the memory ever travel.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Bool, Float, Int

from memorizing.memory.bank import Bank, valid
from memorizing.memory.search import Keys, Search
from memorizing.memory.search.sharded import Sharded
from memorizing.parallel.mesh import current_mesh, spec, specs

RETRIEVED = "retrieved"
"""The name of what is kept for the backward pass even where activations are computed again (`Model.remat`): by then the
memory has been written to, so to search it again would take a copy of all of it."""


def attend_to_memory(
    query_BHND: Float[jax.Array, "B H N D"], bank: Bank, search: Search, neighbours: int
) -> tuple[Float[jax.Array, "B H N D"], Bool[jax.Array, "B"]]:
    """Reads the memory; also says which rows have anything in theirs. Rows that have nothing read zeros."""
    bank = lax.stop_gradient(bank)
    attend, keys = functools.partial(_attend, search=search, neighbours=neighbours), bank.keys
    if (mesh := current_mesh()) is not None:
        attend = jax.shard_map(
            functools.partial(attend, axis="memory"),
            mesh=mesh,
            # Every device along the memory axis reads the queries of the whole segment, and gives back its share.
            in_specs=(spec("BH_D"), specs(keys), spec("BHMD"), spec("BM")),
            out_specs=spec("BHND"),
            check_vma=False,  # searches start their scans from constants, which are the same on all devices
        )
    remote = attend(query_BHND, keys, bank.values_BHMD, valid(bank))
    return remote, bank.length_B > 0


def _attend(
    query_BHND: Float[jax.Array, "B H N D"],
    keys: Keys,
    values_BHMD: Float[jax.Array, "B H M D"],
    valid_BM: Bool[jax.Array, "B M"],
    search: Search,
    neighbours: int,
    axis: str | None = None,
) -> Float[jax.Array, "B H N_own D"]:
    """On one device; or, with an `axis`, on each along it: the slots are its own, as is the part of `N` it returns."""
    slots, first = valid_BM.shape[1], 0
    if axis is not None:
        search, first = Sharded(inner=search, axis=axis), lax.axis_index(axis) * slots
    found = search(lax.stop_gradient(query_BHND), keys, valid_BM, neighbours)
    index_BHNK = found.slots_BHNK - first
    is_here_BHNK = (found.scores_BHNK > -jnp.inf) & (index_BHNK >= 0) & (index_BHNK < slots)
    index_BHNK = jnp.clip(index_BHNK, 0, slots - 1)
    found = (gather_keys(keys, index_BHNK), gather(values_BHMD, index_BHNK), is_here_BHNK, found.scores_BHNK[..., :1])
    keys_BHNKD, values_BHNKD, is_here_BHNK, best_BHN1 = checkpoint_name(found, RETRIEVED)
    keys_BHNKD, values_BHNKD = (part.astype(query_BHND.dtype) for part in (keys_BHNKD, values_BHNKD))
    # The scores are computed again from the gathered keys, because through these the gradient reaches the query.
    scores_BHNK = jnp.einsum("BHND,BHNKD->BHNK", query_BHND, keys_BHNKD, preferred_element_type=jnp.float32)
    # The best score is the same on all devices, and finite even where nothing is found: no NaN in or out of `exp`.
    best_BHN1 = jnp.maximum(best_BHN1, -1e30)
    weights_BHNK = jnp.where(is_here_BHNK, jnp.exp(jnp.where(is_here_BHNK, scores_BHNK - best_BHN1, 0.0)), 0.0)
    total_BHN1 = weights_BHNK.sum(-1, keepdims=True)
    remote_BHND = jnp.einsum(
        "BHNK,BHNKD->BHND", weights_BHNK.astype(query_BHND.dtype), values_BHNKD, preferred_element_type=jnp.float32
    )
    if axis is not None:
        remote_BHND, total_BHN1 = (
            lax.psum_scatter(part, axis, scatter_dimension=2, tiled=True) for part in (remote_BHND, total_BHN1)
        )
    return (remote_BHND / jnp.where(total_BHN1 > 0, total_BHN1, 1.0)).astype(query_BHND.dtype)


def gather_keys(keys: Keys, index_BHNK: Int[jax.Array, "B H N K"]) -> Float[jax.Array, "B H N K D"]:
    """The keys in the named slots, at their own scale."""
    vectors_BHNKD = gather(keys.vectors_BHMD, index_BHNK)
    if keys.scales_BHM is None:
        return vectors_BHNKD
    return vectors_BHNKD.astype(jnp.float32) * gather(keys.scales_BHM[..., None], index_BHNK)


def gather(
    slots_BHMD: Float[jax.Array, "B H M D"] | Int[jax.Array, "B H M D"], index_BHNK: Int[jax.Array, "B H N K"]
) -> jax.Array:
    """The vectors `[B, H, N, K, D]` that lie in the named slots."""
    flat = index_BHNK.reshape(*index_BHNK.shape[:2], -1, 1)
    return jnp.take_along_axis(slots_BHMD, flat, axis=2).reshape(*index_BHNK.shape, -1)
