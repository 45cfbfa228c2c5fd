"""`memorizing bench step`: the time of a train step by memory size, with full memories.

It times the compiled call of `memorizing train` on the first device; memory sizes take turns (see `timing.py`).
Memories start filled with random unit keys, so that every slot is valid; the steps then write the model's own keys.
`--against` times another implementation in the same rounds (see `against.py`).
"""

import contextlib
import dataclasses
import functools
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from memorizing.benchmarks import report
from memorizing.benchmarks.against import OtherImplementation, shared_settings
from memorizing.benchmarks.report import mebibytes, number
from memorizing.benchmarks.timing import Timing, bytes_in_use, in_turn, peak_bytes, program_bytes, stopwatch
from memorizing.benchmarks.trained import memory_lookups
from memorizing.benchmarks.vectors import Vectors, recall
from memorizing.data.batches import BatchSettings
from memorizing.errors import InputError
from memorizing.memory.bank import Bank, append, valid
from memorizing.memory.search_choice import chosen_search, make_search
from memorizing.memory.settings import MemorySettings
from memorizing.model.attention import l2_normalize
from memorizing.model.settings import ModelSettings, split_sizes
from memorizing.model.transformer import abstract_model
from memorizing.parallel.mesh import MeshSettings, assemble, open_mesh, shardings
from memorizing.planning.plan import compile_call
from memorizing.shapes import Batch
from memorizing.training.flops import device_peak_flops, training_flops_per_token
from memorizing.training.settings import RunSettings
from memorizing.training.state import StateFactory

SMALL_MODEL = (
    "Model.layers = 4",
    "Model.embedding_size = 256",
    "Model.heads = 4",
    "Model.head_size = 64",
    "Model.feed_forward_size = 1024",
    "Model.vocabulary_size = 256",
    "Model.memory_layers = (3,)",
    "Model.dtype = 'float32'",
    "Memory.dtype = 'float32'",
    "Memory.neighbors = 32",
    "Batch.size = 4",
    "Batch.segment_length = 256",
    "Optimizer.kind = 'adamw'",
    "Optimizer.learning_rate = 0.001",
    "Optimizer.schedule = 'constant'",
)
"""Bindings of the model that is timed without a gin file: it takes seconds on a CPU."""
OURS = "memorizing"


