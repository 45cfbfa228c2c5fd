"""Checkpoints of a whole `TrainState`, saved by orbax in the background while training goes on.

A save is written under another name and renamed when complete, so a kill at any moment leaves the one before intact.
"""

import logging
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from memorizing.model.transformer import Parameters
from memorizing.training.step import TrainState

CHECKPOINTS = "checkpoints"
"""Folder of a workdir that holds them, each in a folder named by its step."""


def has_checkpoint(workdir: Path) -> bool:
    """Whether a run has saved anything; a folder of a save that was cut short has more than a number for a name."""
    return any(path.name.isdigit() for path in (workdir / CHECKPOINTS).glob("*"))


class Checkpoints:
    """The checkpoints of one run, by step; the newest `keep` stay. With `keep` None they can only be read."""

    def __init__(self, workdir: Path, keep: int | None = None):
        logging.getLogger("absl").setLevel(logging.ERROR)
        options = ocp.CheckpointManagerOptions(read_only=True)
        if keep is not None:
            options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager((workdir / CHECKPOINTS).absolute(), options=options)

    def latest_step(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState) -> None:
        """Copies the state to the host, then writes it in the background."""
        items = {"parameters": state.parameters, "progress": state._replace(parameters={})}
        saves = {name: ocp.args.StandardSave(_without_empty(item)) for name, item in items.items()}
        self._manager.save(step, args=ocp.args.Composite(**saves))

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state saved at `step`, with the shapes, dtypes and placement of `like`."""
        restored = self._restore(step, parameters=like.parameters, progress=like._replace(parameters={}))
        return restored["progress"]._replace(parameters=restored["parameters"])

    def restore_parameters(self, step: int, like: Parameters) -> Parameters:
        """The parameters alone: for evaluation, which has a carry of its own and no optimizer."""
        return self._restore(step, parameters=like)["parameters"]

    def _restore(self, step: int, **items: Any) -> Any:
        restores = {
            name: ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, _without_empty(item)))
            for name, item in items.items()
        }
        restored = self._manager.restore(step, args=ocp.args.Composite(**restores))
        fill = lambda like, leaf: like if leaf is None else leaf  # noqa: E731
        return {name: jax.tree.map(fill, item, restored[name]) for name, item in items.items()}

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error: object) -> None:
        """Waits until everything is written."""
        self._manager.wait_until_finished()
        self._manager.close()


def _without_empty(tree: Any) -> Any:
    """Orbax refuses arrays without elements (an XL cache of length 0): None stands for them."""
    return jax.tree.map(lambda leaf: leaf if leaf.size else None, tree)
