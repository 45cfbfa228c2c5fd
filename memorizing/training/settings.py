"""What can be set about a run."""

import dataclasses
import itertools
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
        memory_growth: pairs (from_step, slots): a small memory first, larger later (the paper's stable recipe), and
            none before the first of them. The last is `Memory.size`. With one pair it is `memory_from_step`.
        memory_dropout: share of the rows of each segment that may read only the newest part of their memory, of a
            random size (see memory_dropout.py), so that any size works later.
        init_from: folder of a run with whose parameters this one begins (see storage/init_from.py), its optimizer and
            steps anew; memory layers may be new here. Empty to draw all parameters.
        init_step: of that run's checkpoint; 0 for the newest.
        prebuilt_memory: folder of a snapshot (`memorizing memorize`) with whose memory each document begins, made with
            the parameters of `init_from`. Its keys go stale as the weights move.
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
    memory_growth: tuple[tuple[int, int], ...] = ()
    memory_dropout: float = 0.0
    init_from: str = ""
    init_step: int = 0
    prebuilt_memory: str = ""
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
        for name in ("negative_rows", "memory_from_step", "init_step", "checkpoint_kept_every"):
            if getattr(self, name) < 0:
                raise InputError(f"Training.{name} = {getattr(self, name)}: must be 0 or more")
        if not 0 <= self.memory_dropout <= 1:
            raise InputError(f"Training.memory_dropout = {self.memory_dropout}: must be a share, from 0 to 1")
        if self.init_step and not self.init_from:
            raise InputError(f"Training.init_step = {self.init_step} of which run? Name it with Training.init_from")
        if self.prebuilt_memory and not self.init_from:
            raise InputError(
                f"Training.prebuilt_memory = {self.prebuilt_memory!r} means something only to the parameters that made "
                "it: begin with these, by Training.init_from"
            )
        self._check_growth()

    def _check_growth(self) -> None:
        growth = self.memory_growth
        if growth and self.memory_from_step:
            raise InputError(
                f"Training.memory_growth = {growth} says already from which step there is a memory: leave "
                f"Training.memory_from_step = {self.memory_from_step} at 0, and begin the growth there"
            )
        rises = all(a < b and few < many for (a, few), (b, many) in itertools.pairwise(growth))
        if growth and (not rises or growth[0][0] < 0 or growth[0][1] < 1):
            raise InputError(
                f"Training.memory_growth = {growth}: must be pairs (from_step, slots) of which both rise, such as "
                "((0, 512), (1000, 8192))"
            )
