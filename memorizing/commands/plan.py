"""`memorizing plan`: see `planning/plan.py`."""

import argparse
from pathlib import Path

from memorizing.commands.arguments import add_settings
from memorizing.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `memorizing plan`."""
    parser.add_argument(
        "--topology", default="local", metavar="NAME",
        help="TPU slice to compile for, such as v5p:4x4x4; default: the devices of this machine",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="file to which all figures are written")
    add_settings(parser)


def run(options: argparse.Namespace) -> None:
    """Estimates a run's memory, time and network traffic on devices that need not be present."""
    from memorizing.config import load
    from memorizing.planning.plan import plan

    if not options.gin_file:
        raise InputError("--gin_file is missing. Give the settings to plan, such as --gin_file=configs/base.gin")
    config, _ = load(options.gin_file, options.gin_param)
    plan(config, options.topology, options.json)
