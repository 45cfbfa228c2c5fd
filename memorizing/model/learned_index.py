"""A learned index: a few features of queries and keys that rank slots as the attention over the memory does.

    taught     softmax over all slots of    q . k                     for SAMPLED tokens of each segment
    learned    softmax over all slots of    (q Wq) . (k Wk)           P of D features, for each head of the bank
    loss       the cross-entropy of the two: its gradient reaches Wq and Wk, and nothing else

`Memory.proposer = 'learned'` searches in these features and lets the keys decide (`search/proposed.py`). Features are
made of the keys as they are read, so none is older than the index; it begins as the `projection` that is not learned.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from memorizing.memory.search.contract import Keys, inner_products
from memorizing.memory.search.proposed import in_features, orthonormal

SAMPLED = 8
"""Number of tokens of each segment and row whose queries train an index, and whose neighbors count for recall."""

GRADIENT = "index gradient"
"""Name under which the index gradient is saved for the backward pass, even with `Model.remat`."""


class LearnedIndex(NamedTuple):
    """The learned index of one memory layer: two matrices, because the best ranking need not be a projection."""

    index_query_HDP: Float[Array, "H D P"]
    index_key_HDP: Float[Array, "H D P"]


def first_index(heads: int, head_size: int, size: int) -> LearnedIndex:
    """Returns an untrained index, which estimates inner products from `size` random directions."""
    rows_HDP = np.tile(orthonormal(head_size, size).T * (head_size / size) ** 0.5, (heads, 1, 1))
    return LearnedIndex(jnp.array(rows_HDP), jnp.array(rows_HDP))  # separate arrays, because a train step donates both


def is_of_index(path: tuple) -> bool:
    """True if a parameter, by its path of keys, belongs to an index; the model's loss gives it no gradient."""
    return jax.tree_util.keystr(path[-1:], simple=True) in LearnedIndex._fields


def sampled(tokens: int) -> Int[jax.Array, "S"]:
    """Returns the positions of `SAMPLED` tokens, evenly spread over a segment; all tokens if there are fewer."""
    count = min(SAMPLED, tokens)
    return jnp.arange(count) * tokens // count


def index_loss(
    index: LearnedIndex,
    query_BHND: Float[Array, "B H N D"],
    keys: Keys,
    valid_BM: Bool[Array, "B M"],
    asks_BN: Bool[Array, "B N"],
) -> Float[Array, ""]:
    """The mean cross-entropy in nats over queries that ask, in rows that have something in their memory; 0 for none."""
    valid_B11M, nothing = valid_BM[:, None, None, :], -1e30
    scores_BHNM = inner_products(query_BHND, keys.vectors_BHMD, keys.scales_BHM)
    share_BHNM = jax.nn.softmax(jnp.where(valid_B11M, scores_BHNM, nothing), axis=-1)
    query_BHNP = in_features(Keys(query_BHND), index.index_query_HDP)
    logits_BHNM = inner_products(query_BHNP, in_features(keys, index.index_key_HDP))
    nats_BHNM = jax.nn.log_softmax(jnp.where(valid_B11M, logits_BHNM, nothing), axis=-1)
    nats_BHN = -(share_BHNM * nats_BHNM).sum(-1)
    asks_BN = asks_BN & valid_BM.any(-1, keepdims=True)
    queries = asks_BN.sum() * nats_BHN.shape[1]
    return jnp.where(asks_BN[:, None], nats_BHN, 0.0).sum() / jnp.maximum(queries, 1)


@jax.custom_vjp
def taught[Out](
    out: Out,
    index: LearnedIndex,
    query_BHND: Float[Array, "B H N D"],
    keys: Keys,
    valid_BM: Bool[Array, "B M"],
    asks_BN: Bool[Array, "B N"],
    weight: Float[Array, ""],
) -> Out:
    """`out` as it is; where gradients are taken, `index` gets that of `weight` times its loss, whatever follows.

    That gradient is made while the segment is read: by the backward pass the memory has been written to.
    """
    return out


def _teach(out, index, query_BHND, keys, valid_BM, asks_BN, weight):
    gradient = jax.grad(lambda index: weight * index_loss(index, query_BHND, keys, valid_BM, asks_BN))(index)
    gradient = checkpoint_name(gradient, GRADIENT)
    # Before `out` is used, and so before the segment is written: else the compiler would copy the memory to be safe.
    return lax.optimization_barrier((out, gradient))


def _learn(gradient, of_out):
    return of_out, gradient, None, None, None, None, None


taught.defvjp(_teach, _learn)
