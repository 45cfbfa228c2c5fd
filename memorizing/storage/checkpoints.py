"""Checkpoints of a whole `TrainState`, saved by orbax in the background while training goes on.

A save is written under another name and renamed when complete (in an object store, a file in it says that it is), so a
kill at any moment leaves the one before intact.
Every process writes what its devices hold; a checkpoint can be restored by other processes, onto another mesh, and with
a memory of another size. One that is damaged, so that it cannot be read or does not hold what was saved (see
`fingerprint`), is named and set aside, and the one before it is used. Where the disk, the network or this machine is to
blame it stays as it is, and the run ends.

    WORKDIR/checkpoints/STEP/     parameters/    progress/ (optimizer, step, XL caches)    memory/ (banks, if any)
                                  fingerprints/ (of every array)
"""

import functools
import logging
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from memorizing.files import AnyPath
from memorizing.memory.bank import emptied
from memorizing.model.parameters import Parameters, by_path
from memorizing.parallel.hosts import all_agree, broadcast_from_first, is_first, wait
from memorizing.parallel.mesh import init_sharded, placed, shardings
from memorizing.storage.damage import is_damage, reason
from memorizing.storage.fingerprint import fingerprints
from memorizing.storage.saved_banks import resized, restored_form, saved_form
from memorizing.storage.train_state import TrainState

CHECKPOINTS = "checkpoints"
"""Folder of a workdir that holds them, each in a folder named by its step."""

DAMAGED = ".damaged"
"""What the name of a checkpoint that cannot be read ends in, once it is set aside."""

FINGERPRINTS = "fingerprints"
"""Item of a checkpoint: the fingerprints of the others' arrays."""


class SaveFailed(RuntimeError):
    """A checkpoint or metrics could not be written; checkpoints before that are intact."""


def save_failed(what: str, folder: AnyPath, error: Exception) -> SaveFailed:
    """Names what could not be written and where (a workdir, or its folder of checkpoints), and what is kept."""
    steps = steps_on_disk(folder if folder.name == CHECKPOINTS else folder / CHECKPOINTS)
    kept = f"Checkpoints of steps {', '.join(map(str, steps))} are there" if steps else "No checkpoint is there yet"
    return SaveFailed(
        f"{what} could not be written to {folder} ({reason(error)}). {kept}: make room or mend the disk, and repeat "
        "the command to go on from the newest, or else from the start"
    )


class CorruptCheckpoint(RuntimeError):
    """A checkpoint is damaged, in the part that this process reads or in that of another one."""


class ReadFailed(OSError):
    """A checkpoint could not be read now, by this process or by another one, for a reason that is not damage to it."""


def has_checkpoint(workdir: AnyPath) -> bool:
    """Whether a run has saved anything; what a save that was cut short leaves does not count."""
    return bool(steps_on_disk(workdir / CHECKPOINTS))


def steps_on_disk(folder: AnyPath) -> list[int]:
    """The steps of the finished checkpoints in a folder of them, from the oldest."""
    paths = folder.glob("*")
    return sorted(int(path.name) for path in paths if path.name.isdigit() and ocp.utils.is_checkpoint_finalized(path))


