"""`memorizing show_data`: see `data/show.py`."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `memorizing show_data`."""
    parser.add_argument("data", type=Path, metavar="DIR", help="folder of prepared tokens")
    parser.add_argument("--split", default="train", metavar="NAME", help="split of the document; default: train")
    parser.add_argument("--document", metavar="NAME", help="document to show; default: the first of the split")
    parser.add_argument("--segment_length", type=int, default=512, metavar="N", help="tokens per segment; default: 512")


def run(options: argparse.Namespace) -> None:
    """Shows what prepared tokens hold: the manifest, a document, its segments."""
    from memorizing.data.show import show_data

    show_data(options.data, options.split, options.document, options.segment_length)
