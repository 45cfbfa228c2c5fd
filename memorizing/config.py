"""Gin files and bindings to frozen dataclasses: the only file that imports gin.

Each dataclass below is known to gin by its short name: `Model.layers = 12`. Gin itself lets a misspelt macro and a
wrong type pass; here both are refused, and so are combinations that no single dataclass can judge.
"""

import contextlib
import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import gin
from beartype.door import is_bearable

from memorizing.data.batches import BatchSettings
from memorizing.data.bulk import BeamSettings
from memorizing.data.corpora.arxiv import Arxiv
from memorizing.data.corpora.c4 import C4
from memorizing.data.corpora.github import Github
from memorizing.data.corpora.isabelle import Isabelle
from memorizing.data.corpora.pg19 import Pg19
from memorizing.data.documents import FolderSettings
from memorizing.data.recall import RecallSettings
from memorizing.data.settings import PrepareSettings
from memorizing.errors import InputError
from memorizing.evaluation.evaluate import at_memory_size
from memorizing.evaluation.perplexity import EvaluationSettings
from memorizing.files import AnyPath, atomic_write, run_folder
from memorizing.memory.search.proposed import is_worth_it
from memorizing.memory.settings import WRITING, MemorySettings
from memorizing.model.settings import ModelSettings
from memorizing.parallel.hosts import is_first, wait
from memorizing.parallel.mesh import MeshSettings
from memorizing.storage.checkpoints import has_checkpoint
from memorizing.training.optimizer import OptimizerSettings
from memorizing.training.schedule import memory_schedule
from memorizing.training.settings import TrainingSettings

CONFIG_FILE = "config.gin"


