"""Real runs in real processes: killed, interrupted, broken, and gone on with."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

ROOT = Path(__file__).resolve().parents[2]
GIN = """
MEMORY_SIZE = 32
NUM_STEPS = 240
Model.vocabulary_size = 259
Model.layers = 2
Model.embedding_size = 16
Model.heads = 2
Model.head_size = 8
Model.feed_forward_size = 32
Model.memory_layers = (2,)
Model.dtype = 'float32'
Model.dropout = 0.1
Memory.size = %MEMORY_SIZE
Memory.neighbors = 4
Batch.size = 2
Batch.segment_length = 8
Batch.segments_per_call = 4
Optimizer.kind = 'adamw'
Optimizer.learning_rate = 0.003
Optimizer.schedule = 'cosine'
Optimizer.warmup_steps = 10
Optimizer.decay_steps = 240
Training.steps = %NUM_STEPS
Training.memory_from_step = 28
Training.checkpoint_every = 20
Training.data = 'data'
Prepare.vocabulary = 'bytes'
"""


def memorizing(*arguments: str, cwd: Path | None = None, **variables: str) -> subprocess.Popen:
    """Starts the command with the variables of this process and more, and with XLA flags added to its own."""
    command = [sys.executable, "-m", "memorizing.cli", *arguments]
    flags = " ".join([os.environ["XLA_FLAGS"], variables.pop("XLA_FLAGS", "")])
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags, **variables}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=cwd, env=environment
    )


def finish(process: subprocess.Popen, status: int = 0, timeout: float = 300) -> str:
    output, _ = process.communicate(timeout=timeout)
    assert process.returncode == status, output
    return output


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return prepared(tmp_path_factory.mktemp("resume"))


def prepared(place: Path) -> Path:
    """The folder, with settings `run.gin` and prepared tokens `data`."""
    (place / "run.gin").write_text(GIN)
    (place / "raw").mkdir()
    for number in range(12):
        text = " ".join(f"{word * number % 97} of {word % 7}" for word in range(300 + 40 * number))
        (place / "raw" / f"{number}.txt").write_text(text)
    finish(
        memorizing("prepare", f"--gin_file={place / 'run.gin'}", f"--raw={place / 'raw'}", f"--out={place / 'data'}")
    )
    return place


def train(place: Path, workdir: Path, *more: str, **variables: str) -> subprocess.Popen:
    arguments = ("train", f"--gin_file={place / 'run.gin'}", f"--workdir={workdir}", *more)
    return memorizing(*arguments, cwd=place, **variables)


def saved(workdir: Path, step: int) -> dict:
    """Everything in a checkpoint, as numpy arrays, read by orbax without our code."""
    found = {}
    for path in (workdir / "checkpoints" / str(step)).absolute().iterdir():
        if (path / "_METADATA").exists():  # arrays, not the fingerprints of them
            with ocp.PyTreeCheckpointer() as reader:
                tree = reader.metadata(path).item_metadata.tree
                whole = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
                found[path.name] = reader.restore(path, restore_args=whole)
    assert set(found) >= {"parameters", "progress"}
    return found


def steps_saved(workdir: Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").glob("[0-9]*") if path.name.isdigit())


def metrics(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def losses(workdir: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in metrics(workdir)]


@pytest.fixture(scope="module")
def undisturbed(place) -> Path:
    finish(train(place, place / "undisturbed"))
    return place / "undisturbed"


def assert_same_end(workdir: Path, undisturbed: Path, steps: int = 240) -> None:
    one, other = saved(workdir, steps), saved(undisturbed, steps)
    assert jax.tree.structure(one) == jax.tree.structure(other)
    assert len(jax.tree.leaves(one)) > 40
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert losses(workdir) == losses(undisturbed)
    assert [step for step, _ in losses(workdir)] == list(range(4, steps + 1, 4))


def wait_for(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("after", [20, 120])
def test_a_killed_run_ends_bit_for_bit_like_an_undisturbed_one(place, undisturbed, tmp_path, after):
    """Killed before and after the memory is switched on (step 28), a little after a checkpoint, not at it.

    The second goes on with programs that are compiled anew.
    """
    run = tmp_path / "run"
    process = train(place, run)
    wait_for(lambda: any(step >= after for step in steps_saved(run)), process)
    time.sleep(0.02)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL and max(steps_saved(run)) < 240
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled")} if after == 120 else {}
    assert "resuming after step" in finish(train(place, run, **cache))
    assert_same_end(run, undisturbed)


def test_a_terminated_run_saves_and_resumes(place, undisturbed, tmp_path):
    """Told twice, and before anything is computed as well; meanwhile no other training gets into its folder."""
    run = tmp_path / "run"
    process = train(place, run)
    wait_for((run / "config.gin").exists, process)
    process.send_signal(signal.SIGTERM)
    assert "SIGTERM: nothing was computed yet. The same command resumes from there" in finish(process, status=75)
    process = train(place, run)
    wait_for(lambda: steps_saved(run), process)
    process.send_signal(signal.SIGSTOP)  # so that it does not finish meanwhile
    assert f"--workdir={run}: another `memorizing train` is at work there" in finish(train(place, run), status=2)
    process.send_signal(signal.SIGCONT)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    output = finish(process, status=75)
    assert "SIGTERM: saved at step" in output and max(steps_saved(run)) < 240
    finish(train(place, run))
    assert_same_end(run, undisturbed)


def test_a_finished_run_says_so_and_continues_with_more_steps(place, undisturbed, tmp_path):
    run = tmp_path / "run"
    finish(train(place, run, "--gin_param", "NUM_STEPS = 80"))
    assert "all 80 steps are done already" in finish(memorizing("train", f"--workdir={run}"))
    finish(memorizing("train", f"--workdir={run}", "--gin_param", "NUM_STEPS = 240"))
    assert_same_end(run, undisturbed)


def test_the_memory_is_switched_on_at_its_step(undisturbed):
    """The memory is empty and its gates get no gradient until step 28; from then on it fills and the gates move."""
    lines = metrics(undisturbed)
    off, on = [line for line in lines if line["step"] <= 28], [line for line in lines if line["step"] > 28]
    gates = [name for name in lines[0] if name.startswith("gates/")]
    assert len(off) == 7 and gates == ["gates/layer_2/head_0", "gates/layer_2/head_1"]
    assert all(line["memory_fill"] == 0 for line in off) and all(line["memory_fill"] > 0 for line in on)
    for gate in gates:
        assert {line[gate] for line in off} == {off[0][gate]} and len({line[gate] for line in on}) > 45


def test_rows_spread_over_devices_train_as_on_one(place, undisturbed, tmp_path):
    run = tmp_path / "run"
    devices = "--xla_force_host_platform_device_count=2"
    process = train(place, run, "--gin_param", "NUM_STEPS = 160", XLA_FLAGS=devices)
    assert "on 2 x cpu" in finish(process)
    np.testing.assert_allclose(losses(run), losses(undisturbed)[:40], rtol=1e-4)


def test_a_run_does_not_resume_with_another_model(place, undisturbed):
    output = finish(train(place, undisturbed, "--gin_param", "Model.heads = 1"), status=2)
    assert "Model.heads = 1" in output and "started with 2" in output and "--workdir" in output


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_last_checkpoint(place, tmp_path):
    run = tmp_path / "run"
    finish(train(place, run, "--gin_param", "NUM_STEPS = 40"))
    before = saved(run, 40)
    broken = ("--gin_param", "Optimizer.learning_rate = 1e38", "--gin_param", "NUM_STEPS = 400")
    output = finish(memorizing("train", f"--workdir={run}", *broken), status=2)
    assert "Optimizer.learning_rate = 1e+38 from here on; the run started with 0.003" in output
    assert "not finite at step 4" in output and "Optimizer.learning_rate" in output
    assert max(steps_saved(run)) == 40
    jax.tree.map(np.testing.assert_array_equal, saved(run, 40), before)
    assert all(np.isfinite(loss) for _, loss in losses(run))


def test_parameters_that_are_ruined_by_the_last_update_are_not_saved(place, tmp_path):
    """The loss of that step was still finite."""
    run = tmp_path / "run"
    settings = ("Optimizer.learning_rate = 1e38", "Batch.segments_per_call = 1", "Training.checkpoint_every = 1")
    output = finish(train(place, run, *(f"--gin_param={each}" for each in settings)), status=2)
    assert "a parameter is not finite at step 1 " in output and not steps_saved(run)


def test_a_run_does_not_resume_with_other_documents_and_keeps_its_settings(place, tmp_path):
    run, other, moved = tmp_path / "run", tmp_path / "other", tmp_path / "moved"
    finish(train(place, run, "--gin_param", "NUM_STEPS = 40"))
    settings = (run / "config.gin").read_text()
    raw, gin = f"--raw={place / 'raw'}", f"--gin_file={place / 'run.gin'}"
    finish(memorizing("prepare", gin, raw, f"--out={other}", "--gin_param", "Prepare.seed = 5"))
    for data, words in ((other, "has another train split"), (tmp_path / "typo", "holds no prepared tokens")):
        binding = f"Training.data = '{data}'"
        output = finish(train(place, run, "--gin_param", "NUM_STEPS = 80", "--gin_param", binding), status=2)
        assert words in output and str(data) in output
        assert (run / "config.gin").read_text() == settings
    shutil.copytree(place / "data", moved)
    finish(train(place, run, "--gin_param", "NUM_STEPS = 80", "--gin_param", f"Training.data = '{moved}'"))


def test_the_workdir_alone_is_enough_to_evaluate(undisturbed):
    """Runs in another folder than training did, which named its data by a relative path."""
    output = finish(memorizing("evaluate", f"--workdir={undisturbed}", "--memory_size=0,64", cwd=Path(os.sep)))
    assert output.count("perplexity") == 2
    figures = json.loads((undisturbed / "evaluations" / "test-memory-64.json").read_text())
    assert figures["checkpoint_step"] == 240 and figures["memory_size"] == 64


def test_evaluating_a_folder_without_a_run_is_refused(tmp_path):
    output = finish(memorizing("evaluate", f"--workdir={tmp_path / 'none'}"), status=2)
    assert str(tmp_path / "none") in output and "memorizing train" in output


INDEXED = [
    "--gin_param=Memory.search = 'ivf'", "--gin_param=Ivf.lists = 4", "--gin_param=Ivf.probes = 2",
    "--gin_param=Memory.key_dtype = 'int8'", "--gin_param=Memory.report_recall = True",
    "--gin_param=Training.memory_from_step = 0",
]  # fmt: skip


def test_an_index_resumes_with_the_run_and_is_rebuilt_for_another_search(place):
    whole, parts = place / "indexed", place / "indexed-in-parts"
    steps = lambda number: f"--gin_param=NUM_STEPS = {number}"  # noqa: E731
    assert "searched by `ivf`" in finish(train(place, whole, *INDEXED, steps(80)))
    finish(train(place, parts, *INDEXED, steps(40)))
    finish(train(place, parts, *INDEXED, steps(80)))
    one, other = saved(parts, 80), saved(whole, 80)
    assert {"keys_BHMD", "scales_BHM", "centroids_BHCD"} <= one["memory"][0].keys()
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert all(0 < line["recall/layer_2"] <= 1 for line in metrics(whole) if line["step"] > 40)

    output = finish(train(place, parts, *INDEXED, "--gin_param=Memory.search = 'exact'", steps(120)))
    assert "Memory.search = 'exact' from here on; the run started with 'ivf'" in output
    assert "centroids_BHCD" not in saved(parts, 120)["memory"][0]
    assert metrics(parts)[-1]["recall/layer_2"] == 1.0
    finish(train(place, parts, *INDEXED, "--gin_param=MEMORY_SIZE = 64", steps(160)))
    memory = saved(parts, 160)["memory"][0]
    assert memory["keys_BHMD"].shape[2] == memory["lists_BHM"].shape[2] == 64
    assert 0.5 < metrics(parts)[-1]["recall/layer_2"] <= 1


def test_index_settings_may_change_and_copies_of_keys_do_not_mix(place):
    """Copies that propose, in several dtypes; and indexes that only their settings tell apart."""
    workdir = place / "copies"
    recall = ["--gin_param=Memory.report_recall = True", "--gin_param=Training.memory_from_step = 0"]
    for number, proposer in enumerate(("int8", "int8", "float8", "projection"), 1):
        some = ["--gin_param=Memory.search = 'exact'", f"--gin_param=Memory.proposer = '{proposer}'"]
        some += ["--gin_param=Memory.proposals = 32", f"--gin_param=NUM_STEPS = {40 * number}"]
        finish(train(place, workdir, *recall, *some))
        memory = saved(workdir, 40 * number)["memory"][0]
        assert str(memory["copy_BHMP"].dtype) == {"int8": "int8", "float8": "float8_e4m3fn"}.get(proposer, "bfloat16")
        assert ("copy_scales_BHM" in memory) == (proposer != "projection")
        assert metrics(workdir)[-1]["recall/layer_2"] == 1.0  # all 32 slots are proposed
