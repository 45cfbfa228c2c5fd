"""Answers `memorizing bench step --against` for the PyTorch port memorizing-transformers-pytorch 0.4.1.

    PYTHON tests/benchmarks/peer_step.py      reads settings and memory sizes from its input, a JSON object per line
    PYTHON tests/benchmarks/peer_step.py --settings='{"memory_sizes": [0, 8192]}' [--rounds=10]    runs by itself

PYTHON is the interpreter of setup_peer.sh. The protocol is described in memorizing/benchmarks/against.py; what is
timed, in peer_model.py. This file imports no package, so that it can refuse settings before torch is loaded.
"""

import argparse
import json
import statistics
import sys
import tempfile

SMALL_MODEL = {
    "vocabulary_size": 256,
    "layers": 4,
    "embedding_size": 256,
    "heads": 4,
    "kv_heads": 4,
    "head_size": 64,
    "feed_forward_size": 1024,
    "memory_layers": [3],
    "xl_cache": True,
    "batch_size": 4,
    "segment_length": 256,
    "neighbors": 32,
    "memory_sizes": [0, 1024, 8192, 32768, 65536],
    "train_steps": 100,
    "train_memory": 4096,
}


def unsupported(settings: dict) -> str | None:
    """Says which settings the port has no model for; None if it has one."""
    size = settings["embedding_size"]
    if settings["xl_cache"] and settings["kv_heads"] == settings["heads"] and settings["feed_forward_size"] % size == 0:
        return None
    return (
        "the PyTorch port needs Model.xl_cache = True, Model.kv_heads = None and a Model.feed_forward_size that is a "
        f"multiple of Model.embedding_size = {size}"
    )


def answer() -> None:
    """Speaks the protocol on standard input and output."""
    settings = {**SMALL_MODEL, **json.loads(sys.stdin.readline())}
    if problem := unsupported(settings):
        print(json.dumps({"error": problem}), flush=True)
        return
    from peer_model import description, prepare

    with tempfile.TemporaryDirectory(prefix="peer-") as folder:
        runs, recalls = prepare(settings, folder)
        print(json.dumps(description(settings, recalls)), flush=True)
        for line in sys.stdin:
            print(json.dumps({"seconds": runs[json.loads(line)["memory_size"]].step()}), flush=True)


def measure_alone(settings: dict) -> dict:
    """Returns the median seconds of a step at each memory size; sizes take turns."""
    from peer_model import description, prepare

    with tempfile.TemporaryDirectory(prefix="peer-") as folder:
        runs, recalls = prepare(settings, folder)
        seconds = {size: [] for size in runs}
        for number in range(settings["rounds"]):
            for size in runs if number % 2 == 0 else reversed(list(runs)):
                seconds[size].append(runs[size].step())
        medians = {str(size): statistics.median(seconds[size]) for size in runs}
        return {**description(settings, recalls), "settings": settings, "seconds": medians}


def main() -> None:
    """Measures by itself with `--settings`; otherwise answers its input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", type=json.loads, help="settings as JSON; the small model's fill the gaps")
    parser.add_argument("--rounds", type=int, default=10, help="number of rounds; default: 10")
    options = parser.parse_args()
    if options.settings is None:
        answer()
        return
    settings = {**SMALL_MODEL, **options.settings, "rounds": options.rounds}
    if problem := unsupported(settings):
        parser.error(problem)
    print(json.dumps(measure_alone(settings), indent=1))


if __name__ == "__main__":
    main()
