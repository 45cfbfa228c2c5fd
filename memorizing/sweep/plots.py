"""The plots of a sweep: perplexity against memory size, position in the document, and training steps."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from memorizing.sweep.table import Table, TableRow, make_table

LINES = ("-", "--", ":", "-.")
MARKS = "osD^v"


class Curve(NamedTuple):
    """A curve: means over seeds, and their spread (0 for a single seed)."""

    at: list[float]
    mean: list[float]
    spread: list[float]


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Draws the three plots side by side into a PNG file."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (by_size, by_position, by_step) = pyplot.subplots(1, 3, figsize=(17, 5), layout="constrained")
    table = make_table(results)
    _draw_sizes(by_size, table)
    by_place, starts = _evenly(positions(results, table))
    _draw_curves(by_position, table, by_place)
    _draw_curves(by_step, table, trainings(results, table))
    by_size.set(xlabel="memory, tokens", ylabel="perplexity", title="Held-out perplexity by memory size")
    by_position.set(xlabel="position in the document, from token", ylabel="perplexity", title="By position")
    by_position.set_xticks(range(len(starts)), [f"{start:,.0f}" for start in starts], rotation=30)
    by_step.set(xlabel="training step", ylabel="training perplexity", title="In training", yscale="log")
    for axes in (by_size, by_position, by_step):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def sizes(table: Table) -> dict[str, Curve]:
    """Returns perplexity by memory size: a curve for each dataset, context, XL cache and other settings."""
    curves: dict[str, Curve] = {}
    several = len({(row.context, row.xl_cache, row.others) for row in table.cells}) > 1
    for row, cells in sorted(table.cells.items(), key=lambda pair: pair[0].memory):
        for dataset, cell in cells.items():
            if cell.perplexities:
                name = _dataset(table, dataset) + (f", {_setting(table, row)}" if several else "")
                curve = curves.setdefault(name, Curve([], [], []))
                curve.at.append(float(row.memory))
                curve.mean.append(statistics.mean(cell.perplexities))
                curve.spread.append(_spread(cell.perplexities))
    return curves


def positions(results: Mapping[str, Any], table: Table) -> dict[tuple[tuple[str, str], int, str], Curve]:
    """Returns perplexity by position: a curve for each dataset, memory and other settings."""
    found: dict[tuple[tuple[str, str], int, str], dict[float, list[float]]] = {}
    for point in results["points"]:
        for each in point["evaluations"]:
            key = ((each["corpus"], each["split"]), each["memory_size"], _label(table, point, each))
            for part in each["perplexity_by_position"]:
                found.setdefault(key, {}).setdefault(float(part["first_token"]), []).append(part["perplexity"])
    return {key: _curve(values) for key, values in found.items()}


def trainings(results: Mapping[str, Any], table: Table) -> dict[tuple[tuple[str, str], int, str], Curve]:
    """Returns training perplexity by step: a curve for each dataset and memory of the point's first evaluation."""
    found: dict[tuple[tuple[str, str], int, str], dict[float, list[float]]] = {}
    points = [point for point in results["points"] if point["steps"] is not None]
    for point in points:
        first = point["planned"][-1]  # the largest memory evaluated; by default that of training
        key = ((first["corpus"], first["split"]), first["memory_size"], _label(table, point, first))
        for line in point["training"]:
            found.setdefault(key, {}).setdefault(float(line["step"]), []).append(math.exp(min(line["loss"], 50.0)))
    return {key: _curve(values) for key, values in found.items()}


def _evenly(curves: Mapping[Any, Curve]) -> tuple[dict[Any, Curve], list[float]]:
    """Returns the curves over the indices of their places, with these places."""
    places = sorted({x for curve in curves.values() for x in curve.at})
    return {key: curve._replace(at=[float(places.index(x)) for x in curve.at]) for key, curve in curves.items()}, places


def _curve(values: dict[float, list[float]]) -> Curve:
    at = sorted(values)
    return Curve(at, [statistics.mean(values[x]) for x in at], [_spread(values[x]) for x in at])


def _spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _label(table: Table, point: Mapping[str, Any], reading: Mapping[str, Any]) -> str:
    contexts = {(row.context, row.xl_cache) for row in table.cells}
    values = tuple(str(point["values"][name]) for name in table.others)
    row = TableRow(reading["segment_length"], reading["memory_size"], reading["xl_cache"], values)
    return _setting(table, row) if len(contexts) > 1 or values else ""


def _setting(table: Table, row: TableRow) -> str:
    values = [f"{name}={value}" for name, value in zip(table.others, row.others, strict=True)]
    return ", ".join([f"context {row.context:,}", *([] if row.xl_cache else ["no XL cache"]), *values])


def _dataset(table: Table, dataset: tuple[str, str]) -> str:
    return " ".join(dataset) if len({split for _, split in table.datasets}) > 1 else dataset[0]


def _draw_sizes(axes: Any, table: Table) -> None:
    every = sorted({row.memory for row in table.cells})
    for number, (name, curve) in enumerate(sizes(table).items()):
        at = [every.index(int(size)) for size in curve.at]
        style = f"{MARKS[number % len(MARKS)]}{LINES[number % len(LINES)]}"
        axes.errorbar(at, curve.mean, curve.spread, fmt=style, color=f"C{number % 10}", capsize=3, label=name)
    axes.set_xticks(range(len(every)), [f"{size:,}" for size in every])


def _draw_curves(axes: Any, table: Table, curves: dict[tuple[tuple[str, str], int, str], Curve]) -> None:
    """Draws curves: a color for each memory size, a line style for each dataset and other settings."""
    from matplotlib import colormaps

    every = sorted({size for _, size, _ in curves})
    kinds = list(dict.fromkeys((dataset, label) for dataset, _, label in curves))
    for (dataset, size, label), curve in curves.items():
        color = colormaps["viridis"](0.9 * every.index(size) / max(len(every) - 1, 1))
        style = LINES[kinds.index((dataset, label)) % len(LINES)]
        name = ", ".join([_dataset(table, dataset), f"memory {size:,}", *([label] if label else [])])
        axes.plot(curve.at, curve.mean, style, color=color, label=name)
        if any(curve.spread):
            low, high = ([m + sign * s for m, s in zip(curve.mean, curve.spread, strict=True)] for sign in (-1, 1))
            axes.fill_between(curve.at, low, high, color=color, alpha=0.15)
