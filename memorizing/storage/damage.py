"""Tells a damaged checkpoint from one that could not be read because the disk, the network or this machine failed."""

import errno
import re

import jax


def reason(error: BaseException) -> str:
    """Returns one line about the first cause of an error, without the JSON that TensorStore and orbax append."""
    while error.__cause__ is not None:
        error = error.__cause__
    line = f"{type(error).__name__}: {error}".splitlines()[0]
    return re.split(r"\s\[[\w ]+=|\W*\btensorstore_spec\b", line)[0].rstrip(": ")


_NO_DAMAGE = re.compile(
    "RESOURCE_EXHAUSTED|DEADLINE_EXCEEDED|UNAVAILABLE|PERMISSION_DENIED|UNAUTHENTICATED|ABORTED|CANCELLED"
    rf"|os_error_code='(?!(?:{errno.ENOENT}|{errno.ENOTDIR}|{errno.EISDIR})')"
    "|tree structures do not match|is not compatible with the stored shape"
)
"""Messages of errors other than damage: TensorStore's about networks, permissions, disks and memory; orbax's about a
state of another structure or shape."""


def is_damage(error: BaseException) -> bool:
    """Returns whether the error means that a checkpoint is damaged, not that the disk, network or machine failed.

    A damaged file can make a reader raise any exception, so this recognizes the errors that mean something else.
    """
    if isinstance(error, OSError):
        return isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
    of_a_store = type(error).__module__.partition(".")[0] in ("aiohttp", "gcsfs", "google")
    if isinstance(error, MemoryError | jax.errors.JaxRuntimeError) or of_a_store or _NO_DAMAGE.search(str(error)):
        return False
    return error.__cause__ is None or is_damage(error.__cause__)