class ConfigError(InputError):
    """A setting that cannot be; the message names it, its value and a way out."""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """All settings of a run. Creating one checks them against each other."""

    model: ModelSettings = dataclasses.field(default_factory=ModelSettings)
    memory: MemorySettings = dataclasses.field(default_factory=MemorySettings)
    batch: BatchSettings = dataclasses.field(default_factory=BatchSettings)
    optimizer: OptimizerSettings = dataclasses.field(default_factory=OptimizerSettings)
    training: TrainingSettings = dataclasses.field(default_factory=TrainingSettings)
    evaluation: EvaluationSettings = dataclasses.field(default_factory=EvaluationSettings)
    prepare: PrepareSettings = dataclasses.field(default_factory=PrepareSettings)
    folder: FolderSettings = dataclasses.field(default_factory=FolderSettings)
    recall: RecallSettings = dataclasses.field(default_factory=RecallSettings)
    pg19: Pg19 = dataclasses.field(default_factory=Pg19)
    arxiv: Arxiv = dataclasses.field(default_factory=Arxiv)
    github: Github = dataclasses.field(default_factory=Github)
    isabelle: Isabelle = dataclasses.field(default_factory=Isabelle)
    c4: C4 = dataclasses.field(default_factory=C4)
    beam: BeamSettings = dataclasses.field(default_factory=BeamSettings)
    mesh: MeshSettings = dataclasses.field(default_factory=MeshSettings)

    @property
    def sources(self) -> dict[str, Any]:
        """Settings of what documents can come from, by the names that `Prepare.source` has for them."""
        names = ("folder", "recall", "pg19", "arxiv", "github", "isabelle", "c4")
        return {name: getattr(self, name) for name in names}

    def with_memory_size(self, size: int) -> "Experiment":
        """As a trained model is read with another `Memory.size` (see `at_memory_size`), checked against all settings.

        Each document then begins with an empty memory, and a memory that grew in training has this size throughout.
        """
        memory = dataclasses.replace(at_memory_size(self.memory, size), clear_at_documents=True)
        return dataclasses.replace(self, memory=memory, training=dataclasses.replace(self.training, memory_growth=()))

    def __post_init__(self):
        segment, call = self.batch.segment_length, self.batch.segments_per_call
        check_memory_size(self.memory.size, segment)
        self._check_writing()
        self.model.check_segment_length(segment, self.memory.size > 0 and self.memory.writes == "beyond_cache")
        if self.memory.size and not self.model.memory_layers:
            raise ConfigError(
                f"Memory.size = {self.memory.size}, but Model.memory_layers = () has no layer to use it: name a "
                "layer, or set Memory.size = 0"
            )
        if self.memory.size and self.training.memory_from_step >= self.training.steps:
            raise ConfigError(
                f"Training.memory_from_step = {self.training.memory_from_step} is not before the end, Training.steps = "
                f"{self.training.steps}, so the memory of {self.memory.size} would never be used: switch it on "
                "earlier, train for longer, or set Memory.size = 0"
            )
        self._check_growth()
        if self.training.negative_rows >= self.batch.size:
            raise ConfigError(
                f"Training.negative_rows = {self.training.negative_rows}: a row has {self.batch.size - 1} others "
                f"(Batch.size = {self.batch.size}): use at most so many, or more rows"
            )
        steps = {name: getattr(self.training, name) for name in ("steps", "checkpoint_every", "memory_from_step")}
        growth = {f"memory_growth[{place}]": step for place, (step, _) in enumerate(self.training.memory_growth)}
        for name, value in (steps | growth).items():
            if value % call:
                raise ConfigError(
                    f"Training.{name} = {value} is not a multiple of Batch.segments_per_call = {call}, the steps "
                    f"of one compiled call: {value // call * call} or {(value // call + 1) * call} would be"
                )

        kept, every = self.training.checkpoint_kept_every, self.training.checkpoint_every
        if kept % every:
            raise ConfigError(
                f"Training.checkpoint_kept_every = {kept} is not a multiple of Training.checkpoint_every = {every}, so "
                f"not all of those steps would be saved: use {(kept // every + 1) * every}"
            )

    def _check_growth(self) -> None:
        """What the memory grows through has to be a memory that the other settings allow."""
        try:
            memory_schedule(self.memory, self.training)
        except InputError as error:
            raise ConfigError(str(error)) from error
        if self.memory.uses_slot_table and len(self.training.memory_growth) > 1:
            raise ConfigError(
                f"Training.memory_growth = {self.training.memory_growth}: only a memory of the newest tokens can "
                "grow, not with these settings of what is kept (Memory.eviction, sink, duplicate_score, writes, "
                "clear_at_documents)"
            )
        is_given_once = self.memory.writes == "never" and not self.memory.clear_at_documents
        if is_given_once and len(self.training.memory_growth) > 1:
            raise ConfigError(
                f"Training.memory_growth = {self.training.memory_growth} with Memory.writes = 'never' and "
                "Memory.clear_at_documents = False: rows get the prebuilt memory once, so that it would stay as small "
                "as it began: set Training.memory_growth = ()"
            )
        for first, slots in self.training.memory_growth if self.memory.size else ():
            try:
                small = dataclasses.replace(self.memory, size=slots)
                dataclasses.replace(self, memory=small, training=dataclasses.replace(self.training, memory_growth=()))
            except InputError as error:
                raise ConfigError(f"Training.memory_growth = {self.training.memory_growth}: {error}") from error
            if first >= self.training.steps:
                raise ConfigError(
                    f"Training.memory_growth = {self.training.memory_growth}: step {first} is not before the end, "
                    f"Training.steps = {self.training.steps}: grow earlier, or train for longer"
                )

    def _check_writing(self) -> None:
        """What the memory is to keep against how documents are read."""
        memory, segment = self.memory, self.batch.segment_length
        if not memory.size:
            return
        if segment % memory.write_every:
            raise ConfigError(
                f"Memory.write_every = {memory.write_every} does not divide Batch.segment_length = {segment}, so that "
                "segments would be written unevenly: use a number that does"
            )
        if memory.writes == "beyond_cache" and not self.model.xl_cache:
            raise ConfigError(
                "Memory.writes = 'beyond_cache' keeps what falls out of the XL cache, but Model.xl_cache = False: use "
                "'segment', or an XL cache"
            )
        if memory.writes == "beyond_cache" and memory.maximum_age is not None and memory.maximum_age <= segment:
            raise ConfigError(
                f"Memory.maximum_age = {memory.maximum_age} with Memory.writes = 'beyond_cache': tokens are older than "
                f"Batch.segment_length = {segment} when they come to the memory, so none would count: use more"
            )
        if memory.sink + segment // memory.write_every > memory.size:
            raise ConfigError(
                f"Memory.sink = {memory.sink} leaves no room for a segment in Memory.size = {memory.size}: use at most "
                f"{memory.size - segment // memory.write_every}, or a larger memory"
            )


