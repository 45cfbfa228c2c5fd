"""The launch scripts: their dry runs, their errors, the manifest against its API, and how they pass on output, signals
and exit statuses, with stand-ins for `memorizing`, gcloud, srun and scancel.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
import yaml
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

LAUNCH = Path(__file__).resolve().parents[1] / "launch"
TRAIN = ["--gin_file=configs/base.gin", "--gin_param", "NAME = 'two words $HOME'"]
BUCKET = "--workdir=gs://bucket/run"
POD = ["run", "pod", "--zone=us-east5-a"]
GKE = ["pod", "--image=image:1", "--tpu=tpu-v5p-slice", "--topology=4x4x4"]
GPU = ["pod", "--image=image:1", "--gpu=nvidia-h100-80gb", "--pods=4"]
LAUNCHERS = ["local_multiprocess.sh", "tpu_pod.sh", "tpu_worker.sh", "gke.sh", "slurm.sbatch", "gpu_check.sh"]


def launch(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a script from another folder, with only PATH and HOME in its environment."""
    inherited = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    command = ["bash", LAUNCH / script, *arguments]
    return subprocess.run(
        command, env=inherited | environment, cwd="/", capture_output=True, text=True, timeout=60, check=False
    )


def dry_run(script: str, *arguments: str) -> list[list[str]]:
    """Returns the commands that a dry run prints, split as a shell splits them."""
    done = launch(script, *arguments)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def executable(path: Path, text: str) -> Path:
    path.write_text(f"#!/usr/bin/env bash\n{text}")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("script", sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")]), ids=lambda path: path.name)
def test_scripts_pass_shellcheck(script):
    shellcheck = Path(sysconfig.get_path("scripts")) / "shellcheck"
    done = subprocess.run(
        [shellcheck, "-x", script], cwd=LAUNCH.parent, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", LAUNCHERS)
def test_help_is_the_header(script):
    done = launch(script, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"launch/{script}" in done.stdout and "#" not in done.stdout


@pytest.mark.parametrize(
    ("script", "arguments", "words"),
    [
        ("local_multiprocess.sh", ["--processes=two", "--workdir=w"], ["--processes=two", "whole number"]),
        ("local_multiprocess.sh", ["--cpu_devices=2", "--gpus", "--workdir=w"], ["--cpu_devices=2", "--gpus"]),
        ("local_multiprocess.sh", ["--coordinator=a:1", "--workdir=w"], ["--coordinator=a:1"]),
        ("local_multiprocess.sh", TRAIN, ["--workdir is missing"]),
        ("tpu_pod.sh", ["start", "pod"], ["start", "must be run"]),
        ("tpu_pod.sh", ["run", "Pod_1"], ["Pod_1", "a-z"]),
        ("tpu_pod.sh", ["run", "pod", "--type=v5p-128"], ["--zone is missing"]),
        ("tpu_pod.sh", [*POD, "--", BUCKET], ["--type is missing"]),
        ("tpu_pod.sh", [*POD, "--type=v9-8", "--", BUCKET], ["--type=v9-8", "--image"]),
        ("tpu_pod.sh", [*POD, "--type=v5p-128", "--", "--workdir=runs/a"], ["--workdir=runs/a", "gs://"]),
        ("tpu_pod.sh", [*POD, "--gin_file=a"], ["--gin_file=a", "after --"]),
        ("tpu_worker.sh", ["restart"], ["restart", "must be"]),
        ("gke.sh", ["print", *GKE], ["--workdir is missing"]),
        ("gke.sh", ["print", *GKE, "--", "--workdir=runs/a"], ["--workdir", "gs://"]),
        ("gke.sh", ["print", *GKE, "--pods=3", "--", BUCKET], ["--pods=3", "16 hosts"]),
        ("gke.sh", ["print", *GKE, "--topology=4by4", "--", BUCKET], ["--topology=4by4", "4x4x4"]),
        ("gke.sh", ["print", *GKE, "--topology=3x3", "--", BUCKET], ["--topology=3x3", "9 chips"]),
        ("gke.sh", ["print", *GPU, "--slices=2", "--", BUCKET], ["--slices=2", "--pods"]),
        ("gke.sh", ["print", *GPU, "--tpu=x", "--", BUCKET], ["--tpu=x", "--gpu=nvidia-h100-80gb"]),
        ("gke.sh", ["xpk", *GPU, "--", BUCKET], ["--tpu=", "xpk"]),
        ("gke.sh", ["print", "pod"], ["--image is missing"]),
        ("gpu_check.sh", ["--gpu"], ["--gpu", "--cpu, --dry_run and --help"]),
        ("gpu_check.sh", ["--dry-run"], ["--dry-run is now --dry_run"]),
        ("local_multiprocess.sh", ["--dry-run", "--workdir=w"], ["--dry-run is now --dry_run"]),
        ("tpu_pod.sh", [*POD, "--dry-run"], ["--dry-run is now --dry_run"]),
        ("gke.sh", ["print", *GKE, "--max-restarts=3"], ["--max-restarts is now --max_restarts"]),
        ("slurm.sbatch", ["--dry-run", "--workdir=w"], ["--dry-run is now --dry_run"]),
        ("slurm.sbatch", ["--dry_run", *TRAIN], ["--workdir is missing"]),
        ("slurm.sbatch", ["--workdir=w", "--processes=2"], ["--processes=2"]),
        ("slurm.sbatch", ["--workdir=w"], ["sbatch launch/slurm.sbatch"]),
    ],
)
def test_invalid_options_are_refused(script, arguments, words):
    done = launch(script, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"[{script}] error: ")
    for word in words:
        assert word in done.stderr


def test_setup_refuses_unknown_accelerators():
    done = launch("setup.sh", ACCELERATOR="abacus")
    assert done.returncode == 1 and "ACCELERATOR=abacus: must be tpu, cuda12 or cuda" in done.stderr


def test_dry_run_of_several_processes():
    first, second = dry_run("local_multiprocess.sh", "--dry_run", "--cpu_devices=4", *TRAIN, "--workdir=runs/two")
    assert first[:3] == ["env", "JAX_PLATFORMS=cpu", "XLA_FLAGS=--xla_force_host_platform_device_count=4"]
    assert first[3:9] == ["memorizing", "train", *TRAIN, "--workdir=runs/two"]
    assert re.fullmatch(r"--coordinator=127\.0\.0\.1:\d+", first[9])
    assert first[10:] == ["--processes=2", "--process=0"]
    assert second == [*first[:-1], "--process=1"]

    commands = dry_run("local_multiprocess.sh", "--dry_run", "--gpus", "--processes=3", *TRAIN, "--workdir=runs/three")
    assert [command[1] for command in commands] == [f"CUDA_VISIBLE_DEVICES={i}" for i in range(3)]


def test_dry_run_of_a_tpu_slice():
    commands = dry_run("tpu_pod.sh", *POD, "--type=v5p-128", "--spot", "--project=p", "--dry_run", "--", *TRAIN, BUCKET)
    gcloud = [command for command in commands if command[0] == "gcloud"]
    assert all(command[:3] == ["gcloud", "compute", "tpus"] for command in gcloud)
    assert all({"--zone=us-east5-a", "--project=p"} <= set(command) for command in gcloud)
    describe, create, described, asked, archive, copy, install, start, follow, again, ask = commands
    assert describe[3:6] == ["tpu-vm", "describe", "pod"] and describe == described == again
    assert asked == ask and asked[7].endswith("bash memorizing/launch/tpu_worker.sh status; else echo none; fi")
    assert create[3:9] == [
        "tpu-vm",
        "create",
        "pod",
        "--accelerator-type=v5p-128",
        "--version=v2-alpha-tpuv5",
        "--spot",
    ]
    assert archive[:2] == ["git", "archive"] and archive[-1] == "HEAD"
    assert copy[3:5] == ["tpu-vm", "scp"] and archive[-2] == f"--output={copy[5]}"
    assert all("--worker=all" in command for command in (copy, install, start, follow, ask))
    assert install[7].endswith("bash launch/tpu_worker.sh install")
    # a worker's shell reads the same words that were given here
    on_worker = start[7].removeprefix("--command=")
    assert shlex.split(on_worker) == ["bash", "memorizing/launch/tpu_worker.sh", "start", *TRAIN, BUCKET]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--type=v6e-64", "--queued"], ["queued-resources", "create", "pod", "--node-id=pod", "v2-alpha-tpuv6e"]),
        (["--type=v5litepod-16"], ["tpu-vm", "--version=v2-alpha-tpuv5-lite"]),
        (["--type=v4-32"], ["tpu-vm", "--version=tpu-ubuntu2204-base"]),
        (["--type=v9-8", "--image=own"], ["tpu-vm", "--version=own"]),
    ],
)
def test_a_slice_is_created_with_its_image(arguments, expected):
    commands = dry_run("tpu_pod.sh", *POD, *arguments, "--dry_run", "--", BUCKET)
    (create,) = (words for words in commands if words[4] == "create")
    assert all(any(part == word or word.endswith(f"={part}") for word in create) for part in expected)


def test_dry_run_of_the_other_actions_on_a_slice():
    def command(action, *options):
        return dry_run("tpu_pod.sh", action, "pod", "--zone=z", *options, "--dry_run")

    assert command("logs", "--worker=3")[0][3:7] == ["tpu-vm", "ssh", "pod", "--worker=3"]
    assert command("stop")[0][7] == "--command=bash memorizing/launch/tpu_worker.sh stop"
    assert [words[4] for words in command("status")] == ["describe", "ssh"]
    assert command("delete")[0][3:7] == ["tpu-vm", "delete", "pod", "--quiet"]
    assert command("delete", "--queued")[0][3:8] == ["queued-resources", "delete", "pod", "--force", "--quiet"]


def test_dry_run_of_slurm():
    train, terminate, requeue = dry_run("slurm.sbatch", "--dry_run", *TRAIN, "--workdir=w")
    assert train[0] == "srun" and train[-len(TRAIN) - 3 :] == ["memorizing", "train", *TRAIN, "--workdir=w"]
    assert terminate == ["scancel", "--signal=TERM", "JOB"]
    assert requeue == ["scontrol", "requeue", "JOB"]


def test_dry_run_of_gpu_check():
    commands = dry_run("gpu_check.sh", "--dry_run")
    assert [words[3] for words in commands if words[1:3] == ["-m", "memorizing.cli"]] == [
        *("bench", "bench", "bench", "prepare", "train", "evaluate")
    ]
    assert [words[3] for words in commands if words[2:3] == ["memorizing.benchmarks.gpu_check"]] == [
        "searches",
        "collect",
    ]
    (search, mosaic), (step,) = ([words for words in commands if words[4:5] == [bench]] for bench in ("search", "step"))
    assert {"--searches=pallas", "Pallas.gpu_kernel = 'mosaic'"} <= set(mosaic)
    assert "--shapes=M8192,M65536,M262144" in search and "--json=runs/gpu_check/bench_search.json" in search
    assert {"--gin_file=configs/base.gin", "--memory_size=0,8192,65536"} <= set(step)


@pytest.mark.slow
def test_gpu_check_passes_at_tiny_sizes_on_a_cpu(tmp_path):
    out = tmp_path / "out"
    environment = {**os.environ, "OUT": str(out), "PYTHON": sys.executable}
    command = ["bash", LAUNCH / "gpu_check.sh", "--cpu"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((out / "gpu_check.json").read_text())
    parts = {part["part"]: part for part in figures["parts"]}
    assert {"environment", "searches", "bench_search", "bench_step", "prepare", "train", "evaluate"} <= parts.keys()
    assert all(part["status"] == 0 for part in parts.values())
    assert all(row["problem"] is None for row in parts["searches"]["result"]["rows"])
    assert parts["bench_step"]["result"]["rows"] and parts["bench_search"]["result"]["rows"]
    assert {evaluation["memory_size"] for evaluation in figures["evaluations"].values()} == {0, 2048}


def test_gpu_check_runs_all_parts_after_a_failure(tmp_path):
    """A stand-in for Python fails in `bench step`; the other parts still run, and the status is 1."""
    python = executable(
        tmp_path / "python",
        f"""
case "$*" in
*gpu_check?collect*) exec {sys.executable} "$@" ;;
*bench*step*) echo "no room"; exit 3 ;;
esac
""",
    )
    done = launch("gpu_check.sh", "--cpu", OUT=str(tmp_path / "out"), PYTHON=str(python))
    assert done.returncode == 1, done.stderr
    parts = {part["part"]: part for part in json.loads((tmp_path / "out" / "gpu_check.json").read_text())["parts"]}
    assert parts["bench_step"]["status"] == 3 and parts["bench_step"]["last_lines"] == ["no room"]
    assert [name for name, part in parts.items() if part["status"]] == ["bench_step"] and "evaluate" in parts
    assert "FAILED (3)" in done.stdout and "no room" in done.stdout


def test_dry_run_of_kubernetes():
    done = launch("gke.sh", "apply", *GKE, "--dry_run", "--", *TRAIN, BUCKET)
    (line,) = done.stdout.splitlines()
    printing, applying = line.split(" | ")
    assert shlex.split(printing) == ["bash", "launch/gke.sh", "print", *GKE, "--", *TRAIN, BUCKET]
    assert applying == "kubectl apply -f -"

    (xpk,) = dry_run("gke.sh", "xpk", *GKE, "--", *TRAIN, BUCKET)
    assert xpk[:3] == ["xpk", "workload", "create"]
    assert {"--workload=pod", "--tpu-type=v5p-128", "--num-slices=1", "--restart-on-exit-codes=75"} <= set(xpk)
    assert shlex.split(xpk[-1].removeprefix("--command=")) == ["memorizing", "train", *TRAIN, BUCKET]
    assert dry_run("gke.sh", "delete", "pod", "--dry_run") == [["kubectl", "delete", "jobset", "pod"]]


def manifest(*arguments: str) -> tuple[dict, dict, dict]:
    """Returns the JobSet, its Job's spec and its container, checked against the models of their API.

    The models drop unknown fields, so the test compares their output with their input.
    """
    done = launch("gke.sh", "print", *arguments)
    assert done.returncode == 0, done.stderr
    jobset = yaml.safe_load(done.stdout)
    model = JobsetV1alpha2JobSet.from_dict(jobset)
    assert model is not None and model.to_dict() == jobset
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    return jobset, job, container


def test_the_api_models_detect_mistakes_in_a_manifest():
    jobset, _, _ = manifest(*GKE, "--", BUCKET)
    jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["podFailurePolicies"] = {}
    assert JobsetV1alpha2JobSet.from_dict(jobset).to_dict() != jobset
    jobset["spec"]["failurePolicy"]["maxRestarts"] = "ten"
    with pytest.raises(ValueError, match="maxRestarts"):
        JobsetV1alpha2JobSet.from_dict(jobset)


def test_manifest_for_tpus():
    hard = 'A = "quote \\ back $(HOME) ${NAME} & \ttab"'
    jobset, job, container = manifest(*GKE, "--slices=2", "--spot", "--", "--gin_param", hard, BUCKET)
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert jobset["metadata"]["name"] == "pod"
    exclusive = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    assert jobset["metadata"]["annotations"] == exclusive
    assert jobset["spec"]["replicatedJobs"][0]["replicas"] == 2
    assert (job["parallelism"], job["completions"], job["completionMode"]) == (16, 16, "Indexed")
    assert job["template"]["spec"]["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "4x4x4",
        "cloud.google.com/gke-spot": "true",
    }
    assert container["image"] == "image:1" and container["command"] == ["memorizing"]
    assert container["args"] == ["train", "--gin_param", hard.replace("$(", "$$("), BUCKET]
    assert container["resources"]["limits"] == {"google.com/tpu": "4"}


def test_manifest_for_gpus():
    jobset, job, container = manifest(*GPU, "--bucket=bucket", "--max_restarts=3", "--", *TRAIN)
    assert jobset["metadata"]["annotations"] == {}  # on GPUs it would mean one host per Job
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 3
    assert job["parallelism"] == job["completions"] == 4
    assert container["args"] == [
        *("train", *TRAIN, "--workdir=gs://bucket/pod"),
        *("--coordinator=pod-workers-0-0.pod:8482", "--processes=4", "--process=$(JOB_COMPLETION_INDEX)"),
    ]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "8"}


def test_manifest_runs_again_after_75_and_preemption_without_counting():
    jobset, job, container = manifest(*GKE, "--", BUCKET)
    exit_75, disrupted = job["podFailurePolicy"]["rules"]
    assert exit_75["action"] == disrupted["action"] == "FailJob"
    assert exit_75["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [75]}
    assert disrupted["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    (again,) = jobset["spec"]["failurePolicy"]["rules"]
    assert again["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert again["onJobFailureReasons"] == ["PodFailurePolicy"]
    # required by the Job API with a podFailurePolicy, and so that no single pod is replaced
    assert job["template"]["spec"]["restartPolicy"] == "Never" and job["backoffLimit"] == 0
    assert job["template"]["spec"]["terminationGracePeriodSeconds"] >= 60


# --- runs with stand-ins ---------------------------------------------------------------------------------------

STAND_IN = """
for word in "$@"; do case "$word" in --process=*) process=${word#*=} ;; esac; done
trap 'echo saved; exit 75' TERM
echo "train as process $process"
eval "$BEHAVIOR"
"""
WAIT = "for _ in {1..300}; do sleep 0.1; done"


@pytest.fixture
def stand_in(tmp_path) -> str:
    return str(executable(tmp_path / "stand_in", STAND_IN))


def processes(stand_in: str, behavior: str, *options: str) -> subprocess.CompletedProcess[str]:
    return launch("local_multiprocess.sh", "--workdir=w", *options, MEMORIZING=stand_in, BEHAVIOR=behavior)


def test_output_is_prefixed(stand_in):
    done = processes(stand_in, 'echo "last line of $process" >&2', "--processes=3")
    assert done.returncode == 0
    for i in range(3):
        lines = [line for line in done.stdout.splitlines() if line.startswith(f"[{i}] ")]
        assert lines == [f"[{i}] train as process {i}", f"[{i}] last line of {i}"]


def test_the_status_is_that_of_the_process_that_failed_first(stand_in):
    done = processes(stand_in, 'if [ "$process" = 1 ]; then exit 7; fi; sleep 0.6; exit 1')
    assert done.returncode == 7
    assert "process 1 ended with status 7" in done.stderr and "is killed" not in done.stderr


def test_processes_that_outlast_the_wait_are_killed(stand_in):
    started = time.monotonic()
    done = processes(stand_in, f'[ "$process" = 1 ] && kill -KILL $$; {WAIT}', "--wait=1")
    assert done.returncode == 128 + signal.SIGKILL
    assert "process 0 is killed" in done.stderr
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_reach_all_processes(number, stand_in):
    command = ["bash", LAUNCH / "local_multiprocess.sh", "--workdir=w"]
    environment = os.environ | {"MEMORIZING": stand_in, "BEHAVIOR": WAIT}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        lines = [launcher.stdout.readline() for _ in range(2)]
        launcher.send_signal(number)
        lines += launcher.stdout.readlines()
    assert launcher.returncode == 75
    assert {"[0] saved\n", "[1] saved\n"} <= set(lines)


# Two tasks. As in SLURM's own srun (_srun_signal_mgr), SIGTERM kills them; the status is the highest of theirs.
SRUN = """
while [[ "$1" == --* ]]; do shift; done
trap 'echo forcing job termination; kill -KILL "${tasks[@]}"' TERM
tasks=() highest=0
for process in 0 1; do (echo "$BASHPID" >>"$WORLD/tasks"; exec "$@" "--process=$process") & tasks+=($!); done
for task in "${tasks[@]}"; do
    wait "$task" && status=0 || status=$?
    while kill -0 "$task" 2>/dev/null; do wait "$task" && status=0 || status=$?; done
    [ "$status" -le "$highest" ] || highest=$status
done
exit "$highest"
"""
# With --signal and neither --batch nor --full, the job's steps get the signal and the batch script does not.
SCANCEL = """
[ "$*" = "--signal=TERM 17" ] || exit 1
kill -TERM $(cat "$WORLD/tasks")
sleep "$SCANCEL_TAKES"
"""


@pytest.fixture
def slurm(stand_in, tmp_path) -> dict[str, str]:
    """Creates stand-ins for SLURM's commands and returns the environment of a job."""
    programs = tmp_path / "programs"
    programs.mkdir()
    executable(programs / "srun", SRUN)
    executable(programs / "scancel", SCANCEL)
    executable(programs / "scontrol", 'echo "$@"')
    return {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "MEMORIZING": stand_in,
        "WORLD": str(tmp_path),
        "SCANCEL_TAKES": "0",
        "SLURM_JOB_ID": "17",
        "SLURM_SUBMIT_DIR": str(LAUNCH.parent),
    }


@pytest.mark.parametrize(("status", "requeued"), [(75, True), (0, False), (1, False)])
def test_slurm_requeues_after_75_alone(status, requeued, slurm):
    done = launch("slurm.sbatch", "--workdir=w", BEHAVIOR=f"exit {status}", **slurm)
    assert done.returncode == status
    assert sorted(done.stdout.splitlines()) == ["requeue 17"] * requeued + [f"train as process {i}" for i in range(2)]


def test_slurm_requeues_the_point_of_a_sweep_and_not_the_whole_array(slurm):
    array = {"SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "3"}
    done = launch("slurm.sbatch", "sweep", "--out=o", BEHAVIOR="exit 75", **slurm, **array)
    assert done.returncode == 75 and "requeue 17_3" in done.stdout.splitlines(), done.stderr
    assert launch("slurm.sbatch", "sweep", "--out=o", **slurm).returncode == 2
    assert "--out is missing" in launch("slurm.sbatch", "sweep", "--dry_run").stderr


def terminated(slurm: dict[str, str], behavior: str = WAIT) -> tuple[int, list[str]]:
    """Returns status and output of a job of two tasks whose script gets SIGTERM while they run."""
    environment = os.environ | slurm | {"BEHAVIOR": behavior}
    command = ["bash", LAUNCH / "slurm.sbatch", "--workdir=w"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout is not None
        assert all(job.stdout.readline().startswith("train") for _ in range(2))
        job.send_signal(signal.SIGTERM)
        lines = job.stdout.read().splitlines()
    return job.returncode, lines


# 1 s: the training has ended before scancel has
@pytest.mark.parametrize("seconds", ["0", "1"])
def test_slurm_passes_the_signal_on(seconds, slurm):
    status, lines = terminated(slurm | {"SCANCEL_TAKES": seconds})
    assert (status, lines) == (75, ["saved", "saved", "requeue 17"])


def test_slurm_waits_for_a_training_that_the_signal_did_not_reach(slurm, tmp_path, capfd):
    executable(tmp_path / "programs" / "scancel", "exit 3")
    status, lines = terminated(slurm, "sleep 1; exit 4")
    assert (status, lines) == (4, [])
    assert "scancel --signal=TERM 17 ended with status 3" in capfd.readouterr().err


def test_slurm_options_stand_before_the_first_command():
    text = (LAUNCH / "slurm.sbatch").read_text()
    before = text[: text.index("set -euo pipefail")]
    for option in ("--requeue", "--signal=B:TERM@120", "--open-mode=append"):
        assert f"\n#SBATCH {option}\n" in before


GCLOUD = """
# a slice of one worker: a file holds its state, a folder is its home, a shell is SSH
printf '%s\\0' gcloud "$@" $'\\n' >>asked
shift 2
case "$1 $2" in
"tpu-vm describe" | "queued-resources describe") [ -f state ] && cat state || { echo NOT_FOUND >&2; exit 1; } ;;
"tpu-vm create" | "queued-resources create") echo READY >state; rm -rf home; mkdir home; echo create >>calls ;;
"tpu-vm delete") rm state; echo delete >>calls ;;
"tpu-vm scp") cp "$3" home/memorizing.tar.gz ;;
"tpu-vm ssh")
    [ "$(cat state)" = READY ] || exit 255
    for word in "$@"; do if [[ "$word" == --command=* ]]; then command=${word#--command=}; fi; done
    cd home && HOME=$PWD exec bash -c "$command"
    ;;
esac
"""
# Three runs: ends with 75; preempted (the slice is deleted with its log); finished.
PREEMPTED = """
echo x >>$WORLD/runs
case "$(wc -l <$WORLD/runs | tr -d ' ')" in
1) exit 75 ;;
2) echo PREEMPTED >$WORLD/state; exit 1 ;;
3) echo finished ;;
esac
"""


@pytest.fixture
def cloud(tmp_path, stand_in) -> dict[str, str]:
    """Creates stand-ins for gcloud and for sleep, which returns at once."""
    programs = tmp_path / "programs"
    programs.mkdir()
    executable(programs / "gcloud", f"cd {tmp_path}\n{GCLOUD}")
    executable(programs / "sleep", "exec /bin/sleep 0.05")
    return {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "MEMORIZING": stand_in,
        "WORLD": str(tmp_path),
        "TMPDIR": str(tmp_path),
    }


@pytest.mark.parametrize("options", [[], ["--queued"]], ids=["directly", "queued"])
def test_a_dry_run_prints_the_gcloud_commands_of_a_run(options, cloud, tmp_path):
    arguments = ["tpu_pod.sh", *POD, "--type=v5p-8", *options]
    shown = launch(*arguments, "--dry_run", "--", *TRAIN, BUCKET, **cloud)
    done = launch(*arguments, "--", *TRAIN, BUCKET, BEHAVIOR="echo finished", **cloud)
    assert (shown.returncode, done.returncode) == (0, 0), shown.stderr + done.stderr
    calls = [call.split("\0")[:-1] for call in (tmp_path / "asked").read_text().split("\n\0")[:-1]]
    commands = [shlex.split(line) for line in shown.stdout.splitlines()]
    assert [words for words in commands if words[0] != "git"] == calls
    assert sum(words[3:5] == ["queued-resources", "describe"] for words in calls) == len(options)


def test_a_preempted_slice_is_recreated_and_the_training_resumes(cloud, tmp_path):
    done = launch("tpu_pod.sh", *POD, "--type=v5p-8", "--", *TRAIN, BUCKET, BEHAVIOR=PREEMPTED, **cloud)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs").read_text().count("x") == 3
    assert (tmp_path / "calls").read_text().split() == ["create", "delete", "create"]
    assert "finished" in done.stdout and "done" in done.stderr


def test_a_failure_ends_the_launch_with_its_status(cloud, tmp_path):
    done = launch("tpu_pod.sh", *POD, "--type=v5p-8", "--", BUCKET, BEHAVIOR="echo bad input; exit 2", **cloud)
    assert done.returncode == 2, done.stderr
    assert "bad input" in done.stdout and "ended with status 2" in done.stderr
    assert (tmp_path / "state").read_text() == "READY\n"  # kept, so that a person can look at it


def test_a_worker_reports_the_status_of_its_training(stand_in, tmp_path):
    def worker(*arguments):
        state = {"RUN": str(tmp_path / "run"), "MEMORIZING": stand_in, "BEHAVIOR": WAIT}
        done = launch("tpu_worker.sh", *arguments, **state)
        return done.returncode, done.stdout

    assert worker("status") == (0, "none\n")
    assert worker("start", "--workdir=w") == (0, "")
    assert worker("status") == (0, "running\n")
    assert worker("start", "--workdir=w") == (0, "")  # not started twice
    pid = int((tmp_path / "run" / "pid").read_text())
    assert worker("stop") == (0, "")
    status, log = worker("follow")
    assert status == 75 and log.count("train as process") == 1 and log.endswith("saved\n")
    assert worker("status") == (0, "75\n")
    (tmp_path / "run" / "status").unlink()  # as after a reboot
    assert not Path(f"/proc/{pid}").exists() and worker("status") == (0, "lost\n")
