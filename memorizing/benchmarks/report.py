"""What both benches print and write: an aligned table, and JSON with all that the figures depend on."""

import importlib.metadata
import json
import os
import platform
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from memorizing.files import atomic_write

_PACKAGES = ("memorizing", "jax", "jaxlib", "flax", "optax", "numpy")


class BenchFailed(RuntimeError):
    """Something that was to be measured did not run; what did was printed and written all the same."""


def environment() -> dict[str, Any]:
    """The device and the versions that figures were taken with."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # a tree that was never installed
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "versions": versions,
        "variables": {name: os.environ[name] for name in ("XLA_FLAGS", "JAX_PLATFORMS") if name in os.environ},
    }


def opened(bench: str, arguments: Sequence[str]) -> dict[str, Any]:
    """The head of a result, to be filled."""
    command = shlex.join(["memorizing", *arguments])
    return {"bench": bench, "command": command, "environment": environment()}


def written(result: dict[str, Any], json_file: Path | None) -> None:
    """Writes a result, where it is wanted."""
    if json_file is not None:
        atomic_write(json_file, json.dumps(result, indent=1) + "\n")


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table whose first `left` columns are text and the others numbers."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(padded).rstrip()

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows)])


def number(value: float | None, form: str) -> str:
    """A cell: `-` for what is not known."""
    return "-" if value is None else format(value, form)


def mebibytes(value: int | None) -> str:
    """A cell of MiB."""
    return number(None if value is None else value / 2**20, ",.1f")
