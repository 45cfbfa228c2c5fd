"""Gin files and bindings to frozen dataclasses, and back to text.

Each dataclass has a short name, its section: `Model.layers = 12`. Unknown names, values of the wrong type and macros
that no setting uses are rejected.
"""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from beartype.door import is_bearable

from memorizing.bindings import Bindings, ConfigError
from memorizing.data.bulk import BeamSettings
from memorizing.data.corpora.corpus import Corpus
from memorizing.data.corpora.table import CORPORA
from memorizing.data.documents import FolderSettings
from memorizing.data.recall import RecallSettings
from memorizing.data.settings import PrepareSettings
from memorizing.errors import InputError
from memorizing.evaluation.perplexity import EvaluationSettings
from memorizing.files import AnyPath
from memorizing.memory.eviction import EVICTION_RULES
from memorizing.memory.search import SEARCHES
from memorizing.sections import Section, section_name
from memorizing.training.settings import RunSettings

RENAMED_SETTINGS = {
    "Memory.neighbours": "Memory.neighbors",
    "Memory.block_size": "Blocked.block_size (Binned.block_size for Memory.search = 'binned')",
    "Memory.recall_target": "Pallas.recall_target, Binned.recall_target or Approximate.recall_target",
    "Memory.gpu_kernel": "Pallas.gpu_kernel",
    "Memory.candidates": "Ivf.candidates (Lsh.candidates for Memory.search = 'lsh')",
    "Memory.lsh_tables": "Lsh.tables",
    "Memory.lsh_bits": "Lsh.bits",
    "Memory.lsh_probes": "Lsh.probes",
    "Memory.ivf_lists": "Ivf.lists (Faiss.lists for Memory.search = 'faiss')",
    "Memory.ivf_probes": "Ivf.probes (Faiss.probes for Memory.search = 'faiss')",
    "Memory.faiss_index": "Faiss.index",
    "Memory.faiss_effort": "Faiss.effort",
    "Batch.rows": "Batch.size",
    "Evaluation.rows": "Evaluation.batch_size",
    "Model.key_heads": "Model.kv_heads",
    "Training.from_run": "Training.init_from",
    "Training.from_step": "Training.init_step",
    "Optimizer.trained": "Optimizer.trainable",
    "Optimizer.rate_factors": "Optimizer.learning_rate_multipliers",
    "Github.licences": "Github.licenses",
    "Pg19.strip_licence": "Pg19.strip_license",
}
"""Old names of settings; each is refused with its new name."""


FORMAT_VERSION = 2
"""Version of a run's folder, in the first line of its settings. Version 1 (memorizing 0.1) had none: its settings and
parameters have other names."""


@dataclasses.dataclass(frozen=True)
class Experiment(RunSettings):
    """The settings of a run, and those that prepare its data and evaluate it; `sections` lists them by gin section."""

    evaluation: EvaluationSettings = dataclasses.field(default_factory=EvaluationSettings)
    prepare: PrepareSettings = dataclasses.field(default_factory=PrepareSettings)
    folder: FolderSettings = dataclasses.field(default_factory=FolderSettings)
    recall: RecallSettings = dataclasses.field(default_factory=RecallSettings)
    corpora: Mapping[str, Corpus] = dataclasses.field(
        default_factory=lambda: {name: corpus() for name, corpus in CORPORA.items()}
    )
    beam: BeamSettings = dataclasses.field(default_factory=BeamSettings)

    @property
    def sources(self) -> dict[str, Any]:
        """The settings of each source of documents, by its name in `Prepare.source`."""
        return {"folder": self.folder, "recall": self.recall, **self.corpora}

    @property
    def sections(self) -> dict[str, Any]:
        """The settings of each gin section, by its name."""
        settings = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        corpora = settings.pop("corpora")
        sections = {section_name(type(values)): values for values in (settings | corpora).values()}
        return sections | {name: self.memory.section_of(kind) for name, kind in MEMORY_SECTIONS.items()}


MEMORY_SECTIONS: dict[str, type[Section]] = {
    kind.section(): kind for kind in (*SEARCHES.values(), *EVICTION_RULES.values()) if dataclasses.fields(kind)
}
"""The searches and eviction rules that have settings, by gin section. Their settings become `Memory.options`."""

LARGEST_NUMBER = 2**63 - 1
"""Largest whole number of a setting, and of most of what settings become: sizes, seeds, file offsets."""

