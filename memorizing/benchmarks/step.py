"""`memorizing bench step`: the compiled train call of `memorizing train` against the size of a memory that is full.

Sizes take turns (see `timing.py`), on the first device. Memories are filled with random unit keys, so that every slot
is valid; what the steps then write are keys of the model. `--against` sets the PyTorch port beside it: `peer.py`.
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
from memorizing.benchmarks.peer import Peer
from memorizing.benchmarks.report import mebibytes, number
from memorizing.benchmarks.timing import Timing, bytes_in_use, in_turn, peak_bytes, program_bytes, stopwatch
from memorizing.benchmarks.trained import memory_lookups
from memorizing.benchmarks.vectors import Vectors, recall
from memorizing.data.batches import BatchSettings
from memorizing.errors import InputError
from memorizing.memory.bank import Bank, append, valid
from memorizing.memory.search import chosen, make_search
from memorizing.memory.settings import MemorySettings
from memorizing.model.attention import l2_normalize
from memorizing.model.settings import ModelSettings
from memorizing.model.transformer import abstract_model, open_mesh
from memorizing.parallel.mesh import MeshSettings, assemble, shardings
from memorizing.planning.plan import compile_call
from memorizing.shapes import Batch
from memorizing.training.flops import device_peak_flops, training_flops_per_token
from memorizing.training.optimizer import OptimizerSettings
from memorizing.training.settings import TrainingSettings
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
"""What is measured without a gin file: seconds of CPU, and what other implementations were measured with."""
OWN = "memorizing"


def bench_step(
    model: ModelSettings,
    memories: Sequence[MemorySettings],
    batch: BatchSettings,
    optimizer: OptimizerSettings,
    training: TrainingSettings,
    rounds: int,
    arguments: Sequence[str],
    against: str | None = None,
    json_file: Path | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measures a step at each memory; says a table, and with `json_file` writes what it returns.

    `against` is the interpreter of the peer's environment.

    Raises:
        InputError: for a size that is named twice, or a peer that does not start.
    """
    sizes = [memory.size for memory in memories]
    if len(set(sizes)) < len(sizes):
        raise InputError(f"--memory_size={','.join(map(str, sizes))}: name each size once")
    result = report.opened("step", arguments)
    parts = {"model": model, "memory": memories[0], "batch": batch, "optimizer": optimizer, "training": training}
    result |= {"rounds": rounds, "settings": {name: dataclasses.asdict(part) for name, part in parts.items()}}
    with contextlib.ExitStack() as ends:
        peer = None
        if against is not None:
            peer = ends.enter_context(Peer(against, model, memories, batch, rounds))
        own = {str(memory.size): Stepping(model, memory, batch, optimizer, training) for memory in memories}
        contestants = {f"{OWN} {name}": stepping.measure for name, stepping in own.items()}
        if peer is not None:
            contestants |= {f"peer {size}": functools.partial(peer.measure, size) for size in sizes}
            result["peer"] = peer.about
        times = in_turn(contestants, rounds)
        tokens, peak = batch.size * batch.segment_length, device_peak_flops(jax.devices()[0])
        result["peak_flops_per_second"] = peak
        result["rows"] = []
        for memory, stepping in zip(memories, own.values(), strict=True):
            row = _row(OWN, memory.size, times[f"{OWN} {memory.size}"], times.get(f"{OWN} 0"), tokens)
            flops = training_flops_per_token(model, memory, batch.segment_length) * tokens
            row |= {
                "search": chosen(memory, jax.default_backend()),
                "kind": None,
                "model_flops_utilization": flops / row["seconds"] / peak,
            }
            row |= {"program_bytes": stepping.program_bytes, "device_peak_bytes": stepping.device_peak_bytes}
            if memory.size:
                row |= {"kind": type(make_search(memory)).__name__, "recall": stepping.recall()}
            result["rows"].append(row)
        if peer is not None:
            for size in sizes:
                row = _row(peer.about["name"], size, times[f"peer {size}"], times.get("peer 0"), tokens)
                row |= {"search": "HNSW", "kind": "faiss.IndexHNSWFlat", "recall": peer.recall(size)} if size else {}
                result["rows"].append(row)
    environment = result["environment"]
    say(
        f"\na train step: {model.layers} layers of {model.embedding_size}, {batch.size} rows of "
        f"{batch.segment_length} tokens, {model.dtype}, on {environment['device']}"
    )
    say(table(result["rows"]))
    report.written(result, json_file)
    return result


