"""The commands `train`, `evaluate` and `generate` for Python programs: `from memorizing import train`."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Literal

import jax

from memorizing.config import Experiment, load, settings_text
from memorizing.evaluation import evaluate as evaluation
from memorizing.evaluation.perplexity import TrainedModel
from memorizing.evaluation.splits import open_splits
from memorizing.files import AnyPath, run_folder
from memorizing.generation.reader import Reader
from memorizing.memory.bank import Bank
from memorizing.memory.settings import MemorySettings
from memorizing.model.settings import split_sizes
from memorizing.parallel import hosts
from memorizing.parallel.mesh import MeshSettings, open_mesh
from memorizing.runs import check_settings, load_trained, saved_config, with_absolute_data, written_config
from memorizing.storage.init_from import snapshot_owner
from memorizing.storage.prebuilt import prebuilt_banks
from memorizing.storage.snapshots import check_not_empty
from memorizing.storage.workdir import check_data, held_run, open_tokens, open_vocabulary
from memorizing.training import loop
from memorizing.training.settings import RunSettings


def load_settings(gin_files: Sequence[str | Path], gin_params: Sequence[str] = ()) -> Experiment:
    """Returns the settings of gin files and bindings, such as `"MEMORY_SIZE = 8192"`; later values win.

    The result holds a dataclass per gin section (`.model`, `.memory`, `.batch`, `.optimizer`, `.training`, ...).
    Change them with `dataclasses.replace`.

    Raises:
        ConfigError: for a setting that is unknown, of the wrong type or impossible.
    """
    return load(gin_files, gin_params)[0]


def train(
    run: RunSettings, workdir: str | AnyPath, reset_memory: bool = False, say: Callable[[str], None] = hosts.say
) -> None:
    """Trains a model, or resumes from the newest checkpoint in `workdir`, as `memorizing train` does.

    Args:
        run: settings, from `load_settings` or made in Python.
        workdir: folder for settings, checkpoints and metrics, or gs://BUCKET/RUN.
        reset_memory: whether to resume with an empty memory.
        say: receives progress messages.

    Raises:
        InputError: if settings, data and devices do not fit, or another process trains there.
        NonFiniteLoss, SaveFailed, CorruptCheckpoint, ReadFailed, Interrupted: see `training.loop.train`.
    """
    workdir = run_folder("--workdir", str(workdir))
    config = run if isinstance(run, Experiment) else Experiment(**{f.name: getattr(run, f.name) for f in fields(run)})
    check_settings(config, workdir, saved_config(workdir), say)
    train_in(workdir, config, with_absolute_data(settings_text(config), config), reset_memory, say)


def train_in(
    workdir: AnyPath, config: Experiment, text: str, reset_memory: bool, say: Callable[[str], None] = hosts.say
) -> None:
    """Trains in a folder with checked settings, whose gin text it writes there (see `runs.open_workdir`)."""
    check_data(workdir, open_tokens(config.training.data, config.model), train=True)
    batch = config.batch
    open_mesh(config.mesh, split_sizes(config.model, config.memory, batch.segment_length, batch.size))
    with held_run(workdir), written_config(workdir, text):
        loop.train(config, workdir, reset_memory, say)


def open_reader(
    workdir: str | AnyPath,
    memory_size: int | None = None,
    gin_files: Sequence[str] = (),
    gin_params: Sequence[str] = (),
    say: Callable[[str], None] = lambda text: None,
) -> Reader:
    """Returns a `Reader` with the newest checkpoint of a run and an empty memory.

    The run's folder is enough: it holds the vocabulary. The reader has a batch size of 1, so it uses as many devices
    as the run splits a model over (`Mesh.model`).

    Args:
        workdir: folder of the run, or gs://BUCKET/RUN.
        memory_size: size of the memory, in tokens; None for that of training.
        gin_files, gin_params: settings that override those of the run.
        say: receives progress messages.

    Raises:
        InputError: when something is missing or does not fit.
    """
    workdir = run_folder("--workdir", str(workdir))
    config = load_trained(workdir, gin_files, gin_params)
    run = config.with_memory_size(config.memory.size if memory_size is None else memory_size)
    tokens = open_vocabulary(workdir)
    segment, devices = run.batch.segment_length, jax.local_devices()[: run.mesh.model]
    mesh = open_mesh(MeshSettings(1, run.mesh.model), split_sizes(run.model, run.memory, segment, 1), devices=devices)
    parameters, step = evaluation.restore(workdir, run.model, mesh)
    source = snapshot_owner(workdir, run.model, segment, tokens, parameters, step)
    return Reader(source, run.memory, parameters, tokens.vocabulary, config.folder, mesh, say)


@dataclasses.dataclass(frozen=True)
class EvaluationRequest:
    """Choices of an evaluation.

    Attributes:
        memory_sizes: memory sizes, in tokens; empty for that of training.
        data: folders of prepared tokens, as `DIR` or `NAME=DIR`; empty for `Evaluation.data`, or the training data.
        splits: splits of the data; empty for `Evaluation.split`.
        xl_cache: whether to use the XL cache; None for as in training.
        snapshot: folder of a memory snapshot with which each document starts; None for an empty memory.
        per_token: whether to also write the loss of every token.
        name: suffix of the files, to keep those of other settings.
    """

    memory_sizes: tuple[int, ...] = ()
    data: tuple[str, ...] = ()
    splits: tuple[str, ...] = ()
    xl_cache: Literal["on", "off", "both"] | None = None
    snapshot: Path | None = None
    per_token: bool = False
    name: str = ""


def evaluate(
    workdir: str | AnyPath,
    request: EvaluationRequest = EvaluationRequest(),
    gin_files: Sequence[str] = (),
    gin_params: Sequence[str] = (),
    say: Callable[[str], None] = lambda text: None,
) -> list[dict]:
    """Evaluates a run's newest checkpoint over whole documents; writes and returns the figures.

    Args:
        workdir: folder of the run, or gs://BUCKET/RUN; the files go to its folder `evaluations`.
        request: what to measure.
        gin_files, gin_params: settings that override those of the run.
        say: receives a line for each result.

    Returns:
        A dictionary per corpus, split, XL cache and memory size, smallest memory first (see `evaluation/figures.py`).

    Raises:
        InputError: when something is missing or does not fit.
    """
    workdir = run_folder("--workdir", str(workdir))
    config = load_trained(workdir, gin_files, gin_params)
    memories = [config.with_memory_size(size).memory for size in request.memory_sizes or [config.memory.size]]
    _check_memory_at_start(config, memories, request.snapshot, say)
    segment, batch_size = config.batch.segment_length, config.evaluation.batch_size
    meshes = [
        open_mesh(config.mesh, split_sizes(config.model, memory, segment, batch_size, "Evaluation.batch_size"))
        for memory in memories
    ]
    default = config.evaluation.data or config.training.data
    splits = open_splits(request.data, request.splits or [config.evaluation.split], default, workdir, config.model)
    parameters, step = evaluation.restore(workdir, config.model, meshes[0])
    name = request.name
    prebuilt: list[tuple[Bank, ...]] = [()] * len(memories)
    if request.snapshot:
        source = snapshot_owner(workdir, config.model, segment, splits[0].tokens, parameters, step)
        prebuilt = [
            prebuilt_banks(request.snapshot, source, memory, mesh) if memory.size or len(memories) == 1 else ()
            for memory, mesh in zip(memories, meshes, strict=True)
        ]
        name = name or f"from-{request.snapshot.name}"
    cases = evaluation.evaluation_cases(
        splits,
        zip(memories, meshes, prebuilt, strict=True),
        evaluation.xl_caches(request.xl_cache, config.model.xl_cache),
        name,
    )
    trained = TrainedModel(config.model, config.memory, segment, parameters)
    run = evaluation.RestoredRun(workdir, trained, step)
    return evaluation.evaluate(run, cases, config.evaluation, request.per_token, say)


def _check_memory_at_start(
    config: Experiment, memories: Sequence[MemorySettings], snapshot: Path | None, say: Callable[[str], None]
) -> None:
    """Rejects memories that would stay empty, and says how documents begin where training differs.

    Raises:
        InputError: when nothing is written to a memory and no snapshot fills it.
    """
    trained_with = config.training.prebuilt_memory
    if not snapshot:
        for memory in memories:
            check_not_empty(memory, f"name it with --memory={trained_with or 'DIR'}")
        if trained_with:
            say(f"documents start with an empty memory; in training, with {trained_with} (--memory=DIR)")
    if config.memory.size and not config.memory.clear_at_documents:
        say("each document has a memory of its own; in training, memory outlasts them (Memory.clear_at_documents)")
