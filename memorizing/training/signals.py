"""Signals that end a run: it saves first, and exits with a status that makes launchers repeat the command.

This module imports nothing heavy, so that signals are handled from the first moment.
"""

import signal
from types import FrameType
from typing import Any

RUN_ME_AGAIN = 75
"""Exit status of a run that a signal ended without loss: EX_TEMPFAIL of sysexits.h. Launchers repeat the command."""


class Interrupted(RuntimeError):
    """A signal ended the run. Its state was saved first, at `step`; None if nothing was computed.

    `what` says in other words what was saved, for commands that are not a run.
    """

    def __init__(self, number: signal.Signals, step: int | None = None, what: str = ""):
        done = what or ("nothing was computed yet" if step is None else f"saved at step {step}")
        super().__init__(f"{number.name}: {done}. The same command resumes from there")
        self.exit_status = RUN_ME_AGAIN if number == signal.SIGTERM else 128 + number


def end_at_sigterm() -> None:
    """Makes SIGTERM raise `Interrupted`, for code that has nothing to save."""
    signal.signal(signal.SIGTERM, _end)


def die_at_sigterm() -> None:
    """Makes SIGTERM end the process at once, as by default; also where JAX had caught it."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _end(number: int, frame: FrameType | None) -> None:
    raise Interrupted(signal.Signals(number))


class Signals:
    """Records SIGTERM and SIGINT instead of dying, so that the run can save first. A second SIGINT kills it.

    Attributes:
        received: the first signal; None for none.
        has_computed: whether there is something to save. Until it is set, SIGTERM ends the run at once.
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
