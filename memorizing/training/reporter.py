"""The figures of a run: one line of metrics for each call, a check that they are finite, and the line at the start."""

import dataclasses
import functools
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from memorizing.files import AnyPath
from memorizing.memory.search_choice import describe_search
from memorizing.model.parameters import Parameters, count_parameters
from memorizing.parallel.hosts import is_first
from memorizing.storage.checkpoints import save_failed
from memorizing.training.flops import device_peak_flops, training_flops_per_token
from memorizing.training.hardware import Sessions, hardware
from memorizing.training.metrics import WRITERS, MetricsWriter
from memorizing.training.optimizer import TrainableMask, learning_rate
from memorizing.training.progress import Progress
from memorizing.training.settings import RunSettings
from memorizing.training.step import CallMetrics, SegmentMetrics


class NonFiniteLoss(RuntimeError):
    """The loss, the gradient or a parameter became NaN or infinite. Nothing computed since then was saved."""


def describe(run: RunSettings, parameters: Parameters, mesh: Mesh, trainable: TrainableMask | None = None) -> str:
    """Returns a line about a run: parameters, memory, batch size and devices."""
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    layers = ", ".join(map(str, run.model.memory_layers))
    memory, device = "no memory", mesh.devices.flat[0]
    if run.memory.size:
        search = describe_search(run.memory, device.platform)
        memory = f"a memory of {run.memory.size:,} tokens in layer {layers}, searched by {search}"
    share = ""
    if trainable is not None:
        trained = jax.tree.map(lambda leaf, trains: leaf if trains else None, parameters, trainable)
        share = f", {count_parameters(trained):,} of them trained"
    return (
        f"{count_parameters(parameters):,} parameters{share}, {memory}; {run.batch.size} rows of "
        f"{run.batch.segment_length} tokens on {mesh.size} x {device.device_kind}"
        + (f" ({axes})" if mesh.size > 1 else "")
    )


def gate_metrics(metrics: CallMetrics) -> dict[str, float]:
    """Returns learned gates as `gates/...` (per head or layer), and means of per-token gates as `gate_value/...`."""
    values = {f"gates/layer_{layer}": float(gate) for layer, gate in metrics.gates.items() if not gate.ndim}
    for name, layers in (("gates", metrics.gates), ("gate_value", metrics.gate_values)):
        for layer, gate_H in layers.items():
            heads = enumerate(gate_H) if gate_H.ndim else ()
            values |= {f"{name}/layer_{layer}/head_{head}": float(gate) for head, gate in heads if np.isfinite(gate)}
    return values


class Reporter:
    """Writes the metrics of each call, one call late, and rejects those that are not finite.

    Every process checks the metrics, so that all stop at the same step; the first process writes them.
    """

    def __init__(self, run: RunSettings, workdir: AnyPath, first_step: int, mesh: Mesh):
        self._run, self._workdir, self._step = run, workdir, first_step
        self._writers: list[MetricsWriter] = []
        self._sessions = None
        if is_first():
            self._writers = [WRITERS[name](workdir, first_step) for name in run.training.metric_writers]
            self._sessions = Sessions(workdir, first_step, hardware(mesh, run.memory))
        self.save()
        self._progress = Progress(run.training.steps, first_step)
        self._pending: tuple[int, CallMetrics] | None = None
        self._rate = learning_rate(run.optimizer)
        self._flops_of = functools.cache(self._flops_per_token)
        self._peak_flops = device_peak_flops(jax.local_devices()[0]) * jax.device_count()
        self._last_time = time.perf_counter()

    def _flops_per_token(self, slots: int) -> float:
        memory = dataclasses.replace(self._run.memory, size=slots)
        return training_flops_per_token(self._run.model, memory, self._run.batch.segment_length)

    def dispatched(self, step: int, metrics: CallMetrics) -> None:
        """Takes the metrics of the call that ends at `step`, and reports those of the call before."""
        self.flush()
        self._pending = (step, metrics)

    def flush(self) -> None:
        """Waits for the pending metrics and reports them.

        Raises:
            NonFiniteLoss: if they are not finite.
        """
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        metrics = jax.device_get(metrics)
        now = time.perf_counter()
        seconds, self._last_time = now - self._last_time, now
        self._check_finite(step, metrics.segments, float(metrics.parameter_norm))
        values = self._values(step, metrics, seconds)
        for writer in self._writers:
            writer.write(step, values)
        if is_first():
            self._step = step
            self._progress.show(step, values["loss"], values["tokens_per_second"])

    def _values(self, step: int, metrics: CallMetrics, seconds: float) -> dict[str, float]:
        """Returns the call's figures by name; `seconds` is the time since the previous call's metrics."""
        segments = metrics.segments
        tokens = max(int(segments.tokens.sum()), 1)
        flops_per_token = self._flops_of(self._run.memory_schedule.after(step))
        values = {
            "loss": float(segments.nats.sum()) / tokens,
            "accuracy": int(segments.correct.sum()) / tokens,
            "gradient_norm": float(segments.gradient_norm.mean()),
            "parameter_norm": float(metrics.parameter_norm),
            "learning_rate": self._learning_rate(step),
            "tokens_per_second": tokens / seconds,
            "model_flops_utilization": flops_per_token * tokens / seconds / self._peak_flops,
            "memory_fill": float(metrics.memory_fill),
        }
        values |= gate_metrics(metrics)
        by_layer: dict[str, dict[int, Any]] = {"recall": metrics.recall}
        # Keys of a snapshot belong to no update. Across documents segments are padded, so tokens do not count updates.
        if self._run.memory.clear_at_documents and not self._run.training.prebuilt_memory:
            by_layer["age"] = metrics.ages
        for name, layers in by_layer.items():
            values |= {f"{name}/layer_{layer}": float(value) for layer, value in layers.items() if np.isfinite(value)}
        return values

    def _learning_rate(self, step: int) -> float:
        """Returns the learning rate of the last update made by the end of `step`."""
        steps_per_update = self._run.batch.segments_per_call if self._run.training.update == "call" else 1
        return float(np.asarray(self._rate(max(step // steps_per_update - 1, 0))))

    def _check_finite(self, step: int, segments: SegmentMetrics, parameter_norm: float) -> None:
        finite = np.isfinite(segments.nats) & np.isfinite(segments.gradient_norm)
        finite[-1] &= np.isfinite(parameter_norm)
        if not finite.all():
            first = step - len(finite) + int(np.argmin(finite)) + 1
            raise NonFiniteLoss(
                f"the loss, the gradient or a parameter is not finite at step {first} (learning rate "
                f"{self._learning_rate(first):.3g}). Checkpoints before it are intact. Resume with a smaller "
                "Optimizer.learning_rate, a longer Optimizer.warmup_steps or a smaller Optimizer.clip_norm, or start a "
                "new run with Model.dtype = 'float32'"
            )

    def save(self) -> None:
        """Makes the metrics so far, and the step that was reached, available to a run that resumes from here.

        Raises:
            SaveFailed: if they could not be written.
        """
        if self._sessions is None:
            return
        for writer in self._writers:
            writer.save()
        try:
            self._sessions.save(self._step)
        except OSError as error:
            raise save_failed("metrics", self._workdir, error) from error

    def close(self) -> None:
        """Closes the writers and the progress bar."""
        self._progress.close()
        for writer in self._writers:
            writer.close()
