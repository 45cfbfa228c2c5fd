"""The identity of a run, recorded inside each checkpoint: the step, the settings and the data that it was trained with.

`config.gin` and `data.json` say the same where people read and edit them. A checkpoint that was copied to another
step, and files that were deleted or edited, are noticed by comparing them with this record.
"""

import json
from typing import Any, NamedTuple

from memorizing.errors import InputError
from memorizing.files import AnyPath

RECORD = "run"
"""Name of the record among a checkpoint's fingerprints."""


class Identity(NamedTuple):
    """The record of a run in a checkpoint.

    Attributes:
        step: step of the checkpoint.
        settings: `repr` of each training setting, by its gin name.
        data: digests of the vocabulary and the train split.
    """

    step: int
    settings: dict[str, str]
    data: dict[str, str]


def read_identity(checkpoint: AnyPath, fingerprints: str) -> Identity | None:
    """Returns the record in the folder of a checkpoint; None if it cannot be read, which restoring will report."""
    try:
        record = json.loads((checkpoint / fingerprints / "metadata").read_text())[RECORD]
        return Identity(int(record["step"]), dict(record["settings"]), dict(record["data"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def read_small_json(path: AnyPath, remedy: str) -> dict[str, Any]:
    """Returns the content of a small file of a run's folder.

    Raises:
        InputError: if it is damaged; says what to do.
    """
    try:
        content = json.loads(path.read_text())
        if isinstance(content, dict):
            return content
        problem = "it is not a JSON object"
    except (OSError, ValueError, RecursionError) as error:
        problem = str(error)
    raise InputError(f"{path} is damaged ({problem}). {remedy}")
