"""Memory snapshots: what a model has read, kept in a folder, to be gone on from by whoever has the same model.

FOLDER/manifest.json    what made it (model, parameters, vocabulary), what was read, the segment that is not full yet
FOLDER/arrays/          caches and banks of one row, by orbax; without what a search keeps, which is made again

Keys and values mean something only to the parameters that computed them. So a snapshot knows these, and is refused by
others.
"""

import dataclasses
import functools
import hashlib
import json
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from jaxtyping import Int

from memorizing.errors import InputError
from memorizing.files import atomic_write, writing
from memorizing.memory.bank import Bank, as_ring, refill
from memorizing.memory.search import NO_INDEX
from memorizing.memory.search_choice import make_search
from memorizing.memory.settings import WRITING, MemorySettings
from memorizing.model.carry import Carry, empty_carry
from memorizing.model.learned_index import is_of_index
from memorizing.model.parameters import Parameters
from memorizing.model.settings import ModelSettings
from memorizing.parallel.mesh import RULES, MeshSettings, init_sharded, make_mesh, placed, shardings
from memorizing.shapes import Batch
from memorizing.storage.fingerprint import fingerprints
from memorizing.storage.saved_banks import indexed, resized

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
PARTS = "made_by", "memory", "texts", "unfinished_segment", "fingerprints"
"""Of a manifest, that are read."""
ARRAYS = "arrays"
_NO_MATTER = ("dtype", "dropout", "remat", "scan_layers", "index_size")
"""Settings of a model that do not change what its memory means."""


class ReadText(NamedTuple):
    """A text that was read: its name, its tokens, and a digest of these."""

    name: str
    tokens: int
    sha256: str


class Snapshot(NamedTuple):
    """All that a reader knows of what it has read.

    Attributes:
        carry: of one row, before the segment that is not full yet.
        inputs: of that segment, in order.
        texts: that were read, in order.
    """

    carry: Carry
    inputs: list[int]
    texts: list[ReadText]


class Source(NamedTuple):
    """What makes a memory out of a text.

    Attributes:
        model, segment_length: settings.
        vocabulary: a digest of what the ids mean.
        parameters: a digest of them.
        step: of the checkpoint that they come from.
        trained_with: a digest of the snapshot that the model was trained to read, if it was: of the parameters that its
            training began with, and so of older ones than these.
    """

    model: ModelSettings
    segment_length: int
    vocabulary: str
    parameters: str
    step: int
    trained_with: str | None = None

    def described(self) -> dict[str, Any]:
        """As a manifest has it."""
        settings = dataclasses.asdict(self.model).items()
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in settings}
        own = {name: value for name, value in self._asdict().items() if name != "trained_with"}
        return own | {"model": plain}


def parameters_digest(parameters: Parameters) -> str:
    """The same for the same parameters, however they are split over devices; of an index, which makes no key, none."""
    makers = jax.tree_util.tree_map_with_path(lambda path, leaf: None if is_of_index(path) else leaf, parameters)
    return hashlib.sha256(json.dumps(fingerprints(makers), sort_keys=True).encode()).hexdigest()


def snapshot_digest(folder: Path) -> str:
    """The same for a snapshot of the same contents, wherever it lies.

    Raises:
        InputError: when there is none.
    """
    return _digest(_manifest(folder))


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def check_not_empty(memory: MemorySettings, way_out: str = "") -> None:
    """Refuses to read with a memory in which nothing is and nothing will be.

    Raises:
        InputError: telling the `way_out`, beside that of other settings.
    """
    if memory.size and memory.writes == "never":
        raise InputError(
            "Memory.writes = 'never', so nothing that is read gets into the memory, and without a snapshot nothing is "
            f"there to be looked up: {way_out}{', or ' * bool(way_out)}set --gin_param \"Memory.writes = 'segment'\""
        )


def check_folder(option: str, folder: Path) -> None:
    """Refuses, before anything is read, to write a snapshot where something else lies.

    Raises:
        InputError: naming `option`.
    """
    if folder.exists() and not (folder / MANIFEST).is_file():
        raise InputError(f"{option}={folder} is there already and is no snapshot: name a folder that is to be made")


def check_again(folder: Path, texts: Sequence[ReadText], source: Source, memory: MemorySettings) -> None:
    """Refuses, before the texts are read, to replace the snapshot that is there by another.

    Raises:
        InputError: saying what differs.
    """
    if not folder.exists():
        return
    manifest = _manifest(folder)
    _check_source(folder, manifest, source, memory)
    if manifest["texts"] != [text._asdict() for text in texts]:
        raise InputError(f"--out={folder} holds a snapshot of other texts: name another folder, or remove that one")


def read_text_of(tokens_T: Int[np.ndarray, "T"], name: str) -> ReadText:
    """What a snapshot notes of a text."""
    return ReadText(name, len(tokens_T), hashlib.sha256(tokens_T.astype("<i4").tobytes()).hexdigest())


