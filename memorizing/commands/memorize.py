"""`memorizing memorize`: see `generation/reader.py`. `memorizing generate` reads documents the same way."""

import argparse
import functools
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from memorizing.commands.arguments import add_documents, add_settings
from memorizing.errors import InputError

if TYPE_CHECKING:
    from memorizing.generation.reader import Reader


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `memorizing memorize`."""
    add_documents(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help="folder to create for the snapshot")
    add_settings(parser)


def run(options: argparse.Namespace) -> None:
    """Reads documents into memory and saves it as a snapshot, for `generate` and `evaluate`."""
    from memorizing.storage.snapshots import check_folder

    if not options.document:
        raise InputError("--document is missing. Give a file or folder to read")
    check_folder("--out", options.out)
    if options.memory_size == 0:
        raise InputError("--memory_size=0 leaves no memory to save. Give a size above 0")
    is_new = read_documents(options, options.out).save(options.out)
    print(f"snapshot: {options.out}" if is_new else f"{options.out} already holds this snapshot")


def read_documents(options: argparse.Namespace, out: Path | None = None) -> "Reader":
    """Returns a reader that has read the documents of the options; progress goes to standard error.

    Args:
        out: folder in which the reader will be saved, if it will; checked before anything is read.
    """
    from memorizing.api import open_reader
    from memorizing.storage.snapshots import check_not_empty

    for path in options.document:
        if not path.exists():  # before a model is loaded, which takes long
            raise InputError(f"--document={path} does not exist. Give a file or folder")
    say = functools.partial(print, file=sys.stderr, flush=True)
    reader = open_reader(options.workdir, options.memory_size, options.gin_file, options.gin_param, say)
    if options.memory:
        reader.load(options.memory)
        say(f"{options.memory}: a snapshot of {reader.tokens:,} tokens")
    else:
        check_not_empty(reader.memory, "" if out else "name the snapshot to begin from with --memory=DIR")
    if out is not None:
        reader.check_save(out, options.document)
    for path in options.document:
        reader.read_files(path)
    if reader.tokens and reader.memory.size:
        say(f"{reader.tokens:,} tokens read; {reader.tokens_in_memory:,} are in a memory of {reader.memory.size:,}")
    return reader
