"""The hardware of a run: `WORKDIR/hardware.json` has one entry for each time that training started."""

import datetime
import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from memorizing.errors import InputError
from memorizing.files import AnyPath, atomic_write
from memorizing.memory.search_choice import chosen_search
from memorizing.memory.settings import MemorySettings

HARDWARE_FILE = "hardware.json"


def hardware(mesh: Mesh, memory: MemorySettings) -> dict[str, Any]:
    """Returns the devices of a mesh, this host, versions, and the search of the memory."""
    device = mesh.devices.flat[0]
    return {
        "platform": device.platform,
        "device_kind": device.device_kind,
        "devices": mesh.size,
        "processes": jax.process_count(),
        "mesh": dict(mesh.shape),
        "host_cpus": os.cpu_count(),
        "processor": _processor(),
        "search": chosen_search(memory, device.platform) if memory.size else None,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "memorizing": metadata.version("memorizing"),
    }


class Sessions:
    """The entries of a run's `HARDWARE_FILE`: those of earlier starts, and one for this start."""

    def __init__(self, workdir: AnyPath, first_step: int, hardware: dict[str, Any]):
        self._path = workdir / HARDWARE_FILE
        try:
            earlier = json.loads(self._path.read_text()) if self._path.exists() else []
        except ValueError as error:
            raise InputError(f"{self._path} is damaged ({error}). Remove it; only reports read it") from error
        self._session = {"from_step": first_step, "to_step": first_step, "started": _now(), "until": _now(), **hardware}
        self._all = [*earlier, self._session]

    def save(self, step: int) -> None:
        """Records that training has reached `step`.

        Raises:
            OSError: if the file cannot be written.
        """
        self._session |= {"to_step": step, "until": _now()}
        atomic_write(self._path, json.dumps(self._all, indent=1) + "\n")


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _processor() -> str:
    """Returns the name of the host's processor, or its architecture if it has none."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
