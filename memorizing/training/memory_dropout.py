"""Memory dropout: some rows read only a part of their memory, so that the model learns to do with any size of it.

A share of the rows of each segment may read only the newest `m` of `M` slots, `m` drawn anew for each:

    m = floor((M + 1)^u) - 1,   u uniform in [0, 1)          P(m >= n) = 1 - log(n + 1) / log(M + 1)

So every doubling of the size is as likely as any other, and with a probability of log 2 / log(M + 1) there is no memory
at all. A memory gains about as much by each doubling (the paper's figures, and ours), so each of these sizes teaches
about as much; of sizes drawn evenly, half would lie above M / 2, where hardly anything is to be learned, and only one
of 16 below M / 16, where most goes wrong. All layers of a row draw the same, as they would with a memory of that size.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Int

from memorizing.model.carry import Carry

_STREAM = 2**31
"""Tells these random numbers from those of `Model.dropout`, which count up from 0 for the same seed and step."""


def limit_memory(carry: Carry, share: float, seed: int, step: Int[jax.Array, ""]) -> Carry:
    """The carry as the segment at `step` is to read it. The same numbers give the same, on any mesh."""
    if not carry.banks:
        return carry
    rows, slots = carry.cached_B.shape[0], carry.banks[0].keys_BHMD.shape[2]
    rng = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), _STREAM)
    visible_B = sizes(rng, rows, slots, share)
    return carry._replace(banks=tuple(bank._replace(visible_B=visible_B) for bank in carry.banks))


def unlimited(carry: Carry) -> Carry:
    """The carry once that segment was read."""
    return carry._replace(banks=tuple(bank._replace(visible_B=None) for bank in carry.banks))


def sizes(rng: jax.Array, rows: int, slots: int, share: float) -> Int[jax.Array, "B"]:
    """How many of the latest tokens each row may read: all `slots`, or for a share of the rows as many as are drawn."""
    which, how_many = jax.random.uniform(rng, (2, rows))
    drawn_B = jnp.floor((slots + 1.0) ** how_many).astype(jnp.int32) - 1
    return jnp.where(which < share, jnp.clip(drawn_B, 0, slots), slots)
