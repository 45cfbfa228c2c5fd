"""Measures the cost of `memorizing evaluate` at several memory sizes in one call, against the bare forward passes."""

import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np

from memorizing.data.batches import read_batch
from memorizing.evaluation.evaluate import restore
from memorizing.evaluation.perplexity import reading_plan, score_call
from memorizing.model.carry import empty_carry
from memorizing.model.settings import split_sizes
from memorizing.parallel.mesh import open_mesh
from memorizing.runs import load_trained
from memorizing.shapes import Batch
from memorizing.storage.workdir import open_tokens


def forward_seconds(workdir: Path, size: int) -> float:
    it = load_trained(workdir, [], [])
    memory = it.with_memory_size(size).memory
    segment, rows, together = it.batch.segment_length, it.evaluation.batch_size, it.evaluation.segments_per_call
    mesh = open_mesh(it.mesh, split_sizes(it.model, memory, segment, rows), devices=jax.devices()[:1])
    parameters, _ = restore(workdir, it.model, mesh)
    split = open_tokens(it.evaluation.data or it.training.data, it.model).split(it.evaluation.split)
    plan = reading_plan(split.lengths, rows, segment)
    plan += [[None] * rows for _ in range(-len(plan) % together)]
    calls = []
    for first in range(0, len(plan), together):
        parts = [read_batch(split, step, segment) for step in plan[first : first + together]]
        calls.append(Batch(*(np.stack(part) for part in zip(*parts, strict=True))))
    call = score_call(it.model, memory)
    with jax.set_mesh(mesh):
        carry, _ = call(parameters, empty_carry(it.model, memory, rows, segment), calls[0])
        carry = jax.block_until_ready(empty_carry(it.model, memory, rows, segment))
        start = time.perf_counter()
        for batches in calls:
            carry, results = call(parameters, carry, batches)
            jax.block_until_ready(results)
        return time.perf_counter() - start


def main(workdir: str, sizes: str = "0,512,1024,2048,4096,8192") -> None:
    alone = {size: forward_seconds(Path(workdir), int(size)) for size in sizes.split(",")}
    command = [sys.executable, "-m", "memorizing.cli", "evaluate", f"--workdir={workdir}", f"--memory_size={sizes}"]
    start = time.perf_counter()
    subprocess.run([*command, "--name=cost"], check=True)
    whole = time.perf_counter() - start
    print("forward passes: " + ", ".join(f"{size}: {seconds:.1f} s" for size, seconds in alone.items()))
    print(f"in all {sum(alone.values()):.1f} s; the command {whole:.1f} s: {whole / sum(alone.values()):.2f}x")


if __name__ == "__main__":
    main(*sys.argv[1:])
