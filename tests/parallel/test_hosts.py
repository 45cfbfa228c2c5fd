"""Joining other processes: what the environment describes, and what happens if the others do not come."""

import os
import subprocess
import sys

import pytest

from memorizing.errors import InputError
from memorizing.parallel import hosts

OMPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
URI = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"}
SLURM = {
    "SLURM_JOB_ID": "17", "SLURM_STEP_NODELIST": "node[001-004]", "SLURM_NTASKS": "4", "SLURM_PROCID": "3",
    "SLURM_LOCALID": "0",
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("OMPI_", "SLURM_", "JAX_COORD", "KUBERNETES"))]:
        monkeypatch.delenv(name)


def described(monkeypatch, variables: dict[str, str]):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return hosts._environment()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        (OMPI | {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, None),
        (OMPI | URI, ("10.96.0.1:62624", 2, 1, [1], "ompi")),
        (SLURM, ("node001:61457", 4, 3, [0], "slurm")),
        (SLURM | OMPI | {"OMPI_COMM_WORLD_SIZE": "1"}, ("node001:61457", 4, 3, [0], "slurm")),
        (SLURM | {"JAX_COORDINATOR_PORT": "5000"}, ("node001:5000", 4, 3, [0], "slurm")),
    ],
)
def test_the_environment_describes_the_job(variables, expected, monkeypatch):
    assert described(monkeypatch, variables) == expected


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (URI, "a job of ompi, but does not describe it: OMPI_COMM_WORLD_LOCAL_RANK is not set. Give --coordinator"),
        (OMPI, "ompi, .*requires mpi4py.*or unset its variables to run alone"),
        (SLURM | {"SLURM_NTASKS": "four"}, "slurm, .*'four'"),
    ],
)
def test_a_job_that_is_described_in_part_is_refused(variables, message, monkeypatch):
    with pytest.raises(InputError, match=message):
        described(monkeypatch, variables)


@pytest.mark.parametrize("processes", [0, 10**20])
def test_impossible_numbers_of_processes_are_refused(processes):
    with pytest.raises(InputError, match=rf"--processes={processes}: must be at least 1 and at most 1,000,000"):
        hosts.start("localhost:5000", processes, 0)


def test_a_process_without_the_others_says_whom_it_waits_for_and_ends():
    program = "from memorizing.parallel import hosts\nhosts.WAIT_SECONDS = 3\nhosts.start()"
    variables = SLURM | {"SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}
    ended = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | variables, capture_output=True, text=True, timeout=60
    )
    waiting, error = ended.stderr.strip().splitlines()[-2:]
    assert ended.returncode == 1 and waiting.startswith("process 0: waiting for 2 processes at localhost:61457 (slurm)")
    assert "not all of 2 processes at localhost:61457 (slurm) came within 3 seconds" in error
    assert "to run alone, unset the variables of slurm" in error