LARGEST_FLOAT = 3.4e38
"""Largest number of a setting with a fraction: that of float32, in which models compute."""

SECTIONS: dict[str, Any] = {name: type(values) for name, values in Experiment().sections.items()}
"""The dataclass of each gin section."""


def load(
    files: Sequence[str | AnyPath], bindings: Sequence[str], saved: AnyPath | None = None
) -> tuple[Experiment, str]:
    """Returns the settings of gin files, then of bindings (`'MEMORY_SIZE = 8192'`), and all of them as one gin file.

    Later values win. An `include` in a file is resolved relative to that file. The text holds every setting, defaults
    and macros included; loading it gives the same `Experiment`.

    Args:
        saved: file of settings that a run saved, read before the others. It may only hold bindings.

    Raises:
        ConfigError: for a setting or macro that is unknown, misspelled, renamed, of the wrong type or impossible.
    """
    given = Bindings()
    if saved is not None:
        given.read_saved(saved)
    given.read(files, bindings)
    values: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    for name, bound in given.settings.items():
        _check_name(name, bound.where)
        section, _, setting = name.rpartition(".")
        values[section][setting] = given.resolve(bound.value)
    _refuse_unused_macros(given)
    options = [_build(name, values.pop(name)) for name in MEMORY_SECTIONS]
    values["Memory"] |= {"options": tuple(each for each in options if each != type(each)())}
    corpora = {name: _build(section_name(corpus), values.pop(section_name(corpus))) for name, corpus in CORPORA.items()}
    sections = {name.lower(): _build(name, settings) for name, settings in values.items()}
    try:
        experiment = Experiment(**sections, corpora=corpora)
    except InputError as error:
        raise ConfigError(str(error)) from error
    with_macros = {name: repr(bound.value) for name, bound in given.settings.items()}
    return experiment, settings_text(experiment, given.used_macros(), with_macros)


def _check_name(name: str, where: str) -> None:
    """Rejects a setting that does not exist, with the name that was probably meant."""
    if name in RENAMED_SETTINGS:
        raise ConfigError(f"{where}{name} is now {RENAMED_SETTINGS[name]}. Use the new name")
    section, _, setting = name.rpartition(".")
    if section not in SECTIONS:
        raise ConfigError(f"{where}there is no section {section!r}; {_nearest(section, list(SECTIONS))}")
    names = [field.name for field in dataclasses.fields(SECTIONS[section]) if field.init and field.repr]
    if setting not in names:
        raise ConfigError(f"{where}{section} has no setting {setting!r}; {_nearest(setting, names)}")


def _build(name: str, values: dict[str, Any]) -> Any:
    """Builds a section's dataclass from values that have the annotated types."""
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
        members = value if isinstance(value, tuple) else (value,)
        if any(isinstance(each, int) and abs(each) > LARGEST_NUMBER for each in members):
            raise ConfigError(f"{name}.{field.name} = {value!r}: whole numbers must be below 2^63")
        if isinstance(value, float) and not abs(value) <= LARGEST_FLOAT:
            raise ConfigError(f"{name}.{field.name} = {value!r}: must be finite, at most 3.4e38 as float32 is")
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


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else "known are " + ", ".join(known)


def _refuse_unused_macros(given: Bindings) -> None:
    """Rejects macros that no setting ever referred to; `Memory.size = 512` may leave base.gin's macro without use."""
    for name in sorted(given.macros.keys() - given.mentioned):
        value, where = given.macros[name]
        raise ConfigError(
            f"{where}the macro {name} = {value!r} is used by no setting (misspelled?); "
            f"{_nearest(name, list(given.used_macros()))}"
        )


def settings_text(experiment: Experiment, macros: Mapping[str, Any] = {}, bound: Mapping[str, str] = {}) -> str:
    """Returns every setting as gin text.

    Args:
        macros: values of macros, by name.
        bound: text of settings as given, by `Section.name`. Those that use macros are written so.
    """
    lines = [
        f"# memorizing run, format {FORMAT_VERSION}: every setting, defaults included. Read again by --workdir.",
        "",
    ]
    lines += [f"{name} = {value!r}" for name, value in macros.items()]
    for name, values in experiment.sections.items():
        lines.append("")
        for field in filter(lambda field: field.repr, dataclasses.fields(values)):
            full = f"{name}.{field.name}"
            literal = repr(getattr(values, field.name))
            lines.append(f"{full} = {bound[full] if '%' in bound.get(full, '') else literal}")
    return "\n".join(lines) + "\n"
