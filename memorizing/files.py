"""Writing a small file so that a kill leaves either the old one or the new one; holding a folder against others."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from memorizing.errors import InputError

LOCK = "lock"
"""The file by which a folder is held."""


def write_whole(path: Path, text: str) -> None:
    """Writes `text` under another name beside `path`, then renames; makes the folder if need be.

    Raises:
        OSError: see `writing`.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(path.name + ".unfinished")
        unfinished.write_text(text)
        os.replace(unfinished, path)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Where `path`, a file or a folder, is written to: of a full disk Python says neither which nor what to do.

    Raises:
        OSError: naming it, and the way out.
    """
    try:
        yield
    except OSError as error:
        raise OSError(
            f"{path} could not be written to ({error.strerror}): make room or mend the disk, and repeat the command"
        ) from error


@contextmanager
def held(folder: Path, taken: str) -> Iterator[None]:
    """Makes `folder`, and holds it until the end of the `with`, or of the process however it ends.

    Raises:
        InputError: with the message `taken`, when another process holds it; or when it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("w")
    except OSError as error:
        raise InputError(
            f"{folder} cannot be made or written to ({error.strerror}): name another folder, or mend that"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(taken) from None
        except OSError as error:
            raise InputError(f"{folder} cannot be locked ({error.strerror}): name a folder on another disk") from error
        yield
