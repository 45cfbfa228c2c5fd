"""`memorizing export`: writes a run as a Hugging Face folder, if its model fits one of the architectures there.

Parts without a place there are rejected by name: gates, layers that normalize or shift keys, T5's biases and others.
`--omit` leaves out parts that only memory layers have; the exported model then computes another function.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import jax

from memorizing.data.pretrained_vocabulary import PretrainedVocabulary
from memorizing.data.vocabulary import SentencePieceVocabulary, Vocabulary
from memorizing.errors import InputError
from memorizing.evaluation.evaluate import restore
from memorizing.files import AnyPath, copy_files
from memorizing.memory.settings import MemorySettings
from memorizing.model.parameters import Parameters, by_path
from memorizing.model.settings import ModelSettings, split_sizes
from memorizing.parallel.mesh import MeshSettings, open_mesh
from memorizing.pretrained.config_json import ARCHITECTURES, Architecture, read_config, write_config
from memorizing.pretrained.convert import places, to_tensor
from memorizing.pretrained.tensors import write_tensors
from memorizing.runs import load_trained
from memorizing.storage.workdir import PRETRAINED, open_vocabulary

DROPS = ("gates", "normalization", "key_shift")


def export(
    workdir: AnyPath,
    out: Path,
    drop: Collection[str] = (),
    say: Callable[[str], None] = print,
) -> None:
    """Writes `out`: weights of the newest checkpoint in float32, config and tokenizer. Does nothing if it is there.

    Raises:
        InputError: names parts without a place there; also if `out` holds something else.
    """
    if out.exists() and not (out / "config.json").is_file():
        raise InputError(f"--out={out} exists already and is not an export. Give a folder that does not exist")
    run = load_trained(workdir, [], [])
    kept = workdir / PRETRAINED
    architecture, config = _config(run.model, kept)
    dropped = _dropped(run.model)
    if none := [name for name in drop if name not in dropped]:
        raise InputError(f"--omit={','.join(drop)}: {workdir} has no {' and no '.join(none)}. Leave that out of --omit")
    if missing := [name for name in dropped if name not in drop]:
        raise InputError(
            f"{workdir} has what a {architecture.model_type} has not: "
            + "; ".join(f"{name} ({dropped[name]})" for name in missing)
            + f". To leave that out: --omit={','.join(missing)}"
        )
    mesh = open_mesh(
        MeshSettings(1),
        split_sizes(run.model, MemorySettings(size=0), run.batch.segment_length, 1),
        devices=jax.local_devices()[:1],
    )
    parameters, step = restore(workdir, run.model, mesh)
    tensors = _tensors(architecture, parameters, run.model)
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(f"{out.name}.unfinished")
    if unfinished.exists():  # left by an interrupted export: nothing else writes there
        shutil.rmtree(unfinished)
    unfinished.mkdir()
    write_tensors(unfinished, tensors)
    if kept.is_dir():
        copy_files(kept, unfinished)
    else:
        config |= _own_tokenizer(open_vocabulary(workdir).vocabulary, unfinished, say)
    (unfinished / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    if out.exists():
        same = _files(out) == _files(unfinished)
        shutil.rmtree(unfinished)
        if not same:
            raise InputError(f"--out={out} exists already and holds another model. Give a folder that does not exist")
        say(f"{out} already holds this model, of step {step}")
        return
    unfinished.rename(out)
    for name in dropped:
        say(f"left out: {name} ({dropped[name]})")
    say(f"{out}: a {architecture.model_type} of {len(tensors)} tensors, of step {step}, in float32")


def _files(folder: Path) -> dict[str, str]:
    """Returns the digests of the files directly in a folder, by name."""
    found = {}
    for path in folder.iterdir():
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _config(model: ModelSettings, kept: AnyPath) -> tuple[Architecture, dict[str, Any]]:
    """Returns the config that the model came with, or one with the same meaning.

    Raises:
        InputError: if no architecture computes what the model does; names the differences from the nearest one.
    """
    differ: dict[str, list[str]] = {}
    original = kept / "config.json"
    if original.is_file():
        config = json.loads(original.read_text())
        architecture, settings, _ = read_config(config, str(original))
        if not _differences(model, settings):
            names = {name: "float32" for name in ("dtype", "torch_dtype") if name in config}
            return architecture, config | names
    for architecture in ARCHITECTURES.values():
        config = write_config(architecture, model)
        differences = _differences(model, read_config(config, "config.json")[1])
        if not differences:
            return architecture, config | {"dtype": "float32"}
        differ[architecture.model_type] = differences
    nearest = min(differ, key=lambda name: len(differ[name]))
    raise InputError(
        f"no supported Hugging Face architecture computes what this model does. The nearest, {nearest}, "
        f"differs in {', '.join(differ[nearest])}"
    )


def _differences(model: ModelSettings, settings: dict[str, Any]) -> list[str]:
    """Returns the settings that differ from the architecture's. The longest text is not part of the function."""
    same = {"kv_heads": model.kv_heads if model.kv_heads != model.heads else None}
    if model.embedding_scale is None:
        same["embedding_scale"] = model.embedding_size**0.5
    return [
        f"Model.{name} ({value!r}, here {getattr(model, name)!r})"
        for name, value in settings.items()
        if value != same.get(name, getattr(model, name))
        and not (name == "max_positions" and model.positions != "learned")
    ]


def _dropped(model: ModelSettings) -> dict[str, str]:
    """Returns the additional parameters of memory layers, by the name under which `--omit` leaves them out."""
    layers = ", ".join(map(str, model.memory_layers))
    if not layers:
        return {}
    index = ", and the index of it" if model.index_size else ""
    found = {"gates": f"and with them the memory of layers {layers}{index}"}
    if model.normalize_memory_layers:
        found["normalization"] = f"of queries and keys in layers {layers}: without it they compute something else"
    if model.key_shift:
        found["key_shift"] = f"of keys in layers {layers}: without it they compute something else"
    return found


def _tensors(architecture: Architecture, parameters: Parameters, model: ModelSettings) -> dict[str, Any]:
    leaves = by_path(parameters)
    wanted = places(architecture, parameters)
    covered = {path for place in wanted for path in place.parameters}
    memory = tuple(f"layers/{number - 1}/attention/" for number in model.memory_layers)
    left = [path for path in leaves if path not in covered and not path.startswith(memory)]
    assert not left, left  # `_config` has compared all settings that add parameters
    return {place.tensor: to_tensor(place, jax.device_get({path: leaves[path] for path in place.parameters}))
            for place in wanted}  # fmt: skip


def _own_tokenizer(vocabulary: Vocabulary, out: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Writes a vocabulary made here, if Hugging Face has a form for it. Returns its entries of the config."""
    if isinstance(vocabulary, SentencePieceVocabulary | PretrainedVocabulary):
        name = "tokenizer.json" if vocabulary.model.startswith(b"{") else "tokenizer.model"
        (out / name).write_bytes(vocabulary.model)
    else:
        say(f"its vocabulary, of {vocabulary.kind}, has no form there: no tokenizer is written")
    return {"bos_token_id": vocabulary.begin}
