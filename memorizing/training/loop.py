"""The training loop: batches -> compiled call -> metrics -> checkpoint.

The metrics of call `n - 1` are read after call `n` was dispatched, so the device never waits for the host. Only before
a checkpoint does the loop wait, to make sure that the state to save is finite.
"""

import signal
from collections.abc import Callable

import jax

from memorizing.data.batches import Prefetcher, batches
from memorizing.data.tokens import PreparedTokens
from memorizing.errors import InputError
from memorizing.files import AnyPath
from memorizing.memory.bank import Bank, size
from memorizing.model.settings import split_sizes
from memorizing.parallel.hosts import Preemption, is_distributed, say
from memorizing.parallel.mesh import assemble, local_rows, open_mesh
from memorizing.storage.checkpoints import Checkpoints, CorruptCheckpoint
from memorizing.storage.init_from import begin_from, record_beginning
from memorizing.storage.train_state import TrainState
from memorizing.storage.workdir import is_first_drop, open_tokens, record_data
from memorizing.training.prebuilt import prebuilt_loader
from memorizing.training.reporter import Reporter, describe
from memorizing.training.settings import RunSettings
from memorizing.training.signals import Interrupted, Signals
from memorizing.training.state import StateFactory


def train(run: RunSettings, workdir: AnyPath, reset_memory: bool = False, say: Callable[[str], None] = say) -> None:
    """Trains to `Training.steps`, resuming from the newest checkpoint in `workdir` if there is one.

    Every process of a run calls it with the same arguments. `reset_memory` resumes with an empty memory.

    Raises:
        InputError: if the data or the devices do not fit the settings.
        NonFiniteLoss: if the loss, the gradient or a parameter became NaN or infinite; earlier checkpoints are intact.
        SaveFailed: if a checkpoint or metrics could not be written; earlier checkpoints are intact.
        CorruptCheckpoint, ReadFailed: see `resume`.
        Interrupted: after SIGTERM or SIGINT. The state was saved, and the same call resumes from it.
    """
    model, training, batch = run.model, run.training, run.batch
    tokens = open_tokens(training.data, model)
    mesh = open_mesh(run.mesh, split_sizes(model, run.memory, batch.segment_length, batch.size))
    factory = StateFactory(run, mesh)
    say(describe(run, factory.abstract_state(training.steps).parameters, mesh, factory.trainable))
    kept = training.checkpoints_kept, training.checkpoint_kept_every
    # In a distributed run JAX handles SIGTERM, for all processes.
    caught = () if is_distributed() else (signal.SIGTERM, signal.SIGINT)
    record = {"settings": run.by_name(), "data": tokens.digests()}
    with Signals(caught) as signals, Checkpoints(workdir, *kept, factory.index_kind(), record) as checkpoints:
        reset_memory = reset_memory and is_first_drop(workdir, checkpoints.latest_step(), say)
        step, state = resume(checkpoints, factory, reset_memory, say)
        if state is None:
            return
        if not step:
            record_data(workdir, tokens)
            if training.init_from:
                source = training.init_from, training.init_step, training.prebuilt_memory
                parameters, beginning = begin_from(*source, model, tokens, state.parameters, say)
                state = state._replace(parameters=parameters)  # the new optimizer state is all zeros in any case
                record_beginning(workdir, beginning)
        prebuilt = prebuilt_loader(run, workdir, tokens, mesh)
        reporter = Reporter(run, workdir, step, mesh)
        try:
            _Loop(factory, tokens, prebuilt, checkpoints, reporter, signals, say).run(step, state)
        finally:
            reporter.close()


