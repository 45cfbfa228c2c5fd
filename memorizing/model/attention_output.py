"""The result of one attention, and the merge of several attentions into one softmax."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float


class ScoreSummary(NamedTuple):
    """Summary of the scores that each query attends to, in float32; 0 if there are none.

    Attributes:
        best_BHN: the largest score.
        log_total_BHN: log-sum-exp of the scores.
    """

    best_BHN: Float[jax.Array, "B H N"]
    log_total_BHN: Float[jax.Array, "B H N"]


class AttentionOutput(NamedTuple):
    """Result of one attention.

    Attributes:
        out_BHND: values, weighted by the softmax of the scores.
        scores: summary of the scores; None if the gate does not compare scores.
    """

    out_BHND: Float[jax.Array, "B H N D"]
    scores: ScoreSummary | None


def merge_outputs(outputs: Sequence[AttentionOutput], found: Sequence[Bool[jax.Array, "B H N"]]) -> AttentionOutput:
    """Merges attentions over disjoint sets of keys into one softmax over all of them.

    `found` marks the queries for which each attention has any key. A query without any key gets an undefined result.
    """
    scores = [output.scores for output in outputs if output.scores is not None]
    nothing = -1e30  # finite: no NaN in gradients
    bests, totals = (
        jnp.stack([jnp.where(there, part, nothing) for part, there in zip(parts, found, strict=True)])
        for parts in zip(*scores, strict=True)
    )
    shares, outs = jax.nn.softmax(totals, axis=0), jnp.stack([output.out_BHND for output in outputs])
    out_BHND = (shares[..., None] * outs).sum(0).astype(outs.dtype)
    return AttentionOutput(out_BHND, ScoreSummary(bests.max(0), jax.nn.logsumexp(totals, axis=0)))
