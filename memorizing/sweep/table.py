"""The table of a sweep, in the layout of the paper's main table: context, memory and XL cache by dataset.

A cell is a perplexity; with several seeds, mean and standard deviation. Other swept settings get their own columns. If
corpora have the names of the paper's, its figures stand next to them and below, under its name.
"""

import csv
import io
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from memorizing.files import AnyPath, atomic_write
from memorizing.sweep.published import CORPORA, MAIN_TABLE, SOURCE

COLUMNS = {
    "MEMORY_SIZE": "memory_size",
    "Memory.size": "memory_size",
    "SEGMENT_LENGTH": "segment_length",
    "Batch.segment_length": "segment_length",
    "Model.xl_cache": "xl_cache",
    "DATA": "corpus",
    "Training.data": "corpus",
}
"""Swept settings that a column already shows, unless points were evaluated at other values than trained with."""


class TableRow(NamedTuple):
    """The settings of a row; `others` are the values of `Table.others`."""

    context: int
    memory: int
    xl_cache: bool
    others: tuple[str, ...]


class Cell(NamedTuple):
    """The evaluations of one row and dataset, one for each seed."""

    perplexities: tuple[float, ...]
    bits_per_byte: tuple[float, ...]
    missing: tuple[str, ...]
    """Status of points without figures: failed, waiting."""

    def text(self) -> str:
        """Returns the cell as text."""
        shown = f"{statistics.mean(self.perplexities):.3f}" if self.perplexities else ""
        if len(self.perplexities) > 1:
            shown += f" ± {statistics.stdev(self.perplexities):.3f}"
        if not self.missing:
            return shown
        if not shown and len(set(self.missing)) == 1:
            return self.missing[0]
        notes = [f"{self.missing.count(each)} {each}" for each in sorted(set(self.missing))]
        return f"{shown} ({', '.join(notes)})".strip()


class Table(NamedTuple):
    """Cells by row and dataset, where a dataset is a split of a corpus; `others` are other swept settings."""

    others: tuple[str, ...]
    datasets: tuple[tuple[str, str], ...]
    cells: dict[TableRow, dict[tuple[str, str], Cell]]


def make_table(results: Mapping[str, Any]) -> Table:
    """Returns the table of a `sweep.json`."""
    evaluations = list(_evaluations(results["points"]))
    others = tuple(
        name
        for name in results["over"]
        if any(
            name not in COLUMNS or point["values"][name] != wanted[COLUMNS[name]] for point, wanted, _ in evaluations
        )
    )
    datasets = tuple(dict.fromkeys((wanted["corpus"], wanted["split"]) for _, wanted, _ in evaluations))
    found: dict[TableRow, dict[tuple[str, str], list[tuple[dict, dict | None]]]] = {}
    for point, wanted, figures in evaluations:
        values = tuple(str(point["values"][name]) for name in others)
        row = TableRow(wanted["segment_length"], wanted["memory_size"], wanted["xl_cache"], values)
        found.setdefault(row, {}).setdefault((wanted["corpus"], wanted["split"]), []).append((point, figures))
    places = {name: list(map(str, results["over"][name])) for name in others}

    def place(row: TableRow) -> tuple:
        at = [places[name].index(value) for name, value in zip(others, row.others, strict=True)]
        return at, row.context, row.xl_cache, row.memory

    order = sorted(found, key=place)
    return Table(others, datasets, {row: {each: _cell(of) for each, of in found[row].items()} for row in order})


def _evaluations(points: Sequence[dict[str, Any]]) -> Iterator[tuple[dict, dict, dict | None]]:
    """Returns each planned evaluation with its point, and its figures if they exist."""
    for point in points:
        for wanted in point["planned"]:
            names = ("corpus", "split", "memory_size", "xl_cache")
            made = (each for each in point["evaluations"] if all(each[name] == wanted[name] for name in names))
            yield point, wanted, next(made, None)


def _cell(evaluations: Sequence[tuple[dict, dict | None]]) -> Cell:
    made = [figures for _, figures in evaluations if figures is not None]
    return Cell(
        tuple(each["perplexity"] for each in made),
        tuple(each["bits_per_byte"] for each in made),
        tuple(point["status"] for point, figures in evaluations if figures is None),
    )