class Checkpoints:
    """The checkpoints of one run, by step. With `keep` None they can only be read.

    Args:
        workdir: of the run.
        keep: the newest so many stay.
        keep_every: those at multiples of so many steps stay as well; 0 for none.
        index_kind: a number for what makes the banks' indexes; one that another kind has made is not restored.
    """

    def __init__(self, workdir: AnyPath, keep: int | None = None, keep_every: int = 0, index_kind: int = 0):
        self._index_kind = index_kind
        _hush_orbax()
        self._folder = workdir / CHECKPOINTS
        if isinstance(self._folder, Path):
            self._folder = self._folder.absolute()
        # Each process reads by itself. Else those that could read would wait for one that could not, which waits here.
        me = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(
            primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"read{me}"
        )
        options = ocp.CheckpointManagerOptions(read_only=True, multiprocessing_options=alone)
        self._reader = self._manager = ocp.CheckpointManager(self._folder, options=options, item_handlers=_handlers())
        self._failure: Exception | None = None
        if keep is not None:
            # Its time limit stays at 20 minutes: large states on slow disks take many, some processes more than others.
            options = ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                keep_period=keep_every or None,
                cleanup_tmp_directories=True,
                async_options=ocp.AsyncOptions(barrier_sync_fn=self._wait_unless_failed),
            )
            self._wait = ocp.multihost.get_barrier_sync_fn()
            self._manager = ocp.CheckpointManager(self._folder, options=options, item_handlers=_handlers())
            # Orbax would ask as well, by numbers of its own: after that, JAX misses the processes' own `Preemption`.
            self._manager.reached_preemption = lambda step: False

    def _wait_unless_failed(self, *, key: str, timeout_ms: int) -> None:
        """Where orbax's threads wait for the other processes.

        They do so even after this process could not write its part, in a `finally`; but then the others wait elsewhere.
        """
        error = sys.exception()
        if isinstance(error, Exception) and threading.current_thread() is not threading.main_thread():
            self._failure = error
            raise error
        self._wait(key=key, timeout_ms=timeout_ms)

    def latest_step(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return max(self.steps(), default=None)

    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, from the oldest, as the first process finds them.

        Others may find others: on a disk that shows them late, or while a run that is evaluated goes on.
        """
        steps = sorted(self._manager.all_steps())
        count = broadcast_from_first(len(steps))
        return [broadcast_from_first(step) for step in (steps + [0] * count)[:count]]

    def save(self, step: int, state: TrainState) -> None:
        """Copies the state to the host, then writes it in the background.

        Raises:
            SaveFailed: when this save, or the one before it, could not be written.
        """
        banks = state.carry.banks
        rest = state._replace(parameters={}, carry=state.carry._replace(banks=()))
        items: dict[str, Any] = {"parameters": state.parameters, "progress": rest}
        if banks:
            items["memory"] = [saved_form(bank, self._index_kind) for bank in banks]
        saves: dict[str, Any] = {name: ocp.args.StandardSave(_without_empty(item)) for name, item in items.items()}
        saves[FINGERPRINTS] = ocp.args.JsonSave({name: fingerprints(item) for name, item in items.items()})
        self._checked(lambda: self._manager.save(step, args=ocp.args.Composite(**saves)))

    def save_parameters(self, step: int, parameters: Parameters) -> None:
        """Saves parameters alone, which can be evaluated and begun from, but not gone on with.

        They may be on the host: no device has to hold more of them than one array.

        Raises:
            SaveFailed: see `save`.
        """
        written: dict[str, int] = {}
        for path, leaf in jax.tree.leaves_with_path(parameters):
            written |= fingerprints({jax.tree_util.keystr(path, simple=True, separator="/"): leaf})
        saves = {
            "parameters": ocp.args.StandardSave(parameters),
            FINGERPRINTS: ocp.args.JsonSave({"parameters": written}),
        }
        self._checked(lambda: self._manager.save(step, args=ocp.args.Composite(**saves)))

    def check(self) -> None:
        """Sees whether the save in the background goes well, without waiting for it or for other processes.

        The others wait for this process's part of it, so it is to end at once, and they notice.

        Raises:
            SaveFailed: when this process could not write its part.
        """
        if self._failure is not None:
            raise save_failed("a checkpoint", self._folder, self._failure) from self._failure

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
            raise save_failed("a checkpoint", self._folder, error) from error

    def restore(self, step: int, like: TrainState, mesh: Mesh, reset_memory: bool = False) -> TrainState:
        """The state saved at `step`, with the shapes, dtypes and placement of `like` (concrete or not).

        A memory of another size is laid out anew: all of it when it grows, the newest tokens when it shrinks. Where
        nothing is saved for a memory of `like`, or with `reset_memory`, it is empty. An index of another search than
        that of `like` is left out: banks then come without one.

        Raises:
            Unreadable: when any process's part of it is damaged.
            ReadFailed: when any process could not read its part for another reason.
        """
        rest = like._replace(parameters={}, carry=like.carry._replace(banks=()))
        items: dict[str, Any] = {"parameters": like.parameters, "progress": rest}
        banks = like.carry.banks
        saved = [] if reset_memory or not banks else self._saved_banks(step, mesh)
        restored = self._restore(step, **items, **({"memory": saved} if saved else {}))
        if saved:
            found = zip(restored["memory"], banks, strict=True)
            banks = tuple(resized(restored_form(each, like, self._index_kind), like, mesh) for each, like in found)
        elif banks:
            banks = init_sharded(mesh, lambda: tuple(map(emptied, banks)), functools.partial(shardings, mesh))
        progress = restored["progress"]
        return progress._replace(parameters=restored["parameters"], carry=progress.carry._replace(banks=banks))

    def has_progress(self, step: int) -> bool:
        """Whether a run can go on from what was saved at `step`: not from parameters alone.

        Raises:
            Unreadable, ReadFailed: see `restore`.
        """
        return self._attempt(step, lambda: "progress" in self._written(step))

    def memory_size(self, step: int) -> int:
        """How many slots the memory saved at `step` has; 0 if none was saved.

        Raises:
            Unreadable, ReadFailed: see `restore`.
        """
        banks = self._saved(step)
        return banks[0]["keys_BHMD"].shape[2] if banks else 0

    def _saved(self, step: int) -> list[dict[str, Any]]:
        """Shape and dtype of what was saved of each bank, by name; none if none were."""

        def read() -> list[dict[str, Any]]:
            if "memory" not in self._written(step):
                return []
            banks: dict[str, dict[str, Any]] = {}
            for path, leaf in jax.tree.leaves_with_path(self._reader.item_metadata(step)["memory"]):
                bank, name = (jax.tree_util.keystr((key,), simple=True) for key in path[-2:])
                banks.setdefault(bank, {})[name] = leaf
            return [banks[bank] for bank in sorted(banks, key=int)]

        return self._attempt(step, read)

    def _saved_banks(self, step: int, mesh: Mesh) -> list[dict[str, jax.ShapeDtypeStruct]]:
        """The banks that were saved, each of their arrays placed where it belongs."""
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), self._saved(step))
        return placed(shapes, shardings(mesh, shapes))

    def parameter_shapes(self, step: int) -> dict[str, Any]:
        """Shape and dtype of the parameters saved at `step`, by their paths (see `by_path`).

        Raises:
            Unreadable, ReadFailed: see `restore`.
        """
        return self._attempt(step, lambda: by_path(self._reader.item_metadata(step)["parameters"]))

    def restore_parameters(self, step: int, like: Parameters) -> Parameters:
        """The parameters alone: for evaluation, which has a carry of its own and no optimizer.

        Raises:
            Unreadable, ReadFailed: see `restore`.
        """
        return self._restore(step, parameters=like)["parameters"]

    def _restore(self, step: int, **items: Any) -> Any:
        restores = {
            name: ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, _without_empty(item)))
            for name, item in items.items()
        }
        restored = self._attempt(step, lambda: self._reader.restore(step, args=ocp.args.Composite(**restores)))

        def fill(like: Any, leaf: Any) -> Any:
            return jnp.zeros(like.shape, like.dtype, device=like.sharding) if leaf is None else leaf

        filled = {name: jax.tree.map(fill, item, restored[name]) for name, item in items.items()}
        found = {name: fingerprints(item) for name, item in filled.items()}  # by all, so not within an attempt
        self._attempt(step, lambda: self._compare(found, self._written(step)))
        return filled

    def _written(self, step: int) -> dict[str, dict[str, int]]:
        """Fingerprints of what was saved at `step`, by item."""
        args = ocp.args.Composite(**{FINGERPRINTS: ocp.args.JsonRestore()})
        return self._reader.restore(step, args=args)[FINGERPRINTS]

    def _compare(self, found: dict[str, dict[str, int]], written: dict[str, dict[str, int]]) -> None:
        for item, arrays in found.items():
            changed = [name for name in arrays if arrays[name] != written[item][name]]
            if changed:
                raise ValueError(
                    f"{len(changed)} of {len(arrays)} arrays in {item} are not what was written, such as {changed[0]}"
                )

    def _attempt[T](self, step: int, read: Callable[[], T]) -> T:
        """What was read, if every process could read it.

        Raises:
            Unreadable, ReadFailed: in all processes alike, see `restore`.
        """
        result, problem = None, None
        try:
            result = read()
        except Exception as error:  # whatever a damaged file makes of a reader
            problem = error
        if all_agree(problem is None):
            return result  # type: ignore[bad-return]
        why = reason(problem) if problem else "another process could not read it"
        if all_agree(problem is None or is_damage(problem)):
            raise CorruptCheckpoint(f"the checkpoint of step {step} in {self._folder} is damaged ({why})") from problem
        raise ReadFailed(
            f"the checkpoint of step {step} in {self._folder} could not be read ({why}). It is left as it is: mend "
            "that, and repeat the command"
        ) from problem

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
            self._reader.close()


@functools.cache
def _hush_orbax() -> None:
    """Keeps what orbax prints of errors off the terminal: it raises the first of them as well."""
    for logger in ("absl", "asyncio"):
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    tell = sys.unraisablehook

    def tell_others(unraisable: Any) -> None:
        """Reads that go on after one has failed find their event loop closed, or are never asked for their error."""
        of_orbax = "orbax" in getattr(getattr(unraisable.object, "cr_code", None), "co_filename", "")
        if not of_orbax and str(unraisable.exc_value) != "Event loop is closed":
            tell(unraisable)

    sys.unraisablehook = tell_others


def _handlers() -> dict[str, ocp.CheckpointHandler]:
    arrays = {name: ocp.StandardCheckpointHandler() for name in ("parameters", "progress", "memory")}
    return {**arrays, FINGERPRINTS: ocp.JsonCheckpointHandler()}


def _without_empty(tree: Any) -> Any:
    """Orbax refuses arrays without elements (an XL cache of length 0): None stands for them."""
    return jax.tree.map(lambda leaf: leaf if leaf.size else None, tree)
