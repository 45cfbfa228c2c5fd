"""Why a checkpoint could not be read: because it is damaged, or because of the disk, the network or this machine."""

import errno
import re

import jax


def reason(error: BaseException) -> str:
    """One line on what went wrong first; what TensorStore and orbax tell beside it is a page of JSON."""
    while error.__cause__ is not None:
        error = error.__cause__
    line = f"{type(error).__name__}: {error}".splitlines()[0]
    return re.split(r"\s\[[\w ]+=|\W*\btensorstore_spec\b", line)[0].rstrip(": ")


_NO_DAMAGE = re.compile(
    "RESOURCE_EXHAUSTED|DEADLINE_EXCEEDED|UNAVAILABLE|PERMISSION_DENIED|UNAUTHENTICATED|ABORTED|CANCELLED"
    rf"|os_error_code='(?!(?:{errno.ENOENT}|{errno.ENOTDIR}|{errno.EISDIR})')"
    "|tree structures do not match|is not compatible with the stored shape"
)
"""In messages: of TensorStore, on networks, rights, disks and memory; of orbax, on a state that is not that saved."""


def is_damage(error: BaseException) -> bool:
    """Whether a checkpoint that could not be read is damaged, rather than the way to it or the machine that reads.

    What a damaged file makes of a reader can be any exception, so that it is the others that are told apart.
    """
    if isinstance(error, OSError):
        return isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
    of_a_store = type(error).__module__.partition(".")[0] in ("aiohttp", "gcsfs", "google")
    if isinstance(error, MemoryError | jax.errors.JaxRuntimeError) or of_a_store or _NO_DAMAGE.search(str(error)):
        return False
    return error.__cause__ is None or is_damage(error.__cause__)
