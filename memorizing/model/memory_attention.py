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

from memorizing.memory.addresses import Addresses
from memorizing.memory.bank import PARTS, Bank, Noticed, Recall, readable, tokens_ago, valid
from memorizing.memory.search import Keys, Neighbours, Search
from memorizing.memory.search.blocked import Blocked
from memorizing.memory.search.gather import gather, gather_keys
from memorizing.memory.search.sharded import Sharded
from memorizing.parallel.mesh import current_mesh, spec, specs

RETRIEVED = "retrieved"
"""The name of what is kept for the backward pass even where activations are computed again (`Model.remat`): by then the
memory has been written to, so to search it again would take a copy of all of it."""


SAMPLED = 8
"""Queries of each segment, row and head whose neighbours are counted, where recall is reported."""


def attend_to_memory(
    query_BHND: Float[jax.Array, "B H N D"], bank: Bank, search: Search, neighbours: int, write_every: int = 1
) -> tuple[Float[jax.Array, "B H N D"], Bool[jax.Array, "B"], Noticed]:
    """Reads the memory; also says which rows have anything in theirs. Rows that have nothing read zeros.

    Notices what the bank keeps account of: what sampled queries found, and how much attention each slot received; not
    of queries of padding, see `memory.bank.masked`.
    """
    bank = lax.stop_gradient(bank)
    attend = functools.partial(_attend, search=search, neighbours=neighbours)
    keys = bank.keys
    addresses = bank.addresses
    used_BM = None if addresses is None else addresses.used_BM
    addresses = None if used_BM is None else addresses  # of no use here but for that
    ago_BM = None if bank.recall is None else tokens_ago(bank, write_every)
    if (mesh := current_mesh()) is not None:
        attend = jax.shard_map(
            functools.partial(attend, axis="memory"),
            mesh=mesh,
            # Every device along the memory axis reads the queries of the whole segment, and gives back its share.
            in_specs=(
                *(spec("BH_D"), specs(keys), spec("BHMD"), spec("BM"), specs(bank.recall), specs(addresses)),
                None if ago_BM is None else spec("BM"),
            ),
            out_specs=(spec("BHND"), specs(Noticed(bank.recall, used_BM))),
            check_vma=False,  # searches start their scans from constants, which are the same on all devices
        )
    remote, noticed = attend(query_BHND, keys, bank.values_BHMD, valid(bank), bank.recall, addresses, ago_BM)
    return remote, readable(bank) > 0, noticed


def _attend(
    query_BHND: Float[jax.Array, "B H N D"],
    keys: Keys,
    values_BHMD: Float[jax.Array, "B H M D"],
    valid_BM: Bool[jax.Array, "B M"],
    recall: Recall | None,
    addresses: Addresses | None,
    ago_BM: Int[jax.Array, "B M"] | None,
    search: Search,
    neighbours: int,
    axis: str | None = None,
) -> tuple[Float[jax.Array, "B H N_own D"], Noticed]:
    """On one device; or, with an `axis`, on each along it: the slots are its own, as is the part of `N` it returns."""
    slots, first, oracle = valid_BM.shape[1], 0, Blocked(minimum_score=search.minimum_score)
    if axis is not None:
        search, oracle = Sharded(inner=search, axis=axis), Sharded(inner=oracle, axis=axis)
        first = lax.axis_index(axis) * slots
    searched_BHND = lax.stop_gradient(query_BHND)
    found = search(searched_BHND, keys, valid_BM, neighbours)
    counted = None
    if recall is not None and ago_BM is not None:
        tokens = query_BHND.shape[2]
        places = jnp.arange(min(SAMPLED, tokens)) * tokens // min(SAMPLED, tokens)
        wanted = oracle(searched_BHND[:, :, places], keys, valid_BM, neighbours)
        is_token_BN = places < recall.tokens_B[:, None]
        sampled, wanted = (  # padding wants and finds nothing
            each._replace(scores_BHNK=jnp.where(is_token_BN[:, None, :, None], each.scores_BHNK, -jnp.inf))
            for each in (Neighbours(*(part[:, :, places] for part in found)), wanted)
        )
        counted = count(sampled, wanted, _segments_ago(sampled, ago_BM, tokens, first, axis))
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
    used_BM = None
    if addresses is not None:
        used_BM = _received(index_BHNK, weights_BHNK, total_BHN1, addresses.coming_B, slots, axis)
    if axis is not None:
        remote_BHND, total_BHN1 = (
            lax.psum_scatter(part, axis, scatter_dimension=2, tiled=True) for part in (remote_BHND, total_BHN1)
        )
    remote_BHND = (remote_BHND / jnp.where(total_BHN1 > 0, total_BHN1, 1.0)).astype(query_BHND.dtype)
    return remote_BHND, Noticed(counted, used_BM)


