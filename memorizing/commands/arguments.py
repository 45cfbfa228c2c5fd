"""Arguments that several subcommands share, and the parsers of their values."""

import argparse
import re
from pathlib import Path


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Adds --gin_file, --gin_param and --allow_imports, and explains in the epilog which one wins."""
    parser.epilog = SETTINGS
    parser.add_argument(
        "--gin_file", action="append", default=[], metavar="FILE", help="gin file with settings; repeatable"
    )
    parser.add_argument(
        "--gin_param", action="append", default=[], metavar="'NAME = value'", help="a single setting; repeatable"
    )
    parser.add_argument(
        "--allow_imports", action="store_true",
        help="let gin files import Python modules, which runs their code; default: refuse them",
    )  # fmt: skip


SETTINGS = """\
Settings come from gin files (configs/), then from single bindings; later ones win:
  --gin_file=configs/quickstart.gin --gin_param 'MEMORY_SIZE = 8192' --gin_param 'Model.layers = 4'
"""


def add_workdir(parser: argparse.ArgumentParser) -> None:
    """Adds --workdir, the folder of a trained run."""
    parser.add_argument("--workdir", metavar="DIR", required=True, help="folder of the run, or gs://BUCKET/RUN")


def add_processes(parser: argparse.ArgumentParser) -> None:
    """Adds what a distributed run needs where the environment does not say it (TPU pods, SLURM, Open MPI and
    Kubernetes do)."""
    group = parser.add_argument_group(
        "distributed runs", "Found by themselves on TPU pods, SLURM, Open MPI and Kubernetes."
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="address on which the first process listens")
    group.add_argument("--processes", type=int, metavar="N", help="number of processes in this run")
    group.add_argument("--process", type=int, metavar="I", help="rank of this process, from 0")


def add_evaluated(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that say what to evaluate: memory sizes, corpora, splits, XL cache."""
    parser.add_argument(
        "--memory_size", type=whole_numbers, metavar="M[,M...]", help="memory sizes, in tokens; default: as in training"
    )
    parser.add_argument(
        "--data", action="append", default=[], metavar="[NAME=]DIR",
        help="folder of prepared tokens with the run's vocabulary; repeatable; default: Evaluation.data",
    )  # fmt: skip
    parser.add_argument(
        "--split", type=names, metavar="NAME[,NAME...]", help="splits to evaluate; default: Evaluation.split"
    )
    parser.add_argument(
        "--xl_cache", choices=("on", "off", "both"), help="whether to use the XL cache; default: as in training"
    )


def add_documents(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of commands that read documents into a memory."""
    add_workdir(parser)
    parser.add_argument(
        "--document", type=Path, action="append", default=[], metavar="FILE|DIR",
        help="file or folder to read; repeatable; all are read as one document, in this order",
    )  # fmt: skip
    parser.add_argument(
        "--memory_size", type=int, metavar="M", help="size of the memory, in tokens; default: as in training"
    )
    parser.add_argument(
        "--memory", type=Path, metavar="DIR", help="memory snapshot to start from (memorizing memorize makes one)"
    )


def whole_numbers(text: str) -> list[int]:
    """Parses `0,512,2048`."""
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of whole numbers. Separate them with commas, as in 0,512,2048"
        ) from None


def names(text: str) -> list[str]:
    """Parses `validation,test`."""
    return text.split(",")


def file_name_part(text: str) -> str:
    """Checks a text that becomes part of a file's name."""
    if not re.fullmatch(r"[\w.-]*", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} cannot be part of a file's name. Use letters, digits, '.', '-' and '_'"
        )
    return text
