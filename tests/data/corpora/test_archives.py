"""Archives are read in memory, whole or not at all, whatever their names and links say."""

import bz2
import gzip
import io
import lzma
import os
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memorizing.data.corpora import archives
from memorizing.data.corpora.archives import Member
from memorizing.data.corpora.corpus import Problem
from memorizing.errors import InputError
from tests.shared_data import FOLDER

FILES = {"b/second.txt": b"2" * 5000, "a.txt": b"", "b/first.txt": os.urandom(2000), "ü/ñ.txt": b"one\n"}
COMPRESSIONS = {"tar": bytes, "tar.gz": gzip.compress, "tar.xz": lzma.compress, "tar.bz2": bz2.compress}


def packed_tar(files: dict[str, bytes], *others: tarfile.TarInfo) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for info in others:
            tar.addfile(info)
    return buffer.getvalue()


def packed_zip(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def oddity(name: str) -> Path:
    if not (FOLDER / "oddities" / name).exists():
        pytest.skip("needs the corpora that lie beside the checkout in shared/data")
    return FOLDER / "oddities" / name


@pytest.mark.parametrize("kind", [*COMPRESSIONS, "zip"])
def test_every_kind_of_archive_returns_its_members_in_order(tmp_path, kind):
    path = tmp_path / f"archive.{kind}"
    path.write_bytes(packed_zip(FILES) if kind == "zip" else COMPRESSIONS[kind](packed_tar(FILES)))
    assert list(archives.members(path)) == [Member(*item) for item in FILES.items()]
    assert list(archives.names(path)) == list(FILES)
    assert archives.member(path, "b/first.txt") == FILES["b/first.txt"]
    assert list(archives.members_of(path.read_bytes(), "it")) == [Member(*item) for item in FILES.items()]
    assert archives.stem(path.name) == "archive"


@pytest.mark.parametrize("pack", [packed_tar, packed_zip])
def test_names_that_lead_out_are_left_out_and_others_normalized(tmp_path, pack):
    bad = ["../x", "a/../../x", "/etc/x", "C:\\x\\y" if pack is packed_tar else "C:/x", "a/.."]
    good = {"./a//b": b"1", "a/./c": b"2", "..a/b..": b"3"}
    (tmp_path / "archive").write_bytes(pack({name: b"bad" for name in bad} | good))
    found = list(archives.members(tmp_path / "archive"))
    assert [member for member in found if isinstance(member, Member)] == [
        Member("a/b", b"1"),
        Member("a/c", b"2"),
        Member("..a/b..", b"3"),
    ]
    problems = [problem for problem in found if isinstance(problem, Problem)]
    assert [problem.place.removeprefix("archive: ") for problem in problems] == bad


def test_links_and_devices_are_left_out_with_a_note(tmp_path):
    kinds = {"soft": tarfile.SYMTYPE, "hard": tarfile.LNKTYPE, "pipe": tarfile.FIFOTYPE, "disk": tarfile.BLKTYPE}
    others = [special(name, kind, "a.txt") for name, kind in kinds.items()]
    (tmp_path / "archive.tar").write_bytes(packed_tar({"a.txt": b"text"}, *others, special("empty", tarfile.DIRTYPE)))
    first, *problems = archives.members(tmp_path / "archive.tar")
    assert first == Member("a.txt", b"text")
    assert [problem.place for problem in problems] == [f"archive.tar: {name}" for name in kinds]

    link = zipfile.ZipInfo("soft")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "archive.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
        archive.mkdir("empty")
        archive.writestr("a.txt", "text")
    problem, member = archives.members(tmp_path / "archive.zip")
    assert member == Member("a.txt", b"text") and problem.place == "archive.zip: soft"


@pytest.mark.parametrize("pack", [packed_tar, packed_zip])
def test_only_members_beyond_the_limit_are_left_out(tmp_path, pack):
    (tmp_path / "archive").write_bytes(pack({"at": b"x" * 100, "over": b"x" * 101, "under": b"x"}))
    found = list(archives.members(tmp_path / "archive", max_bytes=100))
    assert [type(one) for one in found] == [Member, Problem, Member]
    assert "over" in found[1].place and "101" in found[1].message
    assert isinstance(archives.member(tmp_path / "archive", "over", max_bytes=100), Problem)


@pytest.mark.parametrize("kind", [*COMPRESSIONS, "zip"])
def test_a_truncated_archive_is_refused_by_name(tmp_path, kind):
    whole = packed_zip(FILES) if kind == "zip" else COMPRESSIONS[kind](packed_tar(FILES))
    # A plain tar ends with two blocks of zeros (and padding): with one of them left, nothing is lost.
    end = len(whole.rstrip(b"\0")) if kind == "tar" else len(whole) - 1
    steps = {*range(0, end, max(1, end // 60)), *range(0, end, 512), end}
    for cut in sorted(steps):
        path = tmp_path / "cut"
        path.write_bytes(whole[:cut])
        with pytest.raises(InputError, match="cut off or damaged") as error:
            list(archives.members(path))
        assert str(path) in str(error.value)
        with pytest.raises(InputError):
            list(archives.names(path))


@given(st.integers(0, 3), st.integers(0, 511), st.integers(1, 255))
def test_a_damaged_header_is_refused(member, offset, change):
    damaged = bytearray(packed_tar({f"{index}.txt": b"x" for index in range(4)}))
    damaged[member * 1024 + offset] ^= change
    try:
        found = list(archives.members_of(bytes(damaged), "it"))
    except InputError:
        return
    # Bytes that the checksum does not cover, its own padding, may change; then nothing is lost.
    assert len(found) == 4


def test_a_missing_member_is_refused(tmp_path):
    (tmp_path / "archive.tar").write_bytes(packed_tar(FILES))
    with pytest.raises(InputError, match=r"has no member b/third\.txt"):
        archives.member(tmp_path / "archive.tar", "b/third.txt")


def test_errors_of_the_caller_pass_through(tmp_path):
    (tmp_path / "archive.tar").write_bytes(packed_tar(FILES))
    members = archives.members(tmp_path / "archive.tar")
    next(members)
    with pytest.raises(OSError, match="mine"):
        members.throw(OSError("mine"))


def test_is_tar_recognizes_tars():
    assert archives.is_tar(packed_tar(FILES))
    assert not any(archives.is_tar(content) for content in (b"", b"\\documentclass{a}" * 100, b"\0" * 1024))


def test_malformed_archives_write_no_files_and_are_noted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    *problems, member = sorted(archives.members(oddity("path-traversal.tar")), key=lambda one: isinstance(one, Member))
    assert member.name == "ok/a.py" and [problem.place.rpartition(" ")[2] for problem in problems] == [
        "../outside.py",
        "/tmp/absolute.py",
    ]
    looping = list(archives.members(oddity("symlink-loop.tar")))
    assert sum(isinstance(one, Member) for one in looping) == 2 and len(looping) == 7
    with pytest.raises(InputError, match=r"truncated\.tar\.xz: cut off or damaged in member books/219-0\.txt"):
        list(archives.members(oddity("truncated.tar.xz")))
    assert not list(tmp_path.iterdir()) and not Path("/tmp/absolute.py").exists()


def test_the_github_archive_holds_what_unpacking_it_gives(tmp_path):
    archive = oddity("../github/test.tar.xz")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    on_disk = {
        path.relative_to(tmp_path).as_posix(): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()
    }
    assert dict(archives.members(archive)) == on_disk
