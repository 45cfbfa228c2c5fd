"""`memorizing train`: see `training/loop.py`."""

import argparse

from memorizing.commands.arguments import add_processes, add_settings
from memorizing.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `memorizing train`."""
    parser.add_argument(
        "--workdir", metavar="DIR", required=True,
        help="folder for the run's settings, checkpoints and metrics, or gs://BUCKET/RUN",
    )  # fmt: skip
    parser.add_argument(
        "--reset_memory", action="store_true", help="resume with an empty memory instead of the saved one"
    )
    add_settings(parser)
    add_processes(parser)


def run(options: argparse.Namespace) -> None:
    """Trains a model; if run again, resumes from the newest checkpoint in the workdir."""
    from memorizing.training.signals import end_at_sigterm

    end_at_sigterm()
    from memorizing.api import train_in
    from memorizing.files import run_folder
    from memorizing.parallel import hosts
    from memorizing.runs import open_workdir

    workdir = run_folder("--workdir", options.workdir)
    hosts.start(options.coordinator, options.processes, options.process)
    if workdir.exists() and not workdir.is_dir():
        raise InputError(f"--workdir={workdir} is a file. Give a folder")
    config, text = open_workdir(workdir, options.gin_file, options.gin_param, hosts.say)
    train_in(workdir, config, text, options.reset_memory)
