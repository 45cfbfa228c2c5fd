"""The paper's gate: one learned number per head."""

import jax
import jax.numpy as jnp
from flax import nnx

from memorizing.model.gates.contract import Gate


class HeadGate(Gate):
    """Gate with logit `b_H`."""

    def __init__(self, heads: int, head_size: int, bias: float):
        self.bias_H = nnx.Param(jnp.full(heads, bias, jnp.float32))

    def logit(self, query_BHND, local, remote):
        return self.bias_H[...][:, None]

    def constant(self):
        return jax.nn.sigmoid(self.bias_H[...])
