"""Staleness of a run's memory: its keys against those that the present parameters compute.

The keys in a checkpoint's memory were written by older parameters. What each row reads at a step is a pure function
(`data/batches.py`), so the tokens of these keys are known. Their documents are read again from their starts, with the
parameters of the checkpoint and an empty memory. The cosine of each stored key with its recomputed key is averaged by
age, layer and head. Age 1 is the segment read last.

Layers above a memory layer depend on what that layer read, so reading again must find the same memory size. If a run
was resumed with another Memory.size after its documents began, the difference counts as drift.
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from memorizing.data.batches import Schedule, read_batch
from memorizing.data.tokens import TokenSplit
from memorizing.errors import InputError
from memorizing.files import atomic_write
from memorizing.memory.bank import Bank, readable, size
from memorizing.memory.settings import MemorySettings
from memorizing.model.attention import l2_normalize
from memorizing.model.carry import Carry, empty_carry
from memorizing.model.parameters import Parameters
from memorizing.model.settings import ModelSettings
from memorizing.model.transformer import apply_model
from memorizing.parallel.mesh import assemble, constrain_tree, init_sharded, local_rows, shardings
from memorizing.shapes import Batch
from memorizing.storage.checkpoints import Checkpoints
from memorizing.training.settings import TrainingSettings
from memorizing.training.state import StateFactory


class Drift(NamedTuple):
    """Cosines of one layer by age in segments, the youngest first; `A` is the size of the memory in segments.

    Attributes:
        cosine_AH: mean cosine of stored and recomputed keys over rows and tokens; NaN for ages without keys.
        tokens_A: number of keys compared, for each head.
    """

    cosine_AH: Float[np.ndarray, "A H"]
    tokens_A: Int[np.ndarray, "A"]


def drift(
    checkpoints: Checkpoints,
    factory: StateFactory,
    split: TokenSplit,
    json_file: Path | None = None,
    say: Callable[[str], None] = print,
) -> dict[int, Drift]:
    """Measures the drift of the newest checkpoint. Returns it by memory layer, and reports it as a table through `say`.

    Args:
        json_file: file to which the same figures are written.

    Raises:
        InputError: if there is no checkpoint, it has no memory, or the settings do not allow to read documents again.
        CorruptCheckpoint, ReadFailed: see `Checkpoints.restore`.
    """
    run, step = factory.run, checkpoints.latest_step()
    model, memory, batch = run.model, run.memory, run.batch
    if step is None:
        raise InputError("this run has no checkpoint. `memorizing train` saves one")
    if not checkpoints.memory_size(step):
        raise InputError(f"the checkpoint of step {step} has no memory. See Memory.size and Training.memory_from_step")
    if memory.uses_slot_table or memory.writes == "never":
        raise InputError(
            f"drift cannot be measured with Memory.writes = {memory.writes!r}, Memory.eviction = {memory.eviction!r} "
            "and other settings that need a slot table. The memory must be a ring buffer of the newest tokens"
        )
    last_read = Schedule(split.lengths, batch.size, batch.segment_length, batch.seed).at(step - 1)
    first_step = step - 1 - max(segment for _, segment in last_read)
    _check_reread(model, run.training, factory.schedule.at(first_step) == factory.schedule.after(step))
    state = checkpoints.restore(step, factory.abstract_state(step), factory.mesh)
    memory = dataclasses.replace(memory, size=size(state.carry.banks), report_recall=False)
    recomputed = reread(state.parameters, factory, memory, split, last_read)
    compare = jax.jit(functools.partial(compare_keys, tokens=batch.segment_length // memory.write_every))
    with jax.set_mesh(factory.mesh):
        compared = [compare(*banks) for banks in zip(state.carry.banks, recomputed, strict=True)]
    drifts = {
        layer: Drift(*map(np.asarray, arrays))
        for layer, arrays in zip(model.bank_layers, jax.device_get(compared), strict=True)
    }
    say(f"step {step}: cosine of the keys in memory with those of the present parameters")
    for layer, layer_drift in drifts.items():
        say(table(layer, layer_drift))
    if json_file is not None:
        layers = {
            layer: {"tokens": layer_drift.tokens_A.tolist(), "cosine": _without_nan(layer_drift.cosine_AH)}
            for layer, layer_drift in drifts.items()
        }
        atomic_write(json_file, json.dumps({"step": step, "layers": layers}, indent=1) + "\n")
    return drifts


def _check_reread(model: ModelSettings, training: TrainingSettings, has_one_size: bool) -> None:
    """Rejects settings with which a memory layer below others would read something else than in training.

    `has_one_size` is True if the memory had one size since the oldest document in it began.
    """
    options = {
        "prebuilt_memory": training.prebuilt_memory,
        "negative_rows": training.negative_rows,
        "memory_dropout": training.memory_dropout,
    }
    if not has_one_size:
        options |= {name: getattr(training, name) for name in ("memory_growth", "memory_from_step")}
    used = [f"Training.{name} = {value!r}" for name, value in options.items() if value]
    if used and max(model.bank_layers) > min(model.memory_layers):
        raise InputError(
            f"keys of layer {max(model.bank_layers)} depend on what layer {min(model.memory_layers)} read, which "
            f"in training was not its whole memory ({', '.join(used)}). With such settings, drift can be measured only "
            "for the lowest memory layer, so no layer above it may have a bank"
        )


def reread(
    parameters: Parameters,
    factory: StateFactory,
    memory: MemorySettings,
    split: TokenSplit,
    last_read: list[tuple[int, int]],
) -> tuple[Bank, ...]:
    """Returns the banks after reading each row's document again, up to the (document, segment) in `last_read`."""
    rows, tokens = factory.run.batch.size, factory.run.batch.segment_length
    empty = functools.partial(empty_carry, factory.run.model, memory, rows, tokens)
    carry = init_sharded(factory.mesh, empty, functools.partial(shardings, factory.mesh))
    process_rows = local_rows(factory.mesh, rows)

    @functools.partial(jax.jit, donate_argnums=1)
    def read(parameters: Parameters, carry: Carry, segments: Batch) -> Carry:
        return constrain_tree(apply_model(factory.graph, parameters, segments, carry)[1])

    for back in range(max(segment for _, segment in last_read), -1, -1):
        step = [(document, segment - back) if segment >= back else None for document, segment in last_read]
        segments = read_batch(split, [step[row] for row in process_rows], tokens)
        with jax.set_mesh(factory.mesh):
            carry = read(parameters, carry, assemble(factory.mesh, segments, rows, process_rows))
    return carry.banks


