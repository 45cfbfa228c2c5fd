"""`memorizing export`: see `pretrained/exporting.py`."""

import argparse
from pathlib import Path

from memorizing.commands.arguments import add_workdir, names
from memorizing.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `memorizing export`."""
    add_workdir(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help="folder to create")
    parser.add_argument(
        "--omit", type=names, default=[], metavar="NAME[,NAME...]",
        help="tensors to leave out because the format has no place for them; any of gates, normalization, key_shift",
    )  # fmt: skip


def run(options: argparse.Namespace) -> None:
    """Exports a run as a Hugging Face folder."""
    from memorizing.files import run_folder
    from memorizing.pretrained.exporting import DROPS, export

    if unknown := set(options.omit) - set(DROPS):
        raise InputError(
            f"--omit={','.join(sorted(unknown))} names nothing that can be left out. Choose from {', '.join(DROPS)}"
        )
    export(run_folder("--workdir", options.workdir), options.out, options.omit)
