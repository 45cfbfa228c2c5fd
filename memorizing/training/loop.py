"""The training loop: batches in, compiled calls out, metrics, checkpoints, and a clean end.

The metrics of call `n - 1` are read after call `n` is dispatched, so the device never waits for the host; only before
a checkpoint does the loop wait, to be sure that what it saves is sound.
"""

import dataclasses
import functools
import signal
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from memorizing.data.batches import BatchSettings, Prefetcher, batches
from memorizing.data.tokens import PreparedTokens
from memorizing.errors import InputError
from memorizing.files import AnyPath
from memorizing.memory.bank import Bank, size
from memorizing.memory.search import searched_by
from memorizing.memory.settings import MemorySettings
from memorizing.model.parameters import Parameters, count_parameters
from memorizing.model.settings import ModelSettings, split_sizes
from memorizing.parallel.hosts import Preemption, is_distributed, is_first, say
from memorizing.parallel.mesh import MeshSettings, assemble, local_rows, open_mesh
from memorizing.storage.checkpoints import Checkpoints, CorruptCheckpoint, save_failed
from memorizing.storage.init_from import begin_from, record_beginning, recorded_beginning
from memorizing.storage.snapshots import Source, prebuilt_banks, snapshot_digest
from memorizing.storage.train_state import TrainState
from memorizing.storage.workdir import is_first_drop, open_tokens, record_data
from memorizing.training.flops import device_peak_flops, training_flops_per_token
from memorizing.training.hardware import Sessions, hardware
from memorizing.training.metrics import MetricsWriter, Progress
from memorizing.training.optimizer import OptimizerSettings, TrainableMask, learning_rate
from memorizing.training.schedule import memory_schedule
from memorizing.training.settings import TrainingSettings
from memorizing.training.signals import Interrupted, Signals
from memorizing.training.state import StateFactory
from memorizing.training.step import CallMetrics, SegmentMetrics


class NonFiniteLoss(RuntimeError):
    """The loss, its gradient or the parameters are no numbers any more; nothing that came of it was saved."""


def train(
    model: ModelSettings,
    memory: MemorySettings,
    batch: BatchSettings,
    optimizer: OptimizerSettings,
    training: TrainingSettings,
    mesh_settings: MeshSettings,
    workdir: AnyPath,
    reset_memory: bool = False,
    say: Callable[[str], None] = say,
) -> None:
    """Trains from the newest checkpoint in `workdir`, or from the start, to `training.steps`.

    Every process of a run calls it alike. With `reset_memory` a run goes on with an empty memory.

    Raises:
        InputError: when the data or the devices do not fit the settings.
        NonFiniteLoss: naming the step, and what to try; earlier checkpoints are intact.
        SaveFailed: when a checkpoint or metrics could not be written; earlier checkpoints are intact.
        Unreadable, ReadFailed: see `resume`.
        Interrupted: after SIGTERM or SIGINT; the same call goes on from there.
    """
    tokens = open_tokens(training.data, model)
    mesh = open_mesh(mesh_settings, split_sizes(model, memory, batch.segment_length, batch.size))
    make = StateFactory(model, memory, batch, optimizer, training, mesh)
    say(describe(model, memory, batch, make.abstract_state(training.steps).parameters, mesh, make.only))
    with (
        Signals(() if is_distributed() else (signal.SIGTERM, signal.SIGINT)) as signals,  # else JAX notes them, for all
        Checkpoints(
            workdir, training.checkpoints_kept, training.checkpoint_kept_every, make.index_kind()
        ) as checkpoints,
    ):
        reset_memory = reset_memory and is_first_drop(workdir, checkpoints.latest_step(), say)
        step, state = resume(checkpoints, make, training, reset_memory, say)
        if state is None:
            return
        if not step:
            record_data(workdir, tokens)
            if training.init_from:
                parameters, beginning = begin_from(
                    training.init_from,
                    training.init_step,
                    training.prebuilt_memory,
                    model,
                    tokens,
                    state.parameters,
                    say,
                )
                state = state._replace(parameters=parameters)  # the optimizer's state begins with zeros in any case
                record_beginning(workdir, beginning)
        documents_begin = _prebuilt(model, memory, batch, training, tokens, workdir, mesh)
        reporter = _Reporter(workdir, step, model, memory, batch, optimizer, training, mesh)
        train_call = make.train_call()
        own, preemption = local_rows(mesh, batch.size), Preemption()
        ahead = Prefetcher(batches(tokens.split("train"), batch, step, own))
        try:
            while step < training.steps:
                before, slots = size(state.carry.banks), make.schedule.at(step)
                if slots != before:
                    say(
                        f"step {step}: "
                        + (f"memory grows from {before:,} to {slots:,}" if before else "memory switched on")
                    )
                    state = make.grown(state, slots)
                prebuilt = documents_begin(slots)
                chunk = assemble(mesh, next(ahead), batch.size, own, leading="S")
                with jax.set_mesh(mesh), jax.transfer_guard("disallow"):
                    state, metrics = train_call(state, chunk, prebuilt)
                step += batch.segments_per_call
                reporter.dispatched(step, metrics)
                checkpoints.check()
                signals.has_computed = True
                ends = signal.SIGTERM if preemption.is_agreed() else signals.received
                if step % training.checkpoint_every == 0 or step >= training.steps or ends:
                    reporter.flush()  # raises when the state is not sound, so that it is not saved
                    reporter.save()
                    checkpoints.save(step, state)
                if ends:
                    checkpoints.finish()
                    raise Interrupted(ends, step)
        finally:
            ahead.close()
            reporter.close()


