"""`memorizing compare`: see `reports/comparison.py`."""

import argparse
from pathlib import Path

from memorizing.commands.arguments import add_settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `memorizing compare`."""
    parser.add_argument("--without", metavar="WORKDIR", required=True, help="folder of the run without memory")
    parser.add_argument("--with", metavar="WORKDIR", required=True, dest="with_", help="folder of the run with memory")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", required=True, help="folder to create for results.json and results.png"
    )
    add_settings(parser)


def run(options: argparse.Namespace) -> None:
    """Compares a run without memory to a run with memory: table, JSON, picture."""
    from memorizing.files import run_folder
    from memorizing.reports.comparison import compare
    from memorizing.runs import load_trained

    without_memory, with_memory = run_folder("--without", options.without), run_folder("--with", options.with_)
    split = load_trained(with_memory, options.gin_file, options.gin_param).evaluation.split
    compare(without_memory, with_memory, split, options.out)
