"""Kills at the worst moments, damaged checkpoints, full disks: the same command then ends as an undisturbed run."""

import contextlib
import dataclasses
import errno
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from memorizing.evaluation import evaluate
from memorizing.parallel.mesh import make_mesh
from memorizing.runs import load_trained
from memorizing.storage import checkpoints
from memorizing.storage.checkpoints import Checkpoints, CorruptCheckpoint, ReadFailed
from memorizing.training.loop import resume
from memorizing.training.state import StateFactory
from tests.integration import test_resume
from tests.integration.test_resume import finish, saved, steps_saved, train, wait_for

STEPS = 400
CALL = 4 * 8  # tokens of a row in a call: segments times their length


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return test_resume.prepared(tmp_path_factory.mktemp("kills"))


def start(place: Path, run: Path, *more: str, steps: int = STEPS) -> subprocess.Popen:
    return train(place, run, "--gin_param", f"NUM_STEPS = {steps}", *more)


@pytest.fixture(scope="module")
def undisturbed(place) -> Path:
    finish(start(place, place / "undisturbed"))
    return place / "undisturbed"


@pytest.fixture(scope="module")
def nearly(place) -> Path:
    """A run with checkpoints at 360 and 380, which is to go on to 400."""
    finish(start(place, place / "nearly", steps=380))
    assert steps_saved(place / "nearly") == [360, 380]
    return place / "nearly"


def assert_same_end(run: Path, undisturbed: Path) -> None:
    test_resume.assert_same_end(run, undisturbed, STEPS)


def kill(process: subprocess.Popen) -> None:
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def half_written(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("*tmp*"))


def test_runs_killed_while_saving_end_like_undisturbed_ones(place, undisturbed, tmp_path):
    """Three times: when its folder appears, when there is data in it, and when some of it is finished."""
    run, cut = tmp_path / "run", 0
    signs = ("*tmp*", "*tmp*/*/ocdbt.process_0/d/*", "*tmp*/[a-z]*/commit_success.txt")
    for _ in range(9):  # a write may end before the kill arrives
        sign, newest = signs[cut], max(steps_saved(run), default=0)
        process = start(place, run)
        wait_for(lambda newest=newest: max(steps_saved(run), default=0) > newest, process)
        while process.poll() is None and not any((run / "checkpoints").glob(sign)):
            time.sleep(0.001)
        kill(process)
        cut += bool(half_written(run))
        if cut == len(signs):
            break
    assert cut == len(signs) and max(steps_saved(run)) < STEPS
    assert "resuming after step" in finish(start(place, run))
    assert not half_written(run)
    assert_same_end(run, undisturbed)


