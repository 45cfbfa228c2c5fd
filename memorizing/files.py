"""Atomic writes of small files, and a lock for a folder.

A run may also be in Google Cloud Storage, which hosts without a common disk can share. Writing an object is atomic
there, but nothing can be appended to one, and renaming one copies it.
"""

import fcntl
import glob
import importlib.util
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from etils import epath

from memorizing.errors import InputError

LOCK = "lock"
"""Name of the lock file of a folder."""

AnyPath = Path | epath.Path
"""A path on a disk, or in an object store (`epath`)."""


def run_folder(option: str, text: str) -> AnyPath:
    """Returns the folder of a run as named on the command line: a path on a disk, or gs://BUCKET/RUN.

    Raises:
        InputError: if `text` is another kind of address, or the bucket cannot be reached; names `option`.
    """
    if "\\" in text and os.sep == "/":
        raise InputError(
            f"{option}={text}: has a backslash, which the library that writes arrays takes for a slash. Choose a name "
            "without one"
        )
    if not re.match(r"(gs|s3):|[A-Za-z][A-Za-z0-9+.-]*:/", text):
        return Path(text)
    address = re.fullmatch(r"(gs://[^/]+)/+[^/].*", text)
    if address is None:
        raise InputError(
            f"{option}={text}: must be a folder, or gs://BUCKET/RUN in Google Cloud Storage. Checkpoints cannot be "
            "written to other stores (s3://...). Give a shared folder instead, such as one on NFS, EFS or FSx. If the "
            "folder really has this name, put ./ before it"
        )
    if importlib.util.find_spec("gcsfs") is None:
        raise InputError(
            f"{option}={text}: needs the extra `gcs`, which is not installed. Run bash launch/setup.sh, or pip install "
            "gcsfs google-cloud-storage"
        )
    # etils reads this. TensorFlow, if installed, would take seconds to load and use its own credentials.
    os.environ["EPATH_USE_TF"] = "false"
    import fsspec.config

    # Files that other processes, or TensorStore in this one, write must be visible at once.
    fsspec.config.conf["gcs"] = {**fsspec.config.conf.get("gcs", {}), "use_listings_cache": False}
    problem = "the bucket does not exist, or these credentials cannot see it"
    try:
        if epath.Path(address[1]).exists():
            return epath.Path(text)
    except Exception as error:  # from gcsfs, aiohttp, requests or google.auth
        problem = f"{type(error).__name__}: {error}"
    raise InputError(
        f"{option}={text}: {address[1]} cannot be reached ({problem}). Create the bucket, or give this machine access, "
        "for instance with `gcloud auth application-default login`"
    )


def atomic_write(path: AnyPath, content: str | bytes) -> None:
    """Writes a file atomically, and creates its folder if needed.

    The content is on the disk before the file gets its name, so readers and a power loss see the old file or the new
    one. Each writer has a file of its own until then; files that killed writers left are removed after an hour.

    Raises:
        OSError: see `writing`.
    """
    data = content.encode() if isinstance(content, str) else content
    with writing(path):
        if not isinstance(path, Path):
            path.write_bytes(data)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.{secrets.token_hex(6)}.unfinished")
        try:
            with unfinished.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)
        for left in path.parent.glob(f".{glob.escape(path.name)}.*.unfinished"):
            with suppress(OSError):
                if left.stat().st_mtime < time.time() - 3600:
                    left.unlink()


@contextmanager
def writing(path: AnyPath) -> Iterator[None]:
    """Adds `path` and what to do to an error of writing to it, such as that of a full disk.

    Raises:
        OSError: names `path` and says what to do.
    """
    try:
        yield
    except OSError as error:
        raise OSError(
            f"{path} could not be written to ({error.strerror or error}). Free space or repair the disk, and repeat "
            "the command"
        ) from error
    except Exception as error:
        if isinstance(path, Path):
            raise
        # From gcsfs, aiohttp, requests or google.auth.
        raise OSError(f"{path} could not be written ({type(error).__name__}: {error}). Repeat the command") from error


@contextmanager
def folder_lock(folder: Path, taken: str) -> Iterator[None]:
    """Creates `folder` and locks it until the end of the `with`, or of the process, however it ends.

    Raises:
        InputError: with the message `taken` if another process holds the lock; or if the folder cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("w")
    except OSError as error:
        raise InputError(
            f"{folder} cannot be created or written to ({error.strerror}). Choose another folder, or correct that"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(taken) from None
        except OSError as error:
            raise InputError(f"{folder} cannot be locked ({error.strerror}). Give a folder on another disk") from error
        yield


def copy_files(source: AnyPath, target: AnyPath) -> None:
    """Copies small files from a folder without subfolders to another; either may be in a bucket."""
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
