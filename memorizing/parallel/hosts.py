"""Joins the processes of a distributed run, lets them agree, and ends them together.

A process joins the others (`jax.distributed`) if flags or the environment name them: a TPU pod, SLURM, Open MPI,
Kubernetes, or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. Every process then runs the same program
on its local devices. Only the first process prints and writes metrics.

If a process dies, the others notice within `HEARTBEAT_SECONDS`: jaxlib ends them and names the process that died.
"""

import os
import sys
import threading
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax._src.clusters.cluster import ClusterEnv, running_in_cloud_tpu_vm
from jax.experimental import multihost_utils

from memorizing.errors import InputError

HEARTBEAT_SECONDS = 60
"""Seconds without a sign of life after which a process counts as dead."""

WAIT_SECONDS = 300
"""Seconds that a process waits for the others at the start."""

MOST_PROCESSES = 1_000_000
"""Largest number of processes."""

SHUTDOWN_SECONDS = 60
"""Seconds that each process waits for the others at the end of the program."""


def start(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Joins the other processes of the run, if there are any. Call it before anything asks JAX for devices.

    Args:
        coordinator: `HOST:PORT` on which the first process listens; if empty, the environment decides.
        processes: number of processes in this run.
        process: rank of this process, from 0.

    Raises:
        InputError: if only some of the three are given, or they contradict each other.
    """
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    processes = _number("JAX_NUM_PROCESSES") if processes is None else processes
    process = _number("JAX_PROCESS_ID") if process is None else process
    given = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    if all(value is None for value in given.values()):
        if (job := _environment()) is not None:
            _join(job)
        return
    missing = [name for name, value in given.items() if value is None]
    if missing:
        raise InputError(
            f"{' and '.join(missing)} missing. Give all of --coordinator=HOST:PORT, --processes=N and --process=I "
            "(or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID), or none"
        )
    assert coordinator is not None and processes is not None and process is not None
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise InputError(f"--coordinator={coordinator}: must be HOST:PORT, such as 10.0.0.1:8476")
    if not 1 <= processes <= MOST_PROCESSES:
        raise InputError(f"--processes={processes}: must be at least 1 and at most {MOST_PROCESSES:,}")
    if not 0 <= process < processes:
        raise InputError(f"--process={process}: must be from 0 to {processes - 1}, one less than --processes")
    # CUDA_VISIBLE_DEVICES and similar variables select the devices of each process.
    _join(_Job(coordinator, processes, process))


class _Job(NamedTuple):
    """The processes that a process joins.

    Attributes:
        coordinator: `HOST:PORT` on which the first process listens.
        devices: local devices of this process; None for all.
        source: what describes the job, for messages; empty for flags.
    """

    coordinator: str
    processes: int
    process: int
    devices: Sequence[int] | None = None
    source: str = ""


def _join(job: _Job) -> None:
    """Joins the other processes; ends this process with a message if some do not come."""
    names = f"{job.processes} processes at {job.coordinator}{job.source and f' ({job.source})'}"
    print(
        f"process {job.process}: waiting for {names}, {WAIT_SECONDS // 60} minutes at most",
        file=sys.stderr, flush=True,
    )  # fmt: skip

    alone = f"; to run alone, unset the variables of {job.source}" if job.source else ""

    def give_up() -> None:  # a timeout of JAX's own would abort with a C++ stack trace
        print(
            f"process {job.process}: error: not all of {names} came within {WAIT_SECONDS} seconds. Start all of them, "
            f"and check that they can reach that address{alone}",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        os._exit(1)

    timer = threading.Timer(WAIT_SECONDS, give_up)
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            job.coordinator,
            job.processes,
            job.process,
            local_device_ids=job.devices,
            cluster_detection_method="deactivate",
            initialization_timeout=2 * WAIT_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except RuntimeError as error:
        # The calling program already uses JAX: it has joined others before, or stays alone.
        if "before any JAX calls" not in str(error):
            raise
    finally:
        timer.cancel()


def _environment() -> _Job | None:
    """Returns the job that the environment describes (see `clusters` in JAX); None if this process is alone.

    Raises:
        InputError: if the environment describes a job only in part.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on Kubernetes, JAX would need another package to find the others
        for cluster in ClusterEnv._cluster_types:
            if cluster.opt_in_only_method:
                continue
            try:
                if not cluster.is_env_present() or _is_single(cluster.name):
                    continue
                local = cluster.get_local_process_id()
                return _Job(
                    cluster.get_coordinator_address(2 * WAIT_SECONDS, os.environ.get("JAX_COORDINATOR_PORT")),
                    cluster.get_process_count(),
                    cluster.get_process_id(),
                    None if local is None or running_in_cloud_tpu_vm else [local],
                    cluster.name,
                )
            except (KeyError, ValueError, RuntimeError) as error:
                problem = f"{error.args[0]} is not set" if isinstance(error, KeyError) else str(error).rstrip(".")
                raise InputError(
                    f"the environment names a job of {cluster.name}, but does not describe it: {problem}. Give "
                    "--coordinator=HOST:PORT, --processes=N and --process=I, or unset its variables to run alone"
                ) from error
    return None


def _is_single(cluster: str) -> bool:
    """Returns True for one process alone, which Open MPI 5 describes only through mpi4py."""
    return cluster == "ompi" and os.environ.get("OMPI_COMM_WORLD_SIZE") == "1"


def _number(variable: str) -> int | None:
    text = os.environ.get(variable)
    if text is None:
        return None
    if not text.isdigit():
        raise InputError(f"{variable}={text}: must be an integer")
    return int(text)


def is_distributed() -> bool:
    """True if this process has joined others."""
    return jax.distributed.is_initialized()


def is_first() -> bool:
    """True for the first process, which prints and writes metrics."""
    return jax.process_index() == 0


def number() -> int:
    """Returns the rank of this process, from 0."""
    return jax.process_index()


def say(text: str) -> None:
    """Prints in the first process only."""
    if is_first():
        print(text, flush=True)


def wait(name: str) -> None:
    """Waits until all processes get here."""
    if is_distributed():
        multihost_utils.sync_global_devices(name)


def broadcast_from_first(number: int) -> int:
    """Returns the first process's number in every process."""
    return int(multihost_utils.broadcast_one_to_all(np.asarray(number))) if is_distributed() else number


def all_agree(yes: bool) -> bool:
    """Returns True if every process passes True."""
    return bool(np.all(multihost_utils.process_allgather(np.asarray(yes)))) if is_distributed() else yes


class Preemption:
    """Agreement of all processes to save and stop, after one of them got SIGTERM. All ask at the same steps."""

    def __init__(self):
        self._asked = 0  # JAX lets the processes agree on one of these numbers; none may be skipped

    def is_agreed(self) -> bool:
        """Returns True once the processes have agreed to stop."""
        self._asked += 1
        return is_distributed() and multihost_utils.reached_preemption_sync_point(self._asked)


def shutdown(status: int, together: bool) -> None:
    """Leaves the run: waits for the other processes if all of them end normally, otherwise ends at once.

    A process that fails alone would wait for the others, and they for it; ending at once lets them notice.
    """
    if not is_distributed():
        return
    sys.stdout.flush()
    sys.stderr.flush()
    if together:
        jax.distributed.shutdown()
    else:
        os._exit(status)
