"""Checkpoints of a whole `TrainState`, saved by orbax in the background while training goes on.

A save is written under another name and renamed when complete, so a kill at any moment leaves the one before intact.
"""

import logging
from pathlib import Path
from typing import Any, Self

import jax
import orbax.checkpoint as ocp

from memorizing.model.transformer import Parameters
from memorizing.training.step import TrainState

CHECKPOINTS = "checkpoints"
"""Folder of a workdir that holds them, each in a folder named by its step."""


class Checkpoints:
    """The checkpoints of one run, by step; the newest `keep` stay."""

    def __init__(self, workdir: Path, keep: int = 2):
        logging.getLogger("absl").setLevel(logging.ERROR)
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager((workdir / CHECKPOINTS).absolute(), options=options)

    def latest_step(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState) -> None:
        """Copies the state to the host, then writes it in the background."""
        items = {"parameters": state.parameters, "progress": state._replace(parameters={})}
        saves = {name: ocp.args.StandardSave(item) for name, item in items.items()}
        self._manager.save(step, args=ocp.args.Composite(**saves))

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state saved at `step`, with the shapes, dtypes and placement of `like`."""
        restored = self._restore(step, parameters=like.parameters, progress=like._replace(parameters={}))
        return restored["progress"]._replace(parameters=restored["parameters"])

    def restore_parameters(self, step: int, like: Parameters) -> Parameters:
        """The parameters alone: for evaluation, which has a carry of its own and no optimizer."""
        return self._restore(step, parameters=like)["parameters"]

    def _restore(self, step: int, **items: Any) -> Any:
        like = {name: jax.tree.map(ocp.utils.to_shape_dtype_struct, item) for name, item in items.items()}
        restores = {name: ocp.args.StandardRestore(item) for name, item in like.items()}
        return self._manager.restore(step, args=ocp.args.Composite(**restores))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Waits until everything is written."""
        self._manager.wait_until_finished()
        self._manager.close()
