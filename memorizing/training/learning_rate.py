"""Learning-rate schedules: a linear warm-up, then one of `SCHEDULES`.

To add one, write its function and add a line to the table.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax


class LearningRates(NamedTuple):
    """The settings that a schedule may use.

    Attributes:
        base: `Optimizer.learning_rate`.
        warmup_steps: updates of the warm-up.
        decay_steps: updates after which a schedule that decays has reached 0, warm-up included.
    """

    base: float
    warmup_steps: int
    decay_steps: int


class LearningRateSchedule(NamedTuple):
    """A learning-rate schedule.

    Attributes:
        after_warmup: returns the learning rate as a function of the number of updates since the end of the warm-up.
        peak: returns the learning rate to which the warm-up rises.
        decays: whether the schedule depends on `decay_steps`, so that a longer run needs other settings.
    """

    after_warmup: Callable[[LearningRates], optax.Schedule]
    peak: Callable[[LearningRates], float] = lambda rates: rates.base
    decays: bool = False


def _rsqrt(rates: LearningRates) -> optax.Schedule:
    start = max(rates.warmup_steps, 1)
    return lambda count: rates.base * jax.lax.rsqrt(jnp.asarray(count + start, jnp.float32))


def _cosine(rates: LearningRates) -> optax.Schedule:
    return optax.cosine_decay_schedule(rates.base, rates.decay_steps - rates.warmup_steps)


def _linear(rates: LearningRates) -> optax.Schedule:
    return optax.linear_schedule(rates.base, 0.0, rates.decay_steps - rates.warmup_steps)


def _constant(rates: LearningRates) -> optax.Schedule:
    return optax.constant_schedule(rates.base)


SCHEDULES = {
    "rsqrt": LearningRateSchedule(_rsqrt, lambda rates: rates.base * max(rates.warmup_steps, 1) ** -0.5),
    "cosine": LearningRateSchedule(_cosine, decays=True),
    "linear": LearningRateSchedule(_linear, decays=True),
    "constant": LearningRateSchedule(_constant),
}
"""The schedules by the names that `Optimizer.schedule` has for them."""


def warmed_up(name: str, rates: LearningRates) -> optax.Schedule:
    """Returns the learning rate as a function of the number of updates done, warm-up included."""
    schedule, warmup = SCHEDULES[name], rates.warmup_steps
    after = schedule.after_warmup(rates)
    if not warmup:
        return after
    peak = schedule.peak(rates)
    # The first update has count 0: a rise from 0 would waste it.
    rise = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, after], [warmup])
