"""`memorizing bench search`: time and recall of each search, next to the product of queries and keys alone.

    square matmul      a large product: the highest rate of this device, measured
    score matmul       queries times keys only: the work of every exact search
    einsum + top_k     the same, then `lax.top_k` of all scores: the straightforward way
    exact, ...         the searches that settings can name

All measurements of a shape take turns (see `timing.py`). `of peak` is the rate of the score's multiplications, as a
share of the larger rate of the two products.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from memorizing.benchmarks import report
from memorizing.benchmarks.choices import Choices, Shape, default_searches
from memorizing.benchmarks.report import BenchFailed, mebibytes, number
from memorizing.benchmarks.timing import (
    bytes_in_use,
    in_turn,
    is_out_of_memory,
    peak_bytes,
    program_bytes,
    stopwatch,
)
from memorizing.benchmarks.vectors import Vectors, plain_dtype, recall, stored
from memorizing.errors import InputError
from memorizing.memory.quantize import DTYPES
from memorizing.memory.search import Neighbors, Search
from memorizing.memory.search.contract import inner_products
from memorizing.memory.search_choice import make_search
from memorizing.memory.settings import MemorySettings

SQUARE, SCORES, NAIVE = "square matmul", "score matmul", "einsum + top_k"
_SQUARE_SIZE = {"cpu": 2048}
"""Size of the square product by platform; 8192 elsewhere, large enough to fill an accelerator."""


def bench_search(
    memory: MemorySettings,
    choices: Choices,
    rounds: int,
    draw: Callable[[Shape, str], Vectors],
    arguments: Sequence[str],
    json_file: Path | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measures every search at every shape and dtype. Prints tables, and writes and returns the results.

    Without names of searches it takes those of the platform and reports which cannot be made here. `draw` returns the
    vectors. `memory` gives all settings except size, neighbors, minimum score, search and dtypes.

    Raises:
        BenchFailed: at the end, if a search failed for another reason than too little memory.
    """
    result = report.new_result("search", arguments)
    result |= {"rounds": rounds, "settings": memory.by_name(), "not_made": {}, "rows": []}
    names = choices.searches or default_searches(result["environment"]["platform"])
    for shape in choices.shapes:
        for dtype in choices.dtypes:
            vectors = draw(shape, dtype)
            changes: dict[str, Any] = {"size": shape.M, "neighbors": shape.K, "minimum_score": None}
            changes |= {"dtype": plain_dtype(dtype), "key_dtype": dtype if dtype in DTYPES else None}
            searches, not_made = _made_searches(dataclasses.replace(memory, **changes), names, not choices.searches)
            result["not_made"] |= not_made
            of_shape = _bench_shape(searches, shape, dtype, vectors, rounds)
            say(f"\n{shape}, {dtype}, {vectors.origin} vectors, on {result['environment']['device']}")
            say(table(of_shape))
            result["rows"] += of_shape
            report.write_result(result, json_file)
    for name, why in result["not_made"].items():
        say(f"\nnot measured: {name}: {why}")
    failed = [f"{row['search']} at {row['shape']}: {row['problem']}" for row in result["rows"] if row["failed"]]
    if failed:
        raise BenchFailed(f"{len(failed)} did not run: " + "; ".join(failed))
    return result


@dataclasses.dataclass
class Trial:
    """A function to measure, and its results.

    Attributes:
        name: name in the table.
        kind: name of the program that runs.
        function, arguments, static: function to compile; `static` are positions of static arguments.
        recall: recall, if it returns neighbors.
        program_bytes: bytes by the compiler's analysis, see `timing.program_bytes`.
        device_peak_bytes: bytes by the device's count, if it held more than any earlier program of this process.
        problem: why it could not run; `failed` unless it was too large for the device.
    """

    name: str
    kind: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    static: tuple[int, ...] = ()
    recall: float | None = None
    program_bytes: int | None = None
    device_peak_bytes: int | None = None
    problem: str | None = None
    failed: bool = False

    def prepare(self, vectors: Vectors) -> Callable[[], float] | None:
        """Compiles, runs once and checks the result. Returns a function that measures a call; None if it cannot run."""
        if self.problem is not None:
            return None
        given = [argument for place, argument in enumerate(self.arguments) if place not in self.static]
        device = jax.devices()[0]
        try:
            compiled = jax.jit(self.function, static_argnums=self.static).lower(*self.arguments).compile()
            self.program_bytes = program_bytes(compiled)
            before, held = peak_bytes(device), bytes_in_use(device)
            found = jax.block_until_ready(compiled(*given))
            after = peak_bytes(device)
            if before is not None and after is not None and after > before:
                self.device_peak_bytes = after - held + sum(leaf.nbytes for leaf in jax.tree.leaves(given))
            if isinstance(found, Neighbors):
                self.recall = recall(found, vectors)
            del found
            return stopwatch(lambda: compiled(*given))
        except Exception as error:  # whatever the error, the other searches are still worth measuring
            self.problem, self.failed = _told(error), not is_out_of_memory(error)
            return None


