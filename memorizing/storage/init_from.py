"""Starts a run from another run's parameters (fine-tuning), even if the other run's model had no memory.

    parameters of both models      are copied, and must have the same shape
    parameters of a memory layer   (gate, query scale, key shift ...) are initialized if the other run lacks them
    any other difference           is rejected, with the parameters' names

No parameter depends on the size of a memory, so the size may differ. Optimizer, step, caches and memory start afresh.
The workdir records the source, so resuming does not read the other run again.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from memorizing.data.tokens import PreparedTokens
from memorizing.errors import InputError
from memorizing.files import AnyPath, atomic_write, copy_files, run_folder
from memorizing.memory.settings import MemorySettings
from memorizing.model.parameters import Parameters, by_path
from memorizing.model.settings import ModelSettings
from memorizing.model.transformer import abstract_model
from memorizing.parallel.hosts import is_first
from memorizing.storage.checkpoints import Checkpoints
from memorizing.storage.snapshot_owner import SnapshotOwner, parameters_digest
from memorizing.storage.snapshots import snapshot_digest
from memorizing.storage.workdir import PRETRAINED, check_data

FROM_FILE = "from.json"
"""File of a workdir that records the source of its parameters (see `Beginning`)."""


class Beginning(NamedTuple):
    """The source of a run's parameters.

    Attributes:
        run, step: folder of the other run, and the step of its checkpoint.
        parameters: digest of all initial parameters, copied and newly initialized.
        memory: digest of the snapshot that fills the memory when a document starts; None if there is none.
    """

    run: str
    step: int
    parameters: str
    memory: str | None


def begin_from(
    init_from: str,
    init_step: int,
    prebuilt_memory: str,
    model: ModelSettings,
    tokens: PreparedTokens,
    fresh: Parameters,
    say: Callable[[str], None],
) -> tuple[Parameters, Beginning]:
    """Returns the parameters of the run `init_from`, with `fresh` ones for a memory that it lacks, and their source.

    Raises:
        InputError: if there is no such checkpoint, it has another vocabulary, or its parameters outside of memory
            layers are not those of this model.
        CorruptCheckpoint, ReadFailed: see `Checkpoints.restore`.
    """
    folder = run_folder("Training.init_from", init_from)
    check_data(folder, tokens, train=False)
    with Checkpoints(folder) as checkpoints:
        steps = checkpoints.steps()
        step = init_step or max(steps, default=0)
        if step not in steps:
            there = f"checkpoints of steps {', '.join(map(str, steps))}" if steps else "no checkpoint"
            raise InputError(f"Training.init_step = {init_step}: {folder} has {there}")
        wanted, there = by_path(fresh), checkpoints.parameter_shapes(step)
        missing = _check(wanted, there, model, f"Training.init_from = {init_from!r} (step {step})")
        restored = checkpoints.restore_parameters(step, _without(fresh, missing))
    taken = by_path(restored)
    drawn = f"; newly initialized, for a memory that it lacks: {', '.join(missing)}" if missing else ""
    say(f"starts from the parameters of {folder}, step {step}{drawn}")
    leaves = [taken.get(path, leaf) for path, leaf in wanted.items()]
    parameters = jax.tree.unflatten(jax.tree.structure(fresh), leaves)
    memory = snapshot_digest(Path(prebuilt_memory)) if prebuilt_memory else None
    return parameters, Beginning(str(folder), step, parameters_digest(parameters), memory)


def _check(wanted: dict[str, Any], there: dict[str, Any], model: ModelSettings, where: str) -> list[str]:
    """Returns the paths of parameters to initialize; rejects all other differences."""
    _, without = abstract_model(dataclasses.replace(model, memory_layers=(), banks_of=()), MemorySettings(size=0))
    of_memory = wanted.keys() - by_path(without).keys()
    shapes = [f"{path} of {there[path].shape} (here {wanted[path].shape})" for path in wanted if path in there
              and tuple(there[path].shape) != tuple(wanted[path].shape)]  # fmt: skip
    faults = {
        "lacks": [path for path in wanted if path not in there and path not in of_memory],
        "has additional parameters:": [path for path in there if path not in wanted],
        "has other shapes:": shapes,
    }
    found = [f"{how} {', '.join(paths)}" for how, paths in faults.items() if paths]
    if found:
        raise InputError(
            f"{where}: it {'; '.join(found)}. Use the Model settings of that run; only Model.memory_layers and "
            "Model.index_size, and what these add, may be new"
        )
    return [path for path in wanted if path not in there]


def _without(tree: Any, paths: list[str], place: str = "") -> Any:
    """Returns nested dictionaries without the leaves at `paths`, and without dictionaries that become empty."""
    if not isinstance(tree, dict):
        return tree
    kept = {}
    for key, part in tree.items():
        path = f"{place}{key}"
        rest = _without(part, paths, f"{path}/")
        if path not in paths and (not isinstance(part, dict) or rest or not part):
            kept[key] = rest
    return kept


def record_beginning(workdir: AnyPath, beginning: Beginning) -> None:
    """Writes `FROM_FILE` and copies the files that `memorizing export` needs, in the first process."""
    if not is_first():
        return
    source = run_folder("Training.init_from", beginning.run) / PRETRAINED
    if source.is_dir():
        (workdir / PRETRAINED).mkdir(exist_ok=True)
        copy_files(source, workdir / PRETRAINED)
    atomic_write(workdir / FROM_FILE, json.dumps(beginning._asdict()) + "\n")


def snapshot_owner(
    workdir: AnyPath,
    model: ModelSettings,
    segment_length: int,
    tokens: PreparedTokens,
    parameters: Parameters,
    step: int,
) -> SnapshotOwner:
    """Returns the owner of the snapshots that this checkpoint of a run makes and may load."""
    trained_with = recorded_beginning(workdir).memory if (workdir / FROM_FILE).exists() else None
    return SnapshotOwner(
        model, segment_length, tokens.digests()["vocabulary"], parameters_digest(parameters), step, trained_with
    )


def recorded_beginning(workdir: AnyPath) -> Beginning:
    """Returns the source that `record_beginning` wrote."""
    return Beginning(**json.loads((workdir / FROM_FILE).read_text()))
