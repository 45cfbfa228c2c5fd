"""Members of a tar (plain, gzip, xz, bzip2) or zip, read in memory. Nothing is written to disk.

An archive may come from anyone. Names are therefore checked although nothing is unpacked. Links and devices are left
out with a note, and members that are too large or not wanted are not read. An archive that ends early is an error.
Python's tarfile takes a cut between two members, or a damaged header, for the end, and would lose the rest without an
error.
"""

import bz2
import contextlib
import gzip
import io
import lzma
import re
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Generator, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from memorizing.data.corpora.corpus import Problem, open_file
from memorizing.errors import InputError

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".tbz2", ".zip")
MAX_BYTES = 1 << 28

_COMPRESSIONS: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"\xfd7zXZ\x00": lzma.open,
    b"BZh": bz2.open,
}
_DAMAGED = (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError, zlib.error, lzma.LZMAError)


class Member(NamedTuple):
    """A file of an archive; `name` is relative, with `/` between its parts and without `.` and `..`."""

    name: str
    content: bytes


class SkippedMember(NamedTuple):
    """A file of an archive whose content was not read."""

    name: str
    size: int


class _ArchivedFile(NamedTuple):
    name: str
    size: int
    read: Callable[[], bytes]


def stem(name: str) -> str | None:
    """Returns a file name without an archive's suffix, or None if it has none."""
    suffix = max((suffix for suffix in SUFFIXES if name.lower().endswith(suffix)), key=len, default=None)
    return name[: -len(suffix)] if suffix else None


def members(
    path: Path, max_bytes: int = MAX_BYTES, wanted: Callable[[str, int], bool] = lambda name, size: True
) -> Iterator[Member | SkippedMember | Problem]:
    """Yields all files of the archive in order, and a note for everything else that is not a folder.

    A name can occur twice; the later member is the one that unpacking would leave.

    Args:
        path: the archive.
        max_bytes: larger members are left out.
        wanted: whether to read a member, by name and size. The content of others is never in memory.

    Raises:
        InputError: for a file that is not an archive, or is cut off or damaged; after the members before that place.
    """
    with open_file(path) as file:
        for entry in _entries(file, str(path), path.name):
            if isinstance(entry, _ArchivedFile) and not wanted(entry.name, entry.size):
                yield SkippedMember(entry.name, entry.size)
            else:
                yield _member(entry, str(path), path.name, max_bytes)


def members_of(content: bytes, place: str, max_bytes: int = MAX_BYTES) -> Iterator[Member | Problem]:
    """Yields the `members` of an archive that is in memory; messages call it `place`."""
    for entry in _entries(io.BytesIO(content), place, place):
        yield _member(entry, place, place, max_bytes)


def names(path: Path) -> Iterator[str | Problem]:
    """Yields the names of the `members` without reading contents; for a plain tar this reads only headers."""
    with open_file(path) as file:
        for entry in _entries(file, str(path), path.name):
            yield entry if isinstance(entry, Problem) else entry.name


def member(path: Path, name: str, max_bytes: int = MAX_BYTES) -> bytes | Problem:
    """Returns the first member of that name. Fast in a plain tar or a zip; otherwise everything before it is
    decompressed.

    Raises:
        InputError: if the member does not exist, or the archive is damaged before it.
    """
    with open_file(path) as file, contextlib.closing(_entries(file, str(path), path.name)) as entries:
        for entry in entries:
            if isinstance(entry, _ArchivedFile) and entry.name == name:
                return _read(entry, str(path), path.name, max_bytes)
    raise InputError(f"{path} has no member {name} any more. It changed since it was listed; run the command again")


