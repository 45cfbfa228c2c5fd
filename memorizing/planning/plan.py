"""`memorizing plan`: compiles the train call for devices that this machine lacks; reports its memory, traffic and time.

Bytes held and sent come from the compiled program. The time of a step is an estimate: the longest of three times, as if
the chip overlapped them perfectly.

    arithmetic    FLOPs executed, including those that Model.remat repeats (see flops.py) / the chip's peak
    memory        parameters and optimizer state, read and written; gathered weights, read by each pass; keys of the
                  memory, read; float32 scores of the search, written and read (forward only) / its bandwidth
    network       bytes that the program's collectives send / the chip's sending bandwidth

The estimate leaves out selecting and reading neighbors, and writing activations to device memory and reading them back.
A real step therefore takes longer.
"""

import json
import math
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from memorizing.data.batches import BatchSettings
from memorizing.files import atomic_write
from memorizing.memory.search_choice import chosen_settings
from memorizing.memory.settings import MemorySettings
from memorizing.model.parameters import count_parameters
from memorizing.model.settings import ModelSettings, split_sizes
from memorizing.parallel.mesh import open_mesh, placed, shardings
from memorizing.parallel.topology import chip_of, memory_of, topology_devices
from memorizing.planning.collectives import Collective, collectives
from memorizing.shapes import Batch
from memorizing.storage.train_state import TrainState
from memorizing.training.flops import executed_flops_per_token, training_flops_per_token
from memorizing.training.settings import RunSettings
from memorizing.training.state import StateFactory

GIB = 2**30

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}
_AMOUNT = r"(([\d.]+)([KMGT]?))"
# libtpu's two messages for a program that does not fit. Their "temporaries" include arguments and results: `x * 2` of
# 12 GiB has no temporaries, but libtpu 0.0.50 reports that it needs 24.00G.
_NEEDS = tuple(
    re.compile(words.replace("AMOUNT", _AMOUNT))
    for words in (r"[Uu]sed AMOUNT of AMOUNT hbm", r"temporaries \(AMOUNT\) exceeds available HBM \(AMOUNT\)")
)


class DoesNotFit(RuntimeError):
    """Raised if the program needs more memory than a device has."""


def plan(run: RunSettings, topology: str, json_file: Path | None = None, say: Callable[[str], None] = print) -> dict:
    """Compiles the train call, prints a table of its memory, traffic and time, and writes and returns these figures.

    Raises:
        InputError: for an unknown topology, or settings that do not divide over it.
        DoesNotFit: if the program needs more memory than the chip has; the table is still printed and written.
    """
    devices, (model, memory, batch) = topology_devices(topology), (run.model, run.memory, run.batch)
    mesh = open_mesh(run.mesh, split_sizes(model, memory, batch.segment_length, batch.size), devices=devices)
    factory = StateFactory(run, mesh)
    state = factory.abstract_state(run.training.steps)
    figures: dict[str, Any] = {
        "topology": topology,
        "devices": mesh.size,
        "device_kind": devices[0].device_kind,
        "platform": devices[0].platform,
        "mesh": dict(mesh.shape),
        "parameters": count_parameters(state.parameters),
        "memory_size": memory.size,
        "rows": batch.size,
        "segment_length": batch.segment_length,
        "segments_per_call": batch.segments_per_call,
        "bytes_per_device": held_bytes(state),
    }
    start, problem = time.perf_counter(), ""
    try:
        compiled = compile_call(factory, state)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        problem = needed(str(error), figures["bytes_per_device"])
    else:
        _measure(figures, compiled, batch)
    figures["compile_seconds"] = time.perf_counter() - start
    _estimate(figures, model, memory, batch, devices)
    capacity = memory_of(devices[0])
    total = figures["bytes_per_device"].get("total", 0)
    if not problem and capacity is not None and total > capacity:
        problem = f"needs {total / GIB:.2f} GiB of {capacity / GIB:.2f} GiB"
    figures["fits"] = not problem if capacity is not None else None
    if problem:
        figures["problem"] = problem
        figures["advice"] = advice(figures, model, memory, batch)
    say(table(figures))
    if json_file is not None:
        atomic_write(json_file, json.dumps(figures, indent=1) + "\n")
    if problem:
        raise DoesNotFit(f"the run does not fit {topology}: {problem}. {figures['advice']}")
    return figures


