"""Measures how much of a memory's gain fine-tuning recovers, and the effect of memory dropout at other sizes."""

import argparse
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STEPS, TUNED, SIZE, DROPOUT_SIZE = 600, 30, 2048, 512
SIZES = (0, 128, 256, 512, 1024, 2048)
"""Memory sizes at which the run with memory dropout is evaluated: up to four times its own."""


def memorizing(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "memorizing.cli", *arguments], check=True, cwd=ROOT)


def train(data: Path, workdir: Path, *bindings: str) -> None:
    """Trains what is not trained yet."""
    given = [f"DATA = '{data}'", *bindings]
    settings = [f"--gin_param={binding}" for binding in given]
    if not (workdir / "checkpoints").exists():
        memorizing("train", "--gin_file=configs/quickstart.gin", *settings, f"--workdir={workdir}")


def nats(workdir: Path, *sizes: int) -> list[float]:
    """The loss of a token of the test documents with each of these memories."""
    files = [workdir / "evaluations" / f"test-memory-{size}.json" for size in sizes]
    if not all(file.exists() for file in files):
        memory_sizes = f"--memory_size={','.join(map(str, sizes))}"
        memorizing("evaluate", f"--workdir={workdir}", memory_sizes, "--gin_param=Evaluation.batch_size = 4")
    return [math.log(json.loads(file.read_text())["perplexity"]) for file in files]


def whole(data: Path, out: Path, name: str, seed: int, size: int, *bindings: str) -> Path:
    """A run of all steps."""
    own = (f"NUM_STEPS = {STEPS}", f"CHECKPOINT_EVERY = {STEPS}", f"Training.memory_from_step = {STEPS // 3}")
    same = ("Batch.seed = 0", f"SEED = {seed}", f"MEMORY_SIZE = {size}")
    train(data, out / f"{name}-{seed}", *own, *same, *bindings)
    return out / f"{name}-{seed}"


def tuned(data: Path, out: Path, name: str, seed: int, size: int) -> Path:
    """The run without a memory, fine-tuned with one of `size`."""
    settings = {
        "NUM_STEPS": TUNED, "CHECKPOINT_EVERY": TUNED, "Batch.segments_per_call": 5, "Training.memory_from_step": 0,
        "SEED": seed, "Batch.seed": 100 + seed, "MEMORY_SIZE": size, "Training.init_from": str(out / f"none-{seed}"),
        "Optimizer.trainable": ("memory_layers",), "Optimizer.learning_rate_multipliers": (("gates", 40.0),),
        "Optimizer.learning_rate": 0.003, "Optimizer.schedule": "linear", "Optimizer.warmup_steps": 5,
    }  # fmt: skip
    train(data, out / f"{name}-{seed}", *(f"{name} = {value!r}" for name, value in settings.items()))
    return out / f"{name}-{seed}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    out, shares, against_control, rises = options.out.absolute(), [], [], []
    data = out / "data"
    lines = ["seed  without  with  fine-tuned without  fine-tuned with  recovered  of what the control lacks"]
    sizes = ["seed  " + "  ".join(f"{size:>6,}" for size in SIZES) + "  largest rise"]
    for seed in range(options.seeds):
        (without,) = nats(whole(data, out, "none", seed, 0), 0)
        (memory,) = nats(whole(data, out, "base", seed, SIZE), SIZE)
        (control,) = nats(tuned(data, out, "control", seed, 0), 0)
        (found,) = nats(tuned(data, out, "retrofit", seed, SIZE), SIZE)
        shares.append((without - found) / (without - memory))
        against_control.append((control - found) / (control - memory))
        perplexities = [f"{math.exp(each):.3f}" for each in (without, memory, control, found)]
        lines.append(f"{seed}  {'  '.join(perplexities)}  {shares[-1]:.1%}  {against_control[-1]:.1%}")
        each = nats(whole(data, out, "dropout", seed, DROPOUT_SIZE, "Training.memory_dropout = 0.25"), *SIZES)
        rises.append(max(math.exp(each[j] - each[i]) - 1 for i in range(len(each)) for j in range(i + 1, len(each))))
        sizes.append(f"{seed}  " + "  ".join(f"{math.exp(one):.3f}" for one in each) + f"  {rises[-1]:+.2%}")
    print(*lines, sep="\n")
    for name, found in (("recovered", shares), ("of what the control lacks", against_control)):
        deviation = statistics.stdev(found) if len(found) > 1 else 0.0
        print(f"{name}: {statistics.mean(found):.1%} +- {deviation:.1%} (standard deviation)")
    print(*sizes, f"largest rise from a smaller memory to a larger one: {max(rises):+.2%}", sep="\n")


if __name__ == "__main__":
    main()
