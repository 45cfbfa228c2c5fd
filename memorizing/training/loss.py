"""The loss: cross-entropy of each target in float32, and whether the model's first choice was right."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from memorizing.shapes import Batch


class Predictions(NamedTuple):
    """Negative log-likelihood of each target in nats, and whether it had the largest logit; 0 and False in padding."""

    nats_BN: Float[jax.Array, "B N"]
    correct_BN: Bool[jax.Array, "B N"]


def score(logits_BNV: Float[jax.Array, "B N V"], batch: Batch) -> Predictions:
    """Scores logits against the targets of the batch."""
    log_total_BN = jax.nn.logsumexp(logits_BNV, axis=-1)
    chosen_BN = jnp.take_along_axis(logits_BNV, batch.targets_BN[..., None], axis=-1)[..., 0]
    correct_BN = jnp.argmax(logits_BNV, axis=-1) == batch.targets_BN
    return Predictions(jnp.where(batch.mask_BN, log_total_BN - chosen_BN, 0.0), correct_BN & batch.mask_BN)
