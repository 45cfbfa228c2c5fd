"""The train call: one compiled program that scans over the segments of a call, carrying caches and memories.

    for each of S segments:   logits, carry = model(parameters, segment, carry)
                              loss -> gradient -> update        (`accumulate`: one update after the S segments)

No gradient crosses a segment. State and carry are donated: they are updated in place.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Float, Int

from memorizing.memory.bank import Bank, mean_age, recall
from memorizing.model.carry import Carry
from memorizing.model.intermediates import Collect
from memorizing.model.parameters import Parameters
from memorizing.model.transformer import apply_and_collect, constant_gates
from memorizing.parallel.mesh import PARAMETER_RULES, RULES, constrain_tree, everywhere, shardings
from memorizing.shapes import Array, Batch
from memorizing.storage.train_state import TrainState
from memorizing.training.loss import score
from memorizing.training.memory_dropout import unlimited
from memorizing.training.optimizer import TrainableMask, model_norm


def state_shardings(mesh: Mesh, state: TrainState) -> TrainState:
    """Returns the sharding of each part of a state."""
    learned = shardings(mesh, (state.parameters, state.optimizer), PARAMETER_RULES)
    return TrainState(*learned, *shardings(mesh, (state.step, state.carry), RULES))


def _constrained(state: TrainState) -> TrainState:
    """Returns the state with these shardings as constraints for the compiler."""
    learned = constrain_tree((state.parameters, state.optimizer), PARAMETER_RULES)
    return TrainState(*learned, *constrain_tree((state.step, state.carry)))


class GateStats(NamedTuple):
    """Sums of a layer's gate over the tokens that found something in memory, and the number of these tokens."""

    gate_value_H: Float[jax.Array, "*S H"]
    tokens_H: Int[jax.Array, "*S H"]


class SegmentMetrics(NamedTuple):
    """Metrics of each segment: sums over the real tokens of all rows.

    Attributes:
        nats: sum of the loss.
        correct: number of tokens that the model's first choice predicts.
        tokens: number of tokens.
        gradient_norm: norm of the mean gradient.
        gate_stats: by memory layer (its number); empty where gates are the same for every token.
    """

    nats: Float[jax.Array, "*S"]
    correct: Int[jax.Array, "*S"]
    tokens: Int[jax.Array, "*S"]
    gradient_norm: Float[jax.Array, "*S"]
    gate_stats: dict[int, GateStats]


class CallMetrics(NamedTuple):
    """Metrics of a call: those of its segments, and those of the state at its end.

    Attributes:
        segments: with a leading axis `S`.
        parameter_norm: norm of all parameters after the last update; infinite if they overflowed although the loss did
            not.
        gates: learned gate of each head, or one for all heads, by memory layer (its number); empty where the gate
            depends on the token.
        gate_values: mean gate per memory layer and head over the call's tokens that found something in memory, where
            the gate depends on the token; NaN if no token did.
        memory_fill: share of slots that are valid, over all rows; 0 without memory.
        recall: share of the true neighbors that the searches found, by layer that has a bank, over all rows and heads;
            NaN if there were none. Only with `Memory.report_recall`.
        ages: mean age of the retrieved keys, in updates since they were computed, by layer. As `recall`.
    """

    segments: SegmentMetrics
    parameter_norm: Float[jax.Array, ""]
    gates: dict[int, Float[jax.Array, "*H"]]
    gate_values: dict[int, Float[jax.Array, "H"]]
    memory_fill: Float[jax.Array, ""]
    recall: dict[int, Float[jax.Array, ""]]
    ages: dict[int, Float[jax.Array, ""]]


class StepOptions(NamedTuple):
    """Options of a train call.

    Attributes:
        accumulate: whether the gradient of all segments of a call makes one update (gradient accumulation). Each
            segment is then read with the same parameters.
        dropout_seed: random seed of dropout; None for no dropout.
        negative_rows: number of other rows whose memories are searched too, see `attend_to_memory`.
    """

    accumulate: bool = False
    dropout_seed: int | None = None
    negative_rows: int = 0