def _made_searches(
    memory: MemorySettings, names: Sequence[str], may_refuse: bool
) -> tuple[dict[str, Search], dict[str, str]]:
    """Returns the searches by name; and the reasons why the others cannot be made here, if that is allowed."""
    made, not_made = {}, {}
    for name in names:
        try:
            made[name] = make_search(dataclasses.replace(memory, search=name))
        except InputError as error:
            if not may_refuse:
                raise
            not_made[name] = str(error)
    return made, not_made


def _trials(searches: dict[str, Search], shape: Shape, dtype: str, vectors: Vectors, square_size: int) -> list[Trial]:
    """Returns what is measured at one shape and dtype: the products, then the searches."""
    square = jnp.ones((square_size, square_size), vectors.keys_BHMD.dtype)
    trials = [
        Trial(SQUARE, "jnp.matmul", jnp.matmul, (square, square)),
        Trial(SCORES, "jnp.einsum", inner_products, (vectors.queries_BHND, vectors.keys_BHMD)),
        Trial(NAIVE, "lax.top_k", _naive, (vectors.queries_BHND, vectors.keys_BHMD, shape.K), static=(2,)),
    ]
    for name, search in searches.items():
        kind = type(search).__name__
        try:
            keys = stored(search, vectors.keys_BHMD, shape.N, dtype)
        except Exception as error:
            trials.append(Trial(name, kind, search, (), problem=_told(error), failed=not is_out_of_memory(error)))
            continue
        trials.append(Trial(name, kind, search, (vectors.queries_BHND, keys, vectors.valid_BM, shape.K), static=(3,)))
    return trials


def _bench_shape(
    searches: dict[str, Search], shape: Shape, dtype: str, vectors: Vectors, rounds: int
) -> list[dict[str, Any]]:
    """Returns the rows of one shape and dtype."""
    size = _SQUARE_SIZE.get(jax.devices()[0].platform, 8192)
    trials = _trials(searches, shape, dtype, vectors, size)
    runs = {trial.name: run for trial in trials if (run := trial.prepare(vectors)) is not None}
    times = in_turn(runs, rounds)
    rates = [2.0 * size**3 / times[SQUARE].median] if SQUARE in times else []
    rates += [shape.flops / times[SCORES].median] if SCORES in times else []
    rows = []
    for trial in trials:
        timing = times.get(trial.name)
        row: dict[str, Any] = {"shape": str(shape), "dtype": dtype, "vectors": vectors.origin, "search": trial.name}
        row |= {"kind": trial.kind, "seconds": timing and timing.median, "spread": timing and timing.spread}
        flops = 2.0 * size**3 if trial.name == SQUARE else shape.flops
        rate = flops / timing.median if timing else None
        over = timing.median / times[SCORES].median if timing and SCORES in times else None
        row |= {"flops_per_second": rate, "of_peak": rate / max(rates) if rate and rates else None}
        row |= {"over_score_matmul": None if trial.name == SQUARE else over, "recall": trial.recall}
        row |= {"program_bytes": trial.program_bytes, "device_peak_bytes": trial.device_peak_bytes}
        row |= {"problem": trial.problem, "failed": trial.failed, "rounds": timing.seconds if timing else []}
        rows.append(row)
    return rows


def _naive(queries_BHND: jax.Array, keys_BHMD: jax.Array, neighbors: int) -> Neighbors:
    return Neighbors(*lax.top_k(inner_products(queries_BHND, keys_BHMD), neighbors))


def _told(error: Exception) -> str:
    """Returns an error in one line."""
    if is_out_of_memory(error):
        return "out of memory"
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the results as a table."""
    header = ["search", "ms", "+-%", "x matmul", "of peak", "recall", "MiB"]
    cells = []
    for row in rows:
        seconds, spread = row["seconds"], row["spread"]
        held = row["device_peak_bytes"] or row["program_bytes"]
        cells.append(
            [
                row["search"] + (f" ({row['problem']})" if row["problem"] else ""),
                number(seconds and 1000 * seconds, ",.2f"),
                number(None if spread is None else 100 * spread, ".1f"),
                number(row["over_score_matmul"], ".2f"),
                number(row["of_peak"], ".1%"),
                number(row["recall"], ".4f"),
                mebibytes(held),
            ]
        )
    return report.aligned(header, cells)
