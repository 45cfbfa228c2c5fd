"""The train call: scans over the segments of a chunk, carrying caches and memories; one compiled program.

    for each of S segments:   logits, carry = model(parameters, segment, carry)
                              loss -> gradient -> update             (or once after the S: `accumulate`)

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
from memorizing.model.parameters import Parameters
from memorizing.model.transformer import apply_and_tell, gates
from memorizing.parallel.mesh import PARAMETER_RULES, RULES, constrain_tree, everywhere, shardings
from memorizing.shapes import Array, Batch
from memorizing.storage.train_state import TrainState
from memorizing.training.loss import score
from memorizing.training.memory_dropout import unlimited
from memorizing.training.optimizer import TrainableMask, model_norm


def state_shardings(mesh: Mesh, state: TrainState) -> TrainState:
    """Where each part of a state belongs."""
    learned = shardings(mesh, (state.parameters, state.optimizer), PARAMETER_RULES)
    return TrainState(*learned, *shardings(mesh, (state.step, state.carry), RULES))


def _in_place(state: TrainState) -> TrainState:
    """The same for the compiler."""
    learned = constrain_tree((state.parameters, state.optimizer), PARAMETER_RULES)
    return TrainState(*learned, *constrain_tree((state.step, state.carry)))


class Opened(NamedTuple):
    """How far a layer's gate was open, summed over the tokens that found something, and how many these were."""

    openness_H: Float[jax.Array, "*S H"]
    tokens_H: Int[jax.Array, "*S H"]


class SegmentMetrics(NamedTuple):
    """What training reports of each segment. Sums are over the real tokens of all rows.

    `opened` is by the number of memory layers, and empty where gates are the same for every token.
    """

    nats: Float[jax.Array, "*S"]
    correct: Int[jax.Array, "*S"]
    tokens: Int[jax.Array, "*S"]
    gradient_norm: Float[jax.Array, "*S"]
    opened: dict[int, Opened]


class CallMetrics(NamedTuple):
    """What training reports of a call: its segments, and the memory at its end.

    Attributes:
        segments: with a leading axis `S`.
        parameter_norm: of all parameters after the last update; infinite when they are ruined though the loss was not.
        gates: per memory layer (by its number), how far each head's gate is open, or the one of all heads; empty where
            that depends on the token.
        openness: there, the mean over the call's tokens that found something, per memory layer and head; not a number
            while there are none.
        memory_fill: share of slots that are valid, over all rows; 0 without memory.
        recall: per layer that has a bank (by its number), the share of true neighbors that the searches of it found,
            over all rows and heads; not a number while there are none. Only with `Memory.report_recall`.
        ages: likewise, how many updates ago the retrieved keys were computed, on average.
    """

    segments: SegmentMetrics
    parameter_norm: Float[jax.Array, ""]
    gates: dict[int, Float[jax.Array, "*H"]]
    openness: dict[int, Float[jax.Array, "H"]]
    memory_fill: Float[jax.Array, ""]
    recall: dict[int, Float[jax.Array, ""]]
    ages: dict[int, Float[jax.Array, ""]]


type Banks = tuple[Bank, ...]
type TrainCall = Callable[[TrainState, Batch, Banks], tuple[TrainState, CallMetrics]]
"""Takes state, batches, and what is in the memory at the start of each document, if anything."""
type Begin = Callable[[Carry, Batch, jax.Array, Banks], tuple[Carry, Batch]]
"""From the carry, a segment, its step, and the prebuilt memory (or none): carry and segment as the model is to read."""


