"""Real sweeps in real processes: killed, told to end, with points that fail, and repeated."""

import json
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.integration.test_resume import finish, memorizing, wait_for
from tests.tiny_run import SETTINGS, write_texts

SIZES = (0, 32)
NAMES = [f"MEMORY_SIZE={size},seed=0" for size in SIZES]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("sweeps")
    (place / "run.gin").write_text(SETTINGS)
    raw = write_texts(place / "raw")
    finish(memorizing("prepare", f"--gin_file={place / 'run.gin'}", f"--raw={raw}", f"--out={place / 'data'}"))
    return place


def start(place: Path, out: Path, *more: str, sizes: tuple[int, ...] = SIZES, steps: int = 400) -> subprocess.Popen:
    settings = [f"--gin_file={place / 'run.gin'}", "--gin_param=DATA = 'data'", f"--gin_param=NUM_STEPS = {steps}"]
    grid = [f"--over=MEMORY_SIZE={','.join(map(str, sizes))}", f"--out={out}"]
    return memorizing("sweep", *settings, *grid, *more, cwd=place)


@pytest.fixture(scope="module")
def undisturbed(place) -> Path:
    output = finish(start(place, place / "undisturbed"))
    assert "2 points: 2 waiting" in output and "table.md" in output
    return place / "undisturbed"


def results(out: Path) -> dict:
    return json.loads((out / "sweep.json").read_text())


def without_times(out: Path) -> dict:
    found = results(out)
    del found["arguments"]  # they name the folder
    for point in found["points"]:
        assert set(point.pop("seconds")) == {"train", "evaluate"}
        for figures in point["evaluations"]:
            del figures["seconds"]
    return found


def attempts(out: Path, name: str, task: str) -> int:
    log = out / "points" / name / f"{task}.log"
    return log.read_text().count("$ memorizing") if log.exists() else 0


def copied(undisturbed: Path, out: Path) -> Path:
    """A finished sweep elsewhere; runs can be moved."""
    shutil.copytree(undisturbed, out)
    return out


def test_each_point_is_trained_and_evaluated_as_its_settings_say(undisturbed):
    found = results(undisturbed)
    assert [point["name"] for point in found["points"]] == NAMES
    assert found["over"] == {"MEMORY_SIZE": [0, 32]} and found["seeds"] == [0]
    for point, size in zip(found["points"], SIZES, strict=True):
        assert (point["status"], point["error"], point["values"]) == ("done", None, {"MEMORY_SIZE": size})
        (figures,) = point["evaluations"]
        assert (figures["memory_size"], figures["checkpoint_step"], figures["corpus"]) == (size, 400, "folder")
        there = json.loads((undisturbed / point["workdir"] / "evaluations" / f"test-memory-{size}.json").read_text())
        assert figures == there
        lines = (undisturbed / point["workdir"] / "metrics.jsonl").read_text().splitlines()
        assert point["training"] == [{key: json.loads(line)[key] for key in ("step", "loss")} for line in lines]
    assert "Memory.size = %MEMORY_SIZE" in found["settings"] and "\nMEMORY_SIZE = " not in found["settings"]
    for name in ("table.md", "table.csv", "sweep.png"):
        assert (undisturbed / name).stat().st_size


def test_a_sweep_killed_in_training_or_evaluation_ends_like_an_undisturbed_one(place, undisturbed, tmp_path):
    out = tmp_path / "out"
    metrics = out / "points" / NAMES[0] / "metrics.jsonl"
    evaluation = out / "points" / NAMES[1] / "evaluate.log"
    for moment in (lambda: metrics.exists() and metrics.read_text().count("\n") > 20, evaluation.exists):
        process = start(place, out)
        wait_for(moment, process)
        process.kill()  # what it started ends with it, or could not be repeated
        process.communicate()
    points = results(out)["points"]
    assert [point["status"] for point in points] == ["done", "waiting"]
    assert "2 points: 1 done, 1 waiting" in finish(start(place, out))
    assert without_times(out) == without_times(undisturbed)
    assert [attempts(out, name, "train") for name in NAMES] == [2, 1]
    assert [attempts(out, name, "evaluate") for name in NAMES] == [1, 2]