def compile_call(factory: StateFactory, state: TrainState) -> jax.stages.Compiled:
    """Compiles the train call of `memorizing train` for the devices of `factory.mesh`; allocates nothing."""
    batch = factory.run.batch
    shape = (batch.segments_per_call, batch.size, batch.segment_length)
    tokens: Any = jax.ShapeDtypeStruct(shape, jnp.int32)
    flags: Any = jax.ShapeDtypeStruct(shape, jnp.bool_)
    starts: Any = jax.ShapeDtypeStruct(shape[:2], jnp.bool_)
    chunk = Batch(tokens, tokens, flags, starts)
    call: Any = factory.train_call()
    with jax.set_mesh(factory.mesh):
        lowered = call.lower(state, placed(chunk, shardings(factory.mesh, chunk, leading="S")))
        return lowered.compile()


def held_bytes(state: TrainState) -> dict[str, int]:
    """Returns the bytes that each device holds of each part of a state."""
    parts = {
        "parameters": state.parameters,
        "optimizer": state.optimizer,
        "xl_caches": state.carry.caches,
        "memory": state.carry.banks,
    }
    return {name: sum(map(_share, jax.tree.leaves(part))) for name, part in parts.items()}


def _share(leaf: Any) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _measure(figures: dict[str, Any], compiled: jax.stages.Compiled, batch: BatchSettings) -> None:
    """Adds to `figures` the bytes that the compiled program holds and sends."""
    analysis = compiled.memory_analysis()
    if analysis is not None:
        held = figures["bytes_per_device"]
        program = int(analysis.generated_code_size_in_bytes)
        held["temporaries"] = int(analysis.temp_size_in_bytes)
        held["program"] = program
        new = int(analysis.output_size_in_bytes - analysis.alias_size_in_bytes)  # outputs not written in place
        held["total"] = int(analysis.argument_size_in_bytes) + held["temporaries"] + new + program
    found = collectives(compiled.as_text() or "")
    figures["collectives"] = summary(found, batch.segments_per_call)
    figures["bytes_sent_per_step"] = sum(each.total for each in found) / batch.segments_per_call


def summary(found: Sequence[Collective], steps: int) -> dict[str, dict[str, float]]:
    """Returns the runs per step and the bytes sent per device of all collectives, by kind and number of devices."""
    sums: dict[str, dict[str, float]] = {}
    for each in found:
        entry = sums.setdefault(f"{each.kind} over {each.devices}", {"times": 0.0, "bytes": 0.0})
        entry["times"] += each.times / steps
        entry["bytes"] += each.total / steps
    return dict(sorted(sums.items(), key=lambda item: -item[1]["bytes"]))


def _estimate(
    figures: dict[str, Any],
    model: ModelSettings,
    memory: MemorySettings,
    batch: BatchSettings,
    devices: Sequence[jax.Device],
) -> None:
    """Adds to `figures` the FLOPs and, for a known chip, the step time by the roofline model."""
    tokens = batch.size * batch.segment_length
    tokens_each = tokens / len(devices)
    executed = executed_flops_per_token(model, memory, batch.segment_length) * tokens_each
    figures["flops_per_device"] = training_flops_per_token(model, memory, batch.segment_length) * tokens_each
    figures["executed_flops_per_device"] = executed
    chip, held = chip_of(devices[0]), figures["bytes_per_device"]
    if chip is None:
        return
    # Parameters and optimizer state are read and written. Gathered weights are read once in the forward pass, again if
    # remat repeats it, and twice in the backward pass.
    weights = 2 * figures["parameters"] / figures["mesh"]["model"]
    traffic = 2 * (held["parameters"] + held["optimizer"]) + (4 if model.remat else 3) * weights
    # Every layer that searches a bank reads its keys.
    traffic += held["memory"] / 2 * len(model.memory_layers) / max(len(model.bank_layers), 1)
    # Searches without a fused kernel write the float32 scores [B, H, N, M] and read them to select, in the forward pass
    # only, because neighbors are saved. The mesh splits B, H and M, each over its own axis.
    is_written = chosen_settings(memory, devices[0].platform).writes_scores
    traffic += is_written * len(model.memory_layers) * 2 * 4 * tokens_each * model.heads * memory.size
    seconds = {
        "arithmetic": executed / chip.flops,
        "memory": traffic / chip.memory_bandwidth,
        "network": figures.get("bytes_sent_per_step", 0.0) / chip.network_bandwidth,
    }
    step = max(seconds.values())
    figures |= {
        "seconds_per_step": seconds,
        "bound_by": max(seconds, key=lambda name: seconds[name]),
        "tokens_per_second": tokens / step,
        # The sum is the time of a program that overlaps nothing.
        "tokens_per_second_without_overlap": tokens / sum(seconds.values()),
    }


