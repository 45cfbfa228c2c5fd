"""`memorizing import`: converts a pretrained model in a Hugging Face folder to the folder of a run.

    config.json          -> settings           config_json.py; every key is known, or rejected
    tokenizer files      -> WORKDIR/vocabulary prepared tokens without documents (data/tokens.py)
    *.safetensors        -> parameters         tables.py, convert.py; every tensor has a place, every place a tensor
                            WORKDIR/pretrained files that `memorizing export` returns unchanged

Memory layers get the additional parameters that they need. Their queries and keys are not normalized as in new models,
because that would change the pretrained function. With closed gates the model computes what the pretrained one does.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from memorizing.config import Experiment, load
from memorizing.data.pretrained_vocabulary import PretrainedVocabulary, token_id
from memorizing.data.tokens import PreparedTokens, write_vocabulary
from memorizing.errors import InputError
from memorizing.files import AnyPath, atomic_write
from memorizing.model.parameters import Parameters, by_path, count_parameters
from memorizing.model.transformer import abstract_model, create_model
from memorizing.parallel.hosts import is_distributed
from memorizing.pretrained.config_json import read_config
from memorizing.pretrained.convert import check_tensors, layer_of, places, to_parameters
from memorizing.pretrained.tensors import Tensors
from memorizing.runs import CONFIG_FILE
from memorizing.storage.checkpoints import Checkpoints
from memorizing.storage.workdir import PRETRAINED, VOCABULARY, record_data

TOKENIZERS = ("tokenizer.json", "tokenizer.model")
"""Names of tokenizer files; the first that exists is read."""
SMALL_FILES = (
    *TOKENIZERS, "config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "generation_config.json", "chat_template.jinja", "LICENSE",
)  # fmt: skip
GATE_BIAS = -4.0
"""Bias of new gates: nearly closed, so that the model starts as it was, and open enough to learn."""
SEGMENT_LENGTH = 512
"""Segment length, unless the model has fewer positions or other settings are given."""


LARGEST_JSON = 64 << 20
"""Largest config.json, in bytes."""


class Pretrained(NamedTuple):
    """A pretrained model in this package's form: settings (and their text), vocabulary, parameters; remarks for a
    person."""

    architecture: str
    experiment: Experiment
    text: str
    vocabulary: PretrainedVocabulary
    parameters: Parameters
    remarks: list[str]


def import_pretrained(
    folder: Path,
    workdir: AnyPath,
    memory_layers: Sequence[int],
    files: Sequence[str | Path],
    bindings: Sequence[str],
    say: Callable[[str], None] = print,
) -> None:
    """Writes `workdir`, which must not exist, completely or not at all.

    Raises:
        InputError: see `read_pretrained`; also if something is in the way.
    """
    _check_workdir(workdir)
    data = f"Training.data = {str(Path(workdir).absolute() / VOCABULARY)!r}"
    read = read_pretrained(folder, memory_layers, files, [data, *bindings])
    work = Path(workdir).absolute().with_name(f"{Path(workdir).name}.unfinished")
    if work.exists():  # left by an interrupted import: nothing else writes there
        shutil.rmtree(work)
    write_vocabulary(work / VOCABULARY, read.vocabulary)
    (work / PRETRAINED).mkdir()
    for name in SMALL_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, work / PRETRAINED / name)
    atomic_write(work / CONFIG_FILE, read.text)
    record_data(work, PreparedTokens(work / VOCABULARY))
    with Checkpoints(work, keep=1) as checkpoints:
        checkpoints.save_parameters(0, read.parameters)
    work.rename(workdir)
    run, layers = read.experiment, ", ".join(map(str, memory_layers))
    say(
        f"{workdir}: {count_parameters(read.parameters):,} parameters of a {read.architecture} from {folder}; memory "
        f"in {f'layer {layers}' if layers else 'no layer'}, segments of {run.batch.segment_length}"
        f"{', no XL cache' * (not run.model.xl_cache)}"
    )
    for remark in read.remarks:
        say(remark)


def read_pretrained(
    folder: Path, memory_layers: Sequence[int], files: Sequence[str | Path], bindings: Sequence[str]
) -> Pretrained:
    """Returns the model in a folder, with a memory in some layers and its parameters on the host.

    Raises:
        InputError: names what is not supported, missing, unknown, or malformed.
    """
    path = folder / "config.json"
    config = _read_json(path)
    architecture, settings, ignored = read_config(config, str(path))
    run, text = _experiment(settings, tuple(memory_layers), files, bindings)
    vocabulary, remarks = _vocabulary(folder, config, run.model.vocabulary_size)
    if ignored:
        remarks.append(f"keys of config.json without effect: {', '.join(ignored)}")
    tensors = Tensors(folder)
    _, like = abstract_model(run.model, run.memory)
    shapes, wanted = by_path(like), places(architecture, like)
    named = check_tensors(tensors, architecture, wanted)
    leaves = _added(run, {path for place in wanted for path in place.parameters})
    for place in wanted:
        for path, part in to_parameters(place, tensors.read(named[place.tensor]), shapes):
            leaves[path] = np.ascontiguousarray(part)
    parameters = jax.tree.unflatten(jax.tree.structure(like), [leaves[path] for path in shapes])
    return Pretrained(architecture.model_type, run, text, vocabulary, parameters, remarks)


def _check_workdir(workdir: AnyPath) -> None:
    if not isinstance(workdir, Path):
        raise InputError(
            f"--workdir={workdir}: a bucket cannot be imported into. Import into a folder, and copy it to the bucket"
        )
    if is_distributed():
        raise InputError(
            "`memorizing import` runs in one process. Run it alone; any number of processes can read its checkpoint"
        )
    if workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
        raise InputError(f"--workdir={workdir} exists already. Give a folder that does not exist")
    if workdir.exists():
        workdir.rmdir()


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file() or path.stat().st_size > LARGEST_JSON:
        raise InputError(
            f"{path} is not a file of at most {LARGEST_JSON >> 20} MB. Give a model's Hugging Face folder with --from"
        )
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read ({error}): --from must be a model's Hugging Face folder") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} is not the config of a model. Give a model's folder with --from")
    return found


def _experiment(
    settings: dict[str, Any],
    memory_layers: tuple[int, ...],
    files: Sequence[str | Path],
    bindings: Sequence[str],
) -> tuple[Experiment, str]:
    """Returns the settings of the run: those of files, then the checkpoint's, then bindings, which may not contradict
    it."""
    own = {f"Model.{name}": value for name, value in settings.items()}
    own["Model.memory_layers"] = memory_layers
    if memory_layers:
        own |= {"Model.gate_bias": GATE_BIAS, "Model.normalize_memory_layers": False}
    else:
        own["Memory.size"] = 0
    learned = settings["positions"] == "learned"
    if learned:
        own["Model.xl_cache"] = False
    if (fits := settings["max_positions"] - (not learned)) < SEGMENT_LENGTH:
        own["Batch.segment_length"] = fits
    run, text = load(files, [*(f"{name} = {value!r}" for name, value in own.items()), *bindings])
    if run.model.memory_layers != memory_layers:  # macros set more than one setting
        raise InputError(
            f"Model.memory_layers = {run.model.memory_layers} was set by a file or binding. Use --memory_layers, which "
            "also sets what depends on it"
        )
    for name in settings:
        wanted, now = own[f"Model.{name}"], getattr(run.model, name)
        if now != wanted:
            raise InputError(f"Model.{name} = {now!r}, but the pretrained model has {wanted!r}. Leave it out")
    return run, text


def _vocabulary(folder: Path, config: dict[str, Any], size: int) -> tuple[PretrainedVocabulary, list[str]]:
    """Returns the tokenizer of a folder for a model with `size` rows of embeddings, and remarks about it."""
    path = next((folder / name for name in TOKENIZERS if (folder / name).is_file()), None)
    if path is None:
        raise InputError(
            f"{folder} has neither {' nor '.join(TOKENIZERS)}. Fetch its tokenizer, or save it with transformers' "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    begin, source = _token_id(folder, config, "bos_token_id"), "bos_token_id of config.json"
    try:
        if begin is None and (name := _begin_token(folder)):
            begin, source = token_id(path.read_bytes(), name), f"bos_token {name!r} of tokenizer_config.json"
        if begin is None:
            begin = _token_id(folder, config, "eos_token_id")
            source = "eos_token_id of config.json: the model has no begin token"
        if begin is None:
            raise InputError(
                "neither bos_token_id nor eos_token_id is in config.json, but documents must begin with a token. Add "
                "the token that the model was trained with to a copy of the file"
            )
        vocabulary = PretrainedVocabulary(path.read_bytes(), begin, rows=size)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except Exception as error:  # errors of the library, which has no class for them
        raise InputError(f"{path} cannot be read ({error}). Fetch it again") from error
    remarks = [f"documents begin with token {begin} ({source})"]
    if vocabulary.unused:
        names = ", ".join(vocabulary.unused[:3])
        remarks.append(f"tokens without a row in the model, which no text becomes: {names}")
    if lost := vocabulary.loses():
        remarks.append(f"its tokens do not give back every text as it was; they lose {', '.join(lost)}")
    return vocabulary, remarks


def _token_id(folder: Path, config: dict[str, Any], key: str) -> int | None:
    """Returns the id that a config gives under `key`: a number, or the first of a list; None if it is missing."""
    value = config.get(key)
    value = value[0] if isinstance(value, list) and value else value
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise InputError(f"{folder / 'config.json'}: {key} = {value!r} is not the id of a token. Fetch the file again")
    return value


def _begin_token(folder: Path) -> str:
    """Returns the name of the begin token in tokenizer_config.json; empty if there is none."""
    path = folder / "tokenizer_config.json"
    value = _read_json(path).get("bos_token") if path.exists() else None
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else ""


def _added(run: Experiment, pretrained: set[str]) -> dict[str, Any]:
    """Returns freshly drawn values of the additional parameters of memory layers, such as gates.

    Raises:
        InputError: if parameters outside of memory layers would have to be drawn.
    """
    _, like = abstract_model(run.model, run.memory)
    added = [path for path in by_path(like) if path not in pretrained]
    if strange := [path for path in added if layer_of(path) not in run.model.memory_layers]:
        raise InputError(
            f"the checkpoint has no {strange[0]}, which these settings need. Leave out the setting that needs it"
        )

    def make() -> dict[str, Any]:
        made = by_path(create_model(run.model, run.memory, run.training.seed)[1])
        return {path: made[path] for path in added}

    return dict(jax.device_get(jax.jit(make)()))
