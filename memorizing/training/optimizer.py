"""The optimizer: Adafactor (the paper's) or AdamW, with a warm-up and a schedule, all from optax.

It can train a part of the parameters: the others have no state here, take no gradient (`step.py`), and stay as they
are.
"""

import dataclasses
import fnmatch
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float

from memorizing.errors import InputError
from memorizing.model.learned_index import is_of_index
from memorizing.model.parameters import Parameters, by_path


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """Defaults are the paper's: Adafactor, rate 1.0 / sqrt(step) after 1,000 steps of linear warm-up.

    Attributes:
        kind: `adafactor` (updates scaled by the size of each parameter) or `adamw`.
        learning_rate: with `rsqrt` the numerator of `rate / sqrt(step)`, else the peak.
        schedule: after the warm-up: `rsqrt`, `cosine` or `linear` (to 0 at `decay_steps`), or `constant`.
        warmup_steps: updates in which the rate rises linearly from 0.
        decay_steps: updates at whose end `cosine` and `linear` reach 0, warm-up included.
        clip_norm: gradients with a larger global norm are scaled down to it; 0 for never.
        weight_decay: of AdamW, on matrices only.
        beta1, beta2: of AdamW.
        trainable: which parameters are trained; () for all. `gates` means those of the memory layers' gates, `index`
            those of their learned indices, `memory_layers` all in these layers, and anything else is a pattern of
            paths, as they are in checkpoints: `layers/8/attention/*` (layers count from 0 there, so this is layer 9),
            `*/scale_E`.
        learning_rate_multipliers: pairs of a part, named as in `trainable`, and the factor of its learning rate:
            `(('gates', 16.0),)`. Of several that name a parameter the last counts.
    """

    kind: Literal["adafactor", "adamw"] = "adafactor"
    learning_rate: float = 1.0
    schedule: Literal["rsqrt", "cosine", "linear", "constant"] = "rsqrt"
    warmup_steps: int = 1000
    decay_steps: int = 500_000
    clip_norm: float = 1.0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.98
    trainable: tuple[str, ...] = ()
    learning_rate_multipliers: tuple[tuple[str, int | float], ...] = ()

    def __post_init__(self):
        if self.learning_rate <= 0:
            raise InputError(f"Optimizer.learning_rate = {self.learning_rate}: must be above 0")
        for part, factor in self.learning_rate_multipliers:
            if not 0 < factor < math.inf:
                raise InputError(
                    f"Optimizer.learning_rate_multipliers: {factor} for {part!r} must be above 0 and finite; to leave "
                    "a part as it is, name the others in Optimizer.trainable"
                )
        for name in ("warmup_steps", "clip_norm", "weight_decay"):
            if getattr(self, name) < 0:
                raise InputError(f"Optimizer.{name} = {getattr(self, name)}: must be 0 or more")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"Optimizer.{name} = {getattr(self, name)}: must be at least 0 and below 1")
        if self.schedule in ("cosine", "linear") and self.decay_steps <= self.warmup_steps:
            raise InputError(
                f"Optimizer.decay_steps = {self.decay_steps} must exceed Optimizer.warmup_steps = "
                f"{self.warmup_steps}: lengthen the run or shorten the warm-up"
            )


def learning_rate(settings: OptimizerSettings) -> optax.Schedule:
    """The rate as a function of the number of updates done."""
    peak, warmup = settings.learning_rate, settings.warmup_steps
    if settings.schedule == "rsqrt":
        peak = peak * max(warmup, 1) ** -0.5
        after = lambda count: settings.learning_rate * jax.lax.rsqrt(jnp.asarray(count + max(warmup, 1), jnp.float32))  # noqa: E731
    elif settings.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, settings.decay_steps - warmup)
    elif settings.schedule == "linear":
        after = optax.linear_schedule(peak, 0.0, settings.decay_steps - warmup)
    else:
        after = optax.constant_schedule(peak)
    # The first update has count 0: a rise from 0 would waste it.
    rise = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, after], [warmup]) if warmup else after


type TrainableMask = dict[str, Any]
"""Nested like the parameters: whether each is trained."""


NAMED = {"gates": "attention/gate*", "index": "attention/index_*", "memory_layers": "*"}
"""Parts of each memory layer that a setting may name, as patterns of paths within it."""