def save_snapshot(folder: Path, snapshot: Snapshot, source: Source, memory: MemorySettings) -> bool:
    """Writes a snapshot, or finds that it is there already and says so by False. It appears whole or not at all.

    Raises:
        InputError: when something else is there.
    """
    check_folder("--out", folder)
    arrays = _by_path(_kept(snapshot.carry))
    kinds = {"size": memory.size, "dtype": memory.dtype, "key_dtype": memory.key_dtype, **memory.writing()}
    manifest = {
        "format_version": FORMAT_VERSION,
        "made_by": source.described(),
        "memory": kinds,
        "tokens": sum(text.tokens for text in snapshot.texts),
        "texts": [text._asdict() for text in snapshot.texts],
        "unfinished_segment": snapshot.inputs,
        "fingerprints": fingerprints(arrays),
    }
    if folder.exists():
        there = _manifest(folder)
        if differ := [name for name in manifest if manifest[name] != there.get(name)]:
            raise InputError(
                f"--out={folder} holds another snapshot (it differs in {', '.join(differ)}): name another folder, or "
                "remove that one"
            )
        return False
    with writing(folder):
        # A name of its own: what a save that was cut short has left, or somebody else has there, stays.
        unfinished = folder.with_name(f"{folder.name}.unfinished-{secrets.token_hex(4)}").absolute()
        unfinished.mkdir(parents=True)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(unfinished / ARRAYS, arrays)
        atomic_write(unfinished / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        unfinished.rename(folder)
    return True


def load_snapshot(folder: Path, source: Source, memory: MemorySettings, mesh: Mesh) -> Snapshot:
    """A snapshot for the same model, in a memory of `memory.size`: the newest tokens where that is smaller.

    Raises:
        InputError: when there is none, another model made it (naming what differs), or it is damaged.
    """
    manifest = _manifest(folder)
    _check_source(folder, manifest, source, memory)
    made_with = dataclasses.replace(_written_with(manifest["memory"]), dtype=memory.dtype, key_dtype=memory.key_dtype,
                                    size=manifest["memory"]["size"], search="exact", neighbors=1)  # fmt: skip
    model = dataclasses.replace(source.model, dtype=manifest["made_by"]["model"]["dtype"])
    like = jax.eval_shape(functools.partial(empty_carry, model, made_with, 1, source.segment_length))
    like = placed(like, shardings(mesh, like))
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            arrays = checkpointer.restore((folder / ARRAYS).absolute(), _by_path(like))
        is_whole = fingerprints(arrays) == manifest["fingerprints"]
    except Exception as error:  # whatever a damaged file makes of a reader
        raise InputError(f"{folder} cannot be read ({type(error).__name__}): copy or make it again") from error
    if not is_whole:
        raise InputError(f"{folder} is damaged, it is not what was written: copy or make it again")
    fill = lambda path, leaf: arrays[path] if leaf.size else jnp.zeros(leaf.shape, leaf.dtype)  # noqa: E731
    paths = [_path(path) for path, _ in jax.tree.leaves_with_path(like)]
    carry = jax.tree.unflatten(jax.tree.structure(like), map(fill, paths, jax.tree.leaves(like)))
    caches = jax.tree.map(lambda leaf: leaf.astype(source.model.dtype), carry.caches)
    carry = carry._replace(caches=caches, banks=_laid_out(carry.banks, source, memory, mesh))
    return Snapshot(carry, manifest["unfinished_segment"], [ReadText(**text) for text in manifest["texts"]])


def prebuilt_banks(folder: Path, source: Source, memory: MemorySettings, mesh: Mesh) -> tuple[Bank, ...]:
    """The memory of a snapshot, for `begin_documents`: on every device that holds rows.

    What is not in the memory is not used: XL caches, and the segment that is not full yet.

    Raises:
        InputError: see `load_snapshot`; also when there is no memory, here or there.
    """
    own = make_mesh(MeshSettings(1), jax.local_devices()[:1])
    banks = load_snapshot(folder, source, dataclasses.replace(memory, report_recall=False), own).carry.banks
    if not banks or not int(banks[0].length_B[0]):
        raise InputError(
            f"{folder}: nothing of it is in a memory of {memory.size} tokens: no segment of "
            f"{source.segment_length} was full, or there is no memory, here or where it was made"
        )
    rules = {letter: axis for letter, axis in RULES.items() if letter != "B"}
    return jax.device_put(jax.device_get(banks), shardings(mesh, banks, rules))


def is_older(folder: Path, source: Source) -> bool:
    """Whether a snapshot that may be loaded was made by the parameters that the model's training began with."""
    return _manifest(folder)["made_by"]["parameters"] != source.parameters


def begin_documents(
    carry: Carry, batch: Batch, prebuilt: tuple[Bank, ...], memory: MemorySettings
) -> tuple[Carry, Batch]:
    """Begins the documents that start with this batch in place of the model: with a prebuilt memory instead of none."""
    starts_B, search, tokens = batch.starts_document_B, make_search(memory), batch.inputs_BN.shape[1]

    def refilled(bank: Bank, own: Bank) -> Bank:
        # A memory that outlasts documents is prebuilt once.
        rows_B = starts_B if memory.clear_at_documents else starts_B & (bank.length_B == 0)
        return refill(bank, rows_B, own, search, tokens)

    banks = tuple(map(refilled, carry.banks, prebuilt))
    carry = carry._replace(cached_B=carry.cached_B & ~starts_B, banks=banks)
    return carry, batch._replace(starts_document_B=jnp.zeros_like(starts_B))


def _kept(carry: Carry) -> Carry:
    return carry._replace(banks=tuple(bank._replace(index=NO_INDEX, recall=None) for bank in carry.banks))


def _by_path(tree: Any) -> dict[str, Any]:
    """All arrays but those without elements (an XL cache of length 0), which orbax refuses."""
    return {_path(path): leaf for path, leaf in jax.tree.leaves_with_path(tree) if leaf.size}


def _path(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise InputError(f"{folder} holds no memory snapshot (no {MANIFEST}): `memorizing memorize --out` makes one")
    try:
        manifest = json.loads(path.read_text())
        version = manifest["format_version"]
        if version != FORMAT_VERSION:
            raise InputError(
                f"{folder} is a snapshot of format {version}, this program reads {FORMAT_VERSION}: make it anew"
            )
        if missing := [name for name in PARTS if name not in manifest]:
            raise KeyError(*missing)
        return manifest
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is damaged ({error!r}): copy or make the snapshot again") from error


def _check_source(folder: Path, manifest: dict[str, Any], source: Source, memory: MemorySettings) -> None:
    """Refuses what another model made, naming what differs, first what the rest follows from."""
    theirs, ours = manifest["made_by"], source.described()
    # A setting that its program did not have yet is at its default there.
    trained = {field.name: field.default for field in dataclasses.fields(ModelSettings)} | theirs["model"]
    settings = {f"Model.{name}": (trained[name], value) for name, value in ours["model"].items()}
    settings = {name: both for name, both in settings.items() if name.removeprefix("Model.") not in _NO_MATTER}
    settings["Batch.segment_length"] = theirs["segment_length"], ours["segment_length"]
    for name in ("dtype", "key_dtype"):
        settings[f"Memory.{name}"] = manifest["memory"][name], getattr(memory, name)
    settings |= _differently_written(manifest["memory"], memory)
    differ = [f"{name} = {was!r} (here {now!r})" for name, (was, now) in settings.items() if was != now]
    if not differ and theirs["vocabulary"] != ours["vocabulary"]:
        differ = [f"a vocabulary of digest {theirs['vocabulary'][:12]} (here {ours['vocabulary'][:12]})"]
    is_own = theirs["parameters"] == ours["parameters"] or _digest(manifest) == source.trained_with
    if not differ and not is_own:
        differ = [
            f"other parameters, of step {theirs['step']}, digest {theirs['parameters'][:12]} (here step "
            f"{ours['step']}, {ours['parameters'][:12]})"
        ]
    if differ:
        raise InputError(
            f"{folder} was made with {', '.join(differ)}: what it holds means nothing to this model as it is set "
            "here. Use these settings and the run that made it, or make it anew with `memorizing memorize`"
        )


def _differently_written(kinds: dict[str, Any], memory: MemorySettings) -> dict[str, tuple[Any, Any]]:
    """Settings of what is kept that would not go on with what is there; a memory that is only read takes all kinds."""
    there = _written_with(kinds)
    if memory.writes == "never" and not memory.uses_slot_table:
        return {}
    names = ["eviction", "sink"]
    if memory.writes != "never":
        names += ["maximum_age", "write_every"] + ["writes"] * (there.writes != "never")
    if there.uses_slot_table != memory.uses_slot_table:
        names += ["writes", "duplicate_score", "clear_at_documents"]
    return {f"Memory.{name}": (getattr(there, name), getattr(memory, name)) for name in names}


def _written_with(kinds: dict[str, Any]) -> MemorySettings:
    """Settings of what is kept, as a manifest has them."""
    return MemorySettings(size=0, **{name: kinds[name] for name in WRITING if name in kinds})


def _laid_out(banks: tuple[Bank, ...], source: Source, memory: MemorySettings, mesh: Mesh) -> tuple[Bank, ...]:
    """Banks in a memory of the size that is wanted, with what the search keeps beside the keys."""
    empty = functools.partial(empty_carry, source.model, memory, 1, source.segment_length)
    if len(banks) != len(jax.eval_shape(empty).banks):  # one of the sizes is 0
        return init_sharded(mesh, lambda: empty().banks, functools.partial(shardings, mesh))
    with jax.set_mesh(mesh):
        like, search = jax.eval_shape(empty).banks, make_search(memory)
        banks = banks if memory.uses_slot_table else tuple(map(as_ring, banks))
    banks = tuple(resized(bank, each._replace(recall=None), mesh) for bank, each in zip(banks, like, strict=True))
    if not any(each.index.slots for each in like):
        return banks
    return tuple(indexed(bank, search, source.segment_length, mesh) for bank in banks)