def _received(
    index_BHNK: Int[jax.Array, "B H N K"],
    weights_BHNK: Float[jax.Array, "B H N K"],
    total_BHN1: Float[jax.Array, "B H N 1"],
    tokens_B: Int[jax.Array, "B"],
    slots: int,
    axis: str | None,
) -> Int[jax.Array, "B M"]:
    """Attention that each of this device's slots received from the first `tokens_B` queries, see `Noticed`."""
    if axis is not None:
        total_BHN1 = lax.psum(total_BHN1, axis)
    shares_BHNK = lax.stop_gradient(weights_BHNK / jnp.where(total_BHN1 > 0, total_BHN1, 1.0))
    is_token_BN = jnp.arange(index_BHNK.shape[2]) < tokens_B[:, None]
    parts_BHNK = jnp.where(is_token_BN[:, None, :, None], jnp.round(PARTS * shares_BHNK), 0).astype(jnp.int32)
    rows = len(tokens_B)
    add = lambda index_X, parts_X: jnp.zeros(slots, jnp.int32).at[index_X].add(parts_X)  # noqa: E731
    used_BM = jax.vmap(add)(index_BHNK.reshape(rows, -1), parts_BHNK.reshape(rows, -1))
    return used_BM if axis is None else lax.psum(used_BM, "model")


def _segments_ago(
    found: Neighbours, ago_BM: Int[jax.Array, "B M"], tokens: int, first: jax.Array | int, axis: str | None
) -> Int[jax.Array, "B H"]:
    """The ages of what was found, added up over all devices: 1 for what the segment before had."""
    index_BHNK, slots = found.slots_BHNK - first, ago_BM.shape[1]
    is_here_BHNK = (found.scores_BHNK > -jnp.inf) & (index_BHNK >= 0) & (index_BHNK < slots)
    ages_BM = -(-ago_BM // tokens)
    ages_BHNK = jax.vmap(lambda ages_M, index_HNK: ages_M[index_HNK])(ages_BM, jnp.clip(index_BHNK, 0, slots - 1))
    age_BH = jnp.where(is_here_BHNK, ages_BHNK, 0).sum((2, 3), dtype=jnp.int32)
    return age_BH if axis is None else lax.psum(age_BH, axis)


def count(found: Neighbours, wanted: Neighbours, age_BH: Int[jax.Array, "B H"]) -> Recall:
    """How many of the `wanted` neighbours there are, and how many were `found`: to be added to a bank's counts.

    `age_BH` are the ages of those found, in segments, added up.
    """
    exists_BHNK = wanted.scores_BHNK > -jnp.inf
    slots_BHNK = jnp.where(found.scores_BHNK > -jnp.inf, found.slots_BHNK, -1)
    is_found_BHNK = (wanted.slots_BHNK[..., :, None] == slots_BHNK[..., None, :]).any(-1) & exists_BHNK
    found_BH, wanted_BH = (part.sum((2, 3), dtype=jnp.int32) for part in (is_found_BHNK, exists_BHNK))
    retrieved_BH = (slots_BHNK >= 0).sum((2, 3), dtype=jnp.int32)
    return Recall(found_BH, wanted_BH, retrieved_BH, age_BH, jnp.zeros(len(exists_BHNK), jnp.int32))
