"""`memorizing prepare`, killed at any moment and repeated, ends as if it had never been killed."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("memorizing.data.builders")
KILLS = 5


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def start(raw: Path, out: Path) -> subprocess.Popen:
    settings = (
        "Prepare.source = 'pg19'",
        "Prepare.vocabulary_size = 330",
        "Prepare.vocabulary_model = 'bpe'",
        "Prepare.part_bytes = 30_000",
    )
    command = [sys.executable, "-m", "memorizing.cli", "prepare", f"--raw={raw}", f"--out={out}"]
    command += [word for setting in settings for word in ("--gin_param", setting)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)


def test_a_killed_preparation_resumes_and_gives_the_same_result(tmp_path):
    raw, rng = tmp_path / "raw", random.Random()
    raw.mkdir()
    for number in range(40):
        words = random.Random(number)
        text = "".join(f"{words.choice('abcdefgh') * words.randrange(1, 9)} " for _ in range(20_000))
        (raw / f"{number}.txt").write_text(text)
    started = time.monotonic()
    process = start(raw, tmp_path / "undisturbed")
    said = process.communicate(timeout=300)[0].decode()
    whole = time.monotonic() - started
    assert process.returncode == 0, said

    killed, moments = 0, []
    while killed < KILLS:
        process = start(raw, tmp_path / "disturbed")
        moments.append(rng.uniform(0.1, 1.0) * whole)
        try:
            process.wait(timeout=moments[-1])
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        said = process.communicate()[0].decode()
        killed += 1
        if process.returncode == 0:
            break  # it was through before its moment
        assert process.returncode == -signal.SIGKILL, (moments, said)
        assert not (tmp_path / "disturbed").exists() or (tmp_path / "disturbed" / "manifest.json").exists()
    process = start(raw, tmp_path / "disturbed")
    said = process.communicate(timeout=300)[0].decode()
    assert process.returncode == 0, (moments, said)
    one, other = files(tmp_path / "undisturbed"), files(tmp_path / "disturbed")
    assert one.keys() == other.keys() and len(one) > 10
    assert [name for name in one if one[name] != other[name]] == [], moments
    assert not (tmp_path / "disturbed.unfinished").exists()
