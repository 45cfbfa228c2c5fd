"""`memorizing report`: a run or a sweep as one HTML page that opens from the disk without a network.

`gather_run` and `gather_sweep` collect the files of a folder into one dictionary for JSON. The page embeds it, and its
scripts (`pages/run.js`, `pages/sweep.js`) draw it. The page lists missing and unreadable files (`notices`).
"""

import ast
import csv
import datetime
import io
import json
import math
import os
import re
import shlex
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import quote

from memorizing.errors import InputError
from memorizing.evaluation.evaluate import FOLDER
from memorizing.files import AnyPath, atomic_write
from memorizing.reports.pages import check_replaceable, page, script
from memorizing.training.hardware import HARDWARE_FILE
from memorizing.training.metrics import METRICS_FILE, read_metrics

CONFIG_FILE = "config.gin"
SWEEP_FILE = "sweep.json"
REPORT_FILE = "report.html"
NAMES = {"run": "training run", "sweep": "sweep"}
MOST_LINES = 4000
"""Largest number of lines of metrics in a page; longer runs are averaged to this number."""
MOST_DOCUMENTS = 2000
"""Largest number of documents of one evaluation in a page; the longest documents are kept."""


def report_run(workdir: AnyPath, out: AnyPath | None, say: Callable[[str], None] = print) -> None:
    """Writes the page of a run to `out`; by default, to `WORKDIR/report.html`.

    Raises:
        InputError: if there is no run, or `out` is another file than a report.
    """
    _write(out or workdir / REPORT_FILE, gather_run(workdir), "run", say)


def report_sweep(folder: Path, out: Path | None, say: Callable[[str], None] = print) -> None:
    """Writes the page of a sweep to `out`; by default, to `DIR/report.html`.

    Raises:
        InputError: if there is no sweep, or `out` is another file than a report.
    """
    out = out or folder / REPORT_FILE
    _write(out, gather_sweep(folder, out), "sweep", say)


def _write(out: AnyPath, data: dict, subject: str, say: Callable[[str], None]) -> None:
    from plotly.offline import get_plotlyjs

    check_replaceable("--out", out)
    scripts = [get_plotlyjs(), *(script(f"{name}.js") for name in ("charts", "report", subject))]
    atomic_write(out, page(f"{data['title']} – {NAMES[subject]}", script(f"{subject}.html"), scripts, data))
    for notice in data["notices"]:
        say(notice)
    say(f"report: {out}")


def gather_run(workdir: AnyPath) -> dict[str, Any]:
    """Returns the data of a run's page.

    Raises:
        InputError: if the folder has neither settings nor metrics.
    """
    if not (workdir / CONFIG_FILE).exists() and not (workdir / METRICS_FILE).exists():
        raise InputError(f"--workdir={workdir} is not a run: it has no {CONFIG_FILE} and no {METRICS_FILE}. Give a run")
    notices: list[str] = []
    settings = read_settings(_text(workdir / CONFIG_FILE))
    metrics = read_metrics(workdir / METRICS_FILE)
    lines = metrics.lines
    if metrics.damaged:
        notices.append(f"{metrics.problem(workdir / METRICS_FILE)} are left out.")
    evaluations = sorted((_finite(each) for each in _evaluations(workdir, notices)), key=_order)
    steps = settings.get("Training.steps")
    last_step = int(lines[-1]["step"]) if lines else 0
    if steps and last_step < steps:
        notices.append(f"Training is at step {last_step:,} of {steps:,}: it is still running, or was interrupted.")
    if len(lines) > MOST_LINES:
        notices.append(f"Curves show averages: {len(lines):,} lines of metrics became at most {MOST_LINES:,} points.")
    checkpoints = sorted({each["figures"]["checkpoint_step"] for each in evaluations} - {None})
    if len(checkpoints) > 1:
        notices.append(f"Evaluations used different checkpoints, of steps {', '.join(map(str, checkpoints))}.")
    return {
        **_origin(workdir),
        "description": _description(settings, last_step),
        "steps": steps,
        "notices": notices,
        "training": _finite(columns(lines)),
        "evaluations": evaluations,
        "hardware": _json(workdir / HARDWARE_FILE, notices) or [],
        "settings": _listed(settings),
    }


def gather_sweep(folder: Path, out: Path) -> dict[str, Any]:
    """Returns the data of a sweep's page; links are relative to `out`.

    Raises:
        InputError: if the folder has no sweep.
    """
    if not (folder / SWEEP_FILE).exists():
        raise InputError(
            f"--sweep={folder} is not a sweep: it has no {SWEEP_FILE}. Give the --out of `memorizing sweep`"
        )
    notices: list[str] = []
    sweep = _json(folder / SWEEP_FILE, notices)
    if not isinstance(sweep, dict) or not isinstance(sweep.get("points"), list):
        raise InputError(f"{folder / SWEEP_FILE} was not written by `memorizing sweep`. Make it again with --collect")
    settings, points = read_settings(sweep.get("settings", "")), []
    for point in sweep["points"]:
        evaluations = [_completed(figures) for figures in point.get("evaluations") or []]
        results = {"evaluations": evaluations, "training": point.get("training") or []}
        points.append({**point, **results, "link": _link(folder / point["workdir"] / REPORT_FILE, out)})
    for status, words in (("failed", "failed (see Points)"), ("waiting", "not done yet")):
        if count := sum(point["status"] == status for point in points):
            notices.append(f"{count} of {len(points)} points {words}.")
    grid = {
        "over": sweep.get("over") or {},
        "seeds": sweep.get("seeds") or [],
        "command": shlex.join(["memorizing", "sweep", *map(str, sweep.get("arguments") or [])]),
    }
    factors = [f"{len(values)} values of {name}" for name, values in grid["over"].items()]
    factors.append(f"{len(grid['seeds'])} seed{'' if len(grid['seeds']) == 1 else 's'}")
    description = f"{len(points)} points: {' × '.join(factors)}."
    about = {"description": description, "memory_size": settings.get("Memory.size"), "settings": _listed(settings)}
    return _finite({**_origin(folder), **grid, **about, "notices": notices, "points": points})


