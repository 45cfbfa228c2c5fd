"""A learned gate that depends on the token's query."""

import jax.numpy as jnp
from flax import nnx

from memorizing.model.gates.contract import Gate


class TokenGate(Gate):
    """Gate with logit `q . w_H + b_H`. It starts as the `head` gate, with `w_H` = 0."""

    def __init__(self, heads: int, head_size: int, bias: float):
        self.bias_H = nnx.Param(jnp.full(heads, bias, jnp.float32))
        self.weight_HD = nnx.Param(jnp.zeros((heads, head_size), jnp.float32))

    def logit(self, query_BHND, local, remote):
        query, weight = query_BHND.astype(jnp.float32), self.weight_HD[...].astype(jnp.float32)
        return jnp.einsum("BHND,HD->BHN", query, weight) + self.bias_H[...][:, None]
