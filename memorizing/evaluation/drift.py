"""How stale a run's memory is: the keys that lie in it beside those that its present parameters would compute.

A checkpoint holds its memory as it was written, by parameters that have moved since. What each row reads at a step is a
pure function (`data/batches.py`), so it is known which tokens these keys are of: their documents are read again, from
their starts and with memories of their own, by the parameters of the checkpoint, and the cosine of each stored key with
its recomputed one is averaged by age, layer and head. An age of 1 is that of the segment read last.
Layers above a memory layer read what that one does, so its memory has to have been what it is now; that a run was
resumed with another Memory.size since its documents began is not known here, and counts as drift.
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

from memorizing.data.batches import BatchSettings, Schedule, read_batch
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
    """Of one layer, by age in segments; `A` is how many the memory holds, the youngest first.

    Attributes:
        cosine_AH: of stored and recomputed keys, on average over rows and tokens; not a number where none is that old.
        tokens_A: how many keys of each head were compared.
    """

    cosine_AH: Float[np.ndarray, "A H"]
    tokens_A: Int[np.ndarray, "A"]


def drift(
    checkpoints: Checkpoints,
    make: StateFactory,
    model: ModelSettings,
    memory: MemorySettings,
    batch: BatchSettings,
    training: TrainingSettings,
    split: TokenSplit,
    json_file: Path | None = None,
    say: Callable[[str], None] = print,
) -> dict[int, Drift]:
    """Of the newest checkpoint, by memory layer: says a table, and with `json_file` writes the same for programs.

    Raises:
        InputError: when there is no checkpoint, or no memory in it.
        Unreadable, ReadFailed: see `Checkpoints.restore`.
    """
    step = checkpoints.latest_step()
    if step is None:
        raise InputError("this run has no checkpoint yet: `memorizing train` makes one")
    if not checkpoints.memory_size(step):
        raise InputError(f"the checkpoint of step {step} has no memory (see Memory.size, Training.memory_from_step)")
    if memory.uses_slot_table or memory.writes == "never":
        raise InputError(
            "which token lies in which slot is known of memories that are written as rings: not with Memory.writes = "
            f"{memory.writes!r}, Memory.eviction = {memory.eviction!r} and what else has slots of its own"
        )
    last = Schedule(split.lengths, batch.size, batch.segment_length, batch.seed).at(step - 1)
    begun = step - 1 - max(segment for _, segment in last)
    _check_reread(model, training, make.schedule.at(begun) == make.schedule.after(step))
    state = checkpoints.restore(step, make.abstract_state(step), make.mesh)
    memory = dataclasses.replace(memory, size=size(state.carry.banks), report_recall=False)
    again = reread(state.parameters, make, model, memory, batch, split, last)
    compare = jax.jit(functools.partial(compared, tokens=batch.segment_length // memory.write_every))
    with jax.set_mesh(make.mesh):
        each = [compare(*banks) for banks in zip(state.carry.banks, again, strict=True)]
    found = {
        layer: Drift(*map(np.asarray, both))
        for layer, both in zip(model.bank_layers, jax.device_get(each), strict=True)
    }
    say(f"step {step}: cosine of the keys in memory with those that the parameters would compute now")
    for layer, its in found.items():
        say(table(layer, its))
    if json_file is not None:
        told = {
            layer: {"tokens": its.tokens_A.tolist(), "cosine": _numbers(its.cosine_AH)} for layer, its in found.items()
        }
        atomic_write(json_file, json.dumps({"step": step, "layers": told}, indent=1) + "\n")
    return found


def _check_reread(model: ModelSettings, training: TrainingSettings, is_of_one_size: bool) -> None:
    """Keys of a layer above a memory layer depend on what that one read, so it has to read the same again.

    `is_of_one_size` says whether the memory had one size since the oldest of the documents in it began.
    """
    options = {
        "prebuilt_memory": training.prebuilt_memory,
        "negative_rows": training.negative_rows,
        "memory_dropout": training.memory_dropout,
    }
    if not is_of_one_size:
        options |= {name: getattr(training, name) for name in ("memory_growth", "memory_from_step")}
    used = [f"Training.{name} = {value!r}" for name, value in options.items() if value]
    if used and max(model.bank_layers) > min(model.memory_layers):
        raise InputError(
            f"keys of layer {max(model.bank_layers)} depend on what layer {min(model.memory_layers)} read, which in "
            f"training was not all that was in its memory ({', '.join(used)}): drift is known of the lowest memory "
            "layer alone, so of runs with such settings only where no bank lies above it"
        )


def reread(
    parameters: Parameters,
    make: StateFactory,
    model: ModelSettings,
    memory: MemorySettings,
    batch: BatchSettings,
    split: TokenSplit,
    last: list[tuple[int, int]],
) -> tuple[Bank, ...]:
    """The memory behind what rows read `last`, had these parameters read all of the documents that they are in."""
    rows, tokens = batch.size, batch.segment_length
    empty = functools.partial(empty_carry, model, memory, rows, tokens)
    carry, own = init_sharded(make.mesh, empty, functools.partial(shardings, make.mesh)), local_rows(make.mesh, rows)

    @functools.partial(jax.jit, donate_argnums=1)
    def read(parameters: Parameters, carry: Carry, part: Batch) -> Carry:
        return constrain_tree(apply_model(make.graph, parameters, part, carry)[1])

    for back in range(max(segment for _, segment in last), -1, -1):
        reading = [(document, segment - back) if segment >= back else None for document, segment in last]
        part = read_batch(split, [reading[row] for row in own], tokens)
        with jax.set_mesh(make.mesh):
            carry = read(parameters, carry, assemble(make.mesh, part, rows, own))
    return carry.banks


def compared(stored: Bank, again: Bank, tokens: int) -> tuple[Float[jax.Array, "A H"], Int[jax.Array, "A"]]:
    """The mean cosine of keys of the same age, and how many there are: of tokens that both banks hold."""

    def by_age(bank: Bank) -> Float[jax.Array, "B H M D"]:
        return l2_normalize(jnp.flip(jnp.roll(bank.keys.plain().astype(jnp.float32), -bank.cursor, axis=2), axis=2))

    slots = stored.keys_BHMD.shape[2]
    held_BM = jnp.arange(slots) < jnp.minimum(readable(stored), readable(again))[:, None]
    cosine_BHM = jnp.einsum("BHMD,BHMD->BHM", by_age(stored), by_age(again))
    summed_HM = jnp.where(held_BM[:, None], cosine_BHM, 0).sum(0)
    tokens_A = held_BM.sum(0).reshape(-1, tokens).sum(1)
    cosine_AH = summed_HM.reshape(-1, slots // tokens, tokens).sum(2).T / tokens_A[:, None]
    return cosine_AH, tokens_A


def table(layer: int, its: Drift) -> str:
    """As a person reads it: a line for ages of 1, 2, 3 to 4, 5 to 8 ... segments."""
    heads = its.cosine_AH.shape[1]
    lines = [f"layer {layer}: age in segments    keys  " + "".join(f"  head {head:<3}" for head in range(heads))]
    first, until = 0, 1
    while first < len(its.tokens_A) and its.tokens_A[first]:
        counts, part = its.tokens_A[first:until], its.cosine_AH[first:until]
        means = np.average(part[counts > 0], axis=0, weights=counts[counts > 0])
        reach = f"{first + 1} to {min(until, len(its.tokens_A))}" if until - first > 1 else str(until)
        lines.append(f"{reach:>24} {counts.sum():9,}  " + "".join(f"{mean:9.4f}" for mean in means))
        first, until = until, 2 * until
    return "\n".join(lines)


def _numbers(cosine_AH: np.ndarray) -> list[list[float | None]]:
    """As JSON has them, which knows no NaN."""
    return [[float(each) if np.isfinite(each) else None for each in row] for row in cosine_AH]
