"""Plans a point of a sweep before it runs: checks settings and data, and builds the train and evaluate commands.

`records.py` reads the status of a point from disk.
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from memorizing.config import ConfigError, Experiment, load
from memorizing.data.tokens import PreparedTokens
from memorizing.errors import InputError
from memorizing.evaluation.evaluate import xl_caches
from memorizing.evaluation.splits import open_splits
from memorizing.files import AnyPath, run_folder
from memorizing.runs import CONFIG_FILE, load_trained, open_workdir, training_differences
from memorizing.storage.checkpoints import CHECKPOINTS, steps_on_disk
from memorizing.storage.workdir import check_data, open_tokens
from memorizing.sweep.grid import Point
from memorizing.sweep.records import POINTS


@dataclasses.dataclass(frozen=True)
class SweepRequest:
    """Options that all points of a sweep share.

    Attributes:
        out: folder of the sweep.
        over: swept settings, as `NAME=V1,V2`.
        seeds: number of seeds per point; None for 1.
        run: folder of a trained run to evaluate at each point; None to train each point.
        data: prepared tokens to evaluate on, [NAME=]FOLDER; empty for the training data.
        splits, memory_sizes, xl_cache: values to evaluate with; empty for those of the settings.
        allow_imports: whether gin files may import Python modules.
    """

    out: AnyPath
    gin_files: tuple[str, ...] = ()
    gin_params: tuple[str, ...] = ()
    over: tuple[str, ...] = ()
    seeds: int | None = None
    run: str | None = None
    data: tuple[str, ...] = ()
    splits: tuple[str, ...] = ()
    memory_sizes: tuple[int, ...] = ()
    xl_cache: str | None = None
    allow_imports: bool = False

    def setting_arguments(self, bindings: Iterable[str]) -> list[str]:
        """The gin files and these bindings as arguments."""
        words = [f"--gin_file={file}" for file in self.gin_files] + [f"--gin_param={binding}" for binding in bindings]
        return words + ["--allow_imports"] * self.allow_imports

    def evaluation_arguments(self) -> list[str]:
        """The evaluation options as arguments, except `data`."""
        words = [f"--split={','.join(self.splits)}"] if self.splits else []
        words += [f"--memory_size={','.join(map(str, self.memory_sizes))}"] if self.memory_sizes else []
        return words + ([f"--xl_cache={self.xl_cache}"] if self.xl_cache else [])


class Plan(NamedTuple):
    """A point that has passed its checks.

    Attributes:
        folder: folder for the sweep's own files about the point.
        workdir: folder of its run.
        steps: number of training steps; None if it is only evaluated.
        settings: the run's settings, as gin text.
        planned: expected fields of the figures, for each evaluation.
        train, evaluate: arguments of `memorizing`; `train` is empty if it is only evaluated.
    """

    point: Point
    folder: AnyPath
    workdir: AnyPath
    steps: int | None
    settings: str
    planned: list[dict[str, Any]]
    train: list[str]
    evaluate: list[str]

    def described(self) -> dict[str, Any]:
        """Returns the point as `sweep.json` describes it, without status."""
        is_own, run = self.steps is not None, self.workdir
        return {
            "name": self.point.name,
            "values": self.point.values,
            "seed": self.point.seed,
            "workdir": f"{POINTS}/{self.point.name}"
            if is_own
            else str(run.absolute() if isinstance(run, Path) else run),
            "steps": self.steps,
            "planned": self.planned,
        }


def check_points(points: Sequence[Point], request: SweepRequest, reads_data: bool = True) -> list[Plan]:
    """Returns a plan for each point.

    Args:
        points: points of the grid.
        request: options that they share.
        reads_data: False if the data is not on this machine; each dataset then needs a name.

    Raises:
        InputError: names the point, for impossible settings or data, or two points that are the same.
    """
    plans, seen = [], {}
    for point in points:
        try:
            config, plan = _check(point, request, reads_data)
        except InputError as error:
            raise type(error)(f"point {point.name}: {error}") from error
        same = seen.setdefault((repr(config), point.data), point.name)
        if same != point.name:
            raise InputError(
                f"points {same} and {point.name} have the same settings: another setting overrides what --over changes."
                " Sweep that one (`Memory.size` instead of MEMORY_SIZE, for instance)"
            )
        plans.append(plan)
    return plans


def _check(point: Point, request: SweepRequest, reads_data: bool) -> tuple[Experiment, Plan]:
    folder, bindings = request.out / POINTS / point.name, [*request.gin_params, *point.bindings]
    trains = request.run is None
    if trains:
        workdir = folder
        bindings += [] if point.data is None else [f"Training.data = {point.data!r}"]
        bindings += _seeds(point, load(request.gin_files, bindings)[0])
        config, text = open_workdir(workdir, request.gin_files, bindings, lambda line: None)
        _check_training(workdir, config)
    else:
        workdir = run_folder("--workdir", str(request.run))
        config = load_trained(workdir, request.gin_files, bindings)
        text = (workdir / CONFIG_FILE).read_text()
        if not steps_on_disk(workdir / CHECKPOINTS):
            raise ConfigError(
                f"--workdir={workdir} has no checkpoint yet. Train it first, or leave --workdir out to train each point"
            )
    given = request.setting_arguments(bindings)
    # A run that only reads its memory needs the snapshot that it was trained with.
    snapshot = config.training.prebuilt_memory if config.memory.size and config.memory.writes == "never" else ""
    own_name = f"from-{Path(snapshot).name}" if snapshot else ""
    data, name = _data(point, request, config, reads_data), own_name if trains else _evaluation_name(point, request.out)
    planned = [
        corpus | reading | {"name": name}
        for corpus in _corpora(data, request, config, workdir, reads_data)
        for reading in _evaluations(request, config)
    ]
    evaluate = [
        "evaluate",
        f"--workdir={workdir}",
        *(f"--data={each}" for each in data),
        *request.evaluation_arguments(),
    ]
    # Given for a trained point, too, because its `config.gin` holds the values of its last training.
    readers = [
        f"--gin_param=Evaluation.{name} = {value!r}" for name, value in dataclasses.asdict(config.evaluation).items()
    ]
    evaluate += readers if trains else given
    evaluate += [f"--name={name}"] if name else []
    evaluate += [f"--memory={snapshot}"] if snapshot else []
    train = ["train", *given, f"--workdir={workdir}"] if trains else []
    steps = config.training.steps if trains else None
    return config, Plan(point, folder, workdir, steps, text, planned, train, evaluate)


def _seeds(point: Point, config: Experiment) -> list[str]:
    """Returns the bindings of another seed: other parameters, and another order of documents."""
    seed = config.training.seed if point.seed is None else point.seed
    return [f"Training.seed = {seed}", f"Batch.seed = {config.batch.seed + seed - config.training.seed}"]


def _check_training(workdir: AnyPath, config: Experiment) -> None:
    """Rejects settings that a resumed run may change, but that would change the results of a point that has started.

    Raises:
        ConfigError: names the setting.
    """
    newest = max(steps_on_disk(workdir / CHECKPOINTS), default=0)
    if not newest:
        return
    began, _ = load([], [], saved=workdir / CONFIG_FILE)
    for name, now, before in training_differences(config, began):
        if name.startswith(("Optimizer.", "Memory.")) or (name == "Training.steps" and config.training.steps < newest):
            raise ConfigError(
                f"{name} = {now!r}, but {workdir} was trained with {before!r} to step {newest}: sweep into another "
                "--out, vary it by --over, or leave it as it was"
            )


def _evaluations(request: SweepRequest, config: Experiment) -> list[dict[str, Any]]:
    """Returns the expected fields of the figures of each corpus."""
    sizes = request.memory_sizes or (config.memory.size,)
    memories = [config.with_memory_size(size).memory for size in sizes]
    return [
        {"segment_length": config.batch.segment_length, "memory_size": memory.size, "xl_cache": xl_cache}
        | {"dtype": config.model.dtype, "memory": json.loads(json.dumps(memory.by_name()))}
        for xl_cache in xl_caches(request.xl_cache, config.model.xl_cache)
        for memory in memories
    ]


def _evaluation_name(point: Point, out: AnyPath) -> str:
    """Returns the suffix of evaluation files in the run's folder, which other sweeps of the same run share."""
    return re.sub(r"[^\w.-]", "-", f"{out.name}-{point.name}")


