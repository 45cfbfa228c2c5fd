"""The gate: how much a token takes from the memory, `g`, and how much from its local context, `1 - g`.

out = g * remote + (1 - g) * local,     g = sigmoid(logit), 0 where a query found nothing

head     b_H                                          a learned number for each head (the paper)
layer    b                                            one for all heads of a layer
token    q . w_H + b_H                                learned, and by what a token asks
score    best remote score - best local score         nothing learned: a softmax of the two
joint    log-sum-exp of remote - that of local scores: one softmax over local and retrieved, no gate
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

GateKind = Literal["head", "token", "layer", "score", "joint"]

COMPARING = ("score", "joint")
"""Gates that are told the scores of both attentions, and have learned nothing."""


class Scores(NamedTuple):
    """Of what each query attends to, in float32; 0 where that is nothing.

    Attributes:
        best_BHN: the largest.
        log_total_BHN: their log-sum-exp.
    """

    best_BHN: Float[jax.Array, "B H N"]
    log_total_BHN: Float[jax.Array, "B H N"]


class Read(NamedTuple):
    """What an attention gives: the sum of values, weighted by the softmax of scores; and what these are, if asked."""

    out_BHND: Float[jax.Array, "B H N D"]
    scores: Scores | None


def compared(kind: GateKind, local: Scores, remote: Scores) -> Float[jax.Array, "B H N"]:
    """The logit of gates that compare scores. Gradients reach queries, and local keys."""
    if kind == "score":
        return remote.best_BHN - local.best_BHN
    return remote.log_total_BHN - local.log_total_BHN


def opened(logit_BHN: Float[jax.Array, "*BHN"], found_BHN: Bool[jax.Array, "B H N"]) -> Float[jax.Array, "B H N"]:
    """How far the gate is open for each token, in float32."""
    return jnp.where(found_BHN, jax.nn.sigmoid(logit_BHN), 0.0)


def mixed(
    gate_BHN: Float[jax.Array, "B H N"],
    remote_BHND: Float[jax.Array, "B H N D"],
    local_BHND: Float[jax.Array, "B H N D"],
) -> Float[jax.Array, "B H N D"]:
    """What the layer reads, of both."""
    gate = gate_BHN[..., None].astype(local_BHND.dtype)
    return gate * remote_BHND + (1 - gate) * local_BHND


def together(reads: Sequence[Read], found: Sequence[Bool[jax.Array, "B H N"]]) -> Read:
    """One attention over all that several have read, from what each gives: their scores in one softmax.

    Where nothing was found by any the result means nothing.
    """
    scores = [it.scores for it in reads if it.scores is not None]
    nothing = -1e30  # finite: no NaN in gradients
    bests, totals = (
        jnp.stack([jnp.where(there, part, nothing) for part, there in zip(parts, found, strict=True)])
        for parts in zip(*scores, strict=True)
    )
    shares, outs = jax.nn.softmax(totals, axis=0), jnp.stack([it.out_BHND for it in reads])
    out_BHND = (shares[..., None] * outs).sum(0).astype(outs.dtype)
    return Read(out_BHND, Scores(bests.max(0), jax.nn.logsumexp(totals, axis=0)))