def check_memory_size(size: int, segment_length: int) -> None:
    """Refuses a memory that segments do not fill evenly."""
    if size % segment_length:
        below, above = size // segment_length * segment_length, (size // segment_length + 1) * segment_length
        raise ConfigError(
            f"Memory.size = {size} is not a multiple of Batch.segment_length = {segment_length}, so a segment's "
            f"write would wrap around: use {above}" + (f" or {below}" if below else "")
        )


SECTIONS: dict[str, Any] = {field.name.capitalize(): field.type for field in dataclasses.fields(Experiment)}
for _name, _class in SECTIONS.items():
    gin.external_configurable(_class, name=_name)


def load(files: Sequence[str | AnyPath], bindings: Sequence[str]) -> tuple[Experiment, str]:
    """Settings from gin files, then bindings (`'MEMORY_SIZE = 8192'`), later ones winning; and the whole as a gin file.

    That text holds every setting, defaults included, and the macros: it makes the same `Experiment` again.

    Raises:
        ConfigError: for anything unknown, misspelt, of the wrong type or impossible.
    """
    gin.clear_config()
    for file in files:
        if isinstance(file, str | Path) and not Path(file).is_file():
            raise ConfigError(f"--gin_file={file}: no such file")
    mentioned = _mentions("\n".join(bindings))
    try:
        for file in files:
            mentioned |= _parse(file)
        gin.parse_config(list(bindings))
        bound = {name: gin.get_bindings(name) for name in SECTIONS}
    except RecursionError as error:
        raise ConfigError("a macro or setting refers to itself: give one in the circle a plain value") from error
    except (ValueError, TypeError, SyntaxError, OSError) as error:
        raise ConfigError(_explain(str(error))) from error
    _refuse_unused_macros(mentioned)
    sections = {name.lower(): _build(name, values) for name, values in bound.items()}
    experiment = Experiment(**sections)
    return experiment, _resolved(experiment)


def _build(name: str, values: dict[str, Any]) -> Any:
    """One dataclass, once its values have the annotated types."""
    for field in dataclasses.fields(SECTIONS[name]):
        if field.name not in values:
            continue
        value, wanted = values[field.name], field.type
        wants_float = wanted is float or float in get_args(wanted)
        if wants_float and isinstance(value, int) and not isinstance(value, bool):
            value = values[field.name] = float(value)
        if isinstance(value, list):
            value = values[field.name] = tuple(tuple(each) if isinstance(each, list) else each for each in value)
        is_bool = isinstance(value, bool) and wanted is not bool
        if is_bool or not is_bearable(value, wanted):  # type: ignore[arg-type]
            raise ConfigError(f"{name}.{field.name} = {value!r}: must be {_describe(wanted)}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{name}.{field.name} = {value!r}: must be finite")
    try:
        return SECTIONS[name](**values)
    except InputError as error:
        raise ConfigError(str(error)) from error


def _describe(wanted: Any) -> str:
    if getattr(wanted, "__name__", "") == "Literal" or "Literal" in str(wanted):
        return "one of " + ", ".join(repr(value) for value in get_args(wanted))
    names = {int: "a whole number", float: "a number", bool: "True or False", str: "text in quotes"}
    if wanted in names:
        return names[wanted]
    if get_args(wanted) and get_args(wanted)[-1] is type(None):
        return f"{_describe(get_args(wanted)[0])} or None"
    if tuple[int, int] in get_args(wanted):
        return "pairs of whole numbers such as ((0, 512), (1000, 8192))"
    if tuple[str, int | float] in get_args(wanted):
        return "pairs of a name and a number such as (('gates', 16.0),)"
    return f"a tuple such as {'(3,)' if int in get_args(wanted) else repr(('.txt',))}"


def _explain(message: str) -> str:
    """Gin's own message with what it could have meant."""
    unknown = re.search(r"No configurable matching '([^']*)'", message)
    if unknown:
        return f"{message}\n  there is no {unknown[1]!r}; {_nearest(unknown[1], list(SECTIONS))}"
    parameter = re.search(r"Configurable '([^']*)' doesn't have a parameter named '([^']*)'", message)
    if parameter:
        names = [field.name for field in dataclasses.fields(SECTIONS[parameter[1]])]
        return f"{message}\n  {parameter[1]} has no setting {parameter[2]!r}; {_nearest(parameter[2], names)}"
    macro = re.search(r"No bindings specified for '(\w+)/gin.macro'|'macro' .* in scope '(\w+)'", message)
    if macro:
        name = macro[1] or macro[2]
        return f"the macro %{name} is used but never set; add `{name} = VALUE`, or include configs/base.gin"
    return message + "\n  write settings as 'Section.name = value' or 'MACRO = value', text in quotes"


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else "known are " + ", ".join(known)