def resume(
    checkpoints: Checkpoints,
    make: StateFactory,
    training: TrainingSettings,
    reset_memory: bool,
    say: Callable[[str], None],
) -> tuple[int, TrainState | None]:
    """The newest step that can be read and its state; the beginning; or no state when there is nothing left to do.

    Raises:
        Unreadable: when there are checkpoints, but all are damaged.
        ReadFailed: when the newest that is not damaged cannot be read now; nothing becomes of it.
    """
    while (step := checkpoints.latest_step()) is not None:
        if step >= training.steps:
            say(f"all {training.steps} steps are done already")
            return step, None
        like = make.abstract_state(step)
        try:
            if not checkpoints.has_progress(step):
                raise InputError(
                    "this run holds parameters alone (of `memorizing import`): begin another one with them, "
                    "--gin_param \"Training.init_from = 'RUN'\" --workdir=NEW"
                )
            state = checkpoints.restore(step, like, make.mesh, reset_memory)
            before = checkpoints.memory_size(step)
        except CorruptCheckpoint as error:
            if len(checkpoints.steps()) == 1:
                raise CorruptCheckpoint(
                    f"{error}, and there is none before it: mend it, or train anew in another --workdir"
                ) from error
            aside = checkpoints.set_aside(step)
            say(f"{error}: it is now {aside.name}, and the one before it is used")
            continue
        state = make.indexed(state)
        say(f"resuming after step {step}{_memory_kept(before, size(like.carry.banks), reset_memory)}")
        return step, state
    return 0, make.state()


def _prebuilt(
    model: ModelSettings,
    memory: MemorySettings,
    batch: BatchSettings,
    training: TrainingSettings,
    tokens: PreparedTokens,
    workdir: AnyPath,
    mesh: Mesh,
) -> Callable[[int], tuple[Bank, ...]]:
    """What each document begins with in a memory of so many slots: loaded once for each size.

    The snapshot has to be of the parameters that the run began with: those that it has now are younger.
    """
    if not training.prebuilt_memory or not memory.size:
        return lambda slots: ()
    folder, began = Path(training.prebuilt_memory), recorded_beginning(workdir)
    if snapshot_digest(folder) != began.memory:
        raise InputError(
            f"Training.prebuilt_memory = {str(folder)!r} is not the snapshot that the run in {workdir} began with: "
            "name that one, or train in another --workdir"
        )
    vocabulary = tokens.digests()["vocabulary"]
    source = Source(model, batch.segment_length, vocabulary, began.parameters, began.step)

    @functools.cache
    def load(slots: int) -> tuple[Bank, ...]:
        if not slots:
            return ()
        try:
            return prebuilt_banks(folder, source, dataclasses.replace(memory, size=slots), mesh)
        except InputError as error:
            raise InputError(
                f"Training.prebuilt_memory: {error}. It has to be made with the parameters that this run began with, "
                f"those of Training.init_from = {began.run!r}, step {began.step}"
            ) from error

    return load


def _memory_kept(before: int, now: int, dropped: bool) -> str:
    """What becomes of a saved memory of `before` slots in one of `now`; nothing is said where all is as it was."""
    if before and (dropped or not now):
        return f", its memory of {before:,} tokens dropped"
    if not before and now:
        return f", with an empty memory of {now:,} tokens: none was saved"
    if before < now:
        return f", its memory of {before:,} tokens laid out anew in one of {now:,}"
    if before > now:
        return f", of its memory of {before:,} tokens the newest {now:,} kept"
    return ""


def describe(
    model: ModelSettings,
    memory: MemorySettings,
    batch: BatchSettings,
    parameters: Parameters,
    mesh: Mesh,
    only: TrainableMask | None = None,
) -> str:
    """A line on what is trained, and on what."""
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    layers = ", ".join(map(str, model.memory_layers))
    remembers, device = "no memory", mesh.devices.flat[0]
    if memory.size:
        search = searched_by(memory, device.platform)
        remembers = f"a memory of {memory.size:,} tokens in layer {layers}, searched by {search}"
    are_trained = ""
    if only is not None:
        moving = jax.tree.map(lambda leaf, moves: leaf if moves else None, parameters, only)
        are_trained = f", of which {count_parameters(moving):,} are trained"
    return (
        f"{count_parameters(parameters):,} parameters{are_trained}, {remembers}; {batch.size} rows of "
        f"{batch.segment_length} tokens on {mesh.size} x {device.device_kind}" + (f" ({axes})" if mesh.size > 1 else "")
    )


