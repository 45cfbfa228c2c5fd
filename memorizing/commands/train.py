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
    """Trains a model; repeated, it resumes from the newest checkpoint in the workdir."""
    from memorizing.training.signals import end_at_sigterm

    end_at_sigterm()
    from memorizing.files import run_folder
    from memorizing.model.settings import split_sizes
    from memorizing.parallel import hosts
    from memorizing.parallel.mesh import open_mesh
    from memorizing.runs import open_workdir, written_config
    from memorizing.storage.workdir import check_data, held_run, open_tokens
    from memorizing.training.loop import train

    workdir = run_folder("--workdir", options.workdir)
    hosts.start(options.coordinator, options.processes, options.process)
    if workdir.exists() and not workdir.is_dir():
        raise InputError(f"--workdir={workdir} is a file. Name a folder")
    config, text = open_workdir(workdir, options.gin_file, options.gin_param, hosts.say)
    check_data(workdir, open_tokens(config.training.data, config.model), train=True)
    batch = config.batch
    open_mesh(config.mesh, split_sizes(config.model, config.memory, batch.segment_length, batch.size))
    with held_run(workdir), written_config(workdir, text):
        train(config, workdir, options.reset_memory)
