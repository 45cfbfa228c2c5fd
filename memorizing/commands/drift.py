"""`memorizing drift`: see `evaluation/drift.py`."""

import argparse
from pathlib import Path

from memorizing.commands.arguments import add_settings, add_workdir


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `memorizing drift`."""
    add_workdir(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="file to which all figures are written")
    add_settings(parser)


def run(options: argparse.Namespace) -> None:
    """Measures how stale a run's memory is: its keys against those of the present parameters."""
    from memorizing.evaluation.drift import drift
    from memorizing.files import run_folder
    from memorizing.model.settings import split_sizes
    from memorizing.parallel.mesh import open_mesh
    from memorizing.runs import load_trained
    from memorizing.storage.checkpoints import Checkpoints
    from memorizing.storage.workdir import check_data, open_tokens
    from memorizing.training.state import StateFactory

    workdir = run_folder("--workdir", options.workdir)
    config = load_trained(workdir, options.gin_file, options.gin_param)
    tokens = open_tokens(config.training.data, config.model)
    check_data(workdir, tokens, train=True)
    batch = config.batch
    mesh = open_mesh(config.mesh, split_sizes(config.model, config.memory, batch.segment_length, batch.size))
    factory = StateFactory(config, mesh)
    with Checkpoints(workdir, index_kind=factory.index_kind()) as checkpoints:
        drift(checkpoints, factory, tokens.split("train"), options.json)