def bench_step(
    run: RunSettings,
    sizes: Sequence[int],
    rounds: int,
    arguments: Sequence[str],
    against: str | None = None,
    json_file: Path | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Times a train step at each memory size and prints a table.

    Args:
        run: the settings; their memory size is replaced by each of `sizes`.
        sizes: memory sizes, in tokens.
        rounds: number of measurements of each size.
        arguments: the command line, for the result.
        against: command of another implementation to time in the same rounds (see `against.py`).
        json_file: file for the result.
        say: prints a line.

    Returns:
        The result as written to `json_file`: a row for each implementation and size.

    Raises:
        InputError: if a size is named twice, or the other implementation does not start.
    """
    if len(set(sizes)) < len(sizes):
        raise InputError(f"--memory_size={','.join(map(str, sizes))} names a size twice. Give each size once")
    runs = {size: run.with_memory_size(size) for size in sizes}
    with contextlib.ExitStack() as stack:
        other = None
        if against is not None:
            settings = shared_settings(run, sizes, rounds)
            other = stack.enter_context(OtherImplementation(against, settings))
        ours = {size: FullMemoryStep(settings) for size, settings in runs.items()}
        functions = {(OURS, size): step.measure for size, step in ours.items()}
        if other is not None:
            functions |= {("other", size): functools.partial(other.measure, size) for size in sizes}
        times = in_turn(functions, rounds)
        tokens, peak = run.batch.size * run.batch.segment_length, device_peak_flops(jax.devices()[0])
        rows = [_our_row(step, times[OURS, size], times.get((OURS, 0)), peak) for size, step in ours.items()]
        if other is not None:
            for size in sizes:
                row = _row(other.about["name"], size, times["other", size], times.get(("other", 0)), tokens)
                row |= {"search": "HNSW", "kind": "faiss.IndexHNSWFlat", "recall": other.recall(size)} if size else {}
                rows.append(row)
    result = report.new_result("step", arguments)
    parts = {name: dataclasses.asdict(getattr(run, name)) for name in ("model", "batch", "optimizer", "training")}
    result |= {"rounds": rounds, "settings": parts | {"memory": dataclasses.asdict(runs[sizes[0]].memory)}}
    result |= {} if other is None else {"against": other.about}
    result |= {"peak_flops_per_second": peak, "rows": rows}
    say(
        f"\none train step: {run.model.layers} layers, embedding size {run.model.embedding_size}, batch size "
        f"{run.batch.size}, segments of {run.batch.segment_length} tokens, {run.model.dtype}, on "
        f"{result['environment']['device']}"
    )
    say(table(rows))
    report.write_result(result, json_file)
    return result


def _our_row(step: "FullMemoryStep", timing: Timing, without_memory: Timing | None, peak: float) -> dict[str, Any]:
    """Returns the row of our step, with what only our side can tell."""
    run, memory = step.run, step.run.memory
    tokens = run.batch.size * run.batch.segment_length
    flops = training_flops_per_token(run.model, memory, run.batch.segment_length) * tokens
    row = _row(OURS, memory.size, timing, without_memory, tokens)
    row |= {"search": chosen_search(memory, jax.default_backend()), "kind": None}
    row |= {"model_flops_utilization": flops / row["seconds"] / peak}
    row |= {"program_bytes": step.program_bytes, "device_peak_bytes": step.device_peak_bytes}
    return row | ({"kind": type(make_search(memory)).__name__, "recall": step.recall()} if memory.size else {})


def _row(implementation: str, size: int, timing: Timing, without_memory: Timing | None, tokens: int) -> dict[str, Any]:
    """Returns what is known of both sides. `over_no_memory` is the median over rounds of the ratio to no memory."""
    ratio = None
    if without_memory is not None:
        pairs = zip(timing.seconds, without_memory.seconds, strict=True)
        ratio = statistics.median(seconds / baseline for seconds, baseline in pairs)
    return {
        "implementation": implementation,
        "memory_size": size,
        "search": None,
        "seconds": timing.median,
        "spread": timing.spread,
        "over_no_memory": ratio,
        "tokens_per_second": tokens / timing.median,
        "model_flops_utilization": None,
        "recall": None,
        "program_bytes": None,
        "device_peak_bytes": None,
        "rounds": timing.seconds,
    }


class FullMemoryStep:
    """A training state with a full memory, and its compiled train call.

    Attributes:
        run: the settings.
        measure: returns the seconds of one step; a call of the program makes `Batch.segments_per_call` steps.
        program_bytes: peak bytes of the program by the compiler's analysis.
        device_peak_bytes: peak bytes by the device's count; None if an earlier program of this process needed more.
    """

    def __init__(self, run: RunSettings):
        # The memory is full from the first step on.
        training = dataclasses.replace(run.training, memory_from_step=0, memory_growth=())
        self.run, model, memory, batch = run, run.model, run.memory, run.batch
        device = jax.devices()[0]
        bytes_before = bytes_in_use(device)
        mesh = open_mesh(MeshSettings(), split_sizes(model, memory, batch.segment_length, batch.size), devices=[device])
        factory = StateFactory(dataclasses.replace(run, training=training), mesh)
        compiled: Any = compile_call(factory, factory.abstract_state(1))
        state = factory.state()
        fill = jax.jit(functools.partial(full_bank, memory=memory, tokens=batch.segment_length), donate_argnums=0)
        rngs = jax.random.split(jax.random.key(training.seed), len(state.carry.banks) + 1)
        banks = tuple(
            jax.device_put(fill(bank, rng), shardings(mesh, bank))
            for bank, rng in zip(state.carry.banks, rngs, strict=False)
        )
        self._state = state._replace(carry=state.carry._replace(banks=banks))
        self._chunk = assemble(mesh, random_tokens(model, batch), batch.size, range(batch.size), leading="S")
        self.program_bytes, self.device_peak_bytes = program_bytes(compiled), None
        jax.block_until_ready(self._state)
        peak_before = peak_bytes(device)

        def call() -> Any:
            self._state, metrics = compiled(self._state, self._chunk)
            return metrics

        jax.block_until_ready((call(), self._state))
        peak = peak_bytes(device)
        if peak_before is not None and peak is not None and peak > peak_before:
            self.device_peak_bytes = peak - bytes_before
        seconds_of_call = stopwatch(call)
        self.measure: Callable[[], float] = lambda: seconds_of_call() / batch.segments_per_call

    def recall(self) -> float:
        """Returns the recall of the search on the model's own queries, averaged over the memory layers."""
        graph, _ = abstract_model(dataclasses.replace(self.run.model, remat=False, dropout=0.0), self.run.memory)
        segment = jax.tree.map(lambda leaf: leaf[0], self._chunk)
        carry, shares = self._state.carry, []
        lookups = memory_lookups(graph, self._state.parameters, segment, carry)
        banks = dict(zip(self.run.model.bank_layers, carry.banks, strict=True))
        for (queries_BHND, found), owner in zip(lookups, self.run.model.read_from.values(), strict=True):
            bank = banks[owner]
            keys_BHMD = bank.keys.plain()
            vectors = Vectors(queries_BHND.astype(keys_BHMD.dtype), keys_BHMD, valid(bank), "model")
            shares.append(recall(found, vectors))
        return statistics.fmean(shares)


def full_bank(bank: Bank, rng: jax.Array, memory: MemorySettings, tokens: int) -> Bank:
    """Returns the bank after random unit keys were written to every slot, one segment at a time as in training."""
    search, (rows, heads, _, size) = make_search(memory), bank.keys_BHMD.shape

    def write(bank: Bank, rng: jax.Array) -> tuple[Bank, None]:
        keys, values = jax.random.normal(rng, (2, rows, heads, tokens, size), jnp.float32)
        return append(bank, l2_normalize(keys), values, search), None

    bank = lax.scan(write, bank, jax.random.split(rng, memory.size // tokens))[0]
    if bank.slot_table is None:
        return bank
    written_B = jnp.full(rows, memory.size, jnp.int32)
    positions_BM = jnp.broadcast_to(jnp.arange(memory.size, dtype=jnp.int32), (rows, memory.size))
    slot_table = bank.slot_table._replace(positions_BM=positions_BM, read_B=written_B, admitted_B=written_B)
    return bank._replace(slot_table=slot_table)


def random_tokens(model: ModelSettings, batch: BatchSettings) -> Batch:
    """Returns segments `[S, B, N]` from the middle of a document, without padding and without a document start."""
    shape = (batch.segments_per_call, batch.size, batch.segment_length)
    tokens = jax.device_get(jax.random.randint(jax.random.key(batch.seed), (2, *shape), 0, model.vocabulary_size))
    mask = jax.device_get(jnp.ones(shape, bool))
    return Batch(tokens[0], tokens[1], mask, jax.device_get(jnp.zeros(shape[:2], bool)))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the rows as an aligned table."""
    header = ["", "search", "memory", "ms", "+-%", "x no memory", "tokens/s", "MFU", "recall", "MiB"]
    cells = [
        [
            row["implementation"],
            row["search"] if row["memory_size"] else "",
            f"{row['memory_size']:,}",
            number(1000 * row["seconds"], ",.1f"),
            number(100 * row["spread"], ".1f"),
            number(row["over_no_memory"], ".2f"),
            number(row["tokens_per_second"], ",.0f"),
            number(row["model_flops_utilization"], ".1%"),
            number(row["recall"], ".3f"),
            mebibytes(row["device_peak_bytes"] or row["program_bytes"]),
        ]
        for row in rows
    ]
    return report.aligned(header, cells, left=2)
