"""Bulk work in jobs, each done once: here one after another, or by Apache Beam on any of its runners.

A job is done when its file is there. So a killed run goes on with the jobs that are missing, and the result does not
depend on how many workers there are, or which did what.
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
"""Runners with a server for jobs, which has options that only it knows."""


@dataclasses.dataclass(frozen=True)
class BeamSettings:
    """Where the corpora are read and tokenized.

    Attributes:
        runner: a runner of Apache Beam: `DirectRunner` (this machine), `DataflowRunner`, `FlinkRunner`, `SparkRunner`.
            Its workers must see the raw files and the output under the same paths.
        options: pipeline options as on Beam's command line, `('--direct_running_mode=multi_processing',
            '--direct_num_workers=8')` for eight processes on this machine.
    """

    runner: str = "DirectRunner"
    options: tuple[str, ...] = ()


class Beam(NamedTuple):
    """A runner of Beam and its options, as Beam and TFDS have them."""

    runner: Any
    options: Any

    @classmethod
    def from_settings(cls, settings: BeamSettings) -> "Beam":
        """Raises InputError for runners and options that Beam does not know, and for values that it does not take."""
        unknown = [option for option in settings.options if not re.fullmatch(r"--\w+(=.*)?", option, re.DOTALL)]
        if unknown:
            raise InputError(f"Beam.options has {', '.join(unknown)}: write each option as '--name=value'")
        beam = _import_beam()
        try:
            beam.runners.create_runner(settings.runner)
        except (ValueError, ImportError, AttributeError) as error:
            raise InputError(f"Beam.runner = {settings.runner!r}: {error}") from error
        _check_options(beam.options.pipeline_options.PipelineOptions, settings)
        return cls(settings.runner, beam.options.pipeline_options.PipelineOptions(list(settings.options)))


def _check_options(known: Any, settings: BeamSettings) -> None:
    """Beam itself passes over options that it does not know, and ends the program for a value it does not take."""
    parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)
    for options in known.__subclasses__():
        options._add_argparse_args(parser)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            _, unknown = parser.parse_known_args(list(settings.options))
    except (argparse.ArgumentError, SystemExit) as error:
        why = error if isinstance(error, argparse.ArgumentError) else said.getvalue().strip().rpartition("\n")[2]
        raise InputError(f"Beam.options = {settings.options}: {why}") from error
    if unknown and not settings.runner.startswith(_OWN_OPTIONS):
        names = [name for action in parser._actions for name in action.option_strings]
        close = difflib.get_close_matches(unknown[0].partition("=")[0], names, n=1)
        near = f"did you mean {close[0]}?" if close else "see the documentation of Beam's pipeline options"
        raise InputError(f"Beam.options has {', '.join(unknown)}, which Beam does not know: {near}")


@contextlib.contextmanager
def name_file_errors() -> Iterator[None]:
    """Makes errors of the file system what they are: no bugs, but files that a user can mend."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{error.filename or 'a file'}: {error.strerror or error}; mend it, move it away, or name another folder, "
            "and repeat the command"
        ) from error


@runtime_checkable
class Job(Protocol):
    """A job of the work: does it when called, and is done when `path` exists. Can be pickled for Beam."""

    @property
    def path(self) -> Path: ...

    def __call__(self) -> None: ...


def run_jobs(jobs: Sequence[Job], title: str, beam: Beam | None) -> None:
    """Does the jobs that are not done yet, with a progress bar.

    Raises:
        InputError: the first that a job raised.
    """
    missing = [job for job in jobs if not job.path.exists()]
    with tqdm(total=len(jobs), initial=len(jobs) - len(missing), desc=title, unit=" jobs", disable=None) as bar:
        if beam is None:
            for job in missing:
                with name_file_errors():
                    job()
                bar.update()
        elif missing:
            _with_beam(missing, beam, bar)


def write_once(path: Path, write: Callable[[Path], Any]) -> None:
    """Has `write` make a file, which gets its name `path` only when it is whole and on disk, lest power fails."""
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
    """Without its warnings: of clouds that nobody asked for, and of each worker's start."""
    logging.disable(logging.WARNING)
    try:
        return importlib.import_module("apache_beam")
    finally:
        logging.disable(logging.NOTSET)
        logging.getLogger("apache_beam").setLevel(logging.ERROR)


def _do_one(job: Job) -> None:
    """Keeps errors of the input from becoming errors of Beam, which would try again and then say where, not what."""
    try:
        with name_file_errors():
            job()
    except InputError as error:
        message = json.dumps(str(error))
        write_once(_error_file(job), lambda path: path.write_text(message))


def _error_file(job: Job) -> Path:
    return job.path.with_name(job.path.name + ".error")
