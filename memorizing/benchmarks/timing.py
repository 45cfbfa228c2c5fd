"""Times of compiled programs that take turns, and the device memory that they need.

round 0      a b c        each program was compiled and run once before
round 1      c b a        the order reverses, so that a slow period of the machine affects all programs alike
...                       the median over rounds is reported, with half the interquartile range as its spread
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

LEAST_SECONDS = 0.02
"""Shortest measurement. Faster programs are called several times in a row."""
_MOST_CALLS = 200


class Timing(NamedTuple):
    """Seconds of one call of a program.

    Attributes:
        median: median over rounds.
        spread: half the interquartile range, divided by the median.
        seconds: seconds of each round.
    """

    median: float
    spread: float
    seconds: list[float]


def timing(seconds: list[float]) -> Timing:
    """Summarizes rounds."""
    median = statistics.median(seconds)
    if len(seconds) < 2:
        return Timing(median, 0.0, seconds)
    first, _, third = statistics.quantiles(seconds, n=4, method="inclusive")
    return Timing(median, (third - first) / 2 / median, seconds)


def in_turn[Name](functions: Mapping[Name, Callable[[], float]], rounds: int) -> dict[Name, Timing]:
    """Calls functions in turn. Each measures itself and returns the seconds of one call."""
    seconds: dict[Name, list[float]] = {name: [] for name in functions}
    for number in range(rounds):
        for name in functions if number % 2 == 0 else reversed(list(functions)):
            seconds[name].append(functions[name]())
    return {name: timing(values) for name, values in seconds.items()}


def stopwatch(run: Callable[[], Any]) -> Callable[[], float]:
    """Returns a function that measures one call of `run` in seconds, waiting for its results; runs it twice first."""
    jax.block_until_ready(run())
    start = time.perf_counter()
    jax.block_until_ready(run())
    calls = min(max(math.ceil(LEAST_SECONDS / max(time.perf_counter() - start, 1e-9)), 1), _MOST_CALLS)

    def measure() -> float:
        start = time.perf_counter()
        for _ in range(calls - 1):
            run()
        jax.block_until_ready(run())
        return (time.perf_counter() - start) / calls

    return measure


def program_bytes(compiled: jax.stages.Compiled) -> int | None:
    """Returns the peak bytes of a program by the compiler's analysis: arguments, results and temporaries."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return None
    held = analysis.argument_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return int(held + analysis.temp_size_in_bytes)


def peak_bytes(device: jax.Device) -> int | None:
    """Returns the most bytes that this process has held on the device; None on devices that do not count them."""
    stats = device.memory_stats()
    return None if not stats else stats.get("peak_bytes_in_use")


def bytes_in_use(device: jax.Device) -> int:
    """Returns the bytes that this process holds on the device now; 0 on devices that do not count them."""
    return (device.memory_stats() or {}).get("bytes_in_use", 0)


def is_out_of_memory(error: BaseException) -> bool:
    """Tells whether the device ran out of memory."""
    return isinstance(error, jax.errors.JaxRuntimeError) and any(
        words in str(error) for words in ("RESOURCE_EXHAUSTED", "Out of memory", "out of memory")
    )
