"""The parts around attention: norms, feed-forward, embedding.

By default those of T5: RMSNorm, no biases, ReLU, one table. The others are what pretrained models have.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Int

from memorizing.model.settings import ModelSettings
from memorizing.parallel.mesh import constrain
from memorizing.shapes import Array


def normal_parameter(rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int) -> nnx.Param:
    """A float32 parameter drawn with variance `1 / fan_in`."""
    return nnx.Param(jax.random.normal(rngs.params(), shape, jnp.float32) * fan_in**-0.5)


class RMSNorm(nnx.Module):
    """Divides by the root mean square and multiplies by a learned scale; no mean, no bias. Computed in float32."""

    def __init__(self, size: int, epsilon: float = 1e-6):
        self.epsilon = epsilon
        self.scale_E = nnx.Param(jnp.ones(size, jnp.float32))

    def __call__(self, x_E: Float[jax.Array, "*any E"]) -> Float[jax.Array, "*any E"]:
        x = x_E.astype(jnp.float32)
        mean_square = jnp.mean(x * x, axis=-1, keepdims=True)
        return (x * jax.lax.rsqrt(mean_square + self.epsilon) * self.scale_E[...]).astype(x_E.dtype)


class LayerNorm(nnx.Module):
    """Subtracts the mean, divides by the standard deviation, then a learned scale and bias. Computed in float32."""

    def __init__(self, size: int, epsilon: float):
        self.epsilon = epsilon
        self.scale_E = nnx.Param(jnp.ones(size, jnp.float32))
        self.bias_E = nnx.Param(jnp.zeros(size, jnp.float32))

    def __call__(self, x_BNE: Float[jax.Array, "B N E"]) -> Float[jax.Array, "B N E"]:
        x = x_BNE.astype(jnp.float32)
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        variance = jnp.mean(x * x, axis=-1, keepdims=True)
        normal = x * jax.lax.rsqrt(variance + self.epsilon)
        return (normal * self.scale_E[...] + self.bias_E[...]).astype(x_BNE.dtype)


def make_norm(settings: ModelSettings) -> RMSNorm | LayerNorm:
    """The norm that the settings name, over the stream."""
    kind = RMSNorm if settings.norm == "rms" else LayerNorm
    return kind(settings.embedding_size, settings.norm_epsilon)


_ACTIVATIONS = {
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "swiglu": jax.nn.silu,
}


class FeedForward(nnx.Module):
    """`f(x W_in) W_out`; for `swiglu` `(f(x W_gate) * x W_in) W_out`; each product with a bias, if there are any."""

    def __init__(self, settings: ModelSettings, rngs: nnx.Rngs):
        embedding, hidden = settings.embedding_size, settings.feed_forward_size
        self.activation = settings.feed_forward
        self.is_gated, self.has_bias = settings.feed_forward == "swiglu", settings.feed_forward_bias
        self.in_EF = normal_parameter(rngs, (embedding, hidden), embedding)
        self.out_FE = normal_parameter(rngs, (hidden, embedding), hidden)
        if self.is_gated:
            self.gate_EF = normal_parameter(rngs, (embedding, hidden), embedding)
        if self.has_bias:
            self.in_bias_F = nnx.Param(jnp.zeros(hidden, jnp.float32))
            self.out_bias_E = nnx.Param(jnp.zeros(embedding, jnp.float32))
            if self.is_gated:
                self.gate_bias_F = nnx.Param(jnp.zeros(hidden, jnp.float32))

    def __call__(self, x_BNE: Float[jax.Array, "B N E"]) -> Float[jax.Array, "B N E"]:
        dtype, activation = x_BNE.dtype, _ACTIVATIONS[self.activation]
        hidden_BNF = jnp.einsum("BNE,EF->BNF", x_BNE, self.in_EF[...].astype(dtype))
        if self.has_bias:
            hidden_BNF = hidden_BNF + self.in_bias_F[...].astype(dtype)
        if self.is_gated:
            gate_BNF = jnp.einsum("BNE,EF->BNF", x_BNE, self.gate_EF[...].astype(dtype))
            if self.has_bias:
                gate_BNF = gate_BNF + self.gate_bias_F[...].astype(dtype)
            hidden_BNF = activation(gate_BNF) * hidden_BNF
        else:
            hidden_BNF = activation(hidden_BNF)
        hidden_BNF = constrain(hidden_BNF, "BNF")
        out_BNE = jnp.einsum("BNF,FE->BNE", hidden_BNF, self.out_FE[...].astype(dtype))
        if self.has_bias:
            out_BNE = out_BNE + self.out_bias_E[...].astype(dtype)
        return constrain(out_BNE, "BNE")


class Embedding(nnx.Module):
    """One table for tokens read and tokens predicted, or one for each."""

    def __init__(self, settings: ModelSettings, rngs: nnx.Rngs):
        size = settings.embedding_size
        self.scale = size**0.5 if settings.embedding_scale is None else settings.embedding_scale
        # Rows of length about 1 keep first logits near 0; reading scales them up to entries of size about 1.
        self.table_VE = normal_parameter(rngs, (settings.vocabulary_size, size), size)
        self.is_tied = settings.tie_embeddings
        if not self.is_tied:
            self.predicted_VE = normal_parameter(rngs, (settings.vocabulary_size, size), size)

    def read(self, tokens_BN: Int[Array, "B N"], dtype: jnp.dtype) -> Float[jax.Array, "B N E"]:
        return constrain(_gathered(self.table_VE, dtype)[tokens_BN] * self.scale, "BNE")

    def logits(self, x_BNE: Float[jax.Array, "B N E"]) -> Float[jax.Array, "B N V"]:
        """Scores of each token of the vocabulary, in float32."""
        table_VE = _gathered(self.table_VE if self.is_tied else self.predicted_VE, x_BNE.dtype)
        return constrain(jnp.einsum("BNE,VE->BNV", x_BNE, table_VE, preferred_element_type=jnp.float32), "BNV")


def _gathered(table_VE: nnx.Param, dtype: jnp.dtype) -> Float[jax.Array, "V E"]:
    """Gathered along `E` once for all uses: rows that are looked up cannot be split both ways."""
    return constrain(table_VE[...].astype(dtype), "VE")
