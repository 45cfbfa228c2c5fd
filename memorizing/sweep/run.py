"""Runs the points of a sweep one after another, each in its own processes, and records them.

    OUT/sweep.json       the grid and the status of each point, rewritten after each point
    OUT/points/NAME/     a point's run, unless a trained run is evaluated; point.json, train.log and evaluate.log

A point that fails or runs out of memory does not stop the others; the repeated sweep tries it again.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from memorizing.files import folder_lock
from memorizing.sweep.points import Plan
from memorizing.sweep.records import is_done, is_trained, merged, point_record, read_sweep, record, write_sweep
from memorizing.training.signals import RUN_ME_AGAIN, Interrupted

TOLD_TO_END = (RUN_ME_AGAIN, -signal.SIGTERM, 128 + signal.SIGTERM)
"""Exit status after SIGTERM of a training, an evaluation, and an evaluation under a launcher."""
TAIL_LINES, TAIL_LETTERS = 12, 2000
"""Largest number of lines and characters shown of a failed point's log."""


class PointsFailed(RuntimeError):
    """Raised if some points could not be trained or evaluated; the others were."""


class Children:
    """Runs commands one at a time; inside the `with`, passes SIGTERM and SIGINT on to the running command.

    Attributes:
        received: the first signal.
    """

    def __init__(self, launcher: Sequence[str] = ()):
        self.received: signal.Signals | None = None
        self._launcher = launcher
        self._running: subprocess.Popen | None = None

    def __enter__(self) -> "Children":
        self._before: dict[int, Any] = {
            number: signal.signal(number, self._pass_on) for number in (signal.SIGTERM, signal.SIGINT)
        }
        return self

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number)
        if self._running is not None:
            self._running.send_signal(number)

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def run(self, arguments: Sequence[str], log: Path) -> tuple[int, str]:
        """Runs `memorizing` with these arguments and appends its output to the log. Returns its status and last output.

        Raises:
            Interrupted: if this process or the command was told to end.
        """
        own = [sys.executable, "-m", "memorizing.cli", *arguments]
        command = [sys.executable, "-m", "memorizing.sweep.child", str(os.getpid()), *self._launcher, *own]
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            start = file.tell()
            file.write(f"$ memorizing {shlex.join(arguments)}\n".encode())
            file.flush()
            self._check()
            # A separate process group: Ctrl-C reaches the command once, through this process, and a second one ends it.
            running = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, process_group=0)
            self._running = running
            if self.received is not None:  # the signal came while the command started
                running.send_signal(self.received)
            status = running.wait()
            self._running = None
        if status in TOLD_TO_END:  # also if only the command got the signal
            self.received = self.received or signal.SIGTERM
        self._check()
        return status, _tail(log, start)

    def _check(self) -> None:
        if self.received is not None:
            raise Interrupted(self.received, what="finished work is on disk")


def _tail(log: Path, start: int) -> str:
    with log.open("rb") as file:
        file.seek(start)
        lines = file.read().decode(errors="replace").rstrip().splitlines()
    return "\n".join(lines[-TAIL_LINES:])[-TAIL_LETTERS:]


def run_point(plan: Plan, out: Path, children: Children, say: Callable[[str], None]) -> dict[str, Any]:
    """Trains and evaluates a point, unless that is done. Returns its status.

    Raises:
        InputError: if another sweep works on it.
        Interrupted: see `Children.run`; finished work is on disk.
    """
    described = plan.described()
    # A lock of its own, because the training locks the point's folder.
    with folder_lock(out / "held" / plan.point.name, f"{plan.folder}: another `memorizing sweep` is at work there"):
        seconds, error = dict(point_record(out, described)["seconds"]), None
        for task, arguments in (("train", plan.train), ("evaluate", plan.evaluate)):
            if is_done(out, described) or (task == "train" and is_trained(out, described)):
                continue
            log, start = Path(plan.folder / f"{task}.log"), time.perf_counter()
            say(f"    {task}: {log}")
            try:
                status, tail = children.run(arguments, log)
                if status or (task == "train" and not is_trained(out, described)):
                    error = f"{task} {_ended(status)}: {log}\n{tail}"
                elif task == "evaluate" and not is_done(out, described):
                    error = f"the requested checkpoint or figures are missing, see {log}\n{tail}"
            finally:
                seconds[task] += time.perf_counter() - start
                record(out, described, error, seconds)
            if error:
                break
    return point_record(out, described)


def _ended(status: int) -> str:
    if status == -signal.SIGKILL:
        return "was killed (out of memory?)"
    return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"


def run_all(
    plans: Sequence[Plan], out: Path, sweep: dict[str, Any], launcher: Sequence[str], say: Callable[[str], None]
) -> dict[str, Any]:
    """Runs the unfinished points of a sweep one after another. Returns the content of `sweep.json`, which it keeps
    current.

    Raises:
        InputError: if another sweep works in `out`.
        Interrupted: see `Children.run`.
    """
    with folder_lock(out, f"--out={out}: another `memorizing sweep` is at work there; let it end, or end it"):
        sweep = merged(read_sweep(out), sweep, out)
        records = {point["name"]: point_record(out, point) for point in sweep["points"]}
        results = write_sweep(out, sweep, list(records.values()))
        say(f"{len(plans)} points: {_count([records[plan.point.name] for plan in plans])}")
        with Children(launcher) as children:
            for number, plan in enumerate(plans):
                name = plan.point.name
                if records[name]["status"] == "done":
                    continue
                say(f"[{number + 1}/{len(plans)}] {name}")
                failed = {}  # not recorded in the point's folder
                try:
                    run_point(plan, out, children, say)
                except (
                    OSError,
                    ValueError,
                ) as error:  # another process works on it, or its folder cannot be read or written
                    failed = {"status": "failed", "error": str(error)}
                finally:
                    records[name] = point_record(out, records[name]) | failed
                    results = write_sweep(out, sweep, list(records.values()))
                say(_told(records[name]))
    return results


def _count(records: Sequence[dict[str, Any]]) -> str:
    each = [record["status"] for record in records]
    return ", ".join(f"{each.count(status)} {status}" for status in ("done", "failed", "waiting") if status in each)


def _told(record: dict[str, Any]) -> str:
    if record["status"] != "done":
        return f"    {record['status']}: " + (record["error"] or "").replace("\n", "\n    | ")
    return "\n".join(
        f"    {each['corpus']} {each['split']}, memory {each['memory_size']:,}: perplexity {each['perplexity']:.3f}"
        for each in record["evaluations"]
    )
