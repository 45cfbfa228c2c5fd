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
from jaxtyping import Bool, Float

from memorizing.memory.bank import Bank, Recall, valid
from memorizing.memory.search import Keys, Neighbours, Search
from memorizing.memory.search.blocked import Blocked
from memorizing.memory.search.gather import gather, gather_keys
from memorizing.memory.search.sharded import Sharded
from memorizing.model.groups import by_key_head, by_query_head
from memorizing.parallel.mesh import current_mesh, spec, specs

RETRIEVED = "retrieved"
"""The name of what is kept for the backward pass even where activations are computed again (`Model.remat`): by then the
memory has been written to, so to search it again would take a copy of all of it."""


SAMPLED = 8
"""Tokens of each segment and row whose queries' neighbours are counted, where recall is reported."""


def attend_to_memory(
    query_BHND: Float[jax.Array, "B H N D"], bank: Bank, search: Search, neighbours: int
) -> tuple[Float[jax.Array, "B H N D"], Bool[jax.Array, "B"], Recall | None]:
    """Reads the memory; also says which rows have anything in theirs. Rows that have nothing read zeros.

    Counts what sampled queries found, if the bank does; not those of padding, see `memory.bank.masked`.
    """
    bank = lax.stop_gradient(bank)
    group = query_BHND.shape[1] // bank.keys_BHMD.shape[1]
    attend = functools.partial(_attend, search=search, neighbours=neighbours, group=group)
    keys = bank.keys
    if (mesh := current_mesh()) is not None:
        attend = jax.shard_map(
            functools.partial(attend, axis="memory"),
            mesh=mesh,
            # Every device along the memory axis reads the queries of the whole segment, and gives back its share.
            in_specs=(spec("BH_D"), specs(keys), spec("BHMD"), spec("BM"), specs(bank.recall)),
            out_specs=(spec("BHND"), specs(bank.recall)),
            check_vma=False,  # searches start their scans from constants, which are the same on all devices
        )
    remote, counted = attend(by_key_head(query_BHND, group), keys, bank.values_BHMD, valid(bank), bank.recall)
    return by_query_head(remote, group), bank.length_B > 0, counted


def _attend(
    query_BHND: Float[jax.Array, "B H N D"],
    keys: Keys,
    values_BHMD: Float[jax.Array, "B H M D"],
    valid_BM: Bool[jax.Array, "B M"],
    recall: Recall | None,
    search: Search,
    neighbours: int,
    group: int,
    axis: str | None = None,
) -> tuple[Float[jax.Array, "B H N_own D"], Recall | None]:
    """On one device; or, with an `axis`, on each along it: the slots are its own, as is the part of `N` it returns.

    Heads are those of the bank, and the queries `group` for each token (see groups.py).
    """
    slots, first, oracle = valid_BM.shape[1], 0, Blocked(minimum_score=search.minimum_score)
    if axis is not None:
        search, oracle = Sharded(inner=search, axis=axis), Sharded(inner=oracle, axis=axis)
        first = lax.axis_index(axis) * slots
    searched_BHND = lax.stop_gradient(query_BHND)
    found = search(searched_BHND, keys, valid_BM, neighbours)
    counted = None
    if recall is not None:
        tokens = query_BHND.shape[2] // group
        places = jnp.arange(min(SAMPLED, tokens)) * tokens // min(SAMPLED, tokens)
        is_token_BQ = jnp.repeat(places < recall.tokens_B[:, None], group, axis=1)
        places = (places[:, None] * group + jnp.arange(group)).ravel()  # all queries of the sampled tokens
        wanted = oracle(searched_BHND[:, :, places], keys, valid_BM, neighbours)
        wanted = wanted._replace(  # padding wants nothing
            scores_BHNK=jnp.where(is_token_BQ[:, None, :, None], wanted.scores_BHNK, -jnp.inf)
        )
        counted = count(Neighbours(*(part[:, :, places] for part in found)), wanted)
    index_BHNK = found.slots_BHNK - first
    is_here_BHNK = (found.scores_BHNK > -jnp.inf) & (index_BHNK >= 0) & (index_BHNK < slots)
    index_BHNK = jnp.clip(index_BHNK, 0, slots - 1)
    retrieved = (
        gather_keys(keys, index_BHNK),
        gather(values_BHMD, index_BHNK),
        is_here_BHNK,
        found.scores_BHNK[..., :1],
    )
    keys_BHNKD, values_BHNKD, is_here_BHNK, best_BHN1 = checkpoint_name(retrieved, RETRIEVED)
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
    return (remote_BHND / jnp.where(total_BHN1 > 0, total_BHN1, 1.0)).astype(query_BHND.dtype), counted


def count(found: Neighbours, wanted: Neighbours) -> Recall:
    """How many of the `wanted` neighbours there are, and how many were `found`: to be added to a bank's counts."""
    exists_BHNK = wanted.scores_BHNK > -jnp.inf
    slots_BHNK = jnp.where(found.scores_BHNK > -jnp.inf, found.slots_BHNK, -1)
    is_found_BHNK = (wanted.slots_BHNK[..., :, None] == slots_BHNK[..., None, :]).any(-1) & exists_BHNK
    found_BH, wanted_BH = (part.sum((2, 3), dtype=jnp.int32) for part in (is_found_BHNK, exists_BHNK))
    return Recall(found_BH, wanted_BH, jnp.zeros(len(exists_BHNK), jnp.int32))
