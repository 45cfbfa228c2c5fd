"""Files are written whole: by several writers and readers at once, and if a writer is killed."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from memorizing.files import atomic_write

SIZE, ROUNDS = 200_000, 150


def writer(path: Path, letter: str) -> subprocess.Popen:
    """Starts a process that writes the file again and again."""
    program = f"for _ in range({ROUNDS}): atomic_write(Path({str(path)!r}), {letter!r} * {SIZE})"
    imports = "from pathlib import Path; from memorizing.files import atomic_write"
    return subprocess.Popen([sys.executable, "-c", f"{imports}\n{program}"])


def test_readers_and_other_writers_never_see_half_a_file(tmp_path):
    path = tmp_path / "figures.json"
    atomic_write(path, "a" * SIZE)
    writers = [writer(path, letter) for letter in "bc"]
    reads = 0
    while any(process.poll() is None for process in writers):
        text = path.read_text()
        assert len(text) == SIZE and len(set(text)) == 1
        reads += 1
    assert reads > 10 and [process.returncode for process in writers] == [0, 0]
    assert os.listdir(tmp_path) == ["figures.json"]


def test_a_killed_writer_leaves_the_old_file_and_its_remains_are_removed_later(tmp_path):
    path = tmp_path / "figures.json"
    atomic_write(path, "a" * SIZE)
    process = writer(path, "b")
    while path.read_text().startswith("a"):
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert len(path.read_text()) == SIZE
    left = tmp_path / f".{path.name}.0123.unfinished"
    left.write_text("half")
    atomic_write(path, "c")
    assert left.exists()  # it may belong to another writer
    os.utime(left, (0, 0))
    atomic_write(path, "d")
    assert not left.exists() and path.read_text() == "d"


def test_a_failed_write_leaves_nothing(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match=r"folder could not be written to"):
        atomic_write(tmp_path / "folder", "x")
    assert os.listdir(tmp_path) == ["folder"]
