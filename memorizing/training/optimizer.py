"""The optimizer: gradient clipping, then Adafactor (the paper's) or AdamW with a learning-rate schedule, by optax.

It can train a part of the parameters. The others have no optimizer state, get no gradient (`step.py`), and stay as they
are. To add an optimizer, write its function and add a line to `OPTIMIZERS`.
"""

import dataclasses
import fnmatch
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float

from memorizing.errors import InputError
from memorizing.model.learned_index import is_of_index
from memorizing.model.parameters import Parameters, by_path
from memorizing.training.learning_rate import SCHEDULES, LearningRates, warmed_up


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """Settings of the optimizer. Defaults are the paper's: Adafactor at 1.0 / sqrt(step) after 1,000 warm-up steps.

    Attributes:
        kind: the optimizer: `adafactor` (updates scaled by the size of each parameter) or `adamw`.
        learning_rate: with `rsqrt` the numerator of `learning_rate / sqrt(step)`, else the peak.
        schedule: learning-rate schedule after the warm-up: `rsqrt`, `cosine` or `linear` (to 0 at `decay_steps`), or
            `constant`.
        warmup_steps: updates in which the learning rate rises linearly from 0.
        decay_steps: updates after which `cosine` and `linear` reach 0, warm-up included.
        clip_norm: largest global norm of a gradient; a larger gradient is scaled down to it. 0 turns clipping off.
        weight_decay: weight decay of AdamW, on matrices only.
        beta1: decay rate of AdamW's first moment (the mean of gradients).
        beta2: decay rate of AdamW's second moment (the mean of their squares).
        trainable: parts of the parameters to train; () for all. `gates` names the gates of the memory layers, `index`
            their learned indices, `memory_layers` all parameters of these layers. Anything else is a pattern of
            parameter paths, as in checkpoints: `layers/8/attention/*` (paths count layers from 0, so this is layer 9),
            `*/scale_E`.
        learning_rate_multipliers: pairs (part, factor of its learning rate), parts as in `trainable`:
            `(('gates', 16.0),)`. If several match a parameter, the last one counts.
    """

    kind: str = "adafactor"
    learning_rate: float = 1.0
    schedule: str = "rsqrt"
    warmup_steps: int = 1000
    decay_steps: int = 500_000
    clip_norm: float = 1.0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.98
    trainable: tuple[str, ...] = ()
    learning_rate_multipliers: tuple[tuple[str, int | float], ...] = ()

    def __post_init__(self):
        for name, table in (("kind", OPTIMIZERS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in table:
                raise InputError(f"Optimizer.{name} = {getattr(self, name)!r}: must be one of {', '.join(table)}")
        if self.learning_rate <= 0:
            raise InputError(f"Optimizer.learning_rate = {self.learning_rate}: must be above 0")
        for part, factor in self.learning_rate_multipliers:
            if not 0 < factor < math.inf:
                raise InputError(
                    f"Optimizer.learning_rate_multipliers: {factor} for {part!r} must be above 0 and finite. To freeze "
                    "a part, name the others in Optimizer.trainable"
                )
        for name in ("warmup_steps", "clip_norm", "weight_decay"):
            if getattr(self, name) < 0:
                raise InputError(f"Optimizer.{name} = {getattr(self, name)}: must be 0 or more")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"Optimizer.{name} = {getattr(self, name)}: must be at least 0 and below 1")
        if SCHEDULES[self.schedule].decays and self.decay_steps <= self.warmup_steps:
            raise InputError(
                f"Optimizer.decay_steps = {self.decay_steps} must exceed Optimizer.warmup_steps = "
                f"{self.warmup_steps}. Lengthen the run or shorten the warm-up"
            )


def learning_rate(settings: OptimizerSettings) -> optax.Schedule:
    """Returns the learning rate as a function of the number of updates done."""
    rates = LearningRates(settings.learning_rate, settings.warmup_steps, settings.decay_steps)
    return warmed_up(settings.schedule, rates)


type TrainableMask = dict[str, Any]
"""A tree like that of the parameters: whether each is trained."""


NAMED = {"gates": "attention/gate/*", "index": "attention/index_*", "memory_layers": "*"}
"""Names of parts of the memory layers, as patterns of paths within a layer."""


def trainable_mask(
    settings: OptimizerSettings, parameters: Parameters, memory_layers: Sequence[int]
) -> TrainableMask | None:
    """Returns which parameters are trained; None for all. Only their paths matter, so abstract parameters will do.

    Raises:
        InputError: for a pattern that matches no parameter.
    """
    if not settings.trainable:
        return None
    given = f"Optimizer.trainable = {settings.trainable}"
    chosen = {path for part in settings.trainable for path in _paths(part, parameters, memory_layers, given)}
    return jax.tree.unflatten(jax.tree.structure(parameters), [path in chosen for path in by_path(parameters)])


def learning_rate_multipliers(
    settings: OptimizerSettings,
    parameters: Parameters,
    memory_layers: Sequence[int],
    trainable: TrainableMask | None = None,
) -> dict[str, float]:
    """Returns the learning-rate multipliers by parameter path; parameters with the usual rate are left out.

    `trainable` is the result of `trainable_mask` for the same settings.

    Raises:
        InputError: for a pattern that matches no parameter, or none that is trained.
    """
    given = f"Optimizer.learning_rate_multipliers = {settings.learning_rate_multipliers}"
    fixed = {path for path, is_trained in by_path(trainable).items() if not is_trained} if trainable else set()
    found: dict[str, float] = {}
    for part, factor in settings.learning_rate_multipliers:
        paths = _paths(part, parameters, memory_layers, given) - fixed
        if not paths:
            raise InputError(
                f"{given}: no parameter of {part!r} is trained. Add it to Optimizer.trainable = {settings.trainable}"
            )
        found |= dict.fromkeys(paths, factor)
    return found


def _paths(part: str, parameters: Parameters, memory_layers: Sequence[int], given: str) -> set[str]:
    """Returns the paths of the parameters that a setting names."""
    patterns = [part]
    if part in NAMED:
        patterns = [f"layers/{number - 1}/{NAMED[part]}" for number in memory_layers]
    found = {path for path in by_path(parameters) for pattern in patterns if fnmatch.fnmatchcase(path, pattern)}
    if not found:
        some = ", ".join(list(by_path(parameters))[:3])
        raise InputError(
            f"{given}: {part!r} matches no parameter. Paths look like {some}. `gates`, `index` and `memory_layers` "
            "need Model.memory_layers; `gates` also needs a Model.gate that learns ('head', 'layer' or 'token'), and "
            "`index` needs Model.index_size"
        )
    return found


def _adafactor(settings: OptimizerSettings, rate: optax.Schedule) -> optax.GradientTransformation:
    return optax.adafactor(rate)


def _adamw(settings: OptimizerSettings, rate: optax.Schedule) -> optax.GradientTransformation:
    return optax.adamw(rate, settings.beta1, settings.beta2, weight_decay=settings.weight_decay, mask=_decays)


OPTIMIZERS: dict[str, Callable[[OptimizerSettings, optax.Schedule], optax.GradientTransformation]] = {
    "adafactor": _adafactor,
    "adamw": _adamw,
}
"""The optimizers by the names that `Optimizer.kind` has for them."""


def make_optimizer(
    settings: OptimizerSettings, trainable: TrainableMask | None = None, factors: Mapping[str, float] | None = None
) -> optax.GradientTransformation:
    """Builds gradient clipping, then the optimizer with its schedule, for all parameters or the `trainable` ones.

    `factors` are the `learning_rate_multipliers`. They multiply the whole update of a parameter, weight decay included.
    """
    chosen = OPTIMIZERS[settings.kind](settings, learning_rate(settings))
    clip = _clip(settings.clip_norm) if settings.clip_norm else optax.identity()
    scale = optax.stateless(functools.partial(_scaled, factors)) if factors else optax.identity()
    whole = optax.chain(clip, chosen, scale)
    return whole if trainable is None else optax.masked(whole, trainable)


def _scaled(factors: Mapping[str, float], updates: Any, parameters: Any) -> Any:
    scaled = [update * factors.get(path, 1.0) for path, update in by_path(updates).items()]
    return jax.tree.unflatten(jax.tree.structure(updates), scaled)


def _clip(norm: float) -> optax.GradientTransformation:
    """Builds `optax.clip_by_global_norm`, but with `model_norm` as the norm."""

    def clipped(gradient: Any, parameters: Any) -> Any:
        found = model_norm(gradient)
        scaled = lambda leaf: leaf / found.astype(leaf.dtype) * norm  # noqa: E731
        return jax.tree.map(lambda leaf: jnp.where(found < norm, leaf, scaled(leaf)), gradient)

    return optax.stateless(clipped)


def model_norm(gradient: Parameters) -> Float[jax.Array, ""]:
    """Returns the norm of the loss's gradient, without the part of a learned index, which has a loss of its own."""
    leaves = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(gradient) if not is_of_index(path)]
    return optax.tree.norm(leaves)


def _decays(tree: Any) -> Any:
    """Returns which parameters weight decay applies to: matrices, but not scales and biases (`query_bias_HD`)."""

    def is_weight(path: tuple, leaf: jax.Array) -> bool:
        return leaf.ndim > 1 and "_bias_" not in jax.tree_util.keystr(path[-1:], simple=True)

    return jax.tree_util.tree_map_with_path(is_weight, tree)
