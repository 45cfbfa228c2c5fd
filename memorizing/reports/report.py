"""`memorizing report`: a run or a sweep as one HTML page that opens from a disk, without a network.

What lies in a workdir is gathered into one JSON-able dict (`gather_run`, `gather_sweep`) and embedded in a page, whose
scripts (`pages/run.js`, `pages/sweep.js`) draw it. What is missing or cannot be read is said on the page (`notices`).
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
from memorizing.training.metrics import METRICS_FILE, read_lines

CONFIG_FILE = "config.gin"
SWEEP_FILE = "sweep.json"
REPORT_FILE = "report.html"
NAMES = {"run": "training run", "sweep": "sweep"}
MOST_LINES = 4000
"""Of metrics, in a page: of longer runs so many averages."""
MOST_DOCUMENTS = 2000
"""Of one reading, in a page: the longest."""


def report_run(workdir: AnyPath, out: AnyPath | None, say: Callable[[str], None] = print) -> None:
    """Writes the page of a run, to `WORKDIR/report.html` if not told otherwise.

    Raises:
        InputError: when there is no run, or something else in the way.
    """
    _write(out or workdir / REPORT_FILE, gather_run(workdir), "run", say)


def report_sweep(folder: Path, out: Path | None, say: Callable[[str], None] = print) -> None:
    """Writes the page of a sweep, to `DIR/report.html` if not told otherwise.

    Raises:
        InputError: when there is no sweep, or something else in the way.
    """
    out = out or folder / REPORT_FILE
    _write(out, gather_sweep(folder, out), "sweep", say)


def _write(out: AnyPath, data: dict, of: str, say: Callable[[str], None]) -> None:
    from plotly.offline import get_plotlyjs

    check_replaceable("--out", out)
    scripts = [get_plotlyjs(), *(script(f"{name}.js") for name in ("charts", "parts", of))]
    atomic_write(out, page(f"{data['title']} – {NAMES[of]}", script(f"{of}.html"), scripts, data))
    for notice in data["notices"]:
        say(notice)
    say(f"report: {out}")


def gather_run(workdir: AnyPath) -> dict[str, Any]:
    """All that the page of a run shows.

    Raises:
        InputError: when there is neither a configuration nor a metric.
    """
    if not (workdir / CONFIG_FILE).exists() and not (workdir / METRICS_FILE).exists():
        raise InputError(f"--workdir={workdir} is no run: neither {CONFIG_FILE} nor {METRICS_FILE} is there")
    notices: list[str] = []
    settings = read_settings(_text(workdir / CONFIG_FILE))
    lines = read_lines(workdir / METRICS_FILE)
    evaluations = sorted((_finite(each) for each in _evaluations(workdir, notices)), key=_order)
    planned = settings.get("Training.steps")
    done = lines[-1]["step"] if lines else 0
    if planned and done < planned:
        notices.append(f"Training has got to step {done:,} of {planned:,}: it is going on, or was interrupted.")
    if len(lines) > MOST_LINES:
        notices.append(f"Curves show averages: of {len(lines):,} lines of metrics, {MOST_LINES:,}.")
    checkpoints = sorted({each["figures"]["checkpoint_step"] for each in evaluations} - {None})
    if len(checkpoints) > 1:
        notices.append(f"Evaluations are of different checkpoints: of steps {', '.join(map(str, checkpoints))}.")
    return {
        **_made(workdir),
        "sentence": _sentence(settings, done),
        "steps": planned,
        "notices": notices,
        "training": _finite(columns(lines)),
        "evaluations": evaluations,
        "hardware": _json(workdir / HARDWARE_FILE, notices) or [],
        "settings": _listed(settings),
    }


def gather_sweep(folder: Path, out: Path) -> dict[str, Any]:
    """All that the page of a sweep shows; links are relative to `out`.

    Raises:
        InputError: when there is no sweep.
    """
    if not (folder / SWEEP_FILE).exists():
        raise InputError(f"--sweep={folder} is no sweep: {SWEEP_FILE} is not there")
    notices: list[str] = []
    sweep = _json(folder / SWEEP_FILE, notices)
    if not isinstance(sweep, dict) or not isinstance(sweep.get("points"), list):
        raise InputError(f"{folder / SWEEP_FILE} is not what `memorizing sweep` writes: make it again")
    settings, points = read_settings(sweep.get("settings", "")), []
    for point in sweep["points"]:
        evaluations = [_completed(figures) for figures in point.get("evaluations") or []]
        more = {"evaluations": evaluations, "training": point.get("training") or []}
        points.append({**point, **more, "link": _link(folder / point["workdir"] / REPORT_FILE, out)})
    for status, words in (("failed", "failed: see Points"), ("waiting", "waiting to be done")):
        if count := sum(point["status"] == status for point in points):
            notices.append(f"Of {len(points)} points {count} {words}.")
    kept = {
        "over": sweep.get("over") or {},
        "seeds": sweep.get("seeds") or [],
        "command": shlex.join(["memorizing", "sweep", *map(str, sweep.get("arguments") or [])]),
    }
    sentence = (
        f"{len(points)} points: {' × '.join(f'{len(values)} of {name}' for name, values in kept['over'].items())}"
        f"{' × ' if kept['over'] else ''}{len(kept['seeds'])} seed{'' if len(kept['seeds']) == 1 else 's'}."
    )
    about = {"sentence": sentence, "memory_size": settings.get("Memory.size"), "settings": _listed(settings)}
    return _finite({**_made(folder), **kept, **about, "notices": notices, "points": points})


def _link(report: Path, out: Path) -> str | None:
    """From the page `out` to a point's own report, where there is one on this disk."""
    return quote(os.path.relpath(report, out.parent)) if report.exists() else None


