"""Reads and writes the status of a sweep: OUT/sweep.json, and OUT/points/NAME/point.json.

A point is done if its run has a checkpoint of the last step and all requested evaluations of that checkpoint. Durations
and errors of a point are in its `point.json`, so points can run in many places at once; `sweep.json` collects them.
"""

import json
from collections.abc import Sequence
from typing import Any

from memorizing.errors import InputError
from memorizing.evaluation.evaluate import FOLDER
from memorizing.files import AnyPath, atomic_write, run_folder
from memorizing.storage.checkpoints import CHECKPOINTS, steps_on_disk
from memorizing.training.metrics import METRICS_FILE, read_metrics

RESULTS = "sweep.json"
RECORD = "point.json"
POINTS = "points"
"""Folder of a sweep with a folder for each point."""
CURVE = 200
"""Largest number of steps kept of a training curve."""


def point_record(out: AnyPath, described: dict[str, Any]) -> dict[str, Any]:
    """Returns a point with its status, figures and curve, for `sweep.json`. Unreadable files make it fail."""
    own = {name: described[name] for name in ("name", "values", "seed", "workdir", "steps", "planned")}
    seconds = {"train": 0.0, "evaluate": 0.0}
    try:
        record = _read(out / POINTS / described["name"] / RECORD)
        done, error = is_done(out, described), record.get("error")
        return own | {
            "status": "done" if done else "failed" if error else "waiting",
            "error": None if done else error,
            "seconds": record.get("seconds", seconds),
            "evaluations": evaluations(out, described),
            "training": training_curve(workdir_of(out, described)),
        }
    except (OSError, ValueError) as error:
        reason = f"{workdir_of(out, described)} cannot be read: {error}. Repair or remove it"
        return own | {"status": "failed", "error": reason, "seconds": seconds, "evaluations": [], "training": []}


def record(out: AnyPath, described: dict[str, Any], error: str | None, seconds: dict[str, float]) -> None:
    """Writes a point's `point.json`."""
    text = json.dumps({"name": described["name"], "error": error, "seconds": seconds}, indent=1)
    atomic_write(out / POINTS / described["name"] / RECORD, text + "\n")


def workdir_of(out: AnyPath, described: dict[str, Any]) -> AnyPath:
    """Returns the folder of a point's run."""
    if described["steps"] is None:
        return run_folder("--workdir", described["workdir"])
    return out / described["workdir"]


def is_trained(out: AnyPath, described: dict[str, Any]) -> bool:
    """Returns True if a point's run has finished training."""
    return described["steps"] is None or _newest_step(workdir_of(out, described)) >= described["steps"]


def is_done(out: AnyPath, described: dict[str, Any]) -> bool:
    """Returns True if a point is trained and evaluated."""
    return is_trained(out, described) and len(evaluations(out, described)) == len(described["planned"])


def evaluations(out: AnyPath, described: dict[str, Any]) -> list[dict]:
    """Returns the figures of the requested evaluations that exist for the last step's checkpoint."""
    if not is_trained(out, described):
        return []
    workdir = workdir_of(out, described)
    step, paths = _newest_step(workdir), sorted((workdir / FOLDER).glob("*.json"), key=lambda path: path.name)
    there = [figures for path in paths if (figures := _read(path)).get("checkpoint_step") == step]
    alike = [
        [figures for figures in there if all(figures.get(name) == value for name, value in wanted.items())]
        for wanted in described["planned"]
    ]
    return [found[0] for found in alike if found]  # an evaluation under two names of the corpus counts once


def training_curve(workdir: AnyPath) -> list[dict]:
    """Returns steps and losses of a run's `metrics.jsonl`, thinned evenly to `CURVE` steps, the last included."""
    lines = read_metrics(workdir / METRICS_FILE).lines
    lines = [{"step": line["step"], "loss": line["loss"]} for line in lines if "loss" in line]
    every = -(-len(lines) // CURVE) or 1
    return lines[::-1][::every][::-1]


def _newest_step(workdir: AnyPath) -> int:
    return max(steps_on_disk(workdir / CHECKPOINTS), default=0)


def read_sweep(out: AnyPath) -> dict[str, Any]:
    """Returns the content of a folder's `sweep.json`; empty if there is none."""
    return _read(out / RESULTS)


def merged(before: dict[str, Any], sweep: dict[str, Any], out: AnyPath) -> dict[str, Any]:
    """Returns a sweep's description with the other points of an earlier sweep in the same folder.

    Raises:
        InputError: if that sweep varied other settings, or evaluated another run.
    """
    if not before:
        return sweep
    for what, how in (("over", list), ("run", str)):
        if how(before[what]) != how(sweep[what]):
            raise InputError(
                f"--out={out} holds a sweep {_described(before)}, this one is {_described(sweep)}. Choose another "
                "folder"
            )
    over = {
        name: [*before["over"][name], *(value for value in values if value not in before["over"][name])]
        for name, values in sweep["over"].items()
    }
    own = {point["name"] for point in sweep["points"]}
    return sweep | {
        "over": over,
        "seeds": sorted({*before["seeds"], *sweep["seeds"]}, key=lambda seed: (seed is not None, seed)),
        "points": [*sweep["points"], *(point for point in before["points"] if point["name"] not in own)],
    }


def _described(sweep: dict[str, Any]) -> str:
    over = " and ".join(sweep["over"]) or "nothing"
    return f"over {over}" + (f" of the run {sweep['run']}" if sweep["run"] else "")


def write_sweep(out: AnyPath, sweep: dict[str, Any], records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Writes `sweep.json` and returns its content."""
    results = sweep | {"points": list(records)}
    atomic_write(out / RESULTS, json.dumps(results, indent=1) + "\n")
    return results


def _read(path: AnyPath) -> dict[str, Any]:
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}). Remove it and repeat the sweep") from error
