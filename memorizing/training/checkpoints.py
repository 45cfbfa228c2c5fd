"""Checkpoints of a whole `TrainState`, saved by orbax in the background while training goes on.

A save is written under another name and renamed when complete (in an object store, a file in it says that it is), so a
kill at any moment leaves the one before intact.
Every process writes what its devices hold; a checkpoint can be restored by other processes, onto another mesh, and with
a memory of another size. One that cannot be read is named and set aside, and the one before it is used.

    WORKDIR/checkpoints/STEP/     parameters/    progress/ (optimizer, step, XL caches)    memory/ (banks, if any)
"""

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from memorizing.files import AnyPath
from memorizing.memory.bank import Bank, resize
from memorizing.model.transformer import Parameters
from memorizing.parallel.hosts import all_agree, is_first, wait
from memorizing.parallel.mesh import shardings
from memorizing.training.step import TrainState

CHECKPOINTS = "checkpoints"
"""Folder of a workdir that holds them, each in a folder named by its step."""

DAMAGED = ".damaged"
"""What the name of a checkpoint that cannot be read ends in, once it is set aside."""


class SaveFailed(RuntimeError):
    """A checkpoint could not be written; those before it are intact."""


class Unreadable(RuntimeError):
    """A checkpoint could not be read, by this process or by another one."""


def has_checkpoint(workdir: AnyPath) -> bool:
    """Whether a run has saved anything; what a save that was cut short leaves does not count."""
    paths = (workdir / CHECKPOINTS).glob("*")
    return any(path.name.isdigit() and ocp.utils.is_checkpoint_finalized(path) for path in paths)