def make_train_call(
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    accumulate: bool,
    dropout_seed: int | None,
    negative_rows: int = 0,
    only: TrainableMask | None = None,
    begin: Begin = lambda carry, batch, step, prebuilt: (carry, batch),
    compiler_options: dict[str, bool] | None = None,
) -> TrainCall:
    """The compiled function from a state and the batch of `S` segments to the next state and metrics.

    With `accumulate` the gradient of all `S` segments together makes one update; each segment is read with the same
    parameters. `dropout_seed` None trains without dropout. For `negative_rows` see `attend_to_memory`. Of `only` the
    parameters that are trained, the others get no gradient, and no arithmetic goes into one. `begin` prepares what a
    segment reads. `compiler_options` are XLA's.
    """

    def frozen(parameters: Parameters) -> Parameters:
        if only is None:
            return parameters
        return jax.tree.map(lambda leaf, moves: leaf if moves else lax.stop_gradient(leaf), parameters, only)

    def moved(parameters: Parameters, changes: Any) -> Parameters:
        if only is None:
            return jax.tree.map(jnp.add, parameters, changes)
        return jax.tree.map(lambda leaf, change, moves: leaf + change if moves else leaf, parameters, changes, only)

    def segment_loss(parameters: Parameters, batch: Batch, carry: Carry, step: jax.Array):
        rng = None if dropout_seed is None else jax.random.fold_in(jax.random.key(dropout_seed), step)
        logits_BNV, carry, told = apply_and_tell(
            graph, frozen(parameters), batch, carry, rng, negative_rows=negative_rows
        )
        predictions, learned = score(logits_BNV, batch), gates(parameters)
        opened = {layer: _opened(gate, batch.mask_BN) for layer, gate in told.items() if layer not in learned}
        return predictions.nats_BN.sum(), (predictions.correct_BN.sum(), *lax.stop_gradient((carry, opened)))

    gradient_of = jax.value_and_grad(segment_loss, has_aux=True)

    def update(state: TrainState, gradient: Parameters, tokens: jax.Array) -> tuple[TrainState, jax.Array]:
        gradient = jax.tree.map(lambda leaf: leaf / jnp.maximum(tokens, 1), gradient)
        changes, optimizer_state = optimizer.update(gradient, state.optimizer, state.parameters)
        parameters = moved(state.parameters, changes)
        return _in_place(state._replace(parameters=parameters, optimizer=optimizer_state)), model_norm(gradient)

    def read(state: TrainState, batch: Batch, prebuilt: Banks) -> tuple[TrainState, Parameters, SegmentMetrics]:
        carry, batch = begin(state.carry, batch, state.step, prebuilt)
        (nats, (correct, carry, opened)), gradient = gradient_of(state.parameters, batch, carry, state.step)
        gradient = constrain_tree(gradient, PARAMETER_RULES)
        metrics = SegmentMetrics(nats, correct, batch.mask_BN.sum(), jnp.zeros(()), opened)
        return _in_place(state._replace(step=state.step + 1, carry=unlimited(carry))), gradient, metrics

    def read_and_update(prebuilt: Banks, state: TrainState, batch: Batch) -> tuple[TrainState, SegmentMetrics]:
        state, gradient, metrics = read(state, batch, prebuilt)
        state, norm = update(state, gradient, metrics.tokens)
        return state, metrics._replace(gradient_norm=norm)

    def read_and_add(prebuilt: Banks, carried: tuple[TrainState, Parameters], batch: Batch):
        state, total = carried
        state, gradient, metrics = read(state, batch, prebuilt)
        return (state, jax.tree.map(jnp.add, total, gradient)), metrics

    def train_call(state: TrainState, batches: Batch, prebuilt: Banks = ()) -> tuple[TrainState, CallMetrics]:
        banks_before = state.carry.banks
        if accumulate:
            nothing = jax.tree.map(jnp.zeros_like, state.parameters)
            (state, gradient), metrics = lax.scan(functools.partial(read_and_add, prebuilt), (state, nothing), batches)
            state, norm = update(state, gradient, metrics.tokens.sum())
            metrics = metrics._replace(gradient_norm=jnp.full_like(metrics.gradient_norm, norm))
        else:
            state, metrics = lax.scan(functools.partial(read_and_update, prebuilt), state, batches)
        layers = nnx.merge(graph, state.parameters).settings.bank_layers if banks_before else ()
        counted = [
            (recall(before, after), mean_age(before, after))
            for before, after in zip(banks_before, state.carry.banks, strict=True)
        ]
        found = {layer: share for layer, (share, _) in zip(layers, counted, strict=True) if share is not None}
        # An update a segment; or one for all segments of a call, of which the first sees the youngest as 1 ago, the
        # others as 0: over all of them, that is the age in segments divided by their number.
        updates = batches.starts_document_B.shape[0] if accumulate else 1
        old = {layer: age / updates for layer, (_, age) in zip(layers, counted, strict=True) if age is not None}
        summed = jax.tree.map(lambda leaf: leaf.sum(0), metrics.opened)
        reported = CallMetrics(
            metrics._replace(opened={}),
            optax.tree.norm(state.parameters),
            gates(state.parameters),
            {layer: it.openness_H / it.tokens_H for layer, it in summed.items()},
            _memory_fill(state.carry),
            found,
            old,
        )
        return state, everywhere(reported)

    return jax.jit(train_call, donate_argnums=0, compiler_options=compiler_options)


def _memory_fill(carry: Carry) -> jax.Array:
    if not carry.banks:
        return jnp.zeros(())
    # Banks differ where each leaves out what is like something that it holds.
    return jnp.stack([bank.length_B.mean() / bank.keys_BHMD.shape[2] for bank in carry.banks]).mean()


def _opened(gate_BHN: jax.Array, mask_BN: Array) -> Opened:
    gate_BHN = jnp.where(mask_BN[:, None], gate_BHN, 0.0)  # which it is where nothing is found
    return Opened(gate_BHN.sum((0, 2)), (gate_BHN > 0).sum((0, 2)))
