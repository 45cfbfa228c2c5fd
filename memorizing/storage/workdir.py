"""Small files of a run's folder: data digests, vocabulary, lock, and the record of the last memory reset."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from memorizing.data.tokens import MANIFEST, PreparedTokens, write_vocabulary
from memorizing.errors import InputError
from memorizing.files import AnyPath, atomic_write, folder_lock
from memorizing.model.settings import ModelSettings
from memorizing.parallel.hosts import broadcast_from_first, is_first
from memorizing.storage.checkpoints import has_checkpoint, newest_identity
from memorizing.storage.identity import read_small_json


def open_tokens(data: str, model: ModelSettings) -> PreparedTokens:
    """Returns prepared tokens that the model can read.

    Raises:
        InputError: if they are missing, or their vocabulary is larger than the model's.
    """
    if not data:
        raise InputError(
            "Training.data = '' names no data. Give a folder of prepared tokens with --gin_param \"DATA = 'FOLDER'\""
        )
    tokens = PreparedTokens(Path(data))
    if tokens.vocabulary_size > model.vocabulary_size:
        raise InputError(
            f"Model.vocabulary_size = {model.vocabulary_size}, but the vocabulary of {data} has "
            f"{tokens.vocabulary_size} tokens. Set it to at least that"
        )
    return tokens


DATA_FILE = "data.json"
"""File with digests of the run's vocabulary and train split."""
VOCABULARY = "vocabulary"
"""Folder with a copy of the run's vocabulary, so that the workdir alone can read and write text."""
PRETRAINED = "pretrained"
"""Folder with the small files of the pretrained model that the run started from, for `memorizing export`."""


def held_run(workdir: AnyPath) -> AbstractContextManager[None]:
    """Locks a run's folder while it trains, in the first process. Does nothing for a bucket, which cannot be locked.

    Raises:
        InputError: if another training holds the lock.
    """
    if not is_first() or not isinstance(workdir, Path):
        return nullcontext()
    return folder_lock(
        workdir, f"--workdir={workdir}: another `memorizing train` is at work there. Wait for it, or stop it"
    )


def record_data(workdir: AnyPath, tokens: PreparedTokens) -> None:
    """Copies the vocabulary to `VOCABULARY` and writes `DATA_FILE`, in the first process."""
    if is_first():
        write_vocabulary(workdir / VOCABULARY, tokens.vocabulary)
        atomic_write(workdir / DATA_FILE, json.dumps({"folder": str(tokens.folder), **tokens.digests()}) + "\n")


def check_data(workdir: AnyPath, tokens: PreparedTokens, train: bool) -> None:
    """Rejects tokens other than those with which the run in `workdir` started.

    Compares the vocabulary and, if `train`, the train split, by their contents: the folder may have moved.

    Raises:
        InputError: if they differ; the message gives the digest and folder of each.
    """
    if not has_checkpoint(workdir):
        return
    saved, digests = _recorded_data(workdir), tokens.digests()
    for name in ("vocabulary", "train") if train else ("vocabulary",):
        if name in saved and digests.get(name) != saved[name]:  # an imported run has only a vocabulary
            raise InputError(
                f"{tokens.folder} has another {'vocabulary' if name == 'vocabulary' else 'train split'} (digest "
                f"{digests.get(name, 'none')[:12]}) than the run in {workdir} started with ({saved[name][:12]}, "
                f"{saved['folder']}). Give those tokens with Training.data, or train in another --workdir"
            )


def _recorded_data(workdir: AnyPath) -> dict[str, str]:
    """Returns the folder and the digests of the data of a run: those in its newest checkpoint, or in `DATA_FILE`.

    Raises:
        InputError: if the file is missing or damaged, or does not agree with the checkpoint.
    """
    path, identity = workdir / DATA_FILE, newest_identity(workdir)
    if not path.exists():
        if identity is None:
            raise InputError(
                f"{path} is missing, which says what data the run was trained with. Copy the run's whole folder again"
            )
        return {"folder": "a folder that is not recorded", **identity.data}
    saved = read_small_json(path, "Remove it: the newest checkpoint holds the same digests")
    if identity is not None:
        for name, digest in identity.data.items():
            if saved.get(name) != digest:
                raise InputError(
                    f"{path} says {name} = {saved.get(name)!r}, but the newest checkpoint was trained with {digest!r}: "
                    "the file was edited or is another run's. Remove it, or copy the run's folder again"
                )
    return {"folder": "a folder that is not recorded", **saved}


def readable_tokens(workdir: AnyPath, data: str, model: ModelSettings) -> PreparedTokens:
    """Returns prepared tokens with the vocabulary of the run in `workdir`; the texts may be new to it.

    Raises:
        InputError: see `open_tokens` and `check_data`.
    """
    tokens = open_tokens(data, model)
    check_data(workdir, tokens, train=False)
    return tokens


def open_vocabulary(workdir: AnyPath) -> PreparedTokens:
    """Returns the run's own copy of its vocabulary, as prepared tokens without documents.

    Raises:
        InputError: if the workdir has no copy, or the copy is damaged or not the vocabulary that the run started with.
    """
    folder = workdir / VOCABULARY
    if not (folder / MANIFEST).exists():
        raise InputError(
            f"{workdir} has no vocabulary: {folder / MANIFEST} is missing. Training writes it when a run begins. Train "
            "the run first, or copy its whole folder"
        )
    tokens = PreparedTokens(folder)
    check_data(workdir, tokens, train=False)
    return tokens


def open_document_tokens(workdir: AnyPath, data: str, model: ModelSettings, document: str) -> PreparedTokens:
    """Returns the prepared tokens that hold `document`, or only the run's vocabulary if it is a file or folder.

    If this machine has the folder `data`, its documents take precedence over files of the same name.

    Raises:
        InputError: see `readable_tokens` and `open_vocabulary`.
    """
    if Path(document).exists() and not (data and (Path(data) / MANIFEST).is_file()):
        return open_vocabulary(workdir)
    return readable_tokens(workdir, data, model)


DROPPED_FILE = "dropped_memory.json"
"""File with the step at which `--reset_memory` dropped the memory."""


def is_first_drop(workdir: AnyPath, newest: int | None, say: Callable[[str], None]) -> bool:
    """Returns True if the memory saved at step `newest` is to be dropped; False if a launcher repeats the command."""
    path, dropped = workdir / DROPPED_FILE, -1
    if is_first() and path.exists():
        again = "Remove it; --reset_memory then drops the memory once more"
        dropped = int(read_small_json(path, again).get("step", -1))
    dropped = broadcast_from_first(dropped)
    if 0 <= dropped < (newest or 0):
        say(f"--reset_memory: the memory was already dropped at step {dropped}. To drop it again, remove {path}")
        return False
    if is_first() and newest is not None:
        atomic_write(path, json.dumps({"step": newest}) + "\n")
    return True
