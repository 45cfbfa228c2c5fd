"""Memory snapshots: folders with the state of a model that has read some texts, from which it can continue.

FOLDER/manifest.json    the model that made it (see snapshot_owner.py), the texts, and the unfinished segment
FOLDER/arrays/          XL caches and banks of one row, in orbax's format; without indexes, which are rebuilt
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
from memorizing.memory.bank import Bank, as_ring
from memorizing.memory.search import NO_INDEX
from memorizing.memory.search_choice import make_search
from memorizing.memory.settings import MemorySettings
from memorizing.model.carry import Carry, empty_carry
from memorizing.parallel.mesh import init_sharded, placed, shardings
from memorizing.storage.fingerprint import fingerprints
from memorizing.storage.saved_banks import indexed, resized
from memorizing.storage.snapshot_owner import SnapshotOwner, check_owner, manifest_digest, written_with

FORMAT_VERSION = 2
"""Version of a snapshot's folder. Version 1 (memorizing 0.1) named parameters differently."""
MANIFEST = "manifest.json"
MANIFEST_KEYS = "made_by", "memory", "texts", "unfinished_segment", "fingerprints"
"""Keys that a manifest must have."""
ARRAYS = "arrays"


class ReadText(NamedTuple):
    """The record of a text that was read: its name, its number of tokens, and their digest."""

    name: str
    tokens: int
    sha256: str


class Snapshot(NamedTuple):
    """The state of a reader after some texts.

    Attributes:
        carry: XL caches and banks of one row, before the unfinished segment.
        inputs: input tokens of the unfinished segment, in order.
        texts: the texts that were read, in order.
    """

    carry: Carry
    inputs: list[int]
    texts: list[ReadText]


def snapshot_digest(folder: Path) -> str:
    """Returns a digest of a snapshot's contents, which does not depend on the folder's name.

    Raises:
        InputError: if there is no snapshot.
    """
    return manifest_digest(_manifest(folder))


def check_not_empty(memory: MemorySettings, way_out: str = "") -> None:
    """Rejects a memory that is empty and is never written.

    Raises:
        InputError: names `way_out`, or else the setting to change.
    """
    if memory.size and memory.writes == "never":
        fix = "set --gin_param \"Memory.writes = 'segment'\""
        fix = f"{way_out}, or {fix}" if way_out else fix
        raise InputError(
            "Memory.writes = 'never' without a snapshot: the memory is empty and is never written, so no query finds "
            f"anything. {fix[0].upper()}{fix[1:]}"
        )


def check_folder(option: str, folder: Path) -> None:
    """Rejects an output folder that exists and is not a snapshot. Call it before reading any text.

    Raises:
        InputError: names `option`.
    """
    if folder.exists() and not (folder / MANIFEST).is_file():
        raise InputError(f"{option}={folder} exists already and is not a snapshot. Give a folder that does not exist")


def check_again(folder: Path, texts: Sequence[ReadText], owner: SnapshotOwner, memory: MemorySettings) -> None:
    """Rejects a folder that holds a snapshot of other texts. Call it before reading the texts.

    Raises:
        InputError: says what differs.
    """
    if not folder.exists():
        return
    manifest = _manifest(folder)
    check_owner(folder, manifest, owner, memory)
    if manifest["texts"] != [text._asdict() for text in texts]:
        raise InputError(f"--out={folder} holds a snapshot of other texts. Choose another folder, or remove that one")


def read_text_of(tokens_T: Int[np.ndarray, "T"], name: str) -> ReadText:
    """Returns a snapshot's record of a text."""
    return ReadText(name, len(tokens_T), hashlib.sha256(tokens_T.astype("<i4").tobytes()).hexdigest())