@pytest.mark.parametrize("kills", [5, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_moments_ends_as_if_undisturbed(place, undisturbed, tmp_path, kills):
    """Some while it starts or restores, the others while it trains or saves."""
    run, moments = tmp_path / "run", random.Random(kills)
    for target in sorted(moments.randrange(STEPS - 120) for _ in range(kills)):
        process = start(place, run)
        if moments.random() < 0.25:
            until = time.monotonic() + moments.uniform(0, 4)
            while time.monotonic() < until and lines_written(run) * 4 < STEPS - 120:  # else it may be done by then
                time.sleep(0.01)
        else:
            wait_for(lambda target=target: lines_written(run) * 4 >= target, process)
            time.sleep(moments.uniform(0, 0.1))
        kill(process)
    finish(start(place, run))
    assert_same_end(run, undisturbed)


def lines_written(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def data_file(checkpoint: Path, item: str) -> Path:
    """The one that holds most of an item's arrays."""
    return max((checkpoint / item).glob("ocdbt.process_0/d/*"), key=lambda path: path.stat().st_size)


def truncate(checkpoint: Path) -> None:
    path = data_file(checkpoint, "progress")
    os.truncate(path, path.stat().st_size // 2)


def flip_bytes(checkpoint: Path) -> None:
    path = data_file(checkpoint, "progress")
    content = bytearray(path.read_bytes())
    for place in range(1000, len(content), 1000):
        content[place] ^= 0x10
    path.write_bytes(content)


def delete_a_file(checkpoint: Path) -> None:
    (checkpoint / "parameters" / "manifest.ocdbt").unlink()


def delete_the_memory(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint / "memory")


def empty_the_metadata(checkpoint: Path) -> None:
    for path in checkpoint.rglob("_*METADATA"):
        path.write_bytes(b"")


def leave_half(checkpoint: Path) -> None:
    """Truncates a checkpoint's file, as a disk without power can: final name, half of the content."""
    shutil.rmtree(checkpoint / "progress")
    (checkpoint / "fingerprints" / "metadata").unlink()


@pytest.mark.parametrize(
    "damage", [truncate, flip_bytes, delete_a_file, delete_the_memory, empty_the_metadata, leave_half]
)
def test_a_damaged_checkpoint_is_named_and_set_aside_and_the_one_before_it_is_used(
    place, undisturbed, nearly, tmp_path, damage: Callable[[Path], None]
):
    run = tmp_path / "run"
    shutil.copytree(nearly, run)
    damage(run / "checkpoints" / "380")
    output = finish(start(place, run))
    assert f"the checkpoint of step 380 in {run / 'checkpoints'} is damaged (" in output
    assert "it is now 380.damaged, and the one before it is used\nresuming after step 360\n" in output
    assert "Traceback" not in output
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["380", "380.damaged", "400"]
    assert_same_end(run, undisturbed)


def test_the_only_checkpoint_is_not_set_aside_when_it_is_damaged(place, nearly, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(nearly, run)
    shutil.rmtree(run / "checkpoints" / "360")
    flip_bytes(run / "checkpoints" / "380")
    output = finish(start(place, run), status=1)
    assert "step 380" in output and "none before it" in output and "another --workdir" in output
    assert steps_saved(run) == [380] and "Traceback" not in output


def maker(run: Path, **training) -> StateFactory:
    """Returns the factory of a run's states in this process."""
    config = load_trained(run, [], [])
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, **training))
    return StateFactory(config, make_mesh(config.mesh, jax.devices()[:1]))


NO_DAMAGE = [
    *(OSError(number, os.strerror(number)) for number in (errno.ETIMEDOUT, errno.EACCES, errno.EIO, errno.ENOSPC)),
    MemoryError(),
    jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 4096 bytes."),
    ValueError("DEADLINE_EXCEEDED: Error reading \"gs://bucket/run\" [tensorstore_spec='{}']"),
    ValueError("UNAVAILABLE: CURL error"),
    ValueError("UNKNOWN: Error opening driver: Error reading local file: Input/output error [os_error_code='5']"),
    ValueError("Requested shape: (2, 9) is not compatible with the stored shape: (2, 8). Truncating is disabled"),
    ValueError("User-provided restore item and on-disk value metadata tree structures do not match:\nbiases: MISSING"),
]


@pytest.mark.parametrize("error", NO_DAMAGE, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_checkpoint_that_cannot_be_read_now_is_left_as_it_is(nearly, tmp_path, monkeypatch, error, wrapped):
    """Whatever the reader raises; as orbax raises it, bare or as the cause of another exception."""
    run, said = tmp_path / "run", []
    shutil.copytree(nearly, run)

    def restore(*_, **__):
        if wrapped:
            raise Exception("Encountered error while reading array index\nand a page more") from error
        raise error

    monkeypatch.setattr(ocp.CheckpointManager, "restore", restore)
    with Checkpoints(run, keep=2) as kept, pytest.raises(ReadFailed) as told:
        resume(kept, maker(run, steps=STEPS), False, said.append)
    assert steps_saved(run) == [360, 380] and not list(run.rglob("*.damaged*")) and not said
    line = str(told.value)
    assert "step 380" in line and str(run) in line and "repeat the command" in line and type(error).__name__ in line
    assert "\n" not in line and "tensorstore_spec" not in line and "page more" not in line


@pytest.mark.parametrize("damage, told", [(True, CorruptCheckpoint), (False, ReadFailed)])
def test_a_read_error_of_one_process_ends_all_with_that_error(nearly, monkeypatch, damage, told):
    """Simulates a read failure in another process, with and without damage. This process reads everything."""
    others = iter([False, damage])
    monkeypatch.setattr(checkpoints, "all_agree", lambda yes: yes and next(others))
    with Checkpoints(nearly) as kept, pytest.raises(told, match="another process could not read it"):
        kept.memory_size(380)


def test_a_checkpoint_of_another_state_is_left_as_it_is(nearly, tmp_path):
    """The errors that orbax raises for parameters of another shape, and for other parameters."""
    run = tmp_path / "run"
    shutil.copytree(nearly, run)
    make = maker(run)
    like = make.abstract_state(380)
    longer = jax.tree.map(lambda x: x.update(shape=(*x.shape, 2)), like.parameters)
    for parameters in (longer, {"other": like.parameters}):
        with Checkpoints(run) as kept, pytest.raises(ReadFailed):
            kept.restore(380, like._replace(parameters=parameters), make.mesh)


def test_evaluation_skips_a_damaged_checkpoint_and_renames_nothing(nearly, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(nearly, run)
    delete_a_file(run / "checkpoints" / "380")
    _, step = evaluate.restore(run, load_trained(run, [], []).model, maker(run).mesh)
    assert step == 360 and steps_saved(run) == [360, 380]
    [line] = capsys.readouterr().out.splitlines()
    assert (
        "step 380" in line
        and "is damaged (ValueError: NOT_FOUND" in line
        and "the checkpoint before it, of step 360" in line
    )
    assert "tensorstore_spec" not in line
    delete_a_file(run / "checkpoints" / "360")
    with pytest.raises(CorruptCheckpoint, match="step 360"):
        evaluate.restore(run, load_trained(run, [], []).model, maker(run).mesh)


def test_the_newest_checkpoints_and_those_at_multiples_stay(nearly, tmp_path):
    state = maker(nearly).state()
    with Checkpoints(tmp_path, keep=2, keep_every=40) as written:
        for step in range(20, 180, 20):
            written.save(step, state)
        written.finish()
        assert written.steps() == [40, 80, 120, 140, 160]
    assert steps_saved(tmp_path) == [40, 80, 120, 140, 160]


def test_every_flipped_byte_is_detected(nearly, tmp_path):
    """Read in this process: either it is refused, or what is read is what was saved."""
    run = tmp_path / "run"
    shutil.copytree(nearly, run)
    make = maker(run)
    like = make.abstract_state(380)

    def read():
        with Checkpoints(run) as kept:
            return jax.tree.map(np.asarray, kept.restore(380, like, make.mesh))

    good, refused, moments = read(), [], random.Random(0)
    for item in ("parameters", "progress", "memory"):
        path = data_file(run / "checkpoints" / "380", item)
        content = path.read_bytes()
        for _ in range(12):
            place = moments.randrange(len(content))
            path.write_bytes(
                content[:place] + bytes([content[place] ^ 1 << moments.randrange(8)]) + content[place + 1 :]
            )
            try:
                jax.tree.map(np.testing.assert_array_equal, read(), good)
            except CorruptCheckpoint as error:
                refused.append(str(error))
        path.write_bytes(content)
    # Without the fingerprints these would have been read as other numbers.
    assert sum("are not what was written" in each for each in refused) > 5


def assert_told(output: str, what: str, run: Path) -> None:
    told = output.splitlines()[-1]
    assert re.match(rf"memorizing train: error: {what} could not be written to {run}", told), output
    kept = ", ".join(map(str, steps_saved(run)))
    for part in (f"Checkpoints of steps {kept} are there", "Free space", "repeat the command"):
        assert part in told
    assert "ERROR" not in output  # not what orbax logs of it, hundreds of lines


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="prlimit is of Linux")
def test_a_file_size_limit_ends_the_run_which_resumes_later(place, undisturbed, tmp_path):
    """Uses `ulimit -f`, as any user can: from the second checkpoint on no file may be larger than 16 KiB."""
    run = tmp_path / "run"
    process = start(place, run)
    wait_for(lambda: steps_saved(run), process)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (16 * 1024, resource.RLIM_INFINITY))
    assert_told(finish(process, status=1), "a checkpoint", run)
    finish(start(place, run))
    assert_same_end(run, undisturbed)


@contextlib.contextmanager
def disk(folder: Path, size: str):
    """A file system of its own; skips where this user may not mount one."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root can mount a disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.skipif(shutil.which("mount") is None, reason="no mount")
def test_a_full_disk_ends_the_run_which_resumes_when_there_is_room(place, undisturbed, tmp_path):
    """It holds two checkpoints; the third is written before the first is deleted."""
    with disk(tmp_path / "disk", "800k") as folder:
        run = folder / "run"
        assert_told(finish(start(place, run), status=1), "(a checkpoint|metrics)", run)  # which comes to it first
        assert 1 <= len(steps_saved(run)) <= 2
        subprocess.run(["mount", "-o", "remount,size=8m", folder], check=True)
        finish(start(place, run))
        assert_same_end(run, undisturbed)


def test_metrics_that_cannot_be_written_end_the_run_naming_the_folder(place, nearly, tmp_path):
    """A folder lies in the place of their file."""
    run = tmp_path / "run"
    shutil.copytree(nearly, run)
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").mkdir()
    assert_told(finish(start(place, run), status=1), "metrics", run)
    assert steps_saved(run) == [360, 380]


@pytest.fixture(scope="module")
def remembering(place) -> Path:
    """A run of 80 steps whose memory of 128 tokens is full, and begins at its slot 32."""
    run = place / "remembering"
    finish(start(place, run, "--gin_param", "MEMORY_SIZE = 128", steps=80))
    assert bank(run, 80)["cursor"] == 32
    return run


def bank(run: Path, step: int) -> dict[str, np.ndarray]:
    return saved(run, step)["memory"][0]


def oldest_first(bank: dict[str, np.ndarray]) -> np.ndarray:
    return np.roll(bank["keys_BHMD"], -bank["cursor"], axis=2)


def test_a_memory_that_grows_keeps_all_and_one_that_shrinks_the_newest(place, remembering, tmp_path):
    """Each time a call more is trained, which writes over the oldest slots."""
    run = tmp_path / "run"
    shutil.copytree(remembering, run)
    output = finish(start(place, run, "--gin_param", "MEMORY_SIZE = 256", steps=84))
    assert "Memory.size = 256 from here on; the run started with 128" in output
    assert "resuming after step 80, its memory of 128 tokens moved to one of 256\n" in output
    grown = bank(run, 84)
    keys_BHMD = grown["keys_BHMD"]
    np.testing.assert_array_equal(keys_BHMD[:, :, :128], oldest_first(bank(remembering, 80)))
    assert keys_BHMD[:, :, 128:][:, :, :CALL].any(axis=(1, 3)).all() and not keys_BHMD[:, :, 128 + CALL :].any()
    assert grown["cursor"] == 128 + CALL

    output = finish(start(place, run, "--gin_param", "MEMORY_SIZE = 128", steps=88))
    assert "Memory.size = 128 from here on; the run started with 256" in output
    assert "resuming after step 84, the newest 128 tokens of its memory of 256 kept\n" in output
    shrunk = bank(run, 88)
    np.testing.assert_array_equal(shrunk["keys_BHMD"][:, :, CALL:], oldest_first(grown)[:, :, -(128 - CALL) :])
    assert shrunk["cursor"] == CALL


def test_a_memory_can_be_dropped(place, remembering, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(remembering, run)
    output = finish(start(place, run, "--gin_param", "MEMORY_SIZE = 128", "--reset_memory", steps=84))
    assert "resuming after step 80, its memory of 128 tokens dropped\n" in output
    left = bank(run, 84)
    assert left["keys_BHMD"][:, :, :CALL].any(axis=(1, 3)).all() and not left["keys_BHMD"][:, :, CALL:].any()
    assert left["cursor"] == CALL and (left["length_B"] <= CALL).all()
    again = start(place, run, "--gin_param", "MEMORY_SIZE = 128", "--reset_memory", steps=88)  # as launchers repeat it
    output = finish(again)
    assert "--reset_memory: the memory was already dropped at step 80" in output
    assert bank(run, 88)["length_B"].max() > CALL