def _row(who: str, size: int, timing: Timing, without: Timing | None, tokens: int) -> dict[str, Any]:
    """What is known of both sides. The overhead is the median of the ratios of each round."""
    over = None
    if without is not None:
        pairs = zip(timing.seconds, without.seconds, strict=True)
        over = statistics.median(seconds / of_none for seconds, of_none in pairs)
    return {
        "who": who,
        "memory_size": size,
        "search": None,
        "seconds": timing.median,
        "spread": timing.spread,
        "over_no_memory": over,
        "tokens_per_second": tokens / timing.median,
        "model_flops_utilization": None,
        "recall": None,
        "program_bytes": None,
        "device_peak_bytes": None,
        "rounds": timing.seconds,
    }


class Stepping:
    """A run's state with a full memory, and its compiled train call.

    Attributes:
        measure: seconds of a step; a call of the program makes `Batch.segments_per_call` of them.
        program_bytes, device_peak_bytes: as in `bench search`.
    """

    def __init__(
        self,
        model: ModelSettings,
        memory: MemorySettings,
        batch: BatchSettings,
        optimizer: OptimizerSettings,
        training: TrainingSettings,
    ):
        self._model, self._memory = model, memory
        training = dataclasses.replace(training, memory_from_step=0, memory_growth=())  # full from the first step on
        device = jax.devices()[0]
        held = bytes_in_use(device)
        mesh = open_mesh(MeshSettings(), model, memory, batch.segment_length, batch.size, devices=[device])
        make = StateFactory(model, memory, batch, optimizer, training, mesh)
        compiled: Any = compile_call(make, make.abstract_state(1), batch)
        state = make.state()
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
        before = peak_bytes(device)

        def run() -> Any:
            self._state, metrics = compiled(self._state, self._chunk)
            return metrics

        jax.block_until_ready((run(), self._state))
        after = peak_bytes(device)
        if before is not None and after is not None and after > before:
            self.device_peak_bytes = after - held
        of_call = stopwatch(run)
        self.measure: Callable[[], float] = lambda: of_call() / batch.segments_per_call

    def recall(self) -> float:
        """Of the search on the model's own queries, the mean of the memory layers."""
        graph, _ = abstract_model(dataclasses.replace(self._model, remat=False, dropout=0.0), self._memory)
        segment = jax.tree.map(lambda leaf: leaf[0], self._chunk)
        carry, shares = self._state.carry, []
        lookups = memory_lookups(graph, self._state.parameters, segment, carry, make_search(self._memory))
        banks = dict(zip(self._model.bank_layers, carry.banks, strict=True))
        for (queries_BHND, found), owner in zip(lookups, self._model.read_from.values(), strict=True):
            bank = banks[owner]
            keys_BHMD = bank.keys.plain()
            vectors = Vectors(queries_BHND.astype(keys_BHMD.dtype), keys_BHMD, valid(bank), "model")
            shares.append(recall(found, vectors))
        return statistics.fmean(shares)


def full_bank(bank: Bank, rng: jax.Array, memory: MemorySettings, tokens: int) -> Bank:
    """The bank once random unit keys were written to all of it, a segment at a time as in training."""
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
    """Segments `[S, B, N]` in the middle of a document: nothing is padding, and nothing is forgotten."""
    shape = (batch.segments_per_call, batch.size, batch.segment_length)
    tokens = jax.device_get(jax.random.randint(jax.random.key(batch.seed), (2, *shape), 0, model.vocabulary_size))
    mask = jax.device_get(jnp.ones(shape, bool))
    return Batch(tokens[0], tokens[1], mask, jax.device_get(jnp.zeros(shape[:2], bool)))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """As a person reads it."""
    header = ["", "search", "memory", "ms", "+-%", "x none", "tokens/s", "MFU", "recall", "MiB"]
    cells = [
        [
            row["who"],
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
