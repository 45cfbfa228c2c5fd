"""What can be set about a run."""

import dataclasses
from typing import Literal

from memorizing.errors import InputError


@dataclasses.dataclass(frozen=True)
class TrainingSettings:
    """A run. A step is one segment of every row.

    Attributes:
        steps: to train for.
        seed: of parameters and dropout.
        update: parameters change after each `segment` (the paper), or once after each `call`, gradients added up.
        negative_rows: from the memories of how many other rows each row's queries also retrieve, in one softmax with
            their own: contrastive training over documents (Focused Transformer). Each costs a search more.
        memory_from_step: until then the memory is neither read nor written: cheaper steps, while keys mean little yet.
        checkpoint_every: steps between checkpoints; the last step is always saved.
        checkpoints_kept: the newest that stay.
        checkpoint_kept_every: those at multiples of so many steps stay too; 0 for none.
        data: folder of prepared tokens.
    """

    steps: int = 500_000
    seed: int = 0
    update: Literal["segment", "call"] = "segment"
    negative_rows: int = 0
    memory_from_step: int = 0
    checkpoint_every: int = 1000
    checkpoints_kept: int = 2
    checkpoint_kept_every: int = 0
    data: str = ""

    def __post_init__(self):
        for name in ("steps", "checkpoint_every", "checkpoints_kept"):
            if getattr(self, name) < 1:
                raise InputError(f"Training.{name} = {getattr(self, name)}: must be at least 1")
        if self.seed < 0:
            raise InputError(f"Training.seed = {self.seed}: must be 0 or more")
        for name in ("negative_rows", "memory_from_step", "checkpoint_kept_every"):
            if getattr(self, name) < 0:
                raise InputError(f"Training.{name} = {getattr(self, name)}: must be 0 or more")
