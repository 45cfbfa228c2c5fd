"""The contract of gates: a gate decides how much of a query's output comes from the memory.

out = g * remote + (1 - g) * local,     g = sigmoid(logit), 0 if the query found nothing
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Bool, Float

from memorizing.model.attention_output import AttentionOutput


class Gate(nnx.Module):
    """Base class of gates. A gate owns its parameters, and its class states whether it compares scores."""

    compares_scores = False
    """True if `logit` needs the `scores` of both attentions."""

    def __init__(self, heads: int, head_size: int, bias: float):
        """Creates the parameters; `bias` is the initial logit of a gate that learns one."""

    def logit(
        self, query_BHND: Float[jax.Array, "B H N D"], local: AttentionOutput, remote: AttentionOutput
    ) -> Float[jax.Array, "*BHN"]:
        """Returns the logit of `g`, in any shape that broadcasts to `[B, H, N]`."""
        raise NotImplementedError

    def constant(self) -> Float[jax.Array, "*H"] | None:
        """Returns `g` per head (or one value for all heads) if it is the same for all tokens; otherwise None."""
        return None


def gate_value(logit_BHN: Float[jax.Array, "*BHN"], found_BHN: Bool[jax.Array, "B H N"]) -> Float[jax.Array, "B H N"]:
    """Returns `g` for each token, in float32; 0 for queries that found nothing."""
    return jnp.where(found_BHN, jax.nn.sigmoid(logit_BHN), 0.0)


def mix(
    gate_BHN: Float[jax.Array, "B H N"],
    remote_BHND: Float[jax.Array, "B H N D"],
    local_BHND: Float[jax.Array, "B H N D"],
) -> Float[jax.Array, "B H N D"]:
    """Returns `g * remote + (1 - g) * local`."""
    gate = gate_BHN[..., None].astype(local_BHND.dtype)
    return gate * remote_BHND + (1 - gate) * local_BHND