def _data(point: Point, request: SweepRequest, config: Experiment, reads_data: bool) -> list[str]:
    """Returns the `evaluate --data` arguments of a point; empty for the default."""
    if request.data or point.data is None:
        return list(request.data)
    takes_own = request.run is None and not config.evaluation.data and reads_data
    if takes_own and PreparedTokens(Path(point.data)).manifest["source"] == point.corpus:
        return []
    return [f"{point.corpus}={point.data}"]


def _corpora(
    data: Sequence[str], request: SweepRequest, config: Experiment, workdir: AnyPath, reads_data: bool
) -> list[dict[str, str]]:
    """Returns the name in the figures of each corpus and split to evaluate."""
    own, splits = config.evaluation.data or config.training.data, request.splits or (config.evaluation.split,)
    if not reads_data:
        names = [each.partition("=")[0] for each in data]
        if not names or not all("=" in each for each in data):
            raise InputError(
                "data is not on this machine, so it needs names. Use --data NAME=FOLDER, or --over DATA=NAME=FOLDER"
            )
        return [{"corpus": name, "split": split} for name in names for split in splits]
    if request.run is None:
        check_data(workdir, open_tokens(config.training.data, config.model), train=True)
    return [
        {
            "corpus": split.corpus,
            "split": split.name,
            "split_sha256": split.sha256,
        }
        for split in open_splits(data, splits, own, workdir, config.model)
    ]
