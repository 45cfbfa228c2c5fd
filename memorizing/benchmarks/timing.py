"""Times of compiled programs that take turns, and the memory that they need.

round 0      a b c        each is compiled, and has run once, before
round 1      c b a        the order turns, so that what slows the machine down for a while slows all alike
...                       of each the median over rounds, and half the range of the middle half as its spread
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

LEAST_SECONDS = 0.02
"""A shorter program is called so many times in a row that a measurement takes this long."""
_MOST_CALLS = 200


class Timing(NamedTuple):
    """Seconds of one call.

    Attributes:
        median: over rounds.
        spread: half of the distance from the first to the third quartile, as a share of the median.
        seconds: of each round.
    """

    median: float
    spread: float
    seconds: list[float]


def timing(seconds: list[float]) -> Timing:
    """The summary of some rounds."""
    median = statistics.median(seconds)
    if len(seconds) < 2:
        return Timing(median, 0.0, seconds)
    first, _, third = statistics.quantiles(seconds, n=4, method="inclusive")
    return Timing(median, (third - first) / 2 / median, seconds)


def in_turn(contestants: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, Timing]:
    """Timings of functions that each measure themselves: they return the seconds of one call."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds):
        for name in contestants if number % 2 == 0 else reversed(list(contestants)):
            seconds[name].append(contestants[name]())
    return {name: timing(of_one) for name, of_one in seconds.items()}


def stopwatch(run: Callable[[], Any]) -> Callable[[], float]:
    """A function that measures `run`, which is called once before: what it returns is waited for."""
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
    """What a program holds at its peak by the compiler's account: arguments, results and temporaries."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return None
    held = analysis.argument_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return int(held + analysis.temp_size_in_bytes)


def peak_bytes(device: jax.Device) -> int | None:
    """The most that this process ever held on the device, which says it of accelerators alone."""
    stats = device.memory_stats()
    return None if not stats else stats.get("peak_bytes_in_use")


def bytes_in_use(device: jax.Device) -> int:
    """What this process holds on the device now; 0 where the device does not say."""
    return (device.memory_stats() or {}).get("bytes_in_use", 0)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it is the device's memory that did not suffice."""
    return isinstance(error, jax.errors.JaxRuntimeError) and any(
        words in str(error) for words in ("RESOURCE_EXHAUSTED", "Out of memory", "out of memory")
    )
