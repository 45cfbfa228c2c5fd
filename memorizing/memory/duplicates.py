"""Finds new tokens that are nearly the same as a stored one, so that the memory need not store them again.

    similarity(i, m) = mean over heads of  k_i . k_m / (|k_i| |k_m|)

A slot serves all heads, so similarity is the mean cosine over heads. A token is compared with the tokens in memory
before its segment, and with earlier tokens of its segment that are not duplicates themselves.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float

from memorizing.memory.search import NO_INDEX, Keys
from memorizing.parallel.mesh import current_mesh, spec, specs

BLOCK = 1024
"""Number of slots compared at a time."""


def novel(
    keys_BHND: Float[jax.Array, "B H N D"],
    offered_BN: Bool[jax.Array, "B N"],
    held: Keys,
    valid_BM: Bool[jax.Array, "B M"],
    duplicate_score: float,
) -> Bool[jax.Array, "B N"]:
    """Returns True for offered tokens whose similarity to every stored token is at most `duplicate_score`."""
    compare = functools.partial(_similarity, heads=keys_BHND.shape[1])
    held = held._replace(index=NO_INDEX)
    if (mesh := current_mesh()) is not None:
        compare = jax.shard_map(
            functools.partial(compare, over=("model", "memory")),
            mesh=mesh,
            in_specs=(spec("BH_D"), specs(held), spec("BM")),
            out_specs=(spec("B"), spec("B")),
            check_vma=False,  # the loop starts from a constant, which is the same on all devices
        )
    nearest_BN, among_BNN = compare(lax.stop_gradient(keys_BHND), held, valid_BM)
    is_like_BNN = among_BNN > duplicate_score
    is_new_BN = offered_BN & (nearest_BN <= duplicate_score)

    def decide(number: jax.Array, kept_BN: jax.Array) -> jax.Array:
        is_one_B = is_new_BN[:, number] & ~(is_like_BNN[:, number] & kept_BN).any(1)
        return kept_BN.at[:, number].set(is_one_B)

    return lax.fori_loop(0, offered_BN.shape[1], decide, jnp.zeros_like(offered_BN))


def _similarity(
    keys_BHND: jax.Array, held: Keys, valid_BM: jax.Array, heads: int, over: tuple[str, str] | None = None
) -> tuple[Float[jax.Array, "B N"], Float[jax.Array, "B N N"]]:
    """Returns each token's largest similarity to a valid slot (-inf if none), and to the tokens of its segment.

    With `over`, the mesh axes of heads and slots, each device holds some of both.
    """
    slots, new_BHND = valid_BM.shape[1], _unit(keys_BHND)
    size = min(BLOCK, slots)

    def over_heads(others_BHMD: jax.Array) -> jax.Array:
        sums_BNM = jnp.einsum("BHND,BHMD->BNM", new_BHND, others_BHMD)
        return (sums_BNM if over is None else lax.psum(sums_BNM, over[0])) / heads

    def compare(number: jax.Array, best_BN: jax.Array) -> jax.Array:
        first = jnp.minimum(number * size, slots - size)  # the last block may overlap the one before it
        block = jax.tree.map(lambda part: lax.dynamic_slice_in_dim(part, first, size, axis=2), held)
        counts_BM = lax.dynamic_slice_in_dim(valid_BM, first, size, axis=1)
        like_BNM = jnp.where(counts_BM[:, None], over_heads(_unit(block.plain())), -jnp.inf)
        return jnp.maximum(best_BN, like_BNM.max(2))

    nothing_BN = jnp.full((len(keys_BHND), keys_BHND.shape[2]), -jnp.inf)
    best_BN = lax.fori_loop(0, -(-slots // size), compare, nothing_BN)
    return best_BN if over is None else lax.pmax(best_BN, over[1]), over_heads(new_BHND)


def _unit(keys_BHMD: jax.Array) -> Float[jax.Array, "B H M D"]:
    """Returns keys in float32, scaled to length 1; zeros stay zeros."""
    wide = keys_BHMD.astype(jnp.float32)
    return wide * lax.rsqrt(jnp.maximum((wide * wide).sum(-1, keepdims=True), 1e-30))