def _macros(text: str) -> dict[str, str]:
    return dict(re.findall(r"^(\w+) = (.*(?:\n    .*)*)", text, flags=re.MULTILINE))


def _mentions(text: str) -> set[str]:
    return set(re.findall(r"%(\w+)", text))


def _mentioned(parsed: Any) -> set[str]:
    """The macros that a parsed gin file refers to, or one that it includes."""
    return _mentions(Path(parsed.filename).read_text()).union(*map(_mentioned, parsed.includes))


def _parse(file: str | AnyPath) -> set[str]:
    """Reads a gin file; gives the macros that it refers to."""
    if not isinstance(file, str | Path):  # a run's own in an object store, which includes no others
        text = file.read_text()
        gin.parse_config(text)
        return _mentions(text)
    with contextlib.chdir(Path(file).parent):  # what it includes is named from its own folder
        return _mentioned(gin.parse_config_file(Path(file).name))


def _refuse_unused_macros(mentioned: set[str]) -> None:
    """Only of macros that no setting ever referred to: `Memory.size = 512` may leave base.gin's macro unused."""
    scoped = re.search(r"^(?:\w+/)+(\w+\.\w+) = ", gin.config_str(), flags=re.MULTILINE)
    if scoped:
        raise ConfigError(f"{scoped[0]}...: settings have no scopes here; write {scoped[1]} = ...")
    given, used = _macros(gin.config_str()), _macros(gin.operative_config_str())
    for name in sorted(given.keys() - used.keys() - mentioned):
        raise ConfigError(
            f"the macro {name} = {given[name]} is used by no setting (misspelt?); {_nearest(name, sorted(used))}"
        )


def _resolved(experiment: Experiment) -> str:
    """Every setting of the experiment as gin text; macros stay macros, so that they can be overridden later."""
    text, used = gin.config_str(max_line_length=10_000), _macros(gin.operative_config_str())
    bound = dict(re.findall(r"^(\w+\.\w+) = (.*)$", text, flags=re.MULTILINE))
    lines = ["# Every setting of this run, defaults included. Written by memorizing; read again by --workdir.", ""]
    lines += [f"{name} = {value}" for name, value in _macros(text).items() if name in used]
    for section in dataclasses.fields(Experiment):
        name, values = section.name.capitalize(), getattr(experiment, section.name)
        lines.append("")
        for field in dataclasses.fields(values):
            full = f"{name}.{field.name}"
            literal = repr(getattr(values, field.name))
            lines.append(f"{full} = {bound[full] if '%' in bound.get(full, '') else literal}")
    return "\n".join(lines) + "\n"


def differences(one: Experiment, other: Experiment) -> list[tuple[str, Any, Any]]:
    """Settings that differ, as (name, value in `one`, value in `other`)."""
    return [
        (f"{section.name.capitalize()}.{field.name}", first, second)
        for section in dataclasses.fields(Experiment)
        for field in dataclasses.fields(getattr(one, section.name))
        if (first := getattr(getattr(one, section.name), field.name))
        != (second := getattr(getattr(other, section.name), field.name))
    ]


def training_differences(one: Experiment, other: Experiment) -> list[tuple[str, Any, Any]]:
    """Those of `differences` that matter to a training, but for where its data lies."""
    decays = one.optimizer.schedule in ("cosine", "linear")
    return [
        (name, first, second)
        for name, first, second in differences(one, other)
        if name.split(".")[0] in ("Model", "Memory", "Batch", "Optimizer", "Training")
        and name != "Training.data"
        and not (name in _FOLDERS and first and second and Path(first).absolute() == Path(second).absolute())
        and (decays or name != "Optimizer.decay_steps")
    ]


_FOLDERS = ("Training.init_from", "Training.prebuilt_memory")
"""Settings that name folders which a run needs to begin."""

