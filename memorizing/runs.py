"""The settings of a run's folder: what a new run starts with, what a resumed run may change, what a reader reads.

WORKDIR/config.gin    every setting of the run; its first line gives the format of the run's folder
"""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from memorizing.config import FORMAT_VERSION, MEMORY_SECTIONS, ConfigError, Experiment, load
from memorizing.errors import InputError
from memorizing.files import AnyPath, atomic_write, run_folder
from memorizing.memory.search import SEARCHES
from memorizing.memory.settings import WRITING, MemorySettings
from memorizing.parallel.hosts import is_first, wait
from memorizing.storage.checkpoints import has_checkpoint, newest_identity
from memorizing.storage.identity import Identity
from memorizing.training.learning_rate import SCHEDULES

CONFIG_FILE = "config.gin"


def stored_config(workdir: AnyPath) -> Experiment:
    """Returns the settings of the run in `workdir` as its folder has them.

    Raises:
        ConfigError: if the folder was written in the format of another version.
    """
    path = workdir / CONFIG_FILE
    header = re.match(r"# memorizing run, format (\d+)", path.read_text())
    version = int(header[1]) if header else 1
    if version != FORMAT_VERSION:
        raise ConfigError(
            f"{path} is of format {version}, but this version of memorizing reads format {FORMAT_VERSION}. Train the "
            "run again in another --workdir, or read it with the version of memorizing that wrote it"
        )
    return load([], [], saved=path)[0]


def differences(one: Experiment, other: Experiment) -> list[tuple[str, Any, Any]]:
    """Returns the settings that differ, as (name, value in `one`, value in `other`)."""
    return [
        (f"{name}.{field.name}", first, second)
        for name, values in one.sections.items()
        for field in dataclasses.fields(values)
        if (name, field.name) != ("Memory", "options")
        if (first := getattr(values, field.name)) != (second := getattr(other.sections[name], field.name))
    ]


def training_differences(one: Experiment, other: Experiment) -> list[tuple[str, Any, Any]]:
    """Returns the differences that affect training, except the folder of its data."""
    decays = SCHEDULES[one.optimizer.schedule].decays
    return [
        (name, first, second)
        for name, first, second in differences(one, other)
        if name.split(".")[0] in ("Model", "Memory", *MEMORY_SECTIONS, "Batch", "Optimizer", "Training")
        and name != "Training.data"
        and not (name in _FOLDERS and first and second and Path(first).absolute() == Path(second).absolute())
        and (decays or name != "Optimizer.decay_steps")
    ]


_FOLDERS = ("Training.init_from", "Training.prebuilt_memory")
"""Settings that name folders from which a run starts."""

MAY_BE_NEW = {
    *("Model.memory_layers", "Model.gate_bias", "Model.query_scale", "Model.key_shift", "Model.xl_cache"),
    *("Model.gate", "Model.banks_of", "Model.normalize_memory_layers", "Model.index_size"),
    *("Model.dropout", "Model.dtype", "Model.remat", "Model.scan_layers"),
}
"""Model settings that may differ from those of the run in `Training.init_from`: the memory's, and those that do
not change the meaning of parameters."""

MAY_CHANGE = {
    "Training.memory_growth",
    "Training.steps",
    "Training.checkpoint_every",
    "Training.checkpoints_kept",
    "Training.checkpoint_kept_every",
    "Training.metric_writers",
    "Optimizer.learning_rate",
    "Optimizer.warmup_steps",
    "Optimizer.clip_norm",
    "Model.remat",
    "Model.scan_layers",
    # The search and the size of the memory, but not what the memory holds.
    *(f"Memory.{field.name}" for field in dataclasses.fields(MemorySettings)),
    *(f"{kind.section()}.{field.name}" for kind in SEARCHES.values() for field in dataclasses.fields(kind)),
} - {f"Memory.{name}" for name in ("neighbors", "dtype", "key_dtype", *WRITING)}
"""Training settings that may change when a run is resumed. Those of evaluation and preparation always may."""


def open_workdir(
    workdir: AnyPath, files: Sequence[str | Path], bindings: Sequence[str], say: Callable[[str], None] = print
) -> tuple[Experiment, str]:
    """Returns the settings of a run that starts or resumes in `workdir`, and the text for its `config.gin`.

    Without files, a run resumes with the settings that it has. With files, they must be the settings it started with,
    except for `MAY_CHANGE`; `say` reports what changed.

    Raises:
        ConfigError: if settings are missing or wrong, or are not those of the run in `workdir`.
    """
    stored = workdir / CONFIG_FILE
    if not files and not stored.exists() and has_checkpoint(workdir):
        raise ConfigError(
            f"{stored} is missing, but there are checkpoints. Copy it back, or name the settings of the run with "
            "--gin_file; they are compared with those in the newest checkpoint"
        )
    if not files and not stored.exists():
        raise ConfigError(
            f"--workdir={workdir} holds no run yet, and no --gin_file names settings. Try "
            "--gin_file=configs/quickstart.gin"
        )
    saved = saved_config(workdir)
    config, text = load(files, bindings, saved=None if files else stored)
    check_settings(config, workdir, saved, say)
    return config, with_absolute_data(text, config)


def saved_config(workdir: AnyPath) -> Experiment | None:
    """Returns the settings of the run in `workdir` that training would resume; None if there is no checkpoint.

    Raises:
        ConfigError: if the folder was written in the format of another version.
    """
    return stored_config(workdir) if (workdir / CONFIG_FILE).exists() and has_checkpoint(workdir) else None


