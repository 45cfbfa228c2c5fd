"""Many processes, one run: joining them, agreeing, and ending together.

A process joins the others (`jax.distributed`) when flags or the environment say that there are others: a TPU pod,
SLURM, Open MPI, Kubernetes, or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. Every process then runs
the same program on its own devices, and only the first one talks and writes metrics.

When one dies, the others notice within `HEARTBEAT_SECONDS`: jaxlib ends them, naming the process that died.
"""

import os
import sys
import warnings

import jax
import numpy as np
from jax.experimental import multihost_utils

from memorizing.errors import InputError

HEARTBEAT_SECONDS = 60
"""A process that is silent for so long counts as dead."""

SHUTDOWN_SECONDS = 60
"""At the end of the program each process waits so long for the others."""


def start(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Joins the other processes of the run, if there are any. Call before anything asks JAX for devices.

    Args:
        coordinator: `HOST:PORT` on which the first process listens; without it, the environment decides.
        processes, process: how many there are, and which of them this is, from 0.

    Raises:
        InputError: when only some of the three are given, or they contradict each other.
    """
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    processes = _number("JAX_NUM_PROCESSES") if processes is None else processes
    process = _number("JAX_PROCESS_ID") if process is None else process
    given = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    timeouts = {"heartbeat_timeout_seconds": HEARTBEAT_SECONDS, "shutdown_timeout_seconds": SHUTDOWN_SECONDS}
    if all(value is None for value in given.values()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on Kubernetes, that JAX would need another package to look further
            try:
                jax.distributed.initialize(**timeouts)
            except RuntimeError as error:
                # A command called by a program that uses JAX already: it has joined others before, or stays alone.
                if "before any JAX calls" not in str(error):
                    raise
            except ValueError as error:
                if "coordinator_address should be defined" not in str(error):
                    raise
        return
    missing = [name for name, value in given.items() if value is None]
    if missing:
        raise InputError(
            f"{' and '.join(missing)} missing: give all of --coordinator=HOST:PORT, --processes=N and --process=I "
            "(or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID), or none"
        )
    assert coordinator is not None and processes is not None and process is not None
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise InputError(f"--coordinator={coordinator}: must be HOST:PORT, such as 10.0.0.1:8476")
    if processes < 1:
        raise InputError(f"--processes={processes}: must be at least 1")
    if not 0 <= process < processes:
        raise InputError(f"--process={process}: must be from 0 to {processes - 1}, one less than --processes")
    print(f"process {process}: waiting for {processes} processes at {coordinator}, 5 minutes at most", file=sys.stderr)
    # Devices are for the processes themselves to see: CUDA_VISIBLE_DEVICES and the like say which.
    jax.distributed.initialize(coordinator, processes, process, cluster_detection_method="deactivate", **timeouts)


def _number(variable: str) -> int | None:
    text = os.environ.get(variable)
    if text is None:
        return None
    if not text.isdigit():
        raise InputError(f"{variable}={text}: must be a whole number")
    return int(text)


def is_distributed() -> bool:
    """Whether this process has joined others."""
    return jax.distributed.is_initialized()


def is_first() -> bool:
    """Whether this is the process that talks and writes metrics."""
    return jax.process_index() == 0


def number() -> int:
    """Which process this is, from 0."""
    return jax.process_index()


def say(text: str) -> None:
    """Prints, in the first process."""
    if is_first():
        print(text, flush=True)


def wait(name: str) -> None:
    """Until all processes are here."""
    if is_distributed():
        multihost_utils.sync_global_devices(name)


def broadcast_from_first(number: int) -> int:
    """The number that the first process has."""
    return int(multihost_utils.broadcast_one_to_all(np.asarray(number))) if is_distributed() else number


def all_agree(yes: bool) -> bool:
    """Whether every process says yes."""
    return bool(np.all(multihost_utils.process_allgather(np.asarray(yes)))) if is_distributed() else yes


class Preemption:
    """Whether all processes are to save now, since one of them got SIGTERM. All ask, at the same places."""

    def __init__(self):
        self._asked = 0  # JAX lets the processes agree on one of these numbers, and none may be skipped

    def is_agreed(self) -> bool:
        """Asks once more."""
        self._asked += 1
        return is_distributed() and multihost_utils.reached_preemption_sync_point(self._asked)


def shutdown(status: int, together: bool) -> None:
    """Before the process ends: waits for the others where all of them end alike, else ends at once.

    A process that fails alone would wait for the others, and they for it; this way they notice.
    """
    if not is_distributed():
        return
    sys.stdout.flush()
    sys.stderr.flush()
    if together:
        jax.distributed.shutdown()
    else:
        os._exit(status)