MAY_BE_NEW = {
    *("Model.memory_layers", "Model.gate_bias", "Model.query_scale", "Model.key_shift", "Model.xl_cache"),
    *("Model.gate", "Model.banks_of", "Model.normalize_memory_layers", "Model.index_size"),
    *("Model.dropout", "Model.dtype", "Model.remat", "Model.scan_layers"),
}
"""Settings of a model that may be others than those of the run whose parameters it begins with: a memory's, and such as
do not change what parameters mean."""

MAY_CHANGE = {
    "Training.memory_growth",
    "Training.steps",
    "Training.checkpoint_every",
    "Training.checkpoints_kept",
    "Training.checkpoint_kept_every",
    "Optimizer.learning_rate",
    "Optimizer.warmup_steps",
    "Optimizer.clip_norm",
    "Model.remat",
    "Model.scan_layers",
    # How the memory is searched, and how large it is; but not what lies in it.
    *(f"Memory.{field.name}" for field in dataclasses.fields(MemorySettings)),
} - {f"Memory.{name}" for name in ("neighbors", "dtype", "key_dtype", *WRITING)}
"""Settings with which a run may go on although it began with others; so may those of evaluation and preparation."""


def open_workdir(
    workdir: AnyPath, files: Sequence[str | Path], bindings: Sequence[str], say: Callable[[str], None] = print
) -> tuple[Experiment, str]:
    """The settings of a run that is to start or to go on in `workdir`, and the text for its `config.gin`.

    Without files a run goes on with the settings it has. With files they must be those that it began with, but for
    `MAY_CHANGE`; what has changed is said.

    Raises:
        ConfigError: when settings are missing, wrong, or not those of the run in `workdir`.
    """
    stored = workdir / CONFIG_FILE
    has_begun = stored.exists() and has_checkpoint(workdir)
    if not has_begun:
        if not files and not stored.exists():
            raise ConfigError(
                f"--workdir={workdir} holds no run yet, and no --gin_file says what to train: try "
                "--gin_file=configs/quickstart.gin"
            )
        experiment, text = load(files or [stored], bindings)
        _check_is_of_use(experiment)
        if experiment.training.init_from:
            _check_from_run(experiment)
    else:
        began, _ = load([stored], [])
        experiment, text = load(files or [stored], bindings)
        for name, now, before in training_differences(experiment, began):
            if name not in MAY_CHANGE:
                raise ConfigError(
                    f"{name} = {now!r}, but the run in {workdir} began with {before!r}: train in another --workdir, "
                    f'or leave it as it was with --gin_param "{name} = {before!r}"'
                )
            say(f"{name} = {now!r} from here on; the run began with {before!r}")
    return experiment, _with_absolute_data(text, experiment)


def _check_is_of_use(it: Experiment) -> None:
    """Refuses to train what would come to nothing.

    Raises:
        ConfigError: for a memory that stays empty or cannot take its snapshot, an index that is never used, negatives
            that are none, or parts of memory layers that are trained without a memory.
    """
    if it.memory.size and it.memory.writes == "never" and not it.training.prebuilt_memory:
        raise ConfigError(
            "Memory.writes = 'never' and no Training.prebuilt_memory: the memory would stay empty. Name a snapshot "
            "(configs/variants/frozen_memory.gin), or set Memory.writes = 'segment'"
        )
    if it.training.prebuilt_memory and it.memory.uses_slot_table:
        by_document = dataclasses.replace(it.memory, clear_at_documents=True)
        if not by_document.uses_slot_table:
            raise ConfigError(
                "Training.prebuilt_memory with Memory.clear_at_documents = False: a memory that outlasts documents and "
                "keeps the newest tokens is laid out unlike any snapshot. Set Memory.clear_at_documents = True, "
                "Memory.writes = 'never' (it is only read), or another Memory.eviction there and in the snapshot"
            )
    size, features, tokens = it.model.head_size, it.model.index_size, it.batch.segment_length
    is_learned = it.memory.size > 0 and it.memory.proposer == "learned"
    if is_learned and not is_worth_it(tokens * it.model.group, size, features):
        raise ConfigError(
            f"Memory.proposer = 'learned': with segments of {tokens} tokens and heads of {size}, features of "
            f"Model.index_size = {features} would never be used, since computing them takes more than all scores: use "
            "fewer features, or longer segments"
        )
    if it.memory.writes == "never" and it.training.negative_rows:
        raise ConfigError(
            f"Training.negative_rows = {it.training.negative_rows} with Memory.writes = 'never': all rows have the "
            "same memory, so none is a negative; set Training.negative_rows = 0"
        )
    if not it.memory.size and it.optimizer.trainable and {*it.optimizer.trainable} <= {"gates", "index"}:
        raise ConfigError(
            f"Optimizer.trainable = {it.optimizer.trainable} with Memory.size = 0: these parameters do nothing without "
            "a memory, so nothing would be trained; set Memory.size"
        )


