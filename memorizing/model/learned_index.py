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
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from memorizing.memory.search.contract import Keys, inner_products
from memorizing.memory.search.proposed import in_features, orthonormal

SAMPLED = 8
"""Tokens of each segment and row from whose queries an index learns; and whose neighbours are counted for recall."""

GRADIENT = "index gradient"
"""The name of what is kept for the backward pass even where activations are computed again (`Model.remat`)."""


class LearnedIndex(NamedTuple):
    """Of one memory layer. Two matrices, since what ranks as `q . k` does need not be a projection."""

    index_query_HDP: Float[Array, "H D P"]
    index_key_HDP: Float[Array, "H D P"]


def first_index(heads: int, head_size: int, size: int) -> LearnedIndex:
    """The index before it has learned: inner products of all features, estimated from `size` random directions."""
    rows_HDP = np.tile(orthonormal(head_size, size).T * (head_size / size) ** 0.5, (heads, 1, 1))
    return LearnedIndex(jnp.array(rows_HDP), jnp.array(rows_HDP))  # each its own: a train step is given both to write


def is_of_index(path: tuple) -> bool:
    """Whether a parameter (by its path of keys) belongs to an index, whose gradient is none of the model's loss."""
    return jax.tree_util.keystr(path[-1:], simple=True).startswith("index_")


def sampled(tokens: int) -> Int[jax.Array, "S"]:
    """The places of `SAMPLED` tokens, evenly over a segment; of all where there are not so many."""
    count = min(SAMPLED, tokens)
    return jnp.arange(count) * tokens // count


def index_loss(
    index: LearnedIndex, query_BHND: Float[Array, "B H N D"], keys: Keys, valid_BM: Bool[Array, "B M"]
) -> Float[Array, ""]:
    """The mean cross-entropy in nats over the queries of rows that have something in their memory; 0 if none has."""
    plain_BHMD, nothing = keys.plain(), -1e30
    valid_B11M = valid_BM[:, None, None, :]
    share_BHNM = jax.nn.softmax(jnp.where(valid_B11M, inner_products(query_BHND, plain_BHMD), nothing), axis=-1)
    query_BHNP, key_BHMP = (
        in_features(part, weight_HDP, plain_BHMD.dtype)
        for part, weight_HDP in ((query_BHND, index.index_query_HDP), (plain_BHMD, index.index_key_HDP))
    )
    logits_BHNM = jnp.where(valid_B11M, inner_products(query_BHNP, key_BHMP), nothing)
    nats_BHN = -(share_BHNM * jax.nn.log_softmax(logits_BHNM, axis=-1)).sum(-1)
    asks_B = valid_BM.any(-1)
    queries = asks_B.sum() * nats_BHN[0].size
    return jnp.where(asks_B[:, None, None], nats_BHN, 0.0).sum() / jnp.maximum(queries, 1)


@jax.custom_vjp
def taught[Out](
    out: Out,
    index: LearnedIndex,
    query_BHND: Float[Array, "B H N D"],
    keys: Keys,
    valid_BM: Bool[Array, "B M"],
    weight: Float[Array, ""],
) -> Out:
    """`out` as it is; where gradients are taken, `index` gets that of `weight` times its loss, whatever follows.

    That gradient is made while the segment is read: by the backward pass the memory has been written to.
    """
    return out


def _read(out, index, query_BHND, keys, valid_BM, weight):
    gradient = jax.grad(lambda index: weight * index_loss(index, query_BHND, keys, valid_BM))(index)
    return out, checkpoint_name(gradient, GRADIENT)


def _learn(gradient, of_out):
    return of_out, gradient, None, None, None, None


taught.defvjp(_read, _learn)
