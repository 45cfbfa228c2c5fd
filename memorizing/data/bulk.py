"""Bulk work in jobs, each done once: one after another in this process, or by Apache Beam on any of its runners.

A job is done when its file exists. A killed run therefore resumes with the missing jobs, and the result does not depend
on the number of workers.
"""

import argparse
import contextlib
import dataclasses
import difflib
import importlib
import io
import json
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from tqdm import tqdm

from memorizing.errors import InputError

_OWN_OPTIONS = ("Flink", "Spark", "Portable", "Prism")
"""Runners with a job server that has options of its own, which Beam does not list."""


@dataclasses.dataclass(frozen=True)
class BeamSettings:
    """Settings of Apache Beam, which reads and tokenizes the corpora.

    Attributes:
        runner: an Apache Beam runner: `DirectRunner` (this machine), `DataflowRunner`, `FlinkRunner`, `SparkRunner`.
            Its workers must see the raw files and the output under the same paths.
        options: pipeline options as on Beam's command line. For eight processes on this machine:
            `('--direct_running_mode=multi_processing', '--direct_num_workers=8')`.
    """

    runner: str = "DirectRunner"
    options: tuple[str, ...] = ()


class Beam(NamedTuple):
    """A Beam runner and its options, in the form that Beam and TFDS take."""

    runner: Any
    options: Any

    @classmethod
    def from_settings(cls, settings: BeamSettings) -> "Beam":
        """Raises InputError for an unknown runner, an unknown option, or an invalid value."""
        unknown = [option for option in settings.options if not re.fullmatch(r"--\w+(=.*)?", option, re.DOTALL)]
        if unknown:
            raise InputError(f"Beam.options has {', '.join(unknown)}. Write each option as '--name=value'")
        beam = _import_beam()
        try:
            beam.runners.create_runner(settings.runner)
        except (ValueError, ImportError, AttributeError) as error:
            raise InputError(f"Beam.runner = {settings.runner!r}: {error}") from error
        _check_options(beam.options.pipeline_options.PipelineOptions, settings)
        return cls(settings.runner, beam.options.pipeline_options.PipelineOptions(list(settings.options)))


def _check_options(known: Any, settings: BeamSettings) -> None:
    """Raises InputError for options that Beam would ignore, and for values on which Beam would exit."""
    parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)
    for options in known.__subclasses__():
        options._add_argparse_args(parser)
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            _, unknown = parser.parse_known_args(list(settings.options))
    except (argparse.ArgumentError, SystemExit) as error:
        reason = error if isinstance(error, argparse.ArgumentError) else stderr.getvalue().strip().rpartition("\n")[2]
        raise InputError(f"Beam.options = {settings.options}: {reason}") from error
    if unknown and not settings.runner.startswith(_OWN_OPTIONS):
        names = [name for action in parser._actions for name in action.option_strings]
        close = difflib.get_close_matches(unknown[0].partition("=")[0], names, n=1)
        near = f"Did you mean {close[0]}?" if close else "See the documentation of Beam's pipeline options"
        raise InputError(f"Beam.options has {', '.join(unknown)}, which Beam does not know. {near}")


@contextlib.contextmanager
def name_file_errors() -> Iterator[None]:
    """Turns errors of the file system into an InputError that names the file."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{error.filename or 'a file'}: {error.strerror or error}. Fix it, move it away, or choose another folder, "
            "and repeat the command"
        ) from error


@runtime_checkable
class Job(Protocol):
    """A unit of work. Calling it does the work, and it is done when `path` exists. It can be pickled for Beam."""

    @property
    def path(self) -> Path: ...

    def __call__(self) -> None: ...


def run_jobs(jobs: Sequence[Job], title: str, beam: Beam | None) -> None:
    """Runs the jobs that are not done, with a progress bar.

    Raises:
        InputError: the first one that a job raised.
    """
    missing = [job for job in jobs if not job.path.exists()]
    with tqdm(total=len(jobs), initial=len(jobs) - len(missing), desc=title, unit=" parts", disable=None) as bar:
        if beam is None:
            for job in missing:
                with name_file_errors():
                    job()
                bar.update()
        elif missing:
            _with_beam(missing, beam, bar)


def write_once(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes a file with `write`, flushes it to disk, and only then gives it its name `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.{threading.get_ident()}")
    write(unfinished)
    with unfinished.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def _with_beam(jobs: Sequence[Job], beam: Beam, bar: tqdm) -> None:
    apache_beam = _import_beam()
    names = apache_beam.options.pipeline_options
    options = beam.options or names.PipelineOptions()
    options.view_as(names.WorkerOptions).default_sdk_harness_log_level = "ERROR"
    options.view_as(names.TypeOptions).pipeline_type_check = False  # it takes protocols for classes
    for job in jobs:
        _error_file(job).unlink(missing_ok=True)
    left = list(jobs)
    finished = threading.Event()

    def watch() -> None:
        while not finished.wait(0.5) and left:
            done = [job for job in left if job.path.exists()]
            left[:] = [job for job in left if job not in done]
            bar.update(len(done))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        with apache_beam.Pipeline(runner=beam.runner, options=options) as pipeline:
            _ = pipeline | apache_beam.Create(list(jobs)) | apache_beam.Reshuffle() | apache_beam.Map(_do_one)
    finally:
        finished.set()
        watcher.join()
    bar.update(len(left))
    for job in jobs:
        if (file := _error_file(job)).exists():
            raise InputError(json.loads(file.read_text()))


def _import_beam() -> Any:
    """Imports Beam without its warnings about cloud services and about each worker's start."""
    logging.disable(logging.WARNING)
    try:
        return importlib.import_module("apache_beam")
    finally:
        logging.disable(logging.NOTSET)
        logging.getLogger("apache_beam").setLevel(logging.ERROR)


def _do_one(job: Job) -> None:
    """Runs a job and writes an InputError to a file. Beam would retry the job and report the stack instead of the
    cause.
    """
    try:
        with name_file_errors():
            job()
    except InputError as error:
        message = json.dumps(str(error))
        write_once(_error_file(job), lambda path: path.write_text(message))


def _error_file(job: Job) -> Path:
    return job.path.with_name(job.path.name + ".error")
