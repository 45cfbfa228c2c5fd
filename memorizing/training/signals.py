"""Being told to end: saving first, and an exit status by which launchers know to repeat the command.

This module loads nothing heavy, so that a signal is heeded from the first moment on.
"""

import signal
from types import FrameType
from typing import Any

RUN_ME_AGAIN = 75
"""The exit status of a run that was told to end and lost nothing: EX_TEMPFAIL of sysexits.h. Launchers repeat it."""


class Interrupted(RuntimeError):
    """A signal asked the run to end. What it had computed was saved first, at `step`; None if that was nothing.

    `what` tells in other words what is kept, where that is no run.
    """

    def __init__(self, number: signal.Signals, step: int | None = None, what: str = ""):
        done = what or ("nothing was computed yet" if step is None else f"saved at step {step}")
        super().__init__(f"{number.name}: {done}; the same command goes on from there")
        self.exit_status = RUN_ME_AGAIN if number == signal.SIGTERM else 128 + number


def end_at_sigterm() -> None:
    """From here on SIGTERM raises `Interrupted`, where nothing has to be saved."""
    signal.signal(signal.SIGTERM, _end)


def die_at_sigterm() -> None:
    """From here on SIGTERM ends the process at once, as where nobody minds it; also where JAX noted it instead."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _end(number: int, frame: FrameType | None) -> None:
    raise Interrupted(signal.Signals(number))


class Signals:
    """Notes SIGTERM and SIGINT instead of dying of them, so that the run can save first; a second SIGINT kills.

    Attributes:
        received: the first of them.
        has_computed: until that is set, to end is to lose nothing, so SIGTERM ends the run where it is.
    """

    def __init__(self, numbers: tuple[signal.Signals, ...] = (signal.SIGTERM, signal.SIGINT)):
        self.received: signal.Signals | None = None
        self.has_computed = False
        self._numbers = numbers

    def __enter__(self) -> "Signals":
        self._before: dict[int, Any] = {int(number): signal.signal(number, self._note) for number in self._numbers}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM and not self.has_computed:
            _end(number, frame)
        if number == signal.SIGINT:
            signal.signal(number, self._before[number])
        self.received = self.received or signal.Signals(number)

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
