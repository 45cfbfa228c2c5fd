"""The memory's size at each step: no memory or a small one at first, a larger one later.

Training.memory_from_step = 800                           no memory for steps 0 ... 799, then Memory.size slots
Training.memory_growth = ((0, 512), (800, 2048))          512 slots for steps 0 ... 799, then 2048 (Memory.size)
"""

from typing import NamedTuple

from memorizing.errors import InputError


class MemorySchedule(NamedTuple):
    """Pairs (first step, slots) in rising order. There is no memory before the first of them."""

    sizes: tuple[tuple[int, int], ...]

    def at(self, step: int) -> int:
        """Returns the number of memory slots at a step (counted from 0); 0 means no memory."""
        return max((slots for first, slots in self.sizes if first <= step), default=0)

    def after(self, step: int) -> int:
        """Returns the slots that the state has at the end of `step` steps: those of the last segment that was read."""
        return self.at(max(step - 1, 0))


def memory_schedule(size: int, from_step: int, growth: tuple[tuple[int, int], ...]) -> MemorySchedule:
    """Builds the schedule of `Memory.size`, `Training.memory_from_step` and `Training.memory_growth`.

    Raises:
        InputError: if the memory does not grow to `Memory.size`.
    """
    if not size:
        return MemorySchedule(())
    if not growth:
        return MemorySchedule(((from_step, size),))
    if growth[-1][1] != size:
        raise InputError(
            f"Training.memory_growth = {growth} ends with {growth[-1][1]} slots, but Memory.size = {size}. The last "
            "size of the growth is Memory.size. Set both to the same number"
        )
    return MemorySchedule(growth)