class Checkpoints:
    """The checkpoints of one run, by step. With `keep` None they can only be read.

    Args:
        workdir: of the run.
        keep: the newest so many stay.
        keep_every: those at multiples of so many steps stay as well; 0 for none.
    """

    def __init__(self, workdir: AnyPath, keep: int | None = None, keep_every: int = 0):
        logging.getLogger("absl").setLevel(logging.ERROR)
        self._folder = workdir / CHECKPOINTS
        if isinstance(self._folder, Path):
            self._folder = self._folder.absolute()
        options = ocp.CheckpointManagerOptions(read_only=True)
        if keep is not None:
            options = ocp.CheckpointManagerOptions(
                max_to_keep=keep, keep_period=keep_every or None, cleanup_tmp_directories=True
            )
        handlers = {name: ocp.StandardCheckpointHandler() for name in ("parameters", "progress", "memory")}
        self._manager = ocp.CheckpointManager(self._folder, options=options, item_handlers=handlers)

    def latest_step(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """The steps of all complete checkpoints."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: TrainState) -> None:
        """Copies the state to the host, then writes it in the background.

        Raises:
            SaveFailed: when this save, or the one before it, could not be written.
        """
        banks = state.carry.banks
        rest = state._replace(parameters={}, carry=state.carry._replace(banks=()))
        items = {"parameters": state.parameters, "progress": rest} | ({"memory": banks} if banks else {})
        saves = {name: ocp.args.StandardSave(_without_empty(item)) for name, item in items.items()}
        self._checked(lambda: self._manager.save(step, args=ocp.args.Composite(**saves)))

    def finish(self) -> None:
        """Waits until everything is written.

        Raises:
            SaveFailed: when it could not be.
        """
        self._checked(self._manager.wait_until_finished)

    def _checked(self, write: Callable[[], Any]) -> None:
        try:
            write()
        except Exception as error:  # disks, tensorstore and object stores have each their own
            raise SaveFailed(
                f"a checkpoint could not be written to {self._folder} ({error}). Those before it are intact: make room "
                "or mend the disk, and repeat the command to go on from there"
            ) from error

    def restore(self, step: int, like: TrainState, mesh: Mesh, drop_memory: bool = False) -> TrainState:
        """The state saved at `step`, with the shapes, dtypes and placement of `like` (concrete or not).

        A memory of another size is laid out anew: all of it when it grows, the newest tokens when it shrinks. Where
        nothing is saved for a memory of `like`, or with `drop_memory`, it is empty.

        Raises:
            Unreadable: when any process could not read its part.
        """
        rest = like._replace(parameters={}, carry=like.carry._replace(banks=()))
        items: dict[str, Any] = {"parameters": like.parameters, "progress": rest}
        saved = () if drop_memory else self._saved_banks(step, like.carry.banks)
        where = shardings(mesh, like.carry.banks)
        restored = self._restore(step, **items, **({"memory": saved} if saved else {}))
        banks = like.carry.banks
        if banks and saved:
            banks = tuple(map(resized, restored["memory"], banks, where))
        elif banks:
            empty = lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), banks)  # noqa: E731
            banks = jax.jit(empty, out_shardings=where)()
        progress = restored["progress"]
        return progress._replace(parameters=restored["parameters"], carry=progress.carry._replace(banks=banks))

    def _saved_banks(self, step: int, like: tuple[Bank, ...]) -> tuple[Bank, ...]:
        """Shapes of the banks that were saved, placed as those of `like`; none if none were."""
        if not like or not (self._folder / str(step) / "memory").exists():
            return ()
        metadata = self._attempt(step, lambda: self._manager.item_metadata(step)["memory"])
        named = {
            jax.tree_util.keystr(path[-1:], simple=True): leaf for path, leaf in jax.tree.leaves_with_path(metadata)
        }
        slots = named["keys_BHMD"].shape[2]

        def as_saved(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            shape = (*leaf.shape[:2], slots, *leaf.shape[3:]) if len(leaf.shape) == 4 else leaf.shape
            return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=leaf.sharding)

        return jax.tree.map(as_saved, like)

    def restore_parameters(self, step: int, like: Parameters) -> Parameters:
        """The parameters alone: for evaluation, which has a carry of its own and no optimizer."""
        return self._restore(step, parameters=like)["parameters"]

    def _restore(self, step: int, **items: Any) -> Any:
        restores = {
            name: ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, _without_empty(item)))
            for name, item in items.items()
        }
        restored = self._attempt(step, lambda: self._manager.restore(step, args=ocp.args.Composite(**restores)))

        def fill(like: Any, leaf: Any) -> Any:
            return jnp.zeros(like.shape, like.dtype, device=like.sharding) if leaf is None else leaf

        return {name: jax.tree.map(fill, item, restored[name]) for name, item in items.items()}

    def _attempt[T](self, step: int, read: Callable[[], T]) -> T:
        """What was read, if every process could read it."""
        result, problem = None, None
        try:
            result = read()
        except Exception as error:  # whatever a damaged file makes of a reader
            problem = error
        if not all_agree(problem is None):
            what = f"{type(problem).__name__}: {problem}" if problem else "another process could not read it"
            raise Unreadable(f"the checkpoint of step {step} in {self._folder} cannot be read ({what})") from problem
        return result  # type: ignore[bad-return]

    def set_aside(self, step: int) -> AnyPath:
        """Renames the checkpoint of `step`, so that it counts no more and is not lost; gives its new name."""
        path = self._folder / str(step)
        aside = next(
            name
            for number in range(1_000_000)
            if not (name := path.with_name(f"{path.name}{DAMAGED}{number or ''}")).exists()
        )
        wait("before setting a checkpoint aside")
        if is_first():
            path.rename(aside)
        wait("after setting a checkpoint aside")
        self._manager.reload()
        return aside

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, *error: object) -> None:
        """Waits until everything is written; after an error, that is what is told."""
        try:
            self.finish()
        except SaveFailed:
            if kind is None:
                raise
        finally:
            self._manager.close()


def resized(bank: Bank, like: Bank, where: Bank) -> Bank:
    """A restored bank with as many slots as `like`."""
    slots = like.keys_BHMD.shape[2]
    if bank.keys_BHMD.shape[2] == slots:
        return bank
    return jax.jit(functools.partial(resize, slots=slots, cursor=int(bank.cursor)), out_shardings=where)(bank)


def _without_empty(tree: Any) -> Any:
    """Orbax refuses arrays without elements (an XL cache of length 0): None stands for them."""
    return jax.tree.map(lambda leaf: leaf if leaf.size else None, tree)
