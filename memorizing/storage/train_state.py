"""The state of a training run, which checkpoints save."""

from typing import NamedTuple

import jax
import optax
from jaxtyping import Int

from memorizing.model.carry import Carry
from memorizing.model.parameters import Parameters


class TrainState(NamedTuple):
    """Everything that a checkpoint saves and a resumed run restores.

    Attributes:
        parameters: parameters of the model.
        optimizer: optax's state.
        step: number of segments that each row has read.
        carry: XL caches and memory banks of the rows.
    """

    parameters: Parameters
    optimizer: optax.OptState
    step: Int[jax.Array, ""]
    carry: Carry