def trainable_mask(
    settings: OptimizerSettings, parameters: Parameters, memory_layers: Sequence[int]
) -> TrainableMask | None:
    """Which of the parameters are trained; None for all. Only their names count, so these may be shapes.

    Raises:
        InputError: for a pattern that none of them matches.
    """
    if not settings.trainable:
        return None
    given = f"Optimizer.trainable = {settings.trainable}"
    chosen = {path for part in settings.trainable for path in _paths(part, parameters, memory_layers, given)}
    return jax.tree.unflatten(jax.tree.structure(parameters), [path in chosen for path in by_path(parameters)])


def learning_rate_multipliers(
    settings: OptimizerSettings, parameters: Parameters, memory_layers: Sequence[int], only: TrainableMask | None = None
) -> dict[str, float]:
    """By what the updates of a parameter are multiplied, by its path; of those that are left as they are, nothing.

    `only` is what `trainable_mask` makes of the same settings.

    Raises:
        InputError: for a pattern that no parameter matches, or none that is trained.
    """
    given = f"Optimizer.learning_rate_multipliers = {settings.learning_rate_multipliers}"
    fixed = {path for path, is_trained in by_path(only).items() if not is_trained} if only is not None else set()
    found: dict[str, float] = {}
    for part, factor in settings.learning_rate_multipliers:
        paths = _paths(part, parameters, memory_layers, given) - fixed
        if not paths:
            raise InputError(f"{given}: nothing of {part!r} is trained, by Optimizer.trainable = {settings.trainable}")
        found |= dict.fromkeys(paths, factor)
    return found


def _paths(part: str, parameters: Parameters, memory_layers: Sequence[int], given: str) -> set[str]:
    """Of the parameters that a setting names."""
    patterns = [part]
    if part in NAMED:
        patterns = [f"layers/{number - 1}/{NAMED[part]}" for number in memory_layers]
    found = {path for path in by_path(parameters) for pattern in patterns if fnmatch.fnmatchcase(path, pattern)}
    if not found:
        some = ", ".join(list(by_path(parameters))[:3])
        raise InputError(
            f"{given}: {part!r} matches no parameter. Paths are such as {some}; `gates`, `index` and `memory_layers` "
            "need Model.memory_layers, `gates` also a Model.gate that learns ('head', 'layer' or 'token'), `index` "
            "Model.index_size"
        )
    return found


def make_optimizer(
    settings: OptimizerSettings, only: TrainableMask | None = None, factors: Mapping[str, float] | None = None
) -> optax.GradientTransformation:
    """Clipping, then the optimizer with its schedule; of `only` the parameters that are trained, if not of all.

    `factors` are `learning_rate_multipliers`: they multiply what is added to a parameter, weight decay included.
    """
    rate = learning_rate(settings)
    if settings.kind == "adafactor":
        chosen = optax.adafactor(rate)
    else:
        chosen = optax.adamw(rate, settings.beta1, settings.beta2, weight_decay=settings.weight_decay, mask=_decays)
    clip = _clip(settings.clip_norm) if settings.clip_norm else optax.identity()
    scale = optax.stateless(functools.partial(_scaled, factors)) if factors else optax.identity()
    whole = optax.chain(clip, chosen, scale)
    return whole if only is None else optax.masked(whole, only)


def _scaled(factors: Mapping[str, float], updates: Any, parameters: Any) -> Any:
    scaled = [update * factors.get(path, 1.0) for path, update in by_path(updates).items()]
    return jax.tree.unflatten(jax.tree.structure(updates), scaled)


def _clip(norm: float) -> optax.GradientTransformation:
    """`optax.clip_by_global_norm` by the norm of the model's gradient."""

    def clipped(gradient: Any, parameters: Any) -> Any:
        own = model_norm(gradient)
        return jax.tree.map(lambda leaf: jnp.where(own < norm, leaf, leaf / own.astype(leaf.dtype) * norm), gradient)

    return optax.stateless(clipped)


def model_norm(gradient: Parameters) -> Float[jax.Array, ""]:
    """Of the gradient of the model's loss: without that of a learned index, which has a loss of its own."""
    kept = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(gradient) if not is_of_index(path)]
    return optax.tree.norm(kept)


def _decays(tree: Any) -> Any:
    """Of each parameter whether weight decay pulls at it: at matrices, not at scales and biases (`query_bias_HD`)."""

    def is_weight(path: tuple, leaf: jax.Array) -> bool:
        return leaf.ndim > 1 and "_bias_" not in jax.tree_util.keystr(path[-1:], simple=True)

    return jax.tree_util.tree_map_with_path(is_weight, tree)
