"""Bulk work in parts, each done once: here one after another, or by Apache Beam on any of its runners.

A part is done when its file is there. So a killed run goes on with the parts that are missing, and the result does not
depend on how many workers there are, or which did what.
"""

import dataclasses
import importlib
import json
import logging
import os
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from tqdm import tqdm

from memorizing.errors import InputError


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
    def of(cls, settings: BeamSettings) -> "Beam":
        """Raises InputError for a runner that Beam does not know, and for what is no option."""
        unknown = [option for option in settings.options if not re.fullmatch(r"--\w+(=.*)?", option, re.DOTALL)]
        if unknown:
            raise InputError(f"Beam.options has {', '.join(unknown)}: write each option as '--name=value'")
        beam = _import_beam()
        try:
            beam.runners.create_runner(settings.runner)
        except (ValueError, ImportError, AttributeError) as error:
            raise InputError(f"Beam.runner = {settings.runner!r}: {error}") from error
        return cls(settings.runner, beam.options.pipeline_options.PipelineOptions(list(settings.options)))


@runtime_checkable
class Part(Protocol):
    """A part of the work: does it when called, and is done when `path` exists. Can be pickled for Beam."""

    @property
    def path(self) -> Path: ...

    def __call__(self) -> None: ...


def do(parts: Sequence[Part], title: str, beam: Beam | None) -> None:
    """Does the parts that are not done yet, with a progress bar.

    Raises:
        InputError: the first that a part raised.
    """
    missing = [part for part in parts if not part.path.exists()]
    with tqdm(total=len(parts), initial=len(parts) - len(missing), desc=title, unit=" parts", disable=None) as bar:
        if beam is None:
            for part in missing:
                part()
                bar.update()
        elif missing:
            _with_beam(missing, beam, bar)


def write_once(path: Path, write: Callable[[Path], Any]) -> None:
    """Has `write` make a file, which gets its name `path` only when it is whole and on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.{threading.get_ident()}")
    write(unfinished)
    os.replace(unfinished, path)


def _with_beam(parts: Sequence[Part], beam: Beam, bar: tqdm) -> None:
    apache_beam = _import_beam()
    names = apache_beam.options.pipeline_options
    options = beam.options or names.PipelineOptions()
    options.view_as(names.WorkerOptions).default_sdk_harness_log_level = "ERROR"
    options.view_as(names.TypeOptions).pipeline_type_check = False  # it takes protocols for classes
    for part in parts:
        _error_file(part).unlink(missing_ok=True)
    left = list(parts)
    finished = threading.Event()

    def watch() -> None:
        while not finished.wait(0.5) and left:
            done = [part for part in left if part.path.exists()]
            left[:] = [part for part in left if part not in done]
            bar.update(len(done))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        with apache_beam.Pipeline(runner=beam.runner, options=options) as pipeline:
            _ = pipeline | apache_beam.Create(list(parts)) | apache_beam.Reshuffle() | apache_beam.Map(_do_one)
    finally:
        finished.set()
        watcher.join()
    bar.update(len(left))
    for part in parts:
        if (file := _error_file(part)).exists():
            raise InputError(json.loads(file.read_text()))


def _import_beam() -> Any:
    """Without its warnings: of clouds that nobody asked for, and of each worker's start."""
    logging.disable(logging.WARNING)
    try:
        return importlib.import_module("apache_beam")
    finally:
        logging.disable(logging.NOTSET)
        logging.getLogger("apache_beam").setLevel(logging.ERROR)


def _do_one(part: Part) -> None:
    """Keeps errors of the input from becoming errors of Beam, which would try again and then say where, not what."""
    try:
        part()
    except InputError as error:
        message = json.dumps(str(error))
        write_once(_error_file(part), lambda path: path.write_text(message))


def _error_file(part: Part) -> Path:
    return part.path.with_name(part.path.name + ".error")
