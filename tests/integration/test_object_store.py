"""Real runs whose workdir is in a bucket, of a stand-in for Google Cloud Storage (`tests/object_store.py`)."""

import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.integration import test_processes, test_resume
from tests.integration.test_resume import finish, memorizing, wait_for
from tests.object_store import Store, serving
from tests.sweep.test_sweep import checked

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("gcsfs"), reason="needs the extra gcs")

SMALL = """
Model.layers = 1
Model.memory_layers = (1,)
Training.memory_from_step = 0
"""
FEW = ("--gin_param", "Training.checkpoint_every = 40")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = test_resume.prepared(tmp_path_factory.mktemp("store"))
    (place / "many.gin").write_text(test_processes.SETTINGS + SMALL)
    (place / "run.gin").write_text(test_resume.GIN + SMALL)
    return place


@pytest.fixture
def store(monkeypatch) -> Iterator[Store]:
    store = Store()
    with serving(store) as address:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", address)  # of gcsfs and google-cloud-storage
        monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", address)
        monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "any")
        monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # which would ask the real one
        yield store


def steps_saved(store: Store, run: str) -> list[int]:
    with store.lock:
        names = list(store.objects)
    found = (re.fullmatch(rf"{run}/checkpoints/(\d+)/commit_success.txt", name) for name in names)
    return sorted(int(each[1]) for each in found if each)


def test_a_killed_run_in_a_bucket_resumes_ends_as_on_a_disk_and_is_evaluated(place, store, tmp_path):
    """The newest of its checkpoints is damaged, too."""
    here, copy = tmp_path / "here", tmp_path / "copy"
    finish(test_resume.train(place, here, *FEW))
    process = test_resume.train(place, "gs://bucket/a/run", *FEW)
    wait_for(lambda: len(steps_saved(store, "a/run")) > 1, process)
    process.kill()
    process.communicate()
    before, newest = steps_saved(store, "a/run")[-2:]
    assert process.returncode == -signal.SIGKILL and newest < 240
    store.put(f"a/run/checkpoints/{newest}/parameters/manifest.ocdbt", b"damaged")
    output = finish(test_resume.train(place, "gs://bucket/a/run", *FEW))
    assert f"it is now {newest}.damaged" in output and f"resuming after step {before}" in output
    assert steps_saved(store, "a/run") == [200, 240]
    store.download("a/run", copy)
    assert (copy / "checkpoints" / f"{newest}.damaged" / "parameters" / "manifest.ocdbt").read_text() == "damaged"
    test_resume.assert_same_end(copy, here)
    assert len(list((copy / "tensorboard").iterdir())) == 2 and not list(place.glob("gs:*"))

    finish(memorizing("evaluate", "--workdir=gs://bucket/a/run", cwd=Path(os.sep)))
    assert json.loads(store.objects["a/run/evaluations/test-memory-32.json"][1])["checkpoint_step"] == 240


def test_two_processes_write_to_one_bucket(place, store, tmp_path):
    """And one goes on from there, with the same devices."""
    here, copy = tmp_path / "here", tmp_path / "copy"
    both = test_processes.start(place, "train", "gs://bucket/run", "--gin_param", "NUM_STEPS = 24", devices=2)
    test_processes.finish_all(both)
    for workdir in ("gs://bucket/run", here):
        (one,) = test_processes.start(place, "train", workdir, "--gin_param", "NUM_STEPS = 40", processes=1, devices=4)
        assert ("resuming after step 24" in finish(one)) == (workdir != here)
    store.download("run", copy)
    assert steps_saved(store, "run") == [32, 40]
    np.testing.assert_allclose(test_processes.losses(copy), test_processes.losses(here), rtol=2e-4)


def test_a_bucket_that_is_not_there_is_refused(place, store):
    output = finish(test_resume.train(place, "gs://other/run"), status=2)
    assert "--workdir=gs://other/run: gs://other cannot be reached" in output and not list(place.glob("gs:*"))


def test_a_sweep_in_a_bucket_is_written_for_xpk_run_there_and_gathered(place, store, tmp_path):
    """Uses an xpk that runs the command of a workload at once."""
    out, settings = "gs://bucket/My_sweep", [f"--gin_file={place / 'run.gin'}", "--gin_param=NUM_STEPS = 40"]
    grid = [f"--over=Training.data=numbers={place / 'data'}", "--over=MEMORY_SIZE=0,32"]
    finish(memorizing("sweep", f"--out={out}", *settings, *grid, "--write=xpk"))
    script = tmp_path / "xpk.sh"
    script.write_bytes(store.objects["My_sweep/xpk.sh"][1])
    checked(script)
    (tmp_path / "xpk").write_text(
        '#!/usr/bin/env bash\nprintf "%q " "$@"; echo\n'
        'for word; do case "$word" in --command=*) bash -c "${word#*=}" >&2 ;; esac; done\n'
    )
    (tmp_path / "memorizing").write_text(f'#!/usr/bin/env bash\nexec {sys.executable} -m memorizing.cli "$@"\n')
    for name in ("xpk", "memorizing"):
        (tmp_path / name).chmod(0o755)
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TPU_TYPE": "v5p-8", "IMAGE": "image:1"}
    environment = {**os.environ, "PYTHONPATH": str(test_resume.ROOT), **variables}
    done = subprocess.run(
        ["bash", script, "--cluster=c"], env=environment, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr
    for number, line in enumerate(done.stdout.splitlines()):
        words = shlex.split(line)
        assert words[:3] == ["workload", "create", f"--workload=my-sweep-{number}"]
        assert {"--tpu-type=v5p-8", "--restart-on-exit-codes=75", "--cluster=c"} <= set(words)
    assert number == 1
    gathered = finish(memorizing("sweep", f"--out={out}", "--collect"))
    points = json.loads(store.objects["My_sweep/sweep.json"][1])["points"]
    assert [(point["status"], point["values"]["MEMORY_SIZE"]) for point in points] == [("done", 0), ("done", 32)]
    for point in points:
        assert f"{point['evaluations'][0]['perplexity']:.3f}" in gathered
