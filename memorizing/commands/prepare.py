"""`memorizing prepare`: see `data/prepare.py`."""

import argparse
from pathlib import Path

from memorizing.commands.arguments import add_settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `memorizing prepare`."""
    parser.add_argument("--raw", type=Path, metavar="DIR", help="folder of documents")
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help="folder to create for the tokens")
    parser.add_argument(
        "--data_dir", type=Path, metavar="DIR",
        help="folder in which TFDS finds or stores a corpus's documents; reused for other vocabularies",
    )  # fmt: skip
    add_settings(parser)


def run(options: argparse.Namespace) -> None:
    """Turns documents into tokens, split into train, validation and test; once per corpus."""
    from memorizing.config import load
    from memorizing.data.prepare import prepare

    config, _ = load(options.gin_file, options.gin_param)
    prepare(config.prepare, config.sources, config.beam, options.raw, options.out, options.data_dir)
