"""Memory dropout: some rows read only a part of their memory, so that the model learns to use any memory size.

A share of the rows of each segment may read only the newest `m` of `M` slots. `m` is drawn for each row:

    m = floor((M + 1)^u) - 1,   u uniform in [0, 1)          P(m >= n) = 1 - log(n + 1) / log(M + 1)

Every doubling of the size is equally likely, and there is no memory at all with a probability of log 2 / log(M + 1).
Each doubling of a memory gains about the same (in the paper's figures and ours), so each size teaches about the same.
Of uniformly drawn sizes, half would be above M / 2, where there is little to learn, and only one in 16 below M / 16,
where most goes wrong. All layers of a row draw the same size, as with a memory of that size.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Int

from memorizing.model.carry import Carry

_STREAM = 2**31
"""Separates these random numbers from those of `Model.dropout`, which count up from 0 for the same seed and step."""


def limit_memory(carry: Carry, share: float, seed: int, step: Int[jax.Array, ""]) -> Carry:
    """Returns the carry that the segment at `step` reads. It depends only on the arguments, not on the mesh."""
    if not carry.banks:
        return carry
    rows, slots = carry.cached_B.shape[0], carry.banks[0].keys_BHMD.shape[2]
    rng = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), _STREAM)
    visible_B = sizes(rng, rows, slots, share)
    return carry._replace(banks=tuple(bank._replace(visible_B=visible_B) for bank in carry.banks))


def unlimited(carry: Carry) -> Carry:
    """Returns the carry without these limits, after the segment was read."""
    return carry._replace(banks=tuple(bank._replace(visible_B=None) for bank in carry.banks))


def sizes(rng: jax.Array, rows: int, slots: int, share: float) -> Int[jax.Array, "B"]:
    """Returns the number of newest tokens that each row may read: all `slots`, or a random number in some rows."""
    which, how_many = jax.random.uniform(rng, (2, rows))
    drawn_B = jnp.floor((slots + 1.0) ** how_many).astype(jnp.int32) - 1
    return jnp.where(which < share, jnp.clip(drawn_B, 0, slots), slots)