def is_tar(content: bytes) -> bool:
    """Returns whether the content starts like a tar that is neither compressed nor empty."""
    try:
        tarfile.TarInfo.frombuf(content[: tarfile.BLOCKSIZE], "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def _member(entry: _ArchivedFile | Problem, path: str, place: str, max_bytes: int) -> Member | Problem:
    if isinstance(entry, Problem):
        return entry
    content = _read(entry, path, place, max_bytes)
    return content if isinstance(content, Problem) else Member(entry.name, content)


def _read(entry: _ArchivedFile, path: str, place: str, max_bytes: int) -> bytes | Problem:
    if entry.size > max_bytes:
        return Problem(f"{place}: {entry.name}", f"left out: {entry.size:,} bytes, more than {max_bytes:,}")
    try:
        return entry.read()
    except (RuntimeError, NotImplementedError) as error:  # raised by zipfile for a password or an unknown compression
        return Problem(f"{place}: {entry.name}", f"left out: {error}")
    except _DAMAGED as error:
        raise _damaged(path, f"in member {entry.name}", error) from error


def _entries(file: io.BufferedIOBase, path: str, place: str) -> Generator[_ArchivedFile | Problem]:
    head = file.read(6)
    file.seek(0)
    listed = _zip_entries(file) if head.startswith((b"PK\3\4", b"PK\5\6")) else _tar_entries(file, head)
    last = "at its start"
    while True:
        try:  # only around the archive's code: the caller's errors are not the archive's
            raw, kind, entry = next(listed)
        except StopIteration:
            return
        except _DAMAGED as error:
            raise _damaged(path, last, error) from error
        last = f"after member {raw}"
        name = _normal(raw)
        if name is None:
            yield Problem(
                f"{place}: {raw}", "left out: its name is absolute or has `..`, so it leads out of the archive"
            )
        elif kind:
            yield Problem(f"{place}: {name}", f"left out: {kind}")
        elif entry is not None:
            yield entry._replace(name=name)


def _damaged(path: str, where: str, error: BaseException) -> InputError:
    return InputError(
        f"{path}: cut off or damaged {where} ({error or type(error).__name__}); documents would be missing. Fetch "
        "or make it again, or move it away to continue without it"
    )


def _normal(name: str) -> str | None:
    parts = PurePosixPath(name).parts
    if name.startswith("/") or re.match(r"[A-Za-z]:[\\/]", name) or ".." in re.split(r"[\\/]", name):
        return None
    return "/".join(parts)


type _Entries = Iterator[tuple[str, str, _ArchivedFile | None]]  # raw name, reason if left out, file if read


class _StrictTarInfo(tarfile.TarInfo):
    """A tar header that ends the archive only at a block of zeros. tarfile itself ends at any invalid header."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str):
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if len(buf) == tarfile.BLOCKSIZE and not any(buf):
                raise
            message = f"{error}" if buf else "no end-of-archive mark"
            raise tarfile.ReadError(message) from error


def _tar_entries(file: io.BufferedIOBase, head: bytes) -> _Entries:
    opener = next((opener for magic, opener in _COMPRESSIONS.items() if head.startswith(magic)), None)
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(opener(file)) if opener else file
        tar = stack.enter_context(tarfile.open(fileobj=stream, mode="r:", tarinfo=_StrictTarInfo))
        for info in tar:
            name = info.name
            try:
                name.encode()
            except UnicodeEncodeError:  # tarfile escapes bytes that are not UTF-8 with surrogates
                name = name.encode("utf-8", "surrogateescape").decode("latin-1")
            if info.isdir():
                yield name, "", None
            elif info.issym() or info.islnk():
                yield name, f"a {'symbolic' if info.issym() else 'hard'} link to {info.linkname}", None
            elif not info.isfile():
                yield name, "a device or a pipe", None
            else:
                yield name, "", _ArchivedFile(name, info.size, lambda info=info: _content(tar, info))
        while opener and stream.read(1 << 20):  # the checksum is at the end
            pass


def _content(tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(info)
    return file.read() if file else b""


def _zip_entries(file: io.BufferedIOBase) -> _Entries:
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            name = info.filename.replace("\\", "/")  # some Windows tools write these against the format
            mode = stat.S_IFMT(info.external_attr >> 16)
            if info.is_dir() or stat.S_ISDIR(mode):
                yield name, "", None
            elif mode and not stat.S_ISREG(mode):
                yield name, "a symbolic link" if stat.S_ISLNK(mode) else "a device or a pipe", None
            else:
                yield name, "", _ArchivedFile(name, info.file_size, lambda info=info: archive.read(info))