type Banks = tuple[Bank, ...]
type TrainCall = Callable[[TrainState, Batch, Banks], tuple[TrainState, CallMetrics]]
"""Maps state, batches and the prebuilt memory of new documents (may be empty) to state and metrics."""
type Begin = Callable[[Carry, Batch, jax.Array, Banks], tuple[Carry, Batch]]
"""Maps carry, segment, step and prebuilt memory to the carry and segment that the model reads."""


def make_train_call(
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    options: StepOptions = StepOptions(),  # noqa: B008
    trainable: TrainableMask | None = None,
    begin: Begin = lambda carry, batch, step, prebuilt: (carry, batch),
    compiler_options: dict[str, bool] | None = None,
) -> TrainCall:
    """Returns the jitted function from a state and the batch of `S` segments to the next state and metrics.

    Parameters that are not `trainable` get no gradient, and nothing is computed for one. `begin` prepares what a
    segment reads. `compiler_options` are XLA's.
    """
    step = _Step(graph, optimizer, options, trainable, begin)
    return jax.jit(step.call, donate_argnums=0, compiler_options=compiler_options)


class _Step:
    """The functions that a train call traces, with what they share."""

    def __init__(
        self,
        graph: nnx.GraphDef,
        optimizer: optax.GradientTransformation,
        options: StepOptions,
        trainable: TrainableMask | None,
        begin: Begin,
    ):
        self._graph, self._optimizer, self._options = graph, optimizer, options
        self._trainable, self._begin = trainable, begin
        self._gradient_of = jax.value_and_grad(self._segment_loss, has_aux=True)

    def call(self, state: TrainState, batches: Batch, prebuilt: Banks = ()) -> tuple[TrainState, CallMetrics]:
        """Reads the segments in order."""
        banks_before = state.carry.banks
        if self._options.accumulate:
            zeros = jax.tree.map(jnp.zeros_like, state.parameters)
            read = functools.partial(self._read_and_accumulate, prebuilt)
            (state, gradient), metrics = lax.scan(read, (state, zeros), batches)
            state, norm = self._update(state, gradient, metrics.tokens.sum())
            metrics = metrics._replace(gradient_norm=jnp.full_like(metrics.gradient_norm, norm))
        else:
            state, metrics = lax.scan(functools.partial(self._read_and_update, prebuilt), state, batches)
        return state, everywhere(self._call_metrics(state, metrics, banks_before))

    def _call_metrics(self, state: TrainState, metrics: SegmentMetrics, banks_before: Banks) -> CallMetrics:
        layers = nnx.merge(self._graph, state.parameters).settings.bank_layers if banks_before else ()
        pairs = zip(banks_before, state.carry.banks, strict=True)
        counted = [(recall(before, after), mean_age(before, after)) for before, after in pairs]
        recalls = {layer: share for layer, (share, _) in zip(layers, counted, strict=True) if share is not None}
        # One update per segment; or one for all segments of a call: the first segment sees the newest keys at age 1,
        # the others at age 0, and the mean over them is the age in segments divided by their number.
        updates = metrics.tokens.shape[0] if self._options.accumulate else 1
        ages = {layer: age / updates for layer, (_, age) in zip(layers, counted, strict=True) if age is not None}
        stats = jax.tree.map(lambda leaf: leaf.sum(0), metrics.gate_stats)
        return CallMetrics(
            metrics._replace(gate_stats={}),
            optax.tree.norm(state.parameters),
            constant_gates(self._graph, state.parameters),
            {layer: each.gate_value_H / each.tokens_H for layer, each in stats.items()},
            _memory_fill(state.carry),
            recalls,
            ages,
        )

    def _read_and_update(self, prebuilt: Banks, state: TrainState, batch: Batch) -> tuple[TrainState, SegmentMetrics]:
        state, gradient, metrics = self._read(state, batch, prebuilt)
        state, norm = self._update(state, gradient, metrics.tokens)
        return state, metrics._replace(gradient_norm=norm)

    def _read_and_accumulate(self, prebuilt: Banks, carried: tuple[TrainState, Parameters], batch: Batch):
        state, total = carried
        state, gradient, metrics = self._read(state, batch, prebuilt)
        return (state, jax.tree.map(jnp.add, total, gradient)), metrics

    def _read(self, state: TrainState, batch: Batch, prebuilt: Banks) -> tuple[TrainState, Parameters, SegmentMetrics]:
        """Reads a segment; returns the state after it, the gradient of the summed loss, and metrics."""
        carry, batch = self._begin(state.carry, batch, state.step, prebuilt)
        (nats, (correct, carry, stats)), gradient = self._gradient_of(state.parameters, batch, carry, state.step)
        gradient = constrain_tree(gradient, PARAMETER_RULES)
        metrics = SegmentMetrics(nats, correct, batch.mask_BN.sum(), jnp.zeros(()), stats)
        return _constrained(state._replace(step=state.step + 1, carry=unlimited(carry))), gradient, metrics

    def _segment_loss(self, parameters: Parameters, batch: Batch, carry: Carry, step: jax.Array):
        seed = self._options.dropout_seed
        rng = None if seed is None else jax.random.fold_in(jax.random.key(seed), step)
        logits_BNV, carry, intermediates = apply_and_collect(
            self._graph, self._frozen(parameters), batch, carry, Collect(gates=True), rng, self._options.negative_rows
        )
        predictions, constant = score(logits_BNV, batch), constant_gates(self._graph, parameters)
        stats = {
            layer: _gate_stats(values.gate_BHN, batch.mask_BN)
            for layer, values in intermediates.items()
            if layer not in constant and values.gate_BHN is not None
        }
        return predictions.nats_BN.sum(), (predictions.correct_BN.sum(), *lax.stop_gradient((carry, stats)))

    def _frozen(self, parameters: Parameters) -> Parameters:
        """Returns the parameters, without a gradient for those that are not trainable."""
        if self._trainable is None:
            return parameters
        frozen = lambda leaf, trains: leaf if trains else lax.stop_gradient(leaf)  # noqa: E731
        return jax.tree.map(frozen, parameters, self._trainable)

    def _update(self, state: TrainState, gradient: Parameters, tokens: jax.Array) -> tuple[TrainState, jax.Array]:
        """Updates the parameters with the mean gradient over `tokens`; returns its norm as well."""
        gradient = jax.tree.map(lambda leaf: leaf / jnp.maximum(tokens, 1), gradient)
        updates, optimizer_state = self._optimizer.update(gradient, state.optimizer, state.parameters)
        parameters = self._updated(state.parameters, updates)
        return _constrained(state._replace(parameters=parameters, optimizer=optimizer_state)), model_norm(gradient)

    def _updated(self, parameters: Parameters, updates: Any) -> Parameters:
        if self._trainable is None:
            return jax.tree.map(jnp.add, parameters, updates)
        add = lambda leaf, update, trains: leaf + update if trains else leaf  # noqa: E731
        return jax.tree.map(add, parameters, updates, self._trainable)


def _memory_fill(carry: Carry) -> jax.Array:
    if not carry.banks:
        return jnp.zeros(())
    # Banks differ if each leaves out tokens that are like one that it holds.
    return jnp.stack([bank.length_B.mean() / bank.keys_BHMD.shape[2] for bank in carry.banks]).mean()


def _gate_stats(gate_BHN: jax.Array, mask_BN: Array) -> GateStats:
    gate_BHN = jnp.where(mask_BN[:, None], gate_BHN, 0.0)  # the gate is 0 for tokens that found nothing
    return GateStats(gate_BHN.sum((0, 2)), (gate_BHN > 0).sum((0, 2)))
