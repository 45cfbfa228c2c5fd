"""The model that a snapshot belongs to. Keys and values mean something only to the parameters that computed them."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax

from memorizing.errors import InputError
from memorizing.memory.eviction import EVICTION_RULES
from memorizing.memory.settings import WRITING, MemorySettings
from memorizing.model.learned_index import is_of_index
from memorizing.model.parameters import Parameters
from memorizing.model.settings import ModelSettings
from memorizing.storage.fingerprint import fingerprints

_WITHOUT_EFFECT = ("dtype", "dropout", "remat", "scan_layers", "index_size")
"""Model settings that do not change the meaning of a memory."""


class SnapshotOwner(NamedTuple):
    """A model that makes snapshots and may load them.

    Attributes:
        model: settings of the model.
        segment_length: tokens in a segment.
        vocabulary: digest of the vocabulary.
        parameters: digest of the parameters.
        step: step of the parameters' checkpoint.
        trained_with: digest of the snapshot that the model was trained to read; None if there is none. The parameters
            before training made that snapshot, so it is accepted although their digest differs.
    """

    model: ModelSettings
    segment_length: int
    vocabulary: str
    parameters: str
    step: int
    trained_with: str | None = None

    def described(self) -> dict[str, Any]:
        """Returns the dictionary that a manifest stores for the owner."""
        settings = dataclasses.asdict(self.model).items()
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in settings}
        values = {name: value for name, value in self._asdict().items() if name != "trained_with"}
        return values | {"model": plain}


def parameters_digest(parameters: Parameters) -> str:
    """Returns a digest of the parameters that does not depend on their sharding.

    A learned index is left out, because it does not affect keys or values.
    """
    makers = jax.tree_util.tree_map_with_path(lambda path, leaf: None if is_of_index(path) else leaf, parameters)
    return hashlib.sha256(json.dumps(fingerprints(makers), sort_keys=True).encode()).hexdigest()


def manifest_digest(manifest: dict[str, Any]) -> str:
    """Returns a digest of a manifest, which identifies the whole snapshot because it holds the arrays' fingerprints."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def check_owner(folder: Path, manifest: dict[str, Any], owner: SnapshotOwner, memory: MemorySettings) -> None:
    """Rejects a snapshot that another model made.

    Raises:
        InputError: names what differs: settings first, then the vocabulary, then the parameters.
    """
    made_by, described = manifest["made_by"], owner.described()
    # A setting that did not exist when the snapshot was made has its default value there.
    defaults = {field.name: field.default for field in dataclasses.fields(ModelSettings)}
    saved = defaults | made_by["model"]
    settings = {
        f"Model.{name}": (saved[name], value)
        for name, value in described["model"].items()
        if name not in _WITHOUT_EFFECT
    }
    settings["Batch.segment_length"] = made_by["segment_length"], described["segment_length"]
    for name in ("dtype", "key_dtype"):
        settings[f"Memory.{name}"] = manifest["memory"][name], getattr(memory, name)
    settings |= _writing_settings(manifest["memory"], memory)
    differ = [f"{name} = {was!r} (here {now!r})" for name, (was, now) in settings.items() if was != now]
    if not differ and made_by["vocabulary"] != described["vocabulary"]:
        differ = [f"a vocabulary of digest {made_by['vocabulary'][:12]} (here {described['vocabulary'][:12]})"]
    has_parameters = made_by["parameters"] == owner.parameters or manifest_digest(manifest) == owner.trained_with
    if not differ and not has_parameters:
        differ = [
            f"other parameters, of step {made_by['step']}, digest {made_by['parameters'][:12]} (here step "
            f"{owner.step}, {owner.parameters[:12]})"
        ]
    if differ:
        raise InputError(
            f"{folder} was made with {', '.join(differ)}. Only the model that made a snapshot can read it. Use these "
            "settings and the run that made it, or make a new one with `memorizing memorize`"
        )


def _writing_settings(stored: dict[str, Any], memory: MemorySettings) -> dict[str, tuple[Any, Any]]:
    """Returns the writing settings that must agree, as (saved, current); a read-only memory accepts any ring buffer."""
    there = written_with(stored)
    if memory.writes == "never" and not memory.uses_slot_table:
        return {}
    names = ["eviction", "sink"]
    if memory.writes != "never":
        names += ["maximum_age", "write_every"] + ["writes"] * (there.writes != "never")
    if there.uses_slot_table != memory.uses_slot_table:
        names += ["writes", "duplicate_score", "clear_at_documents"]
    settings = {f"Memory.{name}": (getattr(there, name), getattr(memory, name)) for name in names}
    if memory.writes != "never" and there.eviction == memory.eviction:
        rules = there.eviction_rule, memory.eviction_rule
        for field in dataclasses.fields(rules[0]):
            settings[f"{rules[0].section()}.{field.name}"] = (
                getattr(rules[0], field.name),
                getattr(rules[1], field.name),
            )
    return settings


def written_with(stored: dict[str, Any]) -> MemorySettings:
    """Returns the writing settings that a manifest stores."""
    rule = EVICTION_RULES[stored.get("eviction", MemorySettings.eviction)]
    names = {field.name: f"{rule.section()}.{field.name}" for field in dataclasses.fields(rule)}
    options = rule(**{field: stored[name] for field, name in names.items() if name in stored})
    return MemorySettings(size=0, options=(options,), **{name: stored[name] for name in WRITING if name in stored})
