"""Training with a prebuilt memory: the banks of a snapshot with which each document starts."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

from jax.sharding import Mesh

from memorizing.data.tokens import PreparedTokens
from memorizing.errors import InputError
from memorizing.files import AnyPath
from memorizing.memory.bank import Bank
from memorizing.storage.init_from import recorded_beginning
from memorizing.storage.prebuilt import prebuilt_banks
from memorizing.storage.snapshot_owner import SnapshotOwner
from memorizing.storage.snapshots import snapshot_digest
from memorizing.training.settings import RunSettings


def prebuilt_loader(
    run: RunSettings, workdir: AnyPath, tokens: PreparedTokens, mesh: Mesh
) -> Callable[[int], tuple[Bank, ...]]:
    """Returns a function from a memory's size to the banks with which documents start; no banks without a snapshot.

    Each size is loaded once. The snapshot must have been made with the parameters that the run started from; the run's
    present parameters are newer.

    Raises:
        InputError: if `Training.prebuilt_memory` is not the snapshot that the run started with.
    """
    if not run.training.prebuilt_memory or not run.memory.size:
        return lambda slots: ()
    folder, beginning = Path(run.training.prebuilt_memory), recorded_beginning(workdir)
    if snapshot_digest(folder) != beginning.memory:
        raise InputError(
            f"Training.prebuilt_memory = {str(folder)!r} is not the snapshot that the run in {workdir} started with. "
            "Give that one, or train in another --workdir"
        )
    vocabulary = tokens.digests()["vocabulary"]
    source = SnapshotOwner(run.model, run.batch.segment_length, vocabulary, beginning.parameters, beginning.step)

    @functools.cache
    def load(slots: int) -> tuple[Bank, ...]:
        if not slots:
            return ()
        try:
            return prebuilt_banks(folder, source, dataclasses.replace(run.memory, size=slots), mesh)
        except InputError as error:
            raise InputError(
                f"Training.prebuilt_memory: {error}. Make it with the parameters that this run started from, those of "
                f"Training.init_from = {beginning.run!r}, step {beginning.step}"
            ) from error

    return load
