"""The output of both benchmarks: an aligned table, and JSON that records the device, versions and command."""

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
    """Some measurements failed. The others were printed and written."""


def environment() -> dict[str, Any]:
    """Returns the device, package versions and environment variables that figures depend on."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # a source tree that was never installed
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "versions": versions,
        "variables": {name: os.environ[name] for name in ("XLA_FLAGS", "JAX_PLATFORMS") if name in os.environ},
    }


def new_result(bench: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Returns a result that holds the command and the environment; the caller adds the figures."""
    command = shlex.join(["memorizing", *arguments])
    return {"bench": bench, "command": command, "environment": environment()}


def write_result(result: dict[str, Any], json_file: Path | None) -> None:
    """Writes a result as JSON if a file is given."""
    if json_file is not None:
        atomic_write(json_file, json.dumps(result, indent=1) + "\n")


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Returns a table; its first `left` columns are aligned to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(padded).rstrip()

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows)])


def number(value: float | None, form: str) -> str:
    """Returns a number as text, or `-` for None."""
    return "-" if value is None else format(value, form)


def mebibytes(value: int | None) -> str:
    """Returns bytes as text in MiB, or `-` for None."""
    return number(None if value is None else value / 2**20, ",.1f")
