"""`memorizing evaluate`: see `evaluation/evaluate.py`."""

import argparse
from pathlib import Path

from memorizing.commands.arguments import add_evaluated, add_processes, add_settings, add_workdir, file_name_part


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `memorizing evaluate`."""
    add_workdir(parser)
    add_evaluated(parser)
    parser.add_argument(
        "--memory", type=Path, metavar="DIR",
        help="memory snapshot (memorizing memorize) with which each document starts; default: an empty memory",
    )  # fmt: skip
    parser.add_argument(
        "--per_token", action="store_true", help="also write the loss of every token, to SPLIT-memory-M.npz"
    )
    parser.add_argument(
        "--name", type=file_name_part, default="",
        help="suffix of the file names, so that files of other settings stay: SPLIT-memory-M-NAME; default: none",
    )  # fmt: skip
    add_settings(parser)
    add_processes(parser)


def run(options: argparse.Namespace) -> None:
    """Evaluates a run's newest checkpoint: perplexity over whole held-out documents, at any memory sizes."""
    from memorizing.api import EvaluationRequest, evaluate
    from memorizing.files import run_folder
    from memorizing.parallel import hosts
    from memorizing.training.signals import die_at_sigterm

    workdir = run_folder("--workdir", options.workdir)
    hosts.start(options.coordinator, options.processes, options.process)
    die_at_sigterm()
    request = EvaluationRequest(
        tuple(options.memory_size or ()), tuple(options.data), tuple(options.split or ()), options.xl_cache,
        options.memory, options.per_token, options.name,
    )  # fmt: skip
    evaluate(workdir, request, options.gin_file, options.gin_param, hosts.say)
