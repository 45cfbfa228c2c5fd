"""Attention over what the external memory retrieves: search, gather, softmax over the `K` found.

    idx     = top-K over valid slots of  stop_gradient(q) . memory_k      # per row, head and token
    remote  = softmax(q . memory_k[idx]) memory_v[idx]                    # gradient flows to q alone

No position bias: a memory is found by what it holds. What is done with `remote`: the gate in `attention.py`.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float, Int

from memorizing.memory.bank import Bank, valid
from memorizing.memory.search import Search


def attend_to_memory(
    query_BHND: Float[jax.Array, "B H N D"], bank: Bank, search: Search, neighbours: int
) -> tuple[Float[jax.Array, "B H N D"], Bool[jax.Array, "B"]]:
    """Reads the memory; also says which rows have anything in theirs. Rows that have nothing read zeros."""
    bank = lax.stop_gradient(bank)
    found = search(lax.stop_gradient(query_BHND), bank.keys_BHMD, valid(bank), neighbours)
    keys_BHNKD = gather(bank.keys_BHMD, found.slots_BHNK).astype(query_BHND.dtype)
    values_BHNKD = gather(bank.values_BHMD, found.slots_BHNK).astype(query_BHND.dtype)
    # The scores are computed again from the gathered keys, because through these the gradient reaches the query.
    scores_BHNK = jnp.einsum("BHND,BHNKD->BHNK", query_BHND, keys_BHNKD, preferred_element_type=jnp.float32)
    exists_BHNK = found.scores_BHNK > -jnp.inf
    # A finite stand-in for -inf: a row without any neighbour would otherwise give NaN, and so would its gradient.
    weights_BHNK = jax.nn.softmax(jnp.where(exists_BHNK, scores_BHNK, -1e30), axis=-1)
    weights_BHNK = jnp.where(exists_BHNK, weights_BHNK, 0.0).astype(query_BHND.dtype)
    return jnp.einsum("BHNK,BHNKD->BHND", weights_BHNK, values_BHNKD), bank.length_B > 0


def gather(slots_BHMD: Float[jax.Array, "B H M D"], index_BHNK: Int[jax.Array, "B H N K"]):
    """The vectors `[B, H, N, K, D]` that lie in the named slots."""
    flat = index_BHNK.reshape(*index_BHNK.shape[:2], -1, 1)
    return jnp.take_along_axis(slots_BHMD, flat, axis=2).reshape(*index_BHNK.shape, -1)
