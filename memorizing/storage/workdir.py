"""What a run's folder says beside checkpoints and metrics: which data it reads, who is at work, what was dropped."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from memorizing.data.tokens import MANIFEST, PreparedTokens, write_vocabulary
from memorizing.errors import InputError
from memorizing.files import AnyPath, atomic_write, folder_lock
from memorizing.model.settings import ModelSettings
from memorizing.parallel.hosts import broadcast_from_first, is_first
from memorizing.storage.checkpoints import has_checkpoint


def open_tokens(data: str, model: ModelSettings) -> PreparedTokens:
    """Prepared tokens that the model can read.

    Raises:
        InputError: when they are missing, or have more different tokens than the model.
    """
    if not data:
        raise InputError("Training.data = '': name a folder of prepared tokens, --gin_param \"DATA = 'FOLDER'\"")
    tokens = PreparedTokens(Path(data))
    if tokens.vocabulary_size > model.vocabulary_size:
        raise InputError(
            f"Model.vocabulary_size = {model.vocabulary_size}, but the vocabulary of {data} has "
            f"{tokens.vocabulary_size} tokens: set it to at least that"
        )
    return tokens


DATA_FILE = "data.json"
"""In a workdir: digests of the vocabulary and of the train split that the run reads."""
VOCABULARY = "vocabulary"
"""In a workdir: a folder with a copy of the run's vocabulary, so that the workdir alone can read and write text."""
PRETRAINED = "pretrained"
"""In a workdir: the small files of the pretrained model that the run began with, for `memorizing export`."""


def held_run(workdir: AnyPath) -> AbstractContextManager[None]:
    """Holds a run's folder, in the first process, for as long as it trains; a bucket cannot be held.

    Raises:
        InputError: when another training holds it.
    """
    if not is_first() or not isinstance(workdir, Path):
        return nullcontext()
    return folder_lock(
        workdir, f"--workdir={workdir}: another `memorizing train` is at work there; let it end, or end it"
    )


def record_data(workdir: AnyPath, tokens: PreparedTokens) -> None:
    """Copies the vocabulary to `VOCABULARY` and writes `DATA_FILE`, in the first process."""
    if is_first():
        write_vocabulary(workdir / VOCABULARY, tokens.vocabulary)
        atomic_write(workdir / DATA_FILE, json.dumps({"folder": str(tokens.folder), **tokens.digests()}) + "\n")


def check_data(workdir: AnyPath, tokens: PreparedTokens, train: bool) -> None:
    """Refuses tokens that are not those the run in `workdir` began with; to evaluate, only the vocabulary counts.

    The folder may have moved: it is what is in it that has to be the same.

    Raises:
        InputError: naming both sides.
    """
    path = workdir / DATA_FILE
    if not path.exists() or not has_checkpoint(workdir):
        return
    began, now = json.loads(path.read_text()), tokens.digests()
    for name in ("vocabulary", "train") if train else ("vocabulary",):
        if name in began and now.get(name) != began[name]:  # an imported run began with a vocabulary alone
            raise InputError(
                f"{tokens.folder} has another {'vocabulary' if name == 'vocabulary' else 'train split'} (digest "
                f"{now.get(name, 'none')[:12]}) than the run in {workdir} began with ({began[name][:12]}, "
                f"{began['folder']}): name those tokens with Training.data, or train in another --workdir"
            )


def readable_tokens(workdir: AnyPath, data: str, model: ModelSettings) -> PreparedTokens:
    """Prepared tokens that the run in `workdir` can read, be it that they are not those it is trained on.

    Raises:
        InputError: see `open_tokens` and `check_data`.
    """
    tokens = open_tokens(data, model)
    check_data(workdir, tokens, train=False)
    return tokens


def open_vocabulary(workdir: AnyPath) -> PreparedTokens:
    """Returns the run's own copy of its vocabulary, as prepared tokens without documents.

    Raises:
        InputError: if the workdir has no copy, or the copy is damaged or not the vocabulary that the run began with.
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
    """Returns the prepared tokens in which `document` may be named; the run's vocabulary if it is a file or folder.

    A document of a split goes before a file of the same name, as long as the folder `data` is on this machine.

    Raises:
        InputError: see `readable_tokens` and `open_vocabulary`.
    """
    if Path(document).exists() and not (data and (Path(data) / MANIFEST).is_file()):
        return open_vocabulary(workdir)
    return readable_tokens(workdir, data, model)


DROPPED_FILE = "dropped_memory.json"
"""In a workdir: the step at which `reset_memory` was asked for."""


def is_first_drop(workdir: AnyPath, newest: int | None, say: Callable[[str], None]) -> bool:
    """Whether the memory saved at the `newest` step is to be dropped: not again when launchers repeat the command."""
    path, dropped = workdir / DROPPED_FILE, -1
    if is_first() and path.exists():
        dropped = json.loads(path.read_text())["step"]
    dropped = broadcast_from_first(dropped)
    if 0 <= dropped < (newest or 0):
        say(f"--reset_memory: the memory was dropped at step {dropped} already; to drop it again, remove {path}")
        return False
    if is_first() and newest is not None:
        atomic_write(path, json.dumps({"step": newest}) + "\n")
    return True