class _Loop:
    """Runs the steps of a run, starting from a given state."""

    def __init__(
        self,
        factory: StateFactory,
        tokens: PreparedTokens,
        prebuilt: Callable[[int], tuple[Bank, ...]],
        checkpoints: Checkpoints,
        reporter: Reporter,
        signals: Signals,
        say: Callable[[str], None],
    ):
        self._factory, self._tokens, self._prebuilt, self._checkpoints = factory, tokens, prebuilt, checkpoints
        self._reporter, self._signals, self._say = reporter, signals, say
        self._preemption = Preemption()

    def run(self, step: int, state: TrainState) -> None:
        """Trains to the last step."""
        run, mesh = self._factory.run, self._factory.mesh
        batch, train_call = run.batch, self._factory.train_call()
        rows = local_rows(mesh, batch.size)
        prefetcher = Prefetcher(batches(self._tokens.split("train"), batch, step, rows))
        try:
            while step < run.training.steps:
                state = self._with_scheduled_memory(step, state)
                prebuilt = self._prebuilt(size(state.carry.banks))
                chunk = assemble(mesh, next(prefetcher), batch.size, rows, leading="S")
                with jax.set_mesh(mesh), jax.transfer_guard("disallow"):
                    state, metrics = train_call(state, chunk, prebuilt)
                step += batch.segments_per_call
                self._reporter.dispatched(step, metrics)
                self._checkpoints.check()
                self._signals.has_computed = True
                self._save_if_due(step, state)
        finally:
            prefetcher.close()

    def _with_scheduled_memory(self, step: int, state: TrainState) -> TrainState:
        """Returns the state with a memory of the size that the schedule gives for `step`."""
        before, slots = size(state.carry.banks), self._factory.schedule.at(step)
        if slots == before:
            return state
        change = f"memory grows from {before:,} to {slots:,}" if before else "memory switched on"
        self._say(f"step {step}: {change}")
        return self._factory.grown(state, slots)

    def _save_if_due(self, step: int, state: TrainState) -> None:
        """Saves a checkpoint at its step, at the last step and after a signal, which then ends the run."""
        training = self._factory.run.training
        ended_by = signal.SIGTERM if self._preemption.is_agreed() else self._signals.received
        if step % training.checkpoint_every == 0 or step >= training.steps or ended_by:
            self._reporter.flush()  # raises if the state is not finite, so that it is not saved
            self._reporter.save()
            self._checkpoints.save(step, state)
        if ended_by:
            self._checkpoints.finish()
            raise Interrupted(ended_by, step)


def resume(
    checkpoints: Checkpoints, factory: StateFactory, reset_memory: bool, say: Callable[[str], None]
) -> tuple[int, TrainState | None]:
    """Returns the newest step that can be read and its state; a new state at step 0; no state if all steps are done.

    A damaged checkpoint is set aside, and the one before it is used.

    Raises:
        CorruptCheckpoint: if there are checkpoints, but all are damaged.
        ReadFailed: if the newest checkpoint that is not damaged cannot be read now; it is left as it is.
    """
    steps = factory.run.training.steps
    while (step := checkpoints.latest_step()) is not None:
        if step >= steps:
            say(f"all {steps} steps are done already")
            return step, None
        abstract = factory.abstract_state(step)
        try:
            if not checkpoints.has_progress(step):
                raise InputError(
                    "this run holds only parameters (of `memorizing import`). Start another run from them with "
                    "--gin_param \"Training.init_from = 'RUN'\" --workdir=NEW"
                )
            state = checkpoints.restore(step, abstract, factory.mesh, reset_memory)
            saved_slots = checkpoints.memory_size(step)
        except CorruptCheckpoint as error:
            if len(checkpoints.steps()) == 1:
                raise CorruptCheckpoint(
                    f"{error}, and there is none before it. Repair it, or train a new run in another --workdir"
                ) from error
            renamed = checkpoints.set_aside(step)
            say(f"{error}: it is now {renamed.name}, and the one before it is used")
            continue
        state = factory.indexed(state)
        say(f"resuming after step {step}{_memory_change(saved_slots, size(abstract.carry.banks), reset_memory)}")
        return step, state
    return 0, factory.state()


def _memory_change(saved: int, slots: int, is_reset: bool) -> str:
    """Returns what happens to a saved memory of `saved` slots in one of `slots`; empty if nothing changes."""
    if saved and (is_reset or not slots):
        return f", its memory of {saved:,} tokens dropped"
    if not saved and slots:
        return f", with an empty memory of {slots:,} tokens, since none was saved"
    if saved < slots:
        return f", its memory of {saved:,} tokens moved to one of {slots:,}"
    if saved > slots:
        return f", the newest {slots:,} tokens of its memory of {saved:,} kept"
    return ""