def published(row: TableRow, corpus: str) -> float | None:
    """Returns the paper's perplexity for the same context, memory and XL cache on the corpus of that name."""
    same = (each for each in MAIN_TABLE if (each.context, each.memory, each.xl_cache) == row[:3])
    return next((each.perplexity.get(corpus) for each in same), None)


def lines(table: Table) -> list[list[str]]:
    """Returns header and rows as text, with a column of the paper's figures for each dataset that it has."""
    several = len({split for _, split in table.datasets}) > 1
    with_paper = [each for each in table.datasets if any(published(row, each[0]) is not None for row in table.cells)]
    header = ["context", "memory", "XL cache", *table.others]
    for dataset in table.datasets:
        header.append(" ".join(dataset) if several else dataset[0])
        header += [f"{dataset[0]}, paper"] if dataset in with_paper else []
    rows = [header]
    for row, cells in table.cells.items():
        shown = [f"{row.context:,}", f"{row.memory:,}" if row.memory else "none", _cache(row.context, row.xl_cache)]
        shown += row.others
        for dataset in table.datasets:
            shown.append(cells[dataset].text() if dataset in cells else "")
            if dataset in with_paper:
                paper = published(row, dataset[0])
                shown.append("" if paper is None else f"{paper:.2f}")
        rows.append(shown)
    return rows


def paper_lines(table: Table) -> list[list[str]]:
    """Returns the paper's rows for datasets with its names; empty if there are none."""
    corpora = [corpus for corpus in CORPORA if corpus in {corpus for corpus, _ in table.datasets}]
    if not corpora:
        return []
    return [
        ["context", "memory", "XL cache", *corpora],
        *(
            [f"{row.context:,}", f"{row.memory:,}" if row.memory else "none", _cache(row.context, row.xl_cache)]
            + [f"{row.perplexity[corpus]:.2f}" for corpus in corpora]
            for row in MAIN_TABLE
        ),
    ]


def _cache(context: int, xl_cache: bool) -> str:
    return f"{context:,}" if xl_cache else "none"


NOTE = f"Published, of another model and vocabulary: only changes within a column compare ({SOURCE})"


def write_table(results: Mapping[str, Any], out: AnyPath) -> list[str]:
    """Writes `table.md` and `table.csv`, and returns the lines for a terminal."""
    table = make_table(results)
    ours, papers = lines(table), paper_lines(table)
    markdown = ["Perplexity", "", *_markdown(ours)]
    if papers:
        markdown += ["", NOTE, "", *_markdown(papers)]
    for point in results["points"]:
        if point["status"] == "failed":
            markdown += ["", f"{point['name']}:", "", *(f"    {line}" for line in point["error"].splitlines())]
    atomic_write(out / "table.md", "\n".join(markdown) + "\n")
    atomic_write(out / "table.csv", _csv(table))
    return ["perplexity", *_aligned(ours), *(["", NOTE, *_aligned(papers)] if papers else [])]


def _markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    header, *body = [f"| {' | '.join(row)} |" for row in rows]
    return [header, "|" + "---|" * len(rows[0]), *body]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def _csv(table: Table) -> str:
    """Writes a line for each cell, with the paper's perplexity if there is one."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = (
        "corpus",
        "split",
        "perplexity",
        "standard_deviation",
        "bits_per_byte",
        "seeds",
        "failed",
        "waiting",
        "paper",
    )
    writer.writerow(("context", "memory", "xl_cache", *table.others, *names))
    for row, cells in table.cells.items():
        for (corpus, split), cell in cells.items():
            deviation = statistics.stdev(cell.perplexities) if len(cell.perplexities) > 1 else math.nan
            mean = statistics.mean(cell.perplexities) if cell.perplexities else math.nan
            bits = statistics.mean(cell.bits_per_byte) if cell.bits_per_byte else math.nan
            numbers = ["" if math.isnan(number) else number for number in (mean, deviation, bits)]
            counts = [len(cell.perplexities), cell.missing.count("failed"), cell.missing.count("waiting")]
            paper = published(row, corpus)
            writer.writerow((*row[:3], *row.others, corpus, split, *numbers, *counts, "" if paper is None else paper))
    return text.getvalue()