def test_a_failed_point_is_shown_retried_and_stops_no_other(place, undisturbed, tmp_path):
    out = tmp_path / "out"
    blocked = out / "points" / NAMES[0] / "tensorboard"
    blocked.parent.mkdir(parents=True)
    blocked.touch()  # only the training finds that this is no folder
    output = finish(start(place, out), status=1)
    assert "failed: train ended with status" in output and "1 of 2 points failed" in output
    assert "tensorboard" in output
    first, second = results(out)["points"]
    assert (first["status"], second["status"]) == ("failed", "done")
    assert "tensorboard" in first["error"] and not first["evaluations"]
    assert "failed" in (out / "table.md").read_text()
    blocked.unlink()
    finish(start(place, out))
    assert without_times(out) == without_times(undisturbed)
    assert [attempts(out, name, "train") for name in NAMES] == [2, 1]


def test_finished_points_are_skipped_and_new_evaluations_run(place, undisturbed, tmp_path):
    out = copied(undisturbed, tmp_path / "out")
    assert "2 points: 2 done" in finish(start(place, out))
    assert [attempts(out, name, "evaluate") for name in NAMES] == [1, 1]
    # a larger grid, and readings that are not there yet
    finish(start(place, out, "--split=validation", sizes=(32,)))
    points = {point["name"]: point for point in results(out)["points"]}
    assert set(points) == set(NAMES) and all(point["status"] == "done" for point in points.values())
    assert [each["split"] for each in points[NAMES[1]]["evaluations"]] == ["validation"]
    assert [attempts(out, name, "train") for name in NAMES] == [1, 1]
    assert [attempts(out, name, "evaluate") for name in NAMES] == [1, 2]
    # a point that has begun cannot become another one
    refused = finish(start(place, out, "--gin_param=Model.layers = 3"), status=2)
    assert "point MEMORY_SIZE=0,seed=0: Model.layers = 3" in refused and "started with 2" in refused


def test_a_terminated_sweep_ends_its_training_and_holds_its_folder(place, tmp_path):
    out = tmp_path / "out"
    metrics = out / "points" / NAMES[0] / "metrics.jsonl"
    process = start(place, out, steps=100_000)
    wait_for(lambda: metrics.exists() and metrics.read_text(), process)
    other = finish(start(place, out, steps=100_000), status=2)
    assert f"--out={out}: another `memorizing sweep` is at work there" in other
    process.send_signal(signal.SIGTERM)
    output = finish(process, status=75)
    assert "SIGTERM" in output and "The same command resumes from there" in output
    assert "saved at step" in (out / "points" / NAMES[0] / "train.log").read_text()
    assert [point["status"] for point in results(out)["points"]] == ["waiting", "waiting"]


def test_one_point_runs_alone_and_is_gathered(place, undisturbed, tmp_path):
    out, launcher = tmp_path / "out", tmp_path / "launcher"
    launcher.write_text('#!/usr/bin/env bash\necho "launched here"\nexec "$@"\n')
    launcher.chmod(0o755)
    finish(start(place, out, "--point=1", f"--launcher={launcher}"))
    assert not (out / "sweep.json").exists()
    assert "launched here" in (out / "points" / NAMES[1] / "train.log").read_text()
    output = finish(start(place, out))
    assert "2 points: 1 done, 1 waiting" in output
    (out / "table.md").unlink()
    finish(memorizing("sweep", f"--out={out}", "--collect"))
    assert (out / "table.md").exists() and without_times(out) == without_times(undisturbed)


def test_a_trained_run_is_only_evaluated(place, undisturbed, tmp_path):
    run, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(undisturbed / "points" / NAMES[1], run)
    grid = ["--over=MEMORY_SIZE=0,32", "--over=Memory.neighbors=1,4", f"--workdir={run}", f"--out={out}"]
    finish(memorizing("sweep", *grid, cwd=place))
    points = results(out)["points"]
    assert [point["status"] for point in points] == ["done"] * 4 and not (out / "points" / "checkpoints").exists()
    found = {tuple(point["values"].values()): point["evaluations"][0]["perplexity"] for point in points}
    (whole,) = results(undisturbed)["points"][1]["evaluations"]
    assert found[32, 4] == pytest.approx(whole["perplexity"], rel=1e-6)
    assert found[0, 1] == found[0, 4] and len({found[0, 4], found[32, 1], found[32, 4]}) == 3
    assert "Memory.neighbors" in (out / "table.md").read_text()


def test_the_printed_table_is_that_of_the_points(undisturbed):
    shown = (undisturbed / "table.md").read_text()
    for point in results(undisturbed)["points"]:
        assert f"{point['evaluations'][0]['perplexity']:.3f}" in shown
