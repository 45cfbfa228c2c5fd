"""Checkpoints of a `TrainState`, saved by orbax in the background while training goes on.

A save is written under a temporary name and renamed when complete (in an object store, a marker file is added instead),
so a kill at any moment leaves the previous checkpoint intact. Every process writes the shards of its devices. A
checkpoint can be restored by another number of processes, onto another mesh, and with a memory of another size. A
damaged checkpoint, which cannot be read or fails its checksums (see `fingerprint.py`), is reported and set aside, and
the previous one is used. If the disk, the network or this machine failed, the checkpoint stays and the run ends.

    WORKDIR/checkpoints/STEP/     parameters/    progress/ (optimizer, step, XL caches)    memory/ (banks, if any)
                                  fingerprints/ (of every array, and the run's identity)
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
from memorizing.storage.identity import RECORD, Identity, read_identity
from memorizing.storage.saved_banks import resized, restored_form, saved_form
from memorizing.storage.train_state import TrainState

CHECKPOINTS = "checkpoints"
"""Folder in a workdir with its checkpoints, each in a folder named after its step."""

DAMAGED = ".damaged"
"""Suffix added to the name of a damaged checkpoint when it is set aside."""

FINGERPRINTS = "fingerprints"
"""Item of a checkpoint with the fingerprints of all arrays in its other items."""


class SaveFailed(RuntimeError):
    """Raised if a checkpoint or metrics could not be written; earlier checkpoints are intact."""


def save_failed(what: str, folder: AnyPath, error: Exception) -> SaveFailed:
    """Returns an error that names the failed write, its folder and the checkpoints that are intact."""
    steps = steps_on_disk(folder if folder.name == CHECKPOINTS else folder / CHECKPOINTS)
    kept = f"Checkpoints of steps {', '.join(map(str, steps))} are there" if steps else "No checkpoint is there yet"
    return SaveFailed(
        f"{what} could not be written to {folder} ({reason(error)}). {kept}. Free space or repair the disk, and repeat "
        "the command to go on from the newest, or else from the start"
    )


class CorruptCheckpoint(RuntimeError):
    """Raised if the part of a checkpoint that this process or another one reads is damaged."""


class ReadFailed(OSError):
    """Raised if this process or another one could not read a checkpoint for a reason other than damage."""


def has_checkpoint(workdir: AnyPath) -> bool:
    """Returns True if a run has a complete checkpoint."""
    return bool(steps_on_disk(workdir / CHECKPOINTS))


def steps_on_disk(folder: AnyPath) -> list[int]:
    """Returns the steps of the complete checkpoints in a folder, oldest first."""
    paths = folder.glob("*")
    return sorted(int(path.name) for path in paths if path.name.isdigit() and ocp.utils.is_checkpoint_finalized(path))


def newest_identity(workdir: AnyPath) -> Identity | None:
    """Returns the identity that the newest checkpoint of a run records; None without such a checkpoint."""
    folder = workdir / CHECKPOINTS
    step = max(steps_on_disk(folder), default=None)
    return None if step is None else read_identity(folder / str(step), FINGERPRINTS)


class Checkpoints:
    """The checkpoints of one run, by step. If `keep` is None, they can only be read.

    Args:
        workdir: folder of the run.
        keep: number of newest checkpoints to keep.
        keep_every: also keeps checkpoints at multiples of this step; 0 for none.
        index_kind: number that identifies the search whose index the banks hold; other indexes are not restored.
        record: settings and data of the run, saved with each checkpoint (see `Identity`).
    """

    def __init__(
        self,
        workdir: AnyPath,
        keep: int | None = None,
        keep_every: int = 0,
        index_kind: int = 0,
        record: dict[str, Any] | None = None,
    ):
        self._index_kind, self._record = index_kind, record
        _hush_orbax()
        self._folder = workdir / CHECKPOINTS
        if isinstance(self._folder, Path):
            self._folder = self._folder.absolute()
        # Each process reads by itself. Otherwise processes that could read would wait for one that could not.
        me = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(
            primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"read{me}"
        )
        options = ocp.CheckpointManagerOptions(read_only=True, multiprocessing_options=alone)
        self._reader = self._manager = ocp.CheckpointManager(self._folder, options=options, item_handlers=_handlers())
        self._failure: Exception | None = None
        if keep is not None:
            # The time limit stays at orbax's 20 minutes: large states on slow disks take long, and processes differ.
            options = ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                keep_period=keep_every or None,
                cleanup_tmp_directories=True,
                async_options=ocp.AsyncOptions(barrier_sync_fn=self._wait_unless_failed),
            )
            self._wait = ocp.multihost.get_barrier_sync_fn()
            self._manager = ocp.CheckpointManager(self._folder, options=options, item_handlers=_handlers())
            # Orbax would also poll for preemption, with its own step numbers, and hide the notice from `Preemption`.
            self._manager.reached_preemption = lambda step: False

    def _wait_unless_failed(self, *, key: str, timeout_ms: int) -> None:
        """Waits at a barrier of orbax's threads; after a failed write, raises its error at once.

        Orbax waits in a `finally` even after this process failed to write its part, while the others wait elsewhere.
        """
        error = sys.exception()
        if isinstance(error, Exception) and threading.current_thread() is not threading.main_thread():
            self._failure = error
            raise error
        self._wait(key=key, timeout_ms=timeout_ms)

    def latest_step(self) -> int | None:
        """Returns the step of the newest complete checkpoint; None if there is none."""
        return max(self.steps(), default=None)

    def steps(self) -> list[int]:
        """Returns the steps of all complete checkpoints that the first process sees, oldest first.

        Processes may see different ones, on a disk that shows files late or while the run goes on.
        """
        steps = sorted(self._manager.all_steps())
        count = broadcast_from_first(len(steps))
        return [broadcast_from_first(step) for step in (steps + [0] * count)[:count]]

    def save(self, step: int, state: TrainState) -> None:
        """Copies the state to the host, then writes it in the background.

        Raises:
            SaveFailed: if this save or the one before could not be written.
        """
        banks = state.carry.banks
        rest = state._replace(parameters={}, carry=state.carry._replace(banks=()))
        items: dict[str, Any] = {"parameters": state.parameters, "progress": rest}
        if banks:
            items["memory"] = [saved_form(bank, self._index_kind) for bank in banks]
        saves: dict[str, Any] = {name: ocp.args.StandardSave(_without_empty(item)) for name, item in items.items()}
        written: dict[str, Any] = {name: fingerprints(item) for name, item in items.items()}
        if self._record is not None:
            written[RECORD] = self._record | {"step": step}
        saves[FINGERPRINTS] = ocp.args.JsonSave(written)
        self._checked(lambda: self._manager.save(step, args=ocp.args.Composite(**saves)))

    def save_parameters(self, step: int, parameters: Parameters) -> None:
        """Saves only parameters, to evaluate or for `Training.init_from`; such a checkpoint cannot be resumed.

        Parameters may be on the host: a device holds at most one of their arrays at a time.

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
        """Checks whether the background save failed, without waiting for it or for other processes.

        The others wait for this process's part. They notice a failure only when it ends, so it must end at once.

        Raises:
            SaveFailed: if this process could not write its part.
        """
        if self._failure is not None:
            raise save_failed("a checkpoint", self._folder, self._failure) from self._failure

    def finish(self) -> None:
        """Waits until everything is written.

        Raises:
            SaveFailed: if something could not be written.
        """
        self._checked(self._manager.wait_until_finished)

    def _checked(self, write: Callable[[], Any]) -> None:
        try:
            write()
        except Exception as error:  # disks, tensorstore and object stores raise different errors
            raise save_failed("a checkpoint", self._folder, error) from error

    def restore(self, step: int, like: TrainState, mesh: Mesh, reset_memory: bool = False) -> TrainState:
        """Returns the state saved at `step`, with the shapes, dtypes and placement of `like` (concrete or abstract).

        A memory of another size is laid out again: a larger one holds all tokens, a smaller one the newest. It is empty
        if no memory was saved, or with `reset_memory`. An index that another search built is not restored: the banks
        then have no index.

        Raises:
            CorruptCheckpoint: if the part of any process is damaged.
            ReadFailed: if any process could not read its part for another reason.
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
        """Returns True if a run can resume from `step`; False if only parameters were saved.

        Raises:
            CorruptCheckpoint, ReadFailed: see `restore`.
        """
        return self._attempt(step, lambda: "progress" in self._written(step))

    def memory_size(self, step: int) -> int:
        """Returns the number of slots of the memory saved at `step`; 0 without a memory.

        Raises:
            CorruptCheckpoint, ReadFailed: see `restore`.
        """
        banks = self._saved(step)
        return banks[0]["keys_BHMD"].shape[2] if banks else 0

    def _saved(self, step: int) -> list[dict[str, Any]]:
        """Returns shapes and dtypes of each saved bank's arrays, by name; an empty list without banks."""

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
        """Returns the abstract arrays of the saved banks, with their shardings on the mesh."""
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), self._saved(step))
        return placed(shapes, shardings(mesh, shapes))

    def parameter_shapes(self, step: int) -> dict[str, Any]:
        """Returns shapes and dtypes of the parameters saved at `step`, by path (see `by_path`).

        Raises:
            CorruptCheckpoint, ReadFailed: see `restore`.
        """
        return self._attempt(step, lambda: by_path(self._reader.item_metadata(step)["parameters"]))

    def restore_parameters(self, step: int, like: Parameters) -> Parameters:
        """Returns only the parameters; evaluation has its own carry and no optimizer.

        Raises:
            CorruptCheckpoint, ReadFailed: see `restore`.
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
        # All processes must compute fingerprints together, so this stays outside `_attempt`.
        found = {name: fingerprints(item) for name, item in filled.items()}
        self._attempt(step, lambda: self._compare(found, self._written(step)))
        return filled

    def _written(self, step: int) -> dict[str, dict[str, int]]:
        """Returns the fingerprints saved at `step`, by item.

        Raises:
            ValueError: if this is a copy of the checkpoint of another step.
        """
        args = ocp.args.Composite(**{FINGERPRINTS: ocp.args.JsonRestore()})
        written = self._reader.restore(step, args=args)[FINGERPRINTS]
        if (saved := written.get(RECORD, {}).get("step", step)) != step:
            raise ValueError(f"it is a copy of the checkpoint of step {saved}")
        return written

    def _compare(self, found: dict[str, dict[str, int]], written: dict[str, dict[str, int]]) -> None:
        for item, arrays in found.items():
            changed = [name for name in arrays if arrays[name] != written[item][name]]
            if changed:
                raise ValueError(
                    f"{len(changed)} of {len(arrays)} arrays in {item} are not what was written, such as {changed[0]}"
                )

    def _attempt[T](self, step: int, read: Callable[[], T]) -> T:
        """Returns the result of a read if every process could read its part.

        Raises:
            CorruptCheckpoint, ReadFailed: the same one in every process, see `restore`.
        """
        result, problem = None, None
        try:
            result = read()
        except Exception as error:  # a damaged file can make a reader raise anything
            problem = error
        if all_agree(problem is None):
            return result  # type: ignore[bad-return]
        why = reason(problem) if problem else "another process could not read it"
        if all_agree(problem is None or is_damage(problem)):
            raise CorruptCheckpoint(f"the checkpoint of step {step} in {self._folder} is damaged ({why})") from problem
        raise ReadFailed(
            f"the checkpoint of step {step} in {self._folder} could not be read ({why}). It stays as it is. Fix the "
            "cause and repeat the command"
        ) from problem

    def set_aside(self, step: int) -> AnyPath:
        """Renames the checkpoint of `step`, which is then ignored but not lost, and returns its new path."""
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
        """Waits until everything is written; after an error, raises that error."""
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
    """Silences the errors that orbax prints; it raises the first of them anyway."""
    for logger in ("absl", "asyncio"):
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    tell = sys.unraisablehook

    def tell_others(unraisable: Any) -> None:
        """Ignores errors of orbax's leftover reads, which continue after another read failed."""
        of_orbax = "orbax" in getattr(getattr(unraisable.object, "cr_code", None), "co_filename", "")
        if not of_orbax and str(unraisable.exc_value) != "Event loop is closed":
            tell(unraisable)

    sys.unraisablehook = tell_others


def _handlers() -> dict[str, ocp.CheckpointHandler]:
    arrays = {name: ocp.StandardCheckpointHandler() for name in ("parameters", "progress", "memory")}
    return {**arrays, FINGERPRINTS: ocp.JsonCheckpointHandler()}


def _without_empty(tree: Any) -> Any:
    """Returns the tree with None for arrays without elements (an XL cache of length 0), which orbax rejects."""
    return jax.tree.map(lambda leaf: leaf if leaf.size else None, tree)