def of_gates(metrics: CallMetrics) -> dict[str, float]:
    """What gates have learned (`gates/...`, of a head or a whole layer); or how open they were (`openness/...`)."""
    values = {f"gates/layer_{layer}": float(gate) for layer, gate in metrics.gates.items() if not gate.ndim}
    for name, layers in (("gates", metrics.gates), ("openness", metrics.openness)):
        for layer, of_H in layers.items():
            heads = enumerate(of_H) if of_H.ndim else ()
            values |= {f"{name}/layer_{layer}/head_{head}": float(it) for head, it in heads if np.isfinite(it)}
    return values


class _Reporter:
    """Turns the metrics of each call into log lines, one call late, and refuses those that are not finite."""

    def __init__(
        self,
        workdir: AnyPath,
        first_step: int,
        model: ModelSettings,
        memory: MemorySettings,
        batch: BatchSettings,
        optimizer: OptimizerSettings,
        training: TrainingSettings,
        mesh: Mesh,
    ):
        # Every process judges the metrics, and all come to the same end; the first one writes them.
        self._writer = MetricsWriter(workdir, first_step) if is_first() else None
        self._workdir, self._step = workdir, first_step
        self._sessions = Sessions(workdir, first_step, hardware(mesh, memory)) if is_first() else None
        self.save()
        self._progress = Progress(training.steps, first_step)
        self._waiting: tuple[int, CallMetrics] | None = None
        self._rate, self._steps_per_update = learning_rate(optimizer), 1
        if training.update == "call":
            self._steps_per_update = batch.segments_per_call
        # Keys of a snapshot are of no update; and across documents, segments are padded, so that tokens tell none.
        self._has_ages = memory.clear_at_documents and not training.prebuilt_memory
        self._schedule = memory_schedule(memory, training)
        self._flops_of = functools.cache(
            lambda slots: training_flops_per_token(model, dataclasses.replace(memory, size=slots), batch.segment_length)
        )
        self._peak_flops = device_peak_flops(jax.local_devices()[0]) * jax.device_count()
        self._last_time = time.perf_counter()

    def dispatched(self, step: int, metrics: CallMetrics) -> None:
        """Takes the metrics of the call that ends at `step`; reports those of the call before."""
        self.flush()
        self._waiting = (step, metrics)

    def flush(self) -> None:
        """Waits for the metrics at hand and reports them."""
        if self._waiting is None:
            return
        step, metrics = self._waiting
        self._waiting = None
        metrics = jax.device_get(metrics)
        now = time.perf_counter()
        segments, seconds = metrics.segments, now - self._last_time
        self._last_time = now
        self._refuse_non_finite(step, segments, float(metrics.parameter_norm))
        flops_per_token = self._flops_of(self._schedule.after(step))
        tokens = max(int(segments.tokens.sum()), 1)
        loss = float(segments.nats.sum()) / tokens
        values = {
            "loss": loss,
            "accuracy": int(segments.correct.sum()) / tokens,
            "gradient_norm": float(segments.gradient_norm.mean()),
            "parameter_norm": float(metrics.parameter_norm),
            "learning_rate": self._learning_rate(step),
            "tokens_per_second": tokens / seconds,
            "model_flops_utilization": flops_per_token * tokens / seconds / self._peak_flops,
            "memory_fill": float(metrics.memory_fill),
        }
        values |= of_gates(metrics)
        values |= {f"recall/layer_{layer}": float(it) for layer, it in metrics.recall.items() if np.isfinite(it)}
        if self._has_ages:
            values |= {f"age/layer_{layer}": float(it) for layer, it in metrics.ages.items() if np.isfinite(it)}
        if self._writer is None:
            return
        self._writer.write(step, values)
        self._step = step
        self._progress.show(step, loss, values["tokens_per_second"])

    def _learning_rate(self, step: int) -> float:
        """Of the last update that was made by the end of `step`."""
        return float(np.asarray(self._rate(max(step // self._steps_per_update - 1, 0))))

    def _refuse_non_finite(self, step: int, segments: SegmentMetrics, parameter_norm: float) -> None:
        sound = np.isfinite(segments.nats) & np.isfinite(segments.gradient_norm)
        sound[-1] &= np.isfinite(parameter_norm)
        if not sound.all():
            first = step - len(sound) + int(np.argmin(sound)) + 1
            raise NonFiniteLoss(
                f"loss, gradient or parameters are not finite at step {first} (learning rate "
                f"{self._learning_rate(first):.3g}). Checkpoints before it are intact. Go on from there with a smaller "
                "Optimizer.learning_rate, a longer Optimizer.warmup_steps or a smaller Optimizer.clip_norm, or train "
                "anew with Model.dtype = 'float32'"
            )

    def save(self) -> None:
        """Sees to it that a run that goes on from here finds its metrics so far, and notes how far it has got."""
        if self._writer is None or self._sessions is None:
            return
        self._writer.save()
        try:
            self._sessions.save(self._step)
        except OSError as error:
            raise save_failed("metrics", self._workdir, error) from error

    def close(self) -> None:
        self._progress.close()
        if self._writer is not None:
            self._writer.close()
