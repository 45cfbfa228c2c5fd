"""Gin files and bindings to frozen dataclasses, and back to text: the only file that imports gin.

gin knows each dataclass by a short name, its section: `Model.layers = 12`. gin itself accepts a misspelled macro and a
value of the wrong type; this module rejects both.
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import gin
from beartype.door import is_bearable

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


class ConfigError(InputError):
    """A setting that cannot be used. The message names it, its value, the rule and a way out."""


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

SECTIONS: dict[str, Any] = {name: type(values) for name, values in Experiment().sections.items()}
for _name, _class in SECTIONS.items():
    gin.external_configurable(_class, name=_name)


def load(files: Sequence[str | AnyPath], bindings: Sequence[str]) -> tuple[Experiment, str]:
    """Returns the settings of gin files, then of bindings (`'MEMORY_SIZE = 8192'`), and all of them as one gin file.

    Later values win. An `include` in a file is resolved relative to that file. The text holds every setting, defaults
    and macros included; loading it gives the same `Experiment`.

    Raises:
        ConfigError: for a setting or macro that is unknown, misspelled, renamed, of the wrong type or impossible.
    """
    gin.clear_config()
    texts = [*bindings]
    for file in files:
        path = Path(file) if isinstance(file, str) else file
        if not path.is_file():
            raise ConfigError(f"--gin_file={file}: no such file")
        texts += _parse_file(path)
    _parse("\n".join(bindings))
    try:
        bound = {name: gin.get_bindings(name) for name in SECTIONS}
    except RecursionError as error:
        raise ConfigError("a macro or setting refers to itself. Give one of the circle a plain value") from error
    except (ValueError, TypeError) as error:
        raise ConfigError(_explain(str(error))) from error
    _refuse_unused_macros({name for text in texts for name in re.findall(r"%(\w+)", text)})
    options = [_build(name, bound.pop(name)) for name in MEMORY_SECTIONS]
    bound["Memory"] |= {"options": tuple(each for each in options if each != type(each)())}
    corpora = {name: _build(section_name(corpus), bound.pop(section_name(corpus))) for name, corpus in CORPORA.items()}
    sections = {name.lower(): _build(name, values) for name, values in bound.items()}
    try:
        experiment = Experiment(**sections, corpora=corpora)
    except InputError as error:
        raise ConfigError(str(error)) from error
    return experiment, _resolved(experiment)


_INCLUDE = re.compile(r"^include[ \t]+(['\"])(.*)\1[ \t]*(?:#.*)?$", flags=re.MULTILINE)


def _parse_file(path: AnyPath, including: tuple[AnyPath, ...] = ()) -> list[str]:
    """Parses a gin file and the files that it includes, in order; returns their texts."""
    if path in including:
        raise ConfigError(f"{path} includes itself, by {' -> '.join(map(str, (*including, path)))}. Remove an include")
    text, texts, start = path.read_text(), [], 0
    for include in _INCLUDE.finditer(text):
        _parse(text[start : include.start()], path, text.count("\n", 0, start))
        start, included = include.end(), path.parent / include[2]
        if not included.is_file():
            raise ConfigError(f"{path} includes {include[2]!r}, but {included} does not exist. Correct the path")
        texts += _parse_file(included, (*including, path))
    _parse(text[start:], path, text.count("\n", 0, start))
    return [*texts, text]


def _parse(text: str, path: AnyPath | None = None, lines_before: int = 0) -> None:
    """Parses a part of a file, or bindings if there is no file."""
    where = "" if path is None else f"{path}: "
    for name in re.findall(r"^([\w.]+)\s*=", text, flags=re.MULTILINE):
        if name in RENAMED_SETTINGS:
            raise ConfigError(f"{where}{name} is now {RENAMED_SETTINGS[name]}. Use the new name")
    try:
        gin.parse_config("\n" * lines_before + text)  # so that gin counts lines from the top of the file
    except RecursionError as error:
        raise ConfigError(f"{where}a macro or setting refers to itself. Give it a plain value") from error
    except (ValueError, TypeError, SyntaxError, OSError) as error:
        raise ConfigError(where + _explain(str(error))) from error


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
    """Returns gin's message together with the setting or macro that was probably meant."""
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


def _refuse_unused_macros(mentioned: set[str]) -> None:
    """Rejects macros that no setting ever referred to; `Memory.size = 512` may leave base.gin's macro without use."""
    scoped = re.search(r"^(?:\w+/)+(\w+\.\w+) = ", gin.config_str(), flags=re.MULTILINE)
    if scoped:
        raise ConfigError(f"{scoped[0]}...: settings have no scopes; write {scoped[1]} = ...")
    given, used = _macros(gin.config_str()), _macros(gin.operative_config_str())
    for name in sorted(given.keys() - used.keys() - mentioned):
        raise ConfigError(
            f"the macro {name} = {given[name]} is used by no setting (misspelled?); {_nearest(name, sorted(used))}"
        )


def _resolved(experiment: Experiment) -> str:
    """Returns every setting as gin text. Macros stay macros, so that they can be overridden later."""
    text, used = gin.config_str(max_line_length=10_000), _macros(gin.operative_config_str())
    bound = dict(re.findall(r"^(\w+\.\w+) = (.*)$", text, flags=re.MULTILINE))
    return settings_text(experiment, {name: value for name, value in _macros(text).items() if name in used}, bound)


def settings_text(experiment: Experiment, macros: Mapping[str, str] = {}, bound: Mapping[str, str] = {}) -> str:
    """Returns every setting as gin text.

    Args:
        macros: values of macros, by name.
        bound: gin's text of settings, by `Section.name`. Those that use macros are written so.
    """
    lines = [
        f"# memorizing run, format {FORMAT_VERSION}: every setting, defaults included. Read again by --workdir.",
        "",
    ]
    lines += [f"{name} = {value}" for name, value in macros.items()]
    for name, values in experiment.sections.items():
        lines.append("")
        for field in filter(lambda field: field.repr, dataclasses.fields(values)):
            full = f"{name}.{field.name}"
            literal = repr(getattr(values, field.name))
            lines.append(f"{full} = {bound[full] if '%' in bound.get(full, '') else literal}")
    return "\n".join(lines) + "\n"