def save_snapshot(folder: Path, snapshot: Snapshot, owner: SnapshotOwner, memory: MemorySettings) -> bool:
    """Writes a snapshot atomically. Returns False if the folder already holds the same snapshot.

    Raises:
        InputError: if the folder holds something else.
    """
    check_folder("--out", folder)
    arrays = _by_path(_saved_part(snapshot.carry))
    settings = {"size": memory.size, "dtype": memory.dtype, "key_dtype": memory.key_dtype, **memory.writing()}
    manifest = {
        "format_version": FORMAT_VERSION,
        "made_by": owner.described(),
        "memory": settings,
        "tokens": sum(text.tokens for text in snapshot.texts),
        "texts": [text._asdict() for text in snapshot.texts],
        "unfinished_segment": snapshot.inputs,
        "fingerprints": fingerprints(arrays),
    }
    if folder.exists():
        saved = _manifest(folder)
        if differ := [name for name in manifest if manifest[name] != saved.get(name)]:
            raise InputError(
                f"--out={folder} holds another snapshot (it differs in {', '.join(differ)}). Choose another folder, or "
                "remove that one"
            )
        return False
    with writing(folder):
        # A random name avoids overwriting an interrupted save or another process's.
        unfinished = folder.with_name(f"{folder.name}.unfinished-{secrets.token_hex(4)}").absolute()
        unfinished.mkdir(parents=True)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(unfinished / ARRAYS, arrays)
        atomic_write(unfinished / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        unfinished.rename(folder)
    return True


def load_snapshot(folder: Path, owner: SnapshotOwner, memory: MemorySettings, mesh: Mesh) -> Snapshot:
    """Loads a snapshot of the same model, into a memory of size `memory.size`. A smaller one keeps the newest tokens.

    Raises:
        InputError: if there is no snapshot, another model made it (names the differences), or it is damaged.
    """
    manifest = _manifest(folder)
    check_owner(folder, manifest, owner, memory)
    saved_memory = dataclasses.replace(written_with(manifest["memory"]), dtype=memory.dtype, key_dtype=memory.key_dtype,
                                    size=manifest["memory"]["size"], search="exact", neighbors=1)  # fmt: skip
    model = dataclasses.replace(owner.model, dtype=manifest["made_by"]["model"]["dtype"])
    abstract = jax.eval_shape(functools.partial(empty_carry, model, saved_memory, 1, owner.segment_length))
    abstract = placed(abstract, shardings(mesh, abstract))
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            arrays = checkpointer.restore((folder / ARRAYS).absolute(), _by_path(abstract))
        is_whole = fingerprints(arrays) == manifest["fingerprints"]
    except Exception as error:  # a damaged file can make a reader raise anything
        raise InputError(f"{folder} cannot be read ({type(error).__name__}). Copy or make it again") from error
    if not is_whole:
        raise InputError(f"{folder} is damaged: its fingerprints differ. Copy or make it again")
    fill = lambda path, leaf: arrays[path] if leaf.size else jnp.zeros(leaf.shape, leaf.dtype)  # noqa: E731
    paths = [_path(path) for path, _ in jax.tree.leaves_with_path(abstract)]
    carry = jax.tree.unflatten(jax.tree.structure(abstract), map(fill, paths, jax.tree.leaves(abstract)))
    caches = jax.tree.map(lambda leaf: leaf.astype(owner.model.dtype), carry.caches)
    carry = carry._replace(caches=caches, banks=_laid_out(carry.banks, owner, memory, mesh))
    return Snapshot(carry, manifest["unfinished_segment"], [ReadText(**text) for text in manifest["texts"]])


def is_older(folder: Path, owner: SnapshotOwner) -> bool:
    """Returns True if the parameters before training made the snapshot, not the current ones."""
    return _manifest(folder)["made_by"]["parameters"] != owner.parameters


def _saved_part(carry: Carry) -> Carry:
    return carry._replace(banks=tuple(bank._replace(index=NO_INDEX, recall=None) for bank in carry.banks))


def _by_path(tree: Any) -> dict[str, Any]:
    """Returns all arrays by path, except empty ones (an XL cache of length 0), which orbax rejects."""
    return {_path(path): leaf for path, leaf in jax.tree.leaves_with_path(tree) if leaf.size}


def _path(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise InputError(
            f"{folder} holds no memory snapshot (no {MANIFEST}). Make one with `memorizing memorize --out`"
        )
    try:
        manifest = json.loads(path.read_text())
        version = manifest["format_version"]
        if version != FORMAT_VERSION:
            raise InputError(
                f"{folder} is a snapshot of format {version}, but this version of memorizing reads format "
                f"{FORMAT_VERSION}. Make it again with `memorizing memorize`"
            )
        if missing := [name for name in MANIFEST_KEYS if name not in manifest]:
            raise KeyError(*missing)
        return manifest
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is damaged ({error!r}). Copy or make the snapshot again") from error


def _laid_out(banks: tuple[Bank, ...], owner: SnapshotOwner, memory: MemorySettings, mesh: Mesh) -> tuple[Bank, ...]:
    """Returns the banks resized to `memory.size`, with the index of its search."""
    empty = functools.partial(empty_carry, owner.model, memory, 1, owner.segment_length)
    if len(banks) != len(jax.eval_shape(empty).banks):  # one of the sizes is 0
        return init_sharded(mesh, lambda: empty().banks, functools.partial(shardings, mesh))
    with jax.set_mesh(mesh):
        abstract, search = jax.eval_shape(empty).banks, make_search(memory)
        banks = banks if memory.uses_slot_table else tuple(map(as_ring, banks))
    banks = tuple(resized(bank, each._replace(recall=None), mesh) for bank, each in zip(banks, abstract, strict=True))
    if not any(each.index.slots for each in abstract):
        return banks
    return tuple(indexed(bank, search, owner.segment_length, mesh) for bank in banks)
