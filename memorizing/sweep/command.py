"""`memorizing sweep`: builds the grid, checks every point, then runs the points, writes jobs, or collects results."""

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from memorizing.config import load
from memorizing.errors import InputError
from memorizing.files import AnyPath, atomic_write
from memorizing.sweep.grid import Axis, Point, combinations, parse_axis
from memorizing.sweep.jobs import write_slurm, write_xpk
from memorizing.sweep.plots import draw
from memorizing.sweep.points import Plan, SweepRequest, check_points
from memorizing.sweep.records import merged, point_record, read_sweep, write_sweep
from memorizing.sweep.run import Children, PointsFailed, run_all, run_point
from memorizing.sweep.table import write_table


def sweep(
    request: SweepRequest,
    launcher: str = "",
    point: str | None = None,
    write: str | None = None,
    dry_run: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """Runs the grid, or one point of it (by number from 0, or by name), or writes job scripts that run it.

    Raises:
        InputError: before anything runs, if a point has impossible settings.
        PointsFailed: after all other points have run.
        Interrupted: if the sweep is interrupted; the same command resumes it.
    """
    if not isinstance(request.out, Path) and write != "xpk" and not dry_run:
        raise InputError(
            f"--out={request.out}: a sweep that runs here needs a local folder. Give one, or use --write=xpk for gs://BUCKET/SWEEP"
        )
    if isinstance(request.out, Path) and write == "xpk":
        raise InputError(
            f"--out={request.out}: --write=xpk needs gs://BUCKET/SWEEP, because a pod loses its disk when it ends. Name"
            " a bucket"
        )
    axes = [parse_axis(text) for text in request.over]
    if request.run is not None and request.seeds is not None:
        raise InputError(
            f"--seeds={request.seeds}: has no effect on a trained run, --workdir={request.run}. Leave --seeds out"
        )
    plans = check_points(_points(axes, request), request, reads_data=write != "xpk")
    arguments = words(request)
    described = _described(plans, axes, request, arguments)
    if write:
        _write(write, plans, described, request.out, arguments, dry_run, say)
    elif dry_run:
        for plan in plans:
            for command in (plan.train, plan.evaluate):
                say(shlex.join(["memorizing", *command]) if command else f"# {plan.point.name}")
    elif point is not None:
        with Children(shlex.split(launcher)) as children:
            record = run_point(_named(plans, point), Path(request.out), children, say)
        if record["status"] != "done":
            raise PointsFailed(f"point {record['name']}: {record['error']}")
    else:
        results = run_all(plans, Path(request.out), described, shlex.split(launcher), say)
        conclude(results, request.out, {plan.point.name for plan in plans}, say)


def collect(out: AnyPath, say: Callable[[str], None] = print) -> None:
    """Collects the status of a sweep's points into its `sweep.json`, table and plots; runs nothing.

    Raises:
        InputError: if there is no sweep.
        PointsFailed: if some points failed.
    """
    described = read_sweep(out)
    if not described:
        raise InputError(f"--out={out} holds no sweep. Run `memorizing sweep` without --collect first")
    results = write_sweep(out, described, [point_record(out, point) for point in described["points"]])
    conclude(results, out, {point["name"] for point in results["points"]}, say)


def conclude(results: dict[str, Any], out: AnyPath, names: set[str], say: Callable[[str], None]) -> None:
    """Writes the table and plots of a `sweep.json`.

    Raises:
        PointsFailed: if some of the named points failed.
    """
    say("")
    for line in write_table(results, out):
        say(line)
    if isinstance(out, Path) and any(point["evaluations"] for point in results["points"]):
        draw(results, out / "sweep.png")
        say(f"\nplots: {out / 'sweep.png'}")
    say(f"table: {out / 'table.md'} and table.csv; all figures: {out / 'sweep.json'}")
    failed = [point["name"] for point in results["points"] if point["name"] in names and point["status"] == "failed"]
    if failed:
        raise PointsFailed(
            f"{len(failed)} of {len(names)} points failed ({'; '.join(failed)}). Repeat the command to try them again"
        )


def words(request: SweepRequest) -> list[str]:
    """Returns the command-line arguments of this sweep."""
    words = [f"--out={request.out}", *request.setting_arguments(request.gin_params)]
    words += [f"--over={text}" for text in request.over]
    words += [] if request.seeds is None else [f"--seeds={request.seeds}"]
    words += [] if request.run is None else [f"--workdir={request.run}"]
    return [*words, *(f"--data={each}" for each in request.data), *request.evaluation_arguments()]


def _points(axes: Sequence[Axis], request: SweepRequest) -> list[Point]:
    seeds = request.seeds
    if request.run is not None:
        return combinations(axes, [None])
    if not request.gin_files:
        raise InputError(
            "--gin_file is missing. Give the settings to train with, such as --gin_file=configs/isabelle.gin"
        )
    if seeds is not None and seeds < 1:
        raise InputError(f"--seeds={seeds}: must be at least 1")
    first, *_ = combinations(axes, [None])
    seed = load(request.gin_files, [*request.gin_params, *first.bindings])[0].training.seed
    return combinations(axes, range(seed, seed + (seeds or 1)))


def _described(
    plans: Sequence[Plan], axes: Sequence[Axis], request: SweepRequest, arguments: Sequence[str]
) -> dict[str, Any]:
    """Returns the sweep as `sweep.json` describes it, its points without status."""
    texts = [plan.settings.splitlines() for plan in plans]
    common = [line for line in texts[0] if all(line in text for text in texts)]
    return {
        "over": {axis.name: [value.shown for value in axis.values] for axis in axes},
        "seeds": list(dict.fromkeys(plan.point.seed for plan in plans)),
        "run": request.run,
        "data": {p.corpus: p.data for plan in plans if (p := plan.point).corpus is not None},
        "arguments": list(arguments),
        "settings": "\n".join(common) + "\n",
        "points": [plan.described() for plan in plans],
    }


def _named(plans: Sequence[Plan], point: str) -> Plan:
    by_name = {plan.point.name: plan for plan in plans}
    if point.isdigit() and int(point) < len(plans):
        return plans[int(point)]
    if point not in by_name:
        raise InputError(f"--point={point}: must be from 0 to {len(plans) - 1}, or one of {'; '.join(by_name)}")
    return by_name[point]


def _write(
    kind: str,
    plans: Sequence[Plan],
    described: dict[str, Any],
    out: AnyPath,
    arguments: Sequence[str],
    dry_run: bool,
    say: Callable[[str], None],
) -> None:
    """Writes the jobs, and a `sweep.json` in which their points wait."""
    path, text = write_slurm(plans, out, arguments) if kind == "slurm" else write_xpk(plans, out)
    if dry_run:
        say(text)
        return
    described = merged(read_sweep(out), described, out)
    write_sweep(out, described, [point_record(out, point) for point in described["points"]])
    atomic_write(path, text)
    say(f"{len(plans)} points; {path} says how they are started. Then: memorizing sweep --out={out} --collect")
