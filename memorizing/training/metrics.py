"""Metric writers: where the metrics of a run go, chosen by `Training.metric_writers`.

To add one, write a class with the methods of `MetricsWriter` and add a line to `WRITERS`.
"""

import json
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer.record_writer import RecordWriter

from memorizing.files import AnyPath, atomic_write
from memorizing.storage.checkpoints import save_failed

METRICS_FILE = "metrics.jsonl"
DAMAGED_FILE = f"{METRICS_FILE}.damaged"


class MetricsWriter(Protocol):
    """The contract of metric writers. They write at once, in the calling thread, so an error appears where it happened.

    A writer is made from the workdir and the step from which the run resumes. Values that an earlier writer wrote for
    later steps no longer count: the run was killed after its checkpoint, and writes them again.

    All methods raise `SaveFailed` if the workdir cannot be written to.
    """

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes one value per name, for the end of `step`."""
        ...

    def save(self) -> None:
        """Makes what was written so far permanent; called before each checkpoint."""
        ...

    def close(self) -> None:
        """Saves, and releases files."""
        ...


class _Folder:
    """The folder in which a writer appends to files: the workdir, or a temporary one if that is in an object store.

    Nothing can be appended to an object, so `save` copies the temporary files to the workdir.
    """

    def __init__(self, workdir: AnyPath):
        self._workdir, self._temporary = workdir, None
        if isinstance(workdir, Path):
            self.path = workdir
        else:
            self._temporary = tempfile.TemporaryDirectory(prefix="memorizing-")
            self.path = Path(self._temporary.name)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Raises `SaveFailed` for an `OSError` within the `with`."""
        try:
            yield
        except OSError as error:
            raise save_failed("metrics", self._workdir, error) from error

    def save(self) -> None:
        """Copies temporary files to the workdir."""
        if self._temporary is None:
            return
        with self.writing():
            for path in self.path.rglob("*"):
                if path.is_file():
                    atomic_write(self._workdir / path.relative_to(self.path), path.read_bytes())

    def close(self, files: Any) -> None:
        """Saves, closes `files`, and removes the temporary folder."""
        try:
            self.save()
        finally:
            with self.writing():
                files.close()
            if self._temporary is not None:
                self._temporary.cleanup()


class JsonLinesWriter:
    """Appends one JSON object per step to `WORKDIR/metrics.jsonl`.

    Lines after `resumed_step` are removed first: a run that was killed after its last checkpoint repeats these steps.
    Damaged lines are moved to `WORKDIR/metrics.jsonl.damaged`.
    """

    def __init__(self, workdir: AnyPath, resumed_step: int):
        self._folder = _Folder(workdir)
        path, aside = self._folder.path / METRICS_FILE, workdir / DAMAGED_FILE
        with self._folder.writing():
            found = read_metrics(workdir / METRICS_FILE)
            if found.damaged:
                before = aside.read_bytes() if aside.exists() else b""
                atomic_write(aside, before + b"".join(raw + b"\n" for raw in found.damaged.values()))
                print(f"{found.problem(workdir / METRICS_FILE)}; moved to {aside}", file=sys.stderr)
            atomic_write(path, "".join(json.dumps(line) + "\n" for line in found.lines if line["step"] <= resumed_step))
            self._file = path.open("a")

    def write(self, step: int, values: dict[str, float]) -> None:
        """See `MetricsWriter`."""
        with self._folder.writing():
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()

    def save(self) -> None:
        """See `MetricsWriter`."""
        self._folder.save()

    def close(self) -> None:
        """See `MetricsWriter`."""
        self._folder.close(self._file)


class TensorBoardWriter:
    """Writes scalars to `WORKDIR/tensorboard`. Names such as `gates/layer_9/head_0` are grouped there.

    TensorBoard forgets what an earlier writer wrote for steps after `resumed_step`.
    """

    def __init__(self, workdir: AnyPath, resumed_step: int):
        self._folder = _Folder(workdir)
        folder = self._folder.path / "tensorboard"
        name = f"events.out.tfevents.{time.time_ns() // 10**9:010}.{socket.gethostname()}.{os.getpid()}"
        with self._folder.writing():
            folder.mkdir(parents=True, exist_ok=True)
            self._events = RecordWriter((folder / name).open("ab"))
        self._add(file_version="brain.Event:2")
        started = event_pb2.SessionLog(status=event_pb2.SessionLog.START)  # type: ignore[missing-attribute]
        self._add(step=resumed_step + 1, session_log=started)

    def write(self, step: int, values: dict[str, float]) -> None:
        """See `MetricsWriter`."""
        summary = summary_pb2.Summary()  # type: ignore[missing-attribute]  # generated at import
        for name, value in values.items():
            summary.value.add(tag=name, simple_value=value)
        self._add(step=step, summary=summary)

    def _add(self, **event: Any) -> None:
        record = event_pb2.Event(wall_time=time.time(), **event)  # type: ignore[missing-attribute]
        with self._folder.writing():
            self._events.write(record.SerializeToString())
            self._events.flush()

    def save(self) -> None:
        """See `MetricsWriter`."""
        self._folder.save()

    def close(self) -> None:
        """See `MetricsWriter`."""
        self._folder.close(self._events)


WRITERS: dict[str, Callable[[AnyPath, int], MetricsWriter]] = {
    "jsonl": JsonLinesWriter,
    "tensorboard": TensorBoardWriter,
}
"""The writers by the names that `Training.metric_writers` has for them. Each takes the workdir and the resumed step."""


class Metrics(NamedTuple):
    """The content of a `metrics.jsonl`.

    Attributes:
        lines: metrics by name, and the step, in order of the file.
        damaged: lines that are no metrics, by their number from 1. A last line that a kill cut short is left out.
    """

    lines: list[dict[str, int | float]]
    damaged: dict[int, bytes]

    def problem(self, path: AnyPath) -> str:
        """Returns a message about damaged lines; empty if there are none."""
        numbers = ", ".join(map(str, list(self.damaged)[:5])) + ", ..." * (len(self.damaged) > 5)
        return f"{path}: {len(self.damaged)} damaged lines ({numbers})" if self.damaged else ""


def read_metrics(path: AnyPath) -> Metrics:
    """Reads a `metrics.jsonl`, empty if there is none. Damaged lines do not hide the others."""
    *whole, last = path.read_bytes().split(b"\n") if path.exists() else [b""]
    lines, damaged = [], {}
    for number, raw in enumerate([*whole, last], 1):
        line = _metrics_line(raw)
        if line is not None:
            lines.append(line)
        elif number <= len(whole):
            damaged[number] = raw
    return Metrics(lines, damaged)


def _metrics_line(raw: bytes) -> dict[str, int | float] | None:
    """Returns the metrics of a line; None if it is damaged."""
    try:
        line = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    is_whole = isinstance(line, dict) and isinstance(line.get("step"), int)
    return line if is_whole and all(isinstance(value, int | float) for value in line.values()) else None
