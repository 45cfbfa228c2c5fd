"""Query heads in groups that share a head of keys and values (grouped-query attention, arXiv 2305.13245).

    query head   0 1 2 3   4 5 6 7        G = 4: query head h reads key head h // G
    key head     0         1

A search works on key heads: it sees a group as one head with G times the queries, those of a token next to each other.
So the tokens of a segment can still be split over devices.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Float


def by_key_head(x_BHN_: jax.Array, group: int) -> jax.Array:
    """Moves query heads `[B, G * H, N, ...]` into their key heads: `[B, H, N * G, ...]`."""
    if group == 1:
        return x_BHN_
    rows, heads, tokens, *rest = x_BHN_.shape
    split = x_BHN_.reshape(rows, heads // group, group, tokens, *rest)
    return jnp.moveaxis(split, 2, 3).reshape(rows, heads // group, tokens * group, *rest)


def by_query_head(x_BHN_: jax.Array, group: int) -> jax.Array:
    """Inverts `by_key_head`."""
    if group == 1:
        return x_BHN_
    rows, heads, tokens, *rest = x_BHN_.shape
    split = x_BHN_.reshape(rows, heads, tokens // group, group, *rest)
    return jnp.moveaxis(split, 3, 2).reshape(rows, heads * group, tokens // group, *rest)


def inner_products(
    query_BHND: Float[jax.Array, "B H N D"], keys_BHJD: Float[jax.Array, "B kv_heads J D"]
) -> Float[jax.Array, "B H N J"]:
    """Returns the inner products of each query with all keys of its key head, in float32."""
    if query_BHND.shape[1] == keys_BHJD.shape[1]:
        return jnp.einsum("BHND,BHJD->BHNJ", query_BHND, keys_BHJD, preferred_element_type=jnp.float32)
    query_BHGND = _in_groups(query_BHND, keys_BHJD.shape[1])
    scores_BHGNJ = jnp.einsum("BHGND,BHJD->BHGNJ", query_BHGND, keys_BHJD, preferred_element_type=jnp.float32)
    return scores_BHGNJ.reshape(*query_BHND.shape[:3], -1)


def weighted_sums(
    weights_BHNJ: Float[jax.Array, "B H N J"], values_BHJD: Float[jax.Array, "B kv_heads J D"]
) -> Float[jax.Array, "B H N D"]:
    """Returns the sums of the values of each query head's key head, weighted by `weights_BHNJ`."""
    if weights_BHNJ.shape[1] == values_BHJD.shape[1]:
        return jnp.einsum("BHNJ,BHJD->BHND", weights_BHNJ, values_BHJD)
    weights_BHGNJ = _in_groups(weights_BHNJ, values_BHJD.shape[1])
    return jnp.einsum("BHGNJ,BHJD->BHGND", weights_BHGNJ, values_BHJD).reshape(*weights_BHNJ.shape[:3], -1)


def _in_groups(x_BHN_: jax.Array, kv_heads: int) -> jax.Array:
    rows, heads, *rest = x_BHN_.shape
    return x_BHN_.reshape(rows, kv_heads, heads // kv_heads, *rest)