def needed(message: str, held: dict[str, int]) -> str:
    """Returns the memory needed and available, from the compiler's message; adds total and temporaries to `held`.

    Temporaries are the total minus all other parts, so they include padding.
    """
    match = next((match for pattern in _NEEDS if (match := pattern.search(message))), None)
    if match is None:
        return message.splitlines()[0]
    total = int(float(match[2]) * _UNITS[match[3]])
    held["temporaries"] = max(total - sum(held.values()), 0)
    held["total"] = total
    return f"needs {match[1]} of {match[4]} of memory"


def advice(figures: dict[str, Any], model: ModelSettings, memory: MemorySettings, batch: BatchSettings) -> str:
    """Returns advice on settings to change, for the part that takes the most memory."""
    held, mesh = figures["bytes_per_device"], figures["mesh"]
    state, banks = held["parameters"] + held["optimizer"], held["memory"]
    temporaries = held.get("temporaries", 0)
    rows = f"fewer rows (BATCH_SIZE = {batch.size}, {batch.size // mesh['data']} for each part of the data axis)"
    smaller = f"a smaller MEMORY_SIZE ({memory.size})"
    ways = []
    if temporaries > max(state, banks):
        ways.append(f"temporaries take most, {temporaries / GIB:.1f} GiB: {rows}")
        if not model.remat:
            ways.append("Model.remat = True, which recomputes activations instead of storing them")
        if memory.size and (change := chosen_settings(memory, figures["platform"]).cheaper()):
            ways.append(change)
        if banks > temporaries / 10:  # large enough for its padding and copies to matter
            ways.append(f"{smaller}: the memory takes {banks / GIB:.1f} GiB, and temporaries can grow with it")
    elif banks >= state:
        ways.append(f"the memory takes most, {banks / GIB:.1f} GiB: {smaller}")
        ways.append(rows)
        ways.append(f"slots over more devices (Mesh.memory, now {mesh['memory']})")
    else:
        ways.append(f"parameters and optimizer take most, {state / GIB:.1f} GiB: more devices, or Mesh.model")
    return "Try " + "; ".join(ways) + "."


def table(figures: dict[str, Any]) -> str:
    """Returns the figures as a table of plain text."""
    held, mesh = figures["bytes_per_device"], figures["mesh"]
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.items())
    lines = [
        f"{figures['topology']}: {figures['devices']} x {figures['device_kind']}, mesh {axes}",
        f"{figures['parameters']:,} parameters, a memory of {figures['memory_size']:,}; {figures['rows']} rows of "
        f"{figures['segment_length']} tokens; compiled in {figures['compile_seconds']:.0f} s",
        "",
        "GiB on each device",
        *(f"  {name.replace('_', ' '):12} {size / GIB:9.3f}" for name, size in held.items()),
    ]
    if figures["fits"] is not None:
        lines.append(f"  {'fits' if figures['fits'] else 'DOES NOT FIT'}")
    executed = f"executed {figures['executed_flops_per_device']:.3g}"
    lines += ["", f"model FLOPs of a step on each device: {figures['flops_per_device']:.3g}, {executed}"]
    if "seconds_per_step" in figures:
        times = ", ".join(f"{name} {1000 * value:.1f}" for name, value in figures["seconds_per_step"].items())
        lines += [
            f"milliseconds of a step at best: {times}; bound by {figures['bound_by']}",
            f"tokens per second at best: {figures['tokens_per_second']:,.0f} "
            f"({figures['tokens_per_second_without_overlap']:,.0f} if nothing overlaps)",
            "  (not counted: the selection among the scores of the memory, and activations going to memory and back)",
        ]
    if figures.get("collectives"):
        lines += ["", "sent by each device in a step: times, MiB"]
        lines += [
            f"  {name:32} {entry['times']:7.1f} {entry['bytes'] / 2**20:10.2f}"
            for name, entry in figures["collectives"].items()
        ]
    return "\n".join(lines)
