"""Writing a small file so that a kill leaves either the old one or the new one; holding a folder against others."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from memorizing.errors import InputError


def write_whole(path: Path, text: str) -> None:
    """Writes `text` under another name beside `path`, then renames; makes the folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(text)
    os.replace(unfinished, path)


@contextmanager
def held(folder: Path, taken: str) -> Iterator[None]:
    """Makes `folder`, and holds it until the end of the `with`, or of the process however it ends.

    Raises:
        InputError: with the message `taken`, when another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(taken) from None
        yield