def _made(folder: AnyPath) -> dict[str, str]:
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    name = (folder.resolve() if isinstance(folder, Path) else folder).name
    return {"title": name, "workdir": str(folder), "made": now, "version": metadata.version("memorizing")}


def _text(path: AnyPath) -> str:
    return path.read_text() if path.exists() else ""


def _json(path: AnyPath, notices: list[str]) -> Any:
    try:
        return json.loads(path.read_text()) if path.exists() else None
    except (json.JSONDecodeError, UnicodeDecodeError):
        notices.append(f"{path.name} cannot be read and is left out: it is no JSON.")
        return None


def read_settings(text: str) -> dict[str, Any]:
    """Values by name, of a `config.gin` in which each setting is a line; macros stand for their values."""
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
    """A list of values for each metric, none where a line has none; of many lines, means over equal stretches."""
    names = list(dict.fromkeys(name for line in lines for name in line))
    stretch = max(math.ceil(len(lines) / MOST_LINES), 1)

    def mean(name: str, part: list[dict]) -> float | None:
        values = [line[name] for line in part if line.get(name) is not None]
        return sum(values) / len(values) if values else None

    parts = [lines[start : start + stretch] for start in range(0, len(lines), stretch)]
    means = {name: [mean(name, part) for part in parts] for name in names if name != "step"}
    return {"step": [part[-1]["step"] for part in parts], **means}


def _evaluations(workdir: AnyPath, notices: list[str]) -> Iterator[dict]:
    folder = workdir / FOLDER
    for path in sorted(folder.glob("*.json"), key=lambda path: path.name) if folder.exists() else []:
        figures = _json(path, notices)
        if not isinstance(figures, dict) or "perplexity" not in figures:
            notices.append(f"{FOLDER}/{path.name} is no evaluation and is left out.")
            continue
        documents = list(_documents(_text(path.with_suffix(".csv"))))
        if len(documents) > MOST_DOCUMENTS:
            notices.append(f"Of {len(documents):,} documents of {path.stem}, the {MOST_DOCUMENTS:,} longest are shown.")
            documents = sorted(documents, key=lambda row: -row["tokens"])[:MOST_DOCUMENTS]
        yield {"file": path.name, "figures": _completed(figures), "documents": documents}


def _order(evaluation: dict) -> tuple:
    """By text; with XL cache first; from the smallest memory."""
    figures = evaluation["figures"]
    text = (figures["corpus"], figures["split"], figures["name"])
    return *text, not figures["xl_cache"], figures["memory_size"]


def _completed(figures: dict) -> dict:
    """Figures of which an earlier version wrote fewer."""
    missing = {"corpus": "", "split": "", "name": "", "xl_cache": True, "checkpoint_step": None}
    return {**missing, "perplexity_interval": [None, None], "perplexity_by_position": [], **figures}


def _documents(text: str) -> Iterator[dict]:
    for row in csv.DictReader(io.StringIO(text)):
        numbers = {name: float(row[name]) if row.get(name) else None for name in ("nats", "gain", "perplexity")}
        counts = {name: int(row[name]) for name in ("tokens", "bytes")}
        yield {"name": row["name"], **counts, **numbers, "bits_per_byte": float(row["bits_per_byte"])}


def _sentence(settings: dict[str, Any], done: int) -> str:
    """What the run is."""
    if not settings:
        return f"A run that has got to step {done:,}."
    layers = settings.get("Model.memory_layers") or ()
    memory, xl = settings.get("Memory.size") or 0, settings.get("Model.xl_cache")
    remembers = "no memory"
    if memory and layers:
        which = f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"
        remembers = f"a memory of {memory:,} tokens in {which}"
    return (
        f"{settings.get('Model.layers')} layers of {settings.get('Model.embedding_size')} with {remembers} and "
        f"{'an' if xl else 'no'} XL cache, trained for {done:,} steps of {settings.get('Batch.size')} × "
        f"{settings.get('Batch.segment_length')} tokens on {settings.get('Training.data') or 'unnamed data'}."
    )


def _finite(data: Any) -> Any:
    """The same without numbers that JSON does not have."""
    if isinstance(data, dict):
        return {name: _finite(value) for name, value in data.items()}
    if isinstance(data, list):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
