"""A progress bar on a terminal, or a plain line from time to time."""

import math
import sys
import time

from tqdm import tqdm


class Progress:
    """Shows loss, speed and time left: a bar on a terminal, elsewhere a line every `seconds_between_lines`."""

    def __init__(self, total: int, first: int, seconds_between_lines: float = 15.0):
        self._total, self._first, self._between = total, first, seconds_between_lines
        self._start = self._last_line = time.monotonic()
        self._bar = tqdm(total=total, initial=first, unit="step") if sys.stderr.isatty() else None

    def show(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Shows that `step` steps are done."""
        if self._bar is not None:
            self._bar.set_postfix(loss=f"{loss:.3f}", tokens_per_second=f"{tokens_per_second:,.0f}", refresh=False)
            self._bar.update(step - self._bar.n)
            return
        now = time.monotonic()
        if now - self._last_line < self._between and step < self._total:
            return
        self._last_line = now
        left = (now - self._start) / max(step - self._first, 1) * (self._total - step)
        width = int(math.log10(self._total)) + 1
        print(
            f"step {step:{width}}/{self._total}  loss {loss:.3f}  {tokens_per_second:,.0f} tokens/s  "
            f"{tqdm.format_interval(left)} left",
            flush=True,
        )

    def close(self) -> None:
        """Closes the bar."""
        if self._bar is not None:
            self._bar.close()
