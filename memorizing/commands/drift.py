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
    from memorizing.config import load_trained
    from memorizing.evaluation.drift import drift
    from memorizing.files import run_folder
    from memorizing.model.settings import split_sizes
    from memorizing.parallel.mesh import open_mesh
    from memorizing.storage.checkpoints import Checkpoints
    from memorizing.storage.workdir import check_data, open_tokens
    from memorizing.training.state import StateFactory

    workdir = run_folder("--workdir", options.workdir)
    it = load_trained(workdir, options.gin_file, options.gin_param)
    tokens = open_tokens(it.training.data, it.model)
    check_data(workdir, tokens, train=True)
    mesh = open_mesh(it.mesh, split_sizes(it.model, it.memory, it.batch.segment_length, it.batch.size))
    make = StateFactory(it.model, it.memory, it.batch, it.optimizer, it.training, mesh)
    with Checkpoints(workdir, index_kind=make.index_kind()) as checkpoints:
        drift(checkpoints, make, it.model, it.memory, it.batch, it.training, tokens.split("train"), options.json)