def compare_keys(stored: Bank, recomputed: Bank, tokens: int) -> tuple[Float[jax.Array, "A H"], Int[jax.Array, "A"]]:
    """Returns mean cosines by age, and the number of keys in both banks; a segment has `tokens` keys."""

    def by_age(bank: Bank) -> Float[jax.Array, "B H M D"]:
        return l2_normalize(jnp.flip(jnp.roll(bank.keys.plain().astype(jnp.float32), -bank.cursor, axis=2), axis=2))

    slots = stored.keys_BHMD.shape[2]
    in_both_BM = jnp.arange(slots) < jnp.minimum(readable(stored), readable(recomputed))[:, None]
    cosine_BHM = jnp.einsum("BHMD,BHMD->BHM", by_age(stored), by_age(recomputed))
    summed_HM = jnp.where(in_both_BM[:, None], cosine_BHM, 0).sum(0)
    tokens_A = in_both_BM.sum(0).reshape(-1, tokens).sum(1)
    cosine_AH = summed_HM.reshape(-1, slots // tokens, tokens).sum(2).T / tokens_A[:, None]
    return cosine_AH, tokens_A


def table(layer: int, drift: Drift) -> str:
    """Returns a table for a person, with a line for ages of 1, 2, 3 to 4, 5 to 8 ... segments."""
    heads = drift.cosine_AH.shape[1]
    lines = [f"layer {layer}: age in segments    keys  " + "".join(f"  head {head:<3}" for head in range(heads))]
    first, stop = 0, 1
    while first < len(drift.tokens_A) and drift.tokens_A[first]:
        counts, cosines = drift.tokens_A[first:stop], drift.cosine_AH[first:stop]
        means = np.average(cosines[counts > 0], axis=0, weights=counts[counts > 0])
        ages = f"{first + 1} to {min(stop, len(drift.tokens_A))}" if stop - first > 1 else str(stop)
        lines.append(f"{ages:>24} {counts.sum():9,}  " + "".join(f"{mean:9.4f}" for mean in means))
        first, stop = stop, 2 * stop
    return "\n".join(lines)


def _without_nan(cosine_AH: np.ndarray) -> list[list[float | None]]:
    """Returns the cosines for JSON, with None in place of NaN."""
    return [[float(cosine) if np.isfinite(cosine) else None for cosine in ages] for ages in cosine_AH]
