"""What a run reports: a line per logged step in `metrics.jsonl`, the same to TensorBoard, and a progress bar."""

import json
import math
import os
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer.record_writer import RecordWriter
from tqdm import tqdm

from memorizing.files import AnyPath, atomic_write
from memorizing.storage.checkpoints import save_failed

METRICS_FILE = "metrics.jsonl"


class MetricsWriter:
    """Appends scalars by step to `WORKDIR/metrics.jsonl` and `WORKDIR/tensorboard`.

    Lines after `resumed_step` are removed first: a run that was killed after its last checkpoint repeats these steps.

    Both are written at once, by this thread: what went wrong is known where it did. Where the workdir is in an object
    store, to which nothing can be appended, they lie in a temporary folder, and get into the workdir by `save`.

    Raises:
        SaveFailed: when the workdir cannot be written to; so do `write`, `save` and `close`.
    """

    def __init__(self, workdir: AnyPath, resumed_step: int):
        self._workdir, self._temporary = workdir, None
        if isinstance(workdir, Path):
            self._folder = workdir
        else:
            self._temporary = tempfile.TemporaryDirectory(prefix="memorizing-")
            self._folder = Path(self._temporary.name)
        kept = [line for line in read_lines(workdir / METRICS_FILE) if line["step"] <= resumed_step]
        path, folder = self._folder / METRICS_FILE, self._folder / "tensorboard"
        with self._writing():
            atomic_write(path, "".join(json.dumps(line) + "\n" for line in kept))
            self._file = path.open("a")
            folder.mkdir(exist_ok=True)
            name = f"events.out.tfevents.{time.time_ns() // 10**9:010}.{socket.gethostname()}.{os.getpid()}"
            self._events = RecordWriter((folder / name).open("ab"))
        self._add(file_version="brain.Event:2")
        # On such a start TensorBoard forgets what an earlier writer told of these steps.
        started = event_pb2.SessionLog(status=event_pb2.SessionLog.START)  # type: ignore[missing-attribute]
        self._add(step=resumed_step + 1, session_log=started)

    def write(self, step: int, values: dict[str, float]) -> None:
        """One value a name; `gates/layer_9/head_0` and the like group in TensorBoard."""
        with self._writing():
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
        summary = summary_pb2.Summary()  # type: ignore[missing-attribute]  # generated at import
        for name, value in values.items():
            summary.value.add(tag=name, simple_value=value)
        self._add(step=step, summary=summary)

    def _add(self, **event: Any) -> None:
        record = event_pb2.Event(wall_time=time.time(), **event)  # type: ignore[missing-attribute]
        with self._writing():
            self._events.write(record.SerializeToString())
            self._events.flush()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise save_failed("metrics", self._workdir, error) from error

    def save(self) -> None:
        """Before a checkpoint: what was written so far is in the workdir from here on.

        Raises:
            SaveFailed: when it could not be written there.
        """
        if self._temporary is None:
            return
        with self._writing():
            for path in self._folder.rglob("*"):
                if path.is_file():
                    atomic_write(self._workdir / path.relative_to(self._folder), path.read_bytes())

    def close(self) -> None:
        try:
            self.save()
        finally:
            with self._writing():
                self._file.close()
                self._events.close()
            if self._temporary is not None:
                self._temporary.cleanup()


def read_lines(path: AnyPath) -> list[dict]:
    """The lines of a `metrics.jsonl`; a last line that a kill cut short is left out."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


class Progress:
    """A bar with loss, speed and time left on a terminal; elsewhere a plain line now and then."""

    def __init__(self, total: int, first: int, seconds_between_lines: float = 15.0):
        self._total, self._first, self._between = total, first, seconds_between_lines
        self._start = self._last_line = time.monotonic()
        self._bar = tqdm(total=total, initial=first, unit="step") if sys.stderr.isatty() else None

    def show(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Reports that `step` steps are done."""
        if self._bar is not None:
            self._bar.set_postfix(loss=f"{loss:.3f}", tokens_per_second=f"{tokens_per_second:,.0f}", refresh=False)
            self._bar.update(step - self._bar.n)
            return
        now = time.monotonic()
        if now - self._last_line < self._between and step < self._total:
            return
        self._last_line = now
        left = (now - self._start) / max(step - self._first, 1) * (self._total - step)
        width = int(math.log10(self._total)) + 1
        print(
            f"step {step:{width}}/{self._total}  loss {loss:.3f}  {tokens_per_second:,.0f} tokens/s  "
            f"{tqdm.format_interval(left)} left",
            flush=True,
        )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
