"""`memorizing bench`: see `benchmarks/search.py` and `benchmarks/step.py`."""

import argparse
from pathlib import Path

from memorizing.commands.arguments import add_settings, whole_numbers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the two benchmarks and their arguments."""
    benchmarks = parser.add_subparsers(title="benchmarks", dest="bench", required=True, metavar="search|step")
    search = benchmarks.add_parser("search", help=run_search.__doc__, description=run_search.__doc__)
    search.add_argument("--shapes", metavar="SHAPES", help="shapes to time, such as B8xH8xN512xM65536xD128xK32,M8192")
    search.add_argument(
        "--searches", metavar="NAMES", help="searches to time, such as exact,blocked; default: those for this device"
    )
    search.add_argument(
        "--dtype", metavar="NAMES", help="dtypes of the keys, with commas: float32, bfloat16, int8, float8"
    )
    search.add_argument("--workdir", metavar="DIR", help="run to take queries and keys from; default: random vectors")
    search.set_defaults(benchmark=run_search)
    step = benchmarks.add_parser("step", help=run_step.__doc__, description=run_step.__doc__)
    step.add_argument(
        "--memory_size", type=whole_numbers, metavar="M[,M...]", default=[0, 1024, 8192, 32768, 65536],
        help="memory sizes, in tokens; default: 0,1024,8192,32768,65536",
    )  # fmt: skip
    step.add_argument(
        "--against",
        metavar="COMMAND",
        help='command of another implementation to time in turn; in a clone: "$(bash tests/benchmarks/setup_peer.sh)"',
    )
    step.set_defaults(benchmark=run_step)
    for benchmark in (search, step):
        benchmark.formatter_class = argparse.RawDescriptionHelpFormatter
        benchmark.add_argument(
            "--rounds", type=int, default=10, metavar="N", help="number of rounds; all programs take turns; default: 10"
        )
        benchmark.add_argument("--json", type=Path, metavar="FILE", help="file to which all figures are written")
        add_settings(benchmark)


def run(options: argparse.Namespace) -> None:
    """Times searches and train steps on this device."""
    options.benchmark(options)


def run_search(options: argparse.Namespace) -> None:
    """Measures the time, recall and memory of each search."""
    import jax

    from memorizing.benchmarks.choices import check_rounds, choose, run_sizes
    from memorizing.benchmarks.search import bench_search
    from memorizing.benchmarks.trained import run_vectors
    from memorizing.benchmarks.vectors import random_vectors
    from memorizing.config import load
    from memorizing.files import run_folder
    from memorizing.runs import load_trained

    check_rounds(options.rounds)
    draw, sizes, platform = random_vectors, None, jax.devices()[0].platform
    if options.workdir:
        workdir = run_folder("--workdir", options.workdir)
        config = load_trained(workdir, options.gin_file, options.gin_param)
        segment = config.batch.segment_length
        sizes = run_sizes(config.model, config.memory, segment)
        draw = run_vectors(workdir, config.model, config.memory, segment, config.evaluation, config.training.data)
    else:
        config, _ = load(options.gin_file, options.gin_param)
    choices = choose(platform, options.shapes, options.dtype, options.searches, sizes)
    bench_search(config.memory, choices, options.rounds, draw, options.arguments, options.json)


def run_step(options: argparse.Namespace) -> None:
    """Measures the time of a train step by memory size."""
    from memorizing.benchmarks.choices import check_rounds
    from memorizing.benchmarks.step import SMALL_MODEL, bench_step
    from memorizing.config import load

    check_rounds(options.rounds)
    run, _ = load(options.gin_file, [*(() if options.gin_file else SMALL_MODEL), *options.gin_param])
    bench_step(run, options.memory_size, options.rounds, options.arguments, options.against, options.json)