def _check_from_run(it: Experiment) -> None:
    """Refuses parameters that would mean something else here; whether they fit is seen when they are read.

    Raises:
        ConfigError: when there is no such run, or its model is another.
    """
    folder = run_folder("Training.init_from", it.training.init_from)
    if not (folder / CONFIG_FILE).exists():
        raise ConfigError(f"Training.init_from = {it.training.init_from!r}: no run is there (no {CONFIG_FILE})")
    other, _ = load([folder / CONFIG_FILE], [])
    for name, now, before in differences(it, other):
        if name.startswith("Model.") and name not in MAY_BE_NEW:
            raise ConfigError(
                f"{name} = {now!r}, but the model of Training.init_from = {it.training.init_from!r} has {before!r}: "
                f'only a memory may be new. Add --gin_param "{name} = {before!r}"'
            )


@contextlib.contextmanager
def written_config(workdir: AnyPath, text: str) -> Iterator[None]:
    """Writes `config.gin`; what was there comes back if these settings are refused, and so nothing was trained by them.

    The first process writes, and the others see that it holds what they were given.

    Raises:
        ConfigError: when the processes of a run differ in their settings, or do not share the workdir.
    """
    before = (workdir / CONFIG_FILE).read_text() if is_first() and (workdir / CONFIG_FILE).exists() else None
    if is_first():
        atomic_write(workdir / CONFIG_FILE, text)
    wait("settings written")
    if not is_first():
        path = workdir / CONFIG_FILE
        if not path.is_file():
            raise ConfigError(
                f"--workdir={workdir}: the first process wrote {CONFIG_FILE} there, and this one does not find it; "
                "name a folder that all processes share"
            )
        if path.read_text() != text:
            raise ConfigError(
                f"{path} does not hold the settings of this process: start all processes with the same files and "
                "bindings, and in the same folder"
            )
    try:
        yield
    except InputError:
        if before is not None and is_first():
            atomic_write(workdir / CONFIG_FILE, before)
        raise


def _with_absolute_data(text: str, experiment: Experiment) -> str:
    """The resolved text with folders of data named from the root, so that the run can be used from anywhere."""
    settings = dict(re.findall(r"^([\w.]+) = (.*)$", text, flags=re.MULTILINE))
    folders = {"Training.data": experiment.training.data, "Evaluation.data": experiment.evaluation.data}
    folders |= {name: getattr(experiment.training, name.partition(".")[2]) for name in _FOLDERS}
    for name, data in folders.items():
        while settings[name].startswith("%"):  # it is the macro that says where
            name = settings[name][1:]
        if data and isinstance(run_folder(name, data), Path):
            line = f"{name} = {str(Path(data).absolute())!r}"
            text = re.sub(rf"^{re.escape(name)} = .*$", lambda _, line=line: line, text, flags=re.MULTILINE)
    return text


def load_trained(workdir: AnyPath, files: Sequence[str | Path], bindings: Sequence[str]) -> Experiment:
    """The settings of the run in `workdir`, with others given on top.

    Raises:
        ConfigError: when there is no run, or the model would not be the one that was trained.
    """
    stored = workdir / CONFIG_FILE
    if not stored.exists():
        raise ConfigError(f"--workdir={workdir} holds no run (no {CONFIG_FILE}): `memorizing train` makes one")
    trained, _ = load([stored], [])
    experiment, _ = load([stored, *files], bindings)
    for name, now, before in differences(experiment, trained):
        if name.startswith("Model.") and name not in ("Model.dtype", "Model.remat", "Model.scan_layers"):
            raise ConfigError(f"{name} = {now!r}, but the model in {workdir} was trained with {before!r}")
    return experiment
