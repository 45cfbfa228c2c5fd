"""Exact search by definition: all scores, then `lax.top_k`. The reference, and good for small memories."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float

from memorizing.memory.search.contract import Neighbours


def exact_search(
    queries_BHND: Float[jax.Array, "B H N D"],
    keys_BHMD: Float[jax.Array, "B H M D"],
    valid_BM: Bool[jax.Array, "B M"],
    neighbours: int,
) -> Neighbours:
    """Materializes the scores `[B, H, N, M]` in float32 and sorts out the best of each query."""
    return Neighbours(*lax.top_k(masked_scores(queries_BHND, keys_BHMD, valid_BM), neighbours))


def masked_scores(
    queries_BHND: Float[jax.Array, "B H N D"],
    keys_BHMD: Float[jax.Array, "B H M D"],
    valid_BM: Bool[jax.Array, "B M"],
) -> Float[jax.Array, "B H N M"]:
    """Inner products in float32, `-inf` at slots that are not valid."""
    # Scores are float32 from the start: more exact, and `top_k` on bfloat16 is many times slower on CPUs.
    scores_BHNM = jnp.einsum(
        "BHND,BHMD->BHNM",
        queries_BHND.astype(keys_BHMD.dtype),
        keys_BHMD,
        preferred_element_type=jnp.float32,
    )
    return jnp.where(valid_BM[:, None, None, :], scores_BHNM, -jnp.inf)
