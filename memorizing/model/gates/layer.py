"""A gate with one learned number for all heads of a layer."""

import jax
import jax.numpy as jnp
from flax import nnx

from memorizing.model.gates.contract import Gate


class LayerGate(Gate):
    """Gate with logit `b`."""

    def __init__(self, heads: int, head_size: int, bias: float):
        self.bias = nnx.Param(jnp.asarray(bias, jnp.float32))

    def logit(self, query_BHND, local, remote):
        return self.bias[...]

    def constant(self):
        return jax.nn.sigmoid(self.bias[...])
