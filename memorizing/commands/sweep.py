"""`memorizing sweep`: see `sweep/command.py`."""

import argparse

from memorizing.commands.arguments import add_evaluated, add_settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `memorizing sweep`."""
    parser.add_argument(
        "--out", metavar="DIR", required=True, help="folder of the sweep; gs://BUCKET/SWEEP with --write=xpk"
    )
    parser.add_argument(
        "--over", action="append", default=[], metavar="NAME=V1,V2...",
        help="macro or setting, and its values; repeatable; values of DATA may be NAME=FOLDER",
    )  # fmt: skip
    parser.add_argument(
        "--seeds", type=int, metavar="N", help="number of seeds per point, counted up from Training.seed; default: 1"
    )
    parser.add_argument(
        "--workdir", metavar="RUN", help="trained run to evaluate at each point; default: train one for each"
    )
    add_evaluated(parser)
    parser.add_argument(
        "--point", metavar="I|NAME", help="single point to run, by number from 0 or by name; default: all points"
    )
    parser.add_argument("--launcher", default="", metavar="COMMAND", help="prefix of each command, such as srun")
    parser.add_argument("--collect", action="store_true", help="only write table and plots of finished points")
    parser.add_argument("--write", choices=("slurm", "xpk"), help="only write jobs, one per point")
    parser.add_argument("--dry_run", action="store_true", help="only print the commands or jobs")
    add_settings(parser)


def run(options: argparse.Namespace) -> None:
    """Trains and evaluates a grid of settings: table and plots; repeated, it resumes."""
    from memorizing.training.signals import end_at_sigterm

    end_at_sigterm()
    from memorizing.files import run_folder
    from memorizing.sweep.command import collect, sweep
    from memorizing.sweep.points import SweepRequest

    out = run_folder("--out", options.out)
    if options.collect:
        collect(out)
        return
    request = SweepRequest(
        out, tuple(options.gin_file), tuple(options.gin_param), tuple(options.over), options.seeds, options.workdir,
        tuple(options.data), tuple(options.split or ()), tuple(options.memory_size or ()), options.xl_cache,
        options.allow_imports,
    )  # fmt: skip
    sweep(request, options.launcher, options.point, options.write, options.dry_run)