def _link(report: Path, out: Path) -> str | None:
    """Returns the link from the page `out` to a point's report; None if that is not on this disk."""
    return quote(os.path.relpath(report, out.parent)) if report.exists() else None


def _origin(folder: AnyPath) -> dict[str, str]:
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    name = (folder.resolve() if isinstance(folder, Path) else folder).name
    return {"title": name, "workdir": str(folder), "created": now, "version": metadata.version("memorizing")}


def _text(path: AnyPath) -> str:
    return path.read_text() if path.exists() else ""


def _json(path: AnyPath, notices: list[str]) -> Any:
    try:
        return json.loads(path.read_text()) if path.exists() else None
    except (json.JSONDecodeError, UnicodeDecodeError):
        notices.append(f"{path.name} is not shown: it is not valid JSON.")
        return None


def read_settings(text: str) -> dict[str, Any]:
    """Returns the settings of a `config.gin` by name, one per line; macros are replaced by their values."""
    found: dict[str, Any] = {}
    for name, value in re.findall(r"^([\w.]+) = (.+)$", text, flags=re.MULTILINE):
        try:
            found[name] = found.get(value[1:], value) if value.startswith("%") else ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[name] = value
    return found


def _listed(settings: dict[str, Any]) -> list[dict[str, str]]:
    return [{"name": name, "value": repr(value)} for name, value in settings.items()]


def columns(lines: list[dict]) -> dict[str, list]:
    """Returns a list of values for each metric, with None where it is missing.

    More than `MOST_LINES` lines are averaged over groups of equal size; the step of a group is its last one.
    """
    names = list(dict.fromkeys(name for line in lines for name in line))
    size = max(math.ceil(len(lines) / MOST_LINES), 1)

    def mean(name: str, group: list[dict]) -> float | None:
        values = [line[name] for line in group if line.get(name) is not None]
        return sum(values) / len(values) if values else None

    groups = [lines[start : start + size] for start in range(0, len(lines), size)]
    means = {name: [mean(name, group) for group in groups] for name in names if name != "step"}
    return {"step": [group[-1]["step"] for group in groups], **means}


def _evaluations(workdir: AnyPath, notices: list[str]) -> Iterator[dict]:
    folder = workdir / FOLDER
    for path in sorted(folder.glob("*.json"), key=lambda path: path.name) if folder.exists() else []:
        figures = _json(path, notices)
        if not isinstance(figures, dict) or "perplexity" not in figures:
            notices.append(f"{FOLDER}/{path.name} is not shown: it is not an evaluation.")
            continue
        documents = list(_documents(_text(path.with_suffix(".csv"))))
        if len(documents) > MOST_DOCUMENTS:
            notices.append(f"{path.stem} has {len(documents):,} documents; the {MOST_DOCUMENTS:,} longest are shown.")
            documents = sorted(documents, key=lambda row: -row["tokens"])[:MOST_DOCUMENTS]
        yield {"file": path.name, "figures": _completed(figures), "documents": documents}


def _order(evaluation: dict) -> tuple:
    """Returns a sort key: by text, then with XL cache first, then by memory size."""
    figures = evaluation["figures"]
    text = (figures["corpus"], figures["split"], figures["name"])
    return *text, not figures["xl_cache"], figures["memory_size"]


def _completed(figures: dict) -> dict:
    """Returns the figures with defaults for those that the file lacks."""
    defaults = {"corpus": "", "split": "", "name": "", "xl_cache": True, "checkpoint_step": None}
    return {**defaults, "perplexity_interval": [None, None], "perplexity_by_position": [], **figures}


def _documents(text: str) -> Iterator[dict]:
    for row in csv.DictReader(io.StringIO(text)):
        numbers = {name: float(row[name]) if row.get(name) else None for name in ("nats", "gain", "perplexity")}
        counts = {name: int(row[name]) for name in ("tokens", "bytes")}
        yield {"name": row["name"], **counts, **numbers, "bits_per_byte": float(row["bits_per_byte"])}


def _description(settings: dict[str, Any], last_step: int) -> str:
    """Returns one sentence about the run."""
    if not settings:
        return f"A run at step {last_step:,}."
    layers = settings.get("Model.memory_layers") or ()
    size, xl_cache = settings.get("Memory.size") or 0, settings.get("Model.xl_cache")
    memory = "no memory"
    if size and layers:
        memory = f"a memory of {size:,} tokens in layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"
    return (
        f"A model of {settings.get('Model.layers')} layers, embedding size {settings.get('Model.embedding_size')}, "
        f"with {memory} and {'an' if xl_cache else 'no'} XL cache. Trained for {last_step:,} steps with batch size "
        f"{settings.get('Batch.size')} and segments of {settings.get('Batch.segment_length')} tokens, on "
        f"{settings.get('Training.data') or 'unnamed data'}."
    )


def _finite(data: Any) -> Any:
    """Returns the data with None in place of NaN and infinities, which JSON does not have."""
    if isinstance(data, dict):
        return {name: _finite(value) for name, value in data.items()}
    if isinstance(data, list):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
