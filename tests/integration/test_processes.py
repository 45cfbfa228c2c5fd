"""Runs of two real processes: they equal runs of one process, and end properly when one of them dies."""

import json
import resource
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.integration import test_resume
from tests.integration.test_resume import finish, memorizing, saved, steps_saved, wait_for

MESH = ("--gin_param", "Mesh.model = 2", "--gin_param", "Mesh.memory = 2")
SETTINGS = """
include 'run.gin'
MEMORY_SIZE = 64
NUM_STEPS = 40
Model.vocabulary_size = 264
Model.heads = 4
Model.embedding_size = 32
Batch.size = 4
Batch.segment_length = 16
Training.memory_from_step = 0
Training.checkpoint_every = 8
Evaluation.batch_size = 4
"""
STEPS = 40


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = test_resume.prepared(tmp_path_factory.mktemp("processes"))
    (place / "many.gin").write_text(SETTINGS)
    return place


def start(place: Path, command: str, workdir: Path, *more: str, processes: int = 2, devices: int = 2):
    """Starts the processes of a run with `devices` devices each, joined by a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = (f"--gin_file={place / 'many.gin'}", *MESH) if command == "train" else ()
    arguments = [command, f"--workdir={workdir}", *settings, *more]
    variables = {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
    }
    if processes == 1:
        return [memorizing(*arguments, cwd=place, **variables)]
    flags = (f"--coordinator=127.0.0.1:{port}", f"--processes={processes}")
    return [memorizing(*arguments, *flags, f"--process={each}", cwd=place, **variables) for each in range(processes)]


def finish_all(running: list[subprocess.Popen], status: int = 0) -> list[str]:
    try:
        return [finish(process, status) for process in running]
    finally:
        for process in running:
            process.kill()


def losses(workdir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def undisturbed(place) -> Path:
    _, second = finish_all(start(place, "train", place / "undisturbed"))
    assert "parameters" not in second and "step" not in second  # the first process talks for both
    return place / "undisturbed"


def assert_same_end(workdir: Path, undisturbed: Path) -> None:
    one, other = saved(workdir, STEPS), saved(undisturbed, STEPS)
    assert len(jax.tree.leaves(one)) > 40
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert losses(workdir) == losses(undisturbed)


def test_processes_of_four_devices_train_as_one_process_of_eight(place):
    """The mesh is 2 x 2 x 2: it splits rows, heads and slots at once."""
    few = ("--gin_param", "NUM_STEPS = 8")
    finish_all(start(place, "train", place / "eight", *few, devices=4))
    finish_all(start(place, "train", place / "eight-alone", *few, processes=1, devices=8))
    np.testing.assert_allclose(losses(place / "eight"), losses(place / "eight-alone"), rtol=2e-4)


def test_two_processes_train_and_evaluate_as_one(place, undisturbed):
    finish_all(start(place, "train", place / "one", processes=1, devices=4))
    np.testing.assert_allclose(losses(place / "one")[:5], losses(undisturbed)[:5], rtol=2e-4)  # 20 steps
    finish_all(start(place, "evaluate", undisturbed))
    finish_all(start(place, "evaluate", undisturbed, "--name=one", processes=1, devices=4))
    two, one = (
        json.loads((undisturbed / "evaluations" / f"{name}.json").read_text())
        for name in ("test-memory-64", "test-memory-64-one")
    )
    np.testing.assert_allclose(two["perplexity"], one["perplexity"], rtol=1e-5)


@pytest.mark.parametrize("which", [0, 1])
def test_when_one_process_is_killed_all_end_and_the_same_command_resumes(place, undisturbed, tmp_path, which):
    run = tmp_path / "run"
    running = start(place, "train", run)
    wait_for(lambda: steps_saved(run), running[0])
    running[which].kill()
    since = time.monotonic()
    output, _ = running[1 - which].communicate(timeout=120)
    assert time.monotonic() - since < 120 and running[1 - which].returncode not in (0, 75)
    running[which].communicate()
    assert (
        "lost the connection to another process" in output or "JAX distributed service detected fatal errors" in output
    ), output
    assert max(steps_saved(run)) < STEPS
    assert "resuming after step" in finish_all(start(place, "train", run))[0]
    assert_same_end(run, undisturbed)


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="prlimit is of Linux")
def test_a_process_that_cannot_write_ends_at_once_and_the_same_command_resumes(place, undisturbed, tmp_path):
    """No file of the second process may be larger than 16 KiB from its second checkpoint on."""
    run = tmp_path / "run"
    first, second = start(place, "train", run)
    wait_for(lambda: steps_saved(run), first)
    resource.prlimit(second.pid, resource.RLIMIT_FSIZE, (16 * 1024, resource.RLIM_INFINITY))
    output = finish(second, status=1, timeout=30)
    assert "(process 1): error: a checkpoint could not be written to" in output and "repeat the command" in output
    first.kill()
    first.communicate()
    assert max(steps_saved(run)) < STEPS
    assert "resuming after step" in finish_all(start(place, "train", run))[0]
    assert_same_end(run, undisturbed)


def test_sigterm_to_one_process_saves_and_ends_all(place, undisturbed, tmp_path):
    run = tmp_path / "run"
    running = start(place, "train", run)
    wait_for(lambda: steps_saved(run), running[0])
    step = 4 * len(losses(run))
    running[1].send_signal(signal.SIGTERM)
    outputs = finish_all(running, status=75)
    assert all("SIGTERM: saved at step" in output for output in outputs)
    assert max(steps_saved(run)) <= step + 20 < STEPS  # a few calls later, though a checkpoint was saved before
    finish_all(start(place, "train", run))
    assert_same_end(run, undisturbed)


def test_all_processes_set_a_damaged_checkpoint_aside_and_use_the_one_before_it(place, undisturbed, tmp_path):
    """Damaged is what the second process wrote."""
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    for path in (run / "checkpoints" / str(STEPS)).glob("*/ocdbt.process_1/d/*"):
        path.write_bytes(bytes(byte ^ 1 for byte in path.read_bytes()))
    output = finish_all(start(place, "train", run, "--gin_param", "NUM_STEPS = 48"))[0]
    assert "it is now 40.damaged, and the one before it is used\n" in output and "resuming after step 32\n" in output
    jax.tree.map(np.testing.assert_array_equal, saved(run, STEPS), saved(undisturbed, STEPS))


def test_no_process_sets_a_checkpoint_aside_that_cannot_be_read_now(place, undisturbed, tmp_path):
    """The system refuses to open what the second process wrote: links to themselves."""
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    for path in (run / "checkpoints" / str(STEPS)).glob("*/ocdbt.process_1/d/*"):
        path.unlink()
        path.symlink_to(path)
    running = start(place, "train", run, "--gin_param", "NUM_STEPS = 48")
    outputs = [process.communicate(timeout=120)[0] for process in running]
    assert all(process.returncode not in (0, 75) for process in running)
    assert "could not be read (" in outputs[0] + outputs[1] and "It stays as it is" in outputs[0] + outputs[1]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["32", "40"]


def test_a_run_resumes_with_another_number_of_processes_and_another_mesh(place, undisturbed, tmp_path):
    run = tmp_path / "run"
    finish_all(start(place, "train", run, "--gin_param", "NUM_STEPS = 24"))
    alone = start(place, "train", run, "--gin_param", "Mesh.memory = 1", processes=1, devices=2)
    assert "on 2 x cpu (data 1, model 2, memory 1)" in finish_all(alone)[0]
    np.testing.assert_allclose(losses(run)[:10], losses(undisturbed)[:10], rtol=5e-3)


def test_processes_with_other_settings_or_another_folder_are_refused(place, tmp_path):
    run = tmp_path / "run"
    first, second = start(place, "train", run)
    second.kill()
    second.communicate()
    port = next(part for part in first.args if part.startswith("--coordinator"))
    other = [part.replace("Mesh.model = 2", "Model.heads = 8") for part in second.args[3:]]
    assert port in other
    variables = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    second = memorizing(*other, cwd=place, **variables)
    output, _ = second.communicate(timeout=120)
    assert second.returncode == 2 and "does not hold the settings of this process" in output
    first.communicate(timeout=120)
    assert first.returncode not in (0, 75)


def test_incomplete_multi_process_flags_are_refused(place, tmp_path):
    output = finish(memorizing("train", f"--workdir={tmp_path}", "--processes=2"), status=2)
    assert "--coordinator and --process missing" in output
    output = finish(
        memorizing("train", f"--workdir={tmp_path}", "--coordinator=here", "--processes=2", "--process=0"), status=2
    )
    assert "--coordinator=here: must be HOST:PORT" in output
    flags = ("--coordinator=here:99999", "--processes=2", "--process=0")
    assert "here:99999: must be HOST:PORT" in finish(memorizing("train", f"--workdir={tmp_path}", *flags), status=2)


def test_a_launcher_starts_processes_and_tells_them_to_save(place, tmp_path):
    """`launch/local_multiprocess.sh` with the real command."""
    run, script = tmp_path / "run", test_resume.ROOT / "launch" / "local_multiprocess.sh"
    if shutil.which("bash") is None:
        pytest.skip("no bash")
    command = ["bash", str(script), "--processes=2", "--cpu_devices=2", f"--gin_file={place / 'many.gin'}"]
    command += [f"--workdir={run}", "--gin_param", f"Training.data = '{place / 'data'}'"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for(lambda: steps_saved(run), process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    assert "[0] memorizing train (process 0): interrupted: SIGTERM: saved at step" in output
