"""Members of a tar (plain, gzip, xz, bzip2) or zip, read in memory: nothing is ever written to disk.

An archive is what a stranger made. So names are checked although nobody unpacks to them, links and devices are left
out with a report, a member beyond a size, or that nobody wants, is not read, and an archive that ends too early is an
error: Python's tarfile takes a cut between two members, or a damaged header, for the end, and whatever followed would
be lost unnoticed.
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
    """A file of an archive that is not wanted."""

    name: str
    size: int


class _ArchivedFile(NamedTuple):
    name: str
    size: int
    read: Callable[[], bytes]


def stem(name: str) -> str | None:
    """The name of a file without the suffix of an archive; None if it has none."""
    suffix = max((suffix for suffix in SUFFIXES if name.lower().endswith(suffix)), key=len, default=None)
    return name[: -len(suffix)] if suffix else None


def members(
    path: Path, max_bytes: int = MAX_BYTES, wanted: Callable[[str, int], bool] = lambda name, size: True
) -> Iterator[Member | SkippedMember | Problem]:
    """All files of the archive in its order, and a problem for everything else in it that is not a folder.

    A name can come twice; the later member is the one that unpacking would leave.

    Args:
        path: of the archive.
        max_bytes: larger members are left out.
        wanted: says by name and size whose content to read; that of others is never in memory.

    Raises:
        InputError: for a file that is no archive, or is cut off or damaged; after the members before that place.
    """
    with open_file(path) as file:
        for entry in _entries(file, str(path), path.name):
            if isinstance(entry, _ArchivedFile) and not wanted(entry.name, entry.size):
                yield SkippedMember(entry.name, entry.size)
            else:
                yield _member(entry, str(path), path.name, max_bytes)


def members_of(content: bytes, place: str, max_bytes: int = MAX_BYTES) -> Iterator[Member | Problem]:
    """`members` of an archive that is itself in memory, called `place` in messages."""
    for entry in _entries(io.BytesIO(content), place, place):
        yield _member(entry, place, place, max_bytes)


def names(path: Path) -> Iterator[str | Problem]:
    """Names of what `members` would give; reads no contents, so a plain tar costs no more than its headers."""
    with open_file(path) as file:
        for entry in _entries(file, str(path), path.name):
            yield entry if isinstance(entry, Problem) else entry.name


def member(path: Path, name: str, max_bytes: int = MAX_BYTES) -> bytes | Problem:
    """The (first) member of that name; fast from a plain tar or a zip, else all before it is decompressed.

    Raises:
        InputError: if it is not there, or the archive is damaged up to there.
    """
    with open_file(path) as file, contextlib.closing(_entries(file, str(path), path.name)) as entries:
        for entry in entries:
            if isinstance(entry, _ArchivedFile) and entry.name == name:
                return _read(entry, str(path), path.name, max_bytes)
    raise InputError(f"{path} has no member {name} any more. It changed since it was listed; run the command again")


def is_tar(content: bytes) -> bool:
    """Whether it starts as a tar does that is not compressed and not empty."""
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
    """Only a block of zeros ends an archive: tarfile itself stops without a word at anything that is no header."""

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
