"""Writing a small file so that a kill leaves either the old one or the new one; holding a folder against others.

A run may also lie in Google Cloud Storage, which hosts without a common disk share. Objects appear there whole or not
at all, but nothing can be appended to one, and renaming copies.
"""

import fcntl
import importlib.util
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from etils import epath

from memorizing.errors import InputError

LOCK = "lock"
"""The file by which a folder is held."""

AnyPath = Path | epath.Path
"""On a disk, or (`epath`) in an object store."""


def run_folder(option: str, text: str) -> AnyPath:
    """The folder of a run, as named on the command line: on a disk, or gs://BUCKET/RUN.

    Raises:
        InputError: naming `option`, when `text` is the address of something else, or the bucket cannot be reached.
    """
    if not re.match(r"(gs|s3):|[A-Za-z][A-Za-z0-9+.-]*:/", text):
        return Path(text)
    address = re.fullmatch(r"(gs://[^/]+)/+[^/].*", text)
    if address is None:
        raise InputError(
            f"{option}={text}: must be a folder, or gs://BUCKET/RUN in Google Cloud Storage. Checkpoints cannot be "
            "written to other stores (s3://...): with those, name a shared folder, such as one on NFS, EFS or FSx; "
            "and if the folder is really called so, ./ before it"
        )
    if importlib.util.find_spec("gcsfs") is None:
        raise InputError(
            f"{option}={text}: needs the extra `gcs`, which is not installed: bash launch/setup.sh, or "
            "pip install gcsfs google-cloud-storage"
        )
    # Read by etils: TensorFlow, where it is installed, would take seconds and its own credentials.
    os.environ["EPATH_USE_TF"] = "false"
    import fsspec.config

    # What others write, be it other processes or TensorStore in this one, has to be seen at once.
    fsspec.config.conf["gcs"] = {**fsspec.config.conf.get("gcs", {}), "use_listings_cache": False}
    problem = "there is no such bucket, or these credentials do not see it"
    try:
        if epath.Path(address[1]).exists():
            return epath.Path(text)
    except Exception as error:  # of gcsfs, aiohttp, requests or google.auth
        problem = f"{type(error).__name__}: {error}"
    raise InputError(
        f"{option}={text}: {address[1]} cannot be reached ({problem}): create the bucket, or give this machine access, "
        "for instance with `gcloud auth application-default login`"
    )


def atomic_write(path: AnyPath, content: str | bytes) -> None:
    """Writes under another name beside `path`, then renames; makes the folder if need be. In a store, writes an object.

    Raises:
        OSError: see `writing`.
    """
    data = content.encode() if isinstance(content, str) else content
    with writing(path):
        if not isinstance(path, Path):
            path.write_bytes(data)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(path.name + ".unfinished")
        unfinished.write_bytes(data)
        os.replace(unfinished, path)


@contextmanager
def writing(path: AnyPath) -> Iterator[None]:
    """Where `path`, a file or a folder, is written to: of a full disk Python says neither which nor what to do.

    Raises:
        OSError: naming it, and the way out.
    """
    try:
        yield
    except OSError as error:
        raise OSError(
            f"{path} could not be written to ({error.strerror or error}): make room or mend the disk, and repeat the "
            "command"
        ) from error
    except Exception as error:
        if isinstance(path, Path):
            raise
        # Of gcsfs, aiohttp, requests or google.auth.
        raise OSError(f"{path} could not be written ({type(error).__name__}: {error}); repeat the command") from error


@contextmanager
def folder_lock(folder: Path, taken: str) -> Iterator[None]:
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


def copy_files(source: AnyPath, target: AnyPath) -> None:
    """Copies the files of a folder that has no folders in it; small ones, be it from or to a bucket."""
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
