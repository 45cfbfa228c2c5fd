"""The parts around attention: RMSNorm, feed-forward, tied embedding (algorithm of T5, without biases)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Int

from memorizing.parallel.mesh import constrain
from memorizing.shapes import Array


def normal_parameter(rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int) -> nnx.Param:
    """A float32 parameter drawn with variance `1 / fan_in`."""
    return nnx.Param(jax.random.normal(rngs.params(), shape, jnp.float32) * fan_in**-0.5)


class RMSNorm(nnx.Module):
    """Divides by the root mean square and multiplies by a learned scale; no mean, no bias. Computed in float32."""

    def __init__(self, size: int):
        self.scale_E = nnx.Param(jnp.ones(size, jnp.float32))

    def __call__(self, x_BNE: Float[jax.Array, "B N E"]) -> Float[jax.Array, "B N E"]:
        x = x_BNE.astype(jnp.float32)
        mean_square = jnp.mean(x * x, axis=-1, keepdims=True)
        return (x * jax.lax.rsqrt(mean_square + 1e-6) * self.scale_E[...]).astype(x_BNE.dtype)


class FeedForward(nnx.Module):
    """`relu(x W_in) W_out`."""

    def __init__(self, embedding_size: int, hidden_size: int, rngs: nnx.Rngs):
        self.in_EF = normal_parameter(rngs, (embedding_size, hidden_size), embedding_size)
        self.out_FE = normal_parameter(rngs, (hidden_size, embedding_size), hidden_size)

    def __call__(self, x_BNE: Float[jax.Array, "B N E"]) -> Float[jax.Array, "B N E"]:
        hidden_BNF = jax.nn.relu(jnp.einsum("BNE,EF->BNF", x_BNE, self.in_EF[...].astype(x_BNE.dtype)))
        hidden_BNF = constrain(hidden_BNF, "BNF")
        return constrain(jnp.einsum("BNF,FE->BNE", hidden_BNF, self.out_FE[...].astype(x_BNE.dtype)), "BNE")


class Embedding(nnx.Module):
    """One table for tokens read and tokens predicted."""

    def __init__(self, vocabulary_size: int, embedding_size: int, rngs: nnx.Rngs):
        # Rows of length about 1 keep first logits near 0; reading scales them up to entries of size about 1.
        self.table_VE = normal_parameter(rngs, (vocabulary_size, embedding_size), embedding_size)

    def read(self, tokens_BN: Int[Array, "B N"], dtype: jnp.dtype) -> Float[jax.Array, "B N E"]:
        size = self.table_VE.shape[-1]
        return constrain(self._table_VE(dtype)[tokens_BN] * size**0.5, "BNE")

    def logits(self, x_BNE: Float[jax.Array, "B N E"]) -> Float[jax.Array, "B N V"]:
        """Scores of each token of the vocabulary, in float32."""
        table_VE = self._table_VE(x_BNE.dtype)
        return constrain(jnp.einsum("BNE,VE->BNV", x_BNE, table_VE, preferred_element_type=jnp.float32), "BNV")

    def _table_VE(self, dtype: jnp.dtype) -> Float[jax.Array, "V E"]:
        """Gathered along `E` once for both uses: rows that are looked up cannot be split both ways."""
        return constrain(self.table_VE[...].astype(dtype), "VE")
