"""How large the memory is at each step: none at first, or a small one, and later a larger one.

Training.memory_from_step = 800                           0 ... 800 none, then Memory.size
Training.memory_growth = ((0, 512), (800, 2048))          0 ... 800 of 512, then of 2048, which is Memory.size
"""

from typing import NamedTuple

from memorizing.errors import InputError
from memorizing.memory.settings import MemorySettings
from memorizing.training.settings import TrainingSettings


class MemorySchedule(NamedTuple):
    """Sizes by the steps from which they hold, in rising order; before the first there is no memory."""

    sizes: tuple[tuple[int, int], ...]

    def at(self, step: int) -> int:
        """How many slots the segment has that is read behind `step` others; 0 for no memory."""
        return max((slots for first, slots in self.sizes if first <= step), default=0)

    def after(self, step: int) -> int:
        """How many slots a state has at the end of `step`: those of the last segment that was read."""
        return self.at(max(step - 1, 0))


def memory_schedule(memory: MemorySettings, training: TrainingSettings) -> MemorySchedule:
    """What the settings say.

    Raises:
        InputError: when the memory does not grow to `Memory.size`.
    """
    if not memory.size:
        return MemorySchedule(())
    if not training.memory_growth:
        return MemorySchedule(((training.memory_from_step, memory.size),))
    if training.memory_growth[-1][1] != memory.size:
        raise InputError(
            f"Training.memory_growth = {training.memory_growth} ends with {training.memory_growth[-1][1]} slots, but "
            f"Memory.size = {memory.size}: let both be the same"
        )
    return MemorySchedule(training.memory_growth)
