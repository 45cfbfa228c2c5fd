"""Cross-entropy of each target, and whether the model's first choice was right. All in float32."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from memorizing.shapes import Batch


class Predictions(NamedTuple):
    """Per target: the negative log-likelihood in nats, and whether it had the largest logit. 0 and False in padding."""

    nats_BN: Float[jax.Array, "B N"]
    correct_BN: Bool[jax.Array, "B N"]


def score(logits_BNV: Float[jax.Array, "B N V"], batch: Batch) -> Predictions:
    """Compares logits with the targets of the batch."""
    log_total_BN = jax.nn.logsumexp(logits_BNV, axis=-1)
    chosen_BN = jnp.take_along_axis(logits_BNV, batch.targets_BN[..., None], axis=-1)[..., 0]
    correct_BN = jnp.argmax(logits_BNV, axis=-1) == batch.targets_BN
    return Predictions(jnp.where(batch.mask_BN, log_total_BN - chosen_BN, 0.0), correct_BN & batch.mask_BN)