def check_settings(
    config: Experiment, workdir: AnyPath, saved: Experiment | None, say: Callable[[str], None] = print
) -> None:
    """Checks the settings of a run that starts in `workdir`, or resumes with settings `saved`; `say` reports changes.

    Raises:
        ConfigError: if the run cannot start, or if it changes a setting that must stay the same when a run resumes.
    """
    identity = newest_identity(workdir)
    if saved is None and identity is None:
        try:
            config.check_can_begin()
        except InputError as error:
            raise ConfigError(str(error)) from error
        if config.training.init_from:
            _check_init_from(config)
        return
    changed = [] if saved is None else [(name, repr(a), repr(b)) for name, a, b in training_differences(config, saved)]
    if identity is not None:
        known = {name for name, _, _ in changed}
        changed += [each for each in _unrecorded(config, identity) if each[0] not in known]
    for name, now, before in changed:
        if name not in MAY_CHANGE:
            raise ConfigError(
                f"{name} = {now}, but the run in {workdir} started with {before}. Train in another --workdir, or "
                f'keep it with --gin_param "{name} = {before}"'
            )
        say(f"{name} = {now} from here on; the run started with {before}")


def _unrecorded(config: Experiment, identity: Identity) -> list[tuple[str, str, str]]:
    """Returns the settings that differ from those recorded in a checkpoint, as (name, value, recorded value)."""
    found = []
    for name, before in identity.settings.items():
        section, _, setting = name.rpartition(".")
        if name in (*_FOLDERS, "Training.data") or not hasattr(config.sections.get(section), setting):
            continue
        if name == "Optimizer.decay_steps" and not SCHEDULES[config.optimizer.schedule].decays:
            continue
        if (now := repr(getattr(config.sections[section], setting))) != before:
            found.append((name, now, before))
    return found


def _check_init_from(config: Experiment) -> None:
    """Rejects parameters that would mean something else here. Their shapes are checked when they are read.

    Raises:
        ConfigError: if the run does not exist, or its model is another.
    """
    source = config.training.init_from
    folder = run_folder("Training.init_from", source)
    if not (folder / CONFIG_FILE).exists():
        raise ConfigError(
            f"Training.init_from = {source!r}: the folder does not contain a run (no {CONFIG_FILE}). Give the folder "
            "of a run"
        )
    for name, now, before in differences(config, stored_config(folder)):
        if name.startswith("Model.") and name not in MAY_BE_NEW:
            raise ConfigError(
                f"{name} = {now!r}, but the model of Training.init_from = {source!r} has {before!r}. Only a memory may "
                f'be new. Add --gin_param "{name} = {before!r}"'
            )


@contextlib.contextmanager
def written_config(workdir: AnyPath, text: str) -> Iterator[None]:
    """Writes `config.gin`, and restores the previous one if these settings are rejected before training.

    The first process writes; the others check that the file holds the settings that they were given.

    Raises:
        ConfigError: if the processes of a run differ in their settings, or do not share the workdir.
    """
    before = (workdir / CONFIG_FILE).read_text() if is_first() and (workdir / CONFIG_FILE).exists() else None
    if is_first():
        atomic_write(workdir / CONFIG_FILE, text)
    wait("settings written")
    if not is_first():
        path = workdir / CONFIG_FILE
        if not path.is_file():
            raise ConfigError(
                f"--workdir={workdir}: the first process wrote {CONFIG_FILE} there, but this process does not find it. "
                "Give a folder that all processes share"
            )
        if path.read_text() != text:
            raise ConfigError(
                f"{path} does not hold the settings of this process. Start all processes with the same files and "
                "bindings, in the same folder"
            )
    try:
        yield
    except InputError:
        if before is not None and is_first():
            atomic_write(workdir / CONFIG_FILE, before)
        raise


def with_absolute_data(text: str, config: Experiment) -> str:
    """Returns the text with absolute paths of data, so that the run can be used from any folder."""
    settings = dict(re.findall(r"^([\w.]+) = (.*)$", text, flags=re.MULTILINE))
    folders = {"Training.data": config.training.data, "Evaluation.data": config.evaluation.data}
    folders |= {name: getattr(config.training, name.partition(".")[2]) for name in _FOLDERS}
    for name, folder in folders.items():
        while settings[name].startswith("%"):  # the macro holds the path
            name = settings[name][1:]
        if folder and isinstance(run_folder(name, folder), Path):
            line = f"{name} = {str(Path(folder).absolute())!r}"
            text = re.sub(rf"^{re.escape(name)} = .*$", lambda _, line=line: line, text, flags=re.MULTILINE)
    return text


def load_trained(workdir: AnyPath, files: Sequence[str | Path], bindings: Sequence[str]) -> Experiment:
    """Returns the settings of the run in `workdir`, overridden by files and bindings.

    Raises:
        ConfigError: if there is no run, or the model would not be the one that was trained.
    """
    stored = workdir / CONFIG_FILE
    if not stored.exists():
        raise ConfigError(f"--workdir={workdir} holds no run (no {CONFIG_FILE}). Train one with `memorizing train`")
    trained = stored_config(workdir)
    if (identity := newest_identity(workdir)) is not None:
        for name, now, before in _unrecorded(trained, identity):
            if name not in MAY_CHANGE:
                raise ConfigError(
                    f"{stored} says {name} = {now}, but the checkpoint of step {identity.step} was trained with "
                    f"{before}: the file was edited, or is another run's. Correct the line, or copy the folder again"
                )
    config, _ = load(files, bindings, saved=stored)
    for name, now, before in differences(config, trained):
        if name.startswith("Model.") and name not in ("Model.dtype", "Model.remat", "Model.scan_layers"):
            raise ConfigError(
                f"{name} = {now!r}, but the model in {workdir} was trained with {before!r}. Leave {name} out"
            )
    return config
