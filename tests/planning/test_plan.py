"""`memorizing plan` as its user runs it: what it says is what the state takes; each shipped pod holds its settings."""

import dataclasses
import importlib.util
import json
import re
from pathlib import Path
from unittest.mock import Mock

import jax
import pytest

from memorizing.config import load
from memorizing.model.settings import split_sizes
from memorizing.parallel.mesh import MeshSettings, open_mesh
from memorizing.parallel.topology import CHIPS, chip_of, memory_of
from memorizing.planning.plan import GIB, advice, needed
from memorizing.training.flops import training_flops_per_token
from memorizing.training.state import StateFactory
from tests.integration.test_resume import ROOT, finish, memorizing

GIN = """
include '{root}/configs/base.gin'
include '{root}/configs/sizes/tiny.gin'
MEMORY_SIZE = 256
SEGMENT_LENGTH = 32
BATCH_SIZE = 8
VOCABULARY_SIZE = 512
"""
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu: ACCELERATOR=tpu bash launch/setup.sh"
)


@pytest.fixture
def settings(tmp_path) -> Path:
    (tmp_path / "run.gin").write_text(GIN.format(root=ROOT))
    return tmp_path / "run.gin"


def planned(settings: Path, *arguments: str, status: int = 0, devices: int = 4) -> tuple[str, dict]:
    file = settings.parent / "plan.json"
    flags = f"--xla_force_host_platform_device_count={devices}"
    command = memorizing("plan", f"--gin_file={settings}", f"--json={file}", *arguments, XLA_FLAGS=flags)
    output = finish(command, status)
    return output, json.loads(file.read_text()) if file.exists() else {}


def test_the_plan_for_this_machine_equals_the_size_of_the_state(settings):
    output, figures = planned(settings, "--gin_param", "Mesh.memory = 2")
    it, _ = load([str(settings)], ["Mesh.memory = 2"])
    mesh = open_mesh(
        MeshSettings(data=2, memory=2),
        split_sizes(it.model, it.memory, it.batch.segment_length, it.batch.size),
        devices=jax.devices()[:4],
    )
    state = StateFactory(it, mesh).state()
    first = jax.devices()[0]

    def held(tree) -> int:
        shards = [shard for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards]
        return sum(shard.data.nbytes for shard in shards if shard.device == first)

    assert figures["bytes_per_device"]["parameters"] == held(state.parameters)
    assert figures["bytes_per_device"]["optimizer"] == held(state.optimizer)
    assert figures["bytes_per_device"]["memory"] == held(state.carry.banks)
    assert figures["bytes_per_device"]["xl_caches"] == held(state.carry.caches)
    assert figures["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(state.parameters))
    flops = training_flops_per_token(it.model, it.memory, it.batch.segment_length)
    assert figures["flops_per_device"] == pytest.approx(flops * it.batch.size * it.batch.segment_length / 4)
    assert figures["executed_flops_per_device"] == figures["flops_per_device"]
    assert figures["mesh"] == {"data": 2, "model": 1, "memory": 2}
    assert figures["fits"] is None  # nothing is known of CPUs
    assert "all-gather over 4" in output and "4 x cpu" in output


@needs_libtpu
def test_a_plan_that_does_not_fit_names_the_settings_to_change(settings):
    fits, figures = planned(settings, "--topology=v5e:2x2")
    assert figures["fits"] and "  fits" in fits and figures["tokens_per_second"] > 0
    assert figures["bytes_per_device"]["total"] < 16 * 2**30
    output, figures = planned(settings, "--topology=v5e:2x2", "--gin_param", "MEMORY_SIZE = 8_388_608", status=2)
    assert figures["fits"] is False and "DOES NOT FIT" in output
    assert "the run does not fit v5e:2x2" in output
    held = figures["bytes_per_device"]
    assert held["total"] > 16 * GIB
    assert held["total"] == sum(size for name, size in held.items() if name != "total")
    assert "a smaller MEMORY_SIZE (8388608)" in output and "BATCH_SIZE = 8" in output


USED = (
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 40.00G of 15.75G "
    "hbm. Exceeded hbm capacity by 24.25G.\n\nTotal hbm usage >= 40.50G:\n    reserved        512.00M \n"
)
TEMPORARIES = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
    "temporaries (40.00G) exceeds available HBM (15.75G). HLO module: jit_train_call.\nSee "
    "https://openxla.org/xla/errors/error_1000 for more details."
)


@pytest.mark.parametrize("message", [USED, TEMPORARIES])
@pytest.mark.parametrize(
    ("state", "banks", "most", "others"),
    [
        (2, 1, "temporaries take most, 37.0 GiB: fewer rows (BATCH_SIZE = 8", ["Model.remat = True", "block_size"]),
        (2, 8, "temporaries take most, 30.0 GiB", ["a smaller MEMORY_SIZE (256): the memory takes 8.0 GiB"]),
        (2, 30, "the memory takes most, 30.0 GiB: a smaller MEMORY_SIZE", ["BATCH_SIZE = 8", "Mesh.memory, now 1"]),
        (30, 2, "parameters and optimizer take most, 30.0 GiB", ["Mesh.model"]),
    ],
)
def test_advice_is_about_the_largest_part(settings, message, state, banks, most, others):
    it, _ = load([str(settings)], [])
    held = {"parameters": state * GIB, "optimizer": 0, "memory": banks * GIB}
    assert needed(message, held) == "needs 40.00G of 15.75G of memory"
    assert (held["total"], held["temporaries"]) == (40 * GIB, (40 - state - banks) * GIB)
    figures = {"bytes_per_device": held, "mesh": {"data": 4, "model": 1, "memory": 1}, "platform": "tpu"}
    memory = dataclasses.replace(it.memory, search="blocked")
    found = advice(figures, it.model, memory, it.batch)
    assert found.startswith(f"Try {most}") and all(other in found for other in others)
    assert ("MEMORY_SIZE" in found) == (banks >= 8)
    assert "Model.remat" not in advice(figures, dataclasses.replace(it.model, remat=True), it.memory, it.batch)


def test_messages_of_other_shapes_are_passed_on():
    held = {"parameters": GIB}
    assert needed("RESOURCE_EXHAUSTED: too much\nof all", held) == "RESOURCE_EXHAUSTED: too much"
    assert held == {"parameters": GIB}


@needs_libtpu
def test_the_estimate_counts_the_search_and_recomputation(settings):
    """Computed by hand: scores are 4 bytes per query and slot, written and read; remat repeats the forward pass."""
    bandwidth = CHIPS["v5e"].memory_bandwidth
    writes = ("--topology=v5e:2x2", "--gin_param", "Memory.search = 'blocked'")
    _, small = planned(settings, *writes)
    output, large = planned(settings, *writes, "--gin_param", "MEMORY_SIZE = 1024")
    it, _ = load([str(settings)], [])
    scores = len(it.model.memory_layers) * 2 * 4 * (8 * 32 // 4) * it.model.heads * (1024 - 256)
    keys = (large["bytes_per_device"]["memory"] - small["bytes_per_device"]["memory"]) / 2
    grown = large["seconds_per_step"]["memory"] - small["seconds_per_step"]["memory"]
    assert grown == pytest.approx((scores + keys) / bandwidth)
    assert "not counted: the selection" in output
    _, kernel = planned(settings, "--topology=v5e:2x2")  # which writes no scores
    written = len(it.model.memory_layers) * 2 * 4 * (8 * 32 // 4) * it.model.heads * 256
    saved = small["seconds_per_step"]["memory"] - kernel["seconds_per_step"]["memory"]
    assert saved == pytest.approx(written / bandwidth)
    _, again = planned(settings, *writes, "--gin_param", "Model.remat = True")
    assert again["flops_per_device"] == small["flops_per_device"]
    assert 1.15 < again["executed_flops_per_device"] / small["flops_per_device"] < 4 / 3
    assert again["seconds_per_step"]["arithmetic"] == again["executed_flops_per_device"] / CHIPS["v5e"].flops


@pytest.mark.parametrize(
    ("kind", "chip"),
    [
        ("TPU v4", "v4"),
        ("TPU v4 lite", None),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H200", "H200"),
        ("NVIDIA GH200 480GB", None),
    ],
)
def test_chips_are_known_by_their_whole_names(kind, chip):
    device = Mock(jax.Device, device_kind=kind)
    assert chip_of(device) == (CHIPS[chip] if chip else None)
    assert memory_of(device) == (CHIPS[chip].memory if chip else None)


def test_a_device_that_is_here_says_how_much_memory_it_has(monkeypatch):
    device = Mock(jax.Device, device_kind="NVIDIA A100-SXM4-80GB")
    device.memory_stats.return_value = {"bytes_limit": 60 * 10**9}
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert memory_of(device) == 60 * 10**9


@pytest.mark.parametrize(
    ("topology", "words"),
    [
        ("v5p", "--topology=v5p: must be VERSION:SHAPE, such as v4:2x2x4"),
        ("v9:2x2", "versions: v4, v5e, v5p, v6e"),
        ("h100:8x8", "or `local`"),
    ],
)
def test_unknown_topologies_are_refused(settings, topology, words):
    output, _ = planned(settings, f"--topology={topology}", status=2)
    assert words in output


@needs_libtpu
def test_shapes_that_a_version_does_not_have_are_refused(settings):
    output, _ = planned(settings, "--topology=v5e:3x5", status=2)
    assert output.splitlines()[-1].startswith("memorizing plan: error: --topology=v5e:3x5:")
    output, _ = planned(settings, "--topology=v5e:4x4", status=2)
    assert "Batch.size = 8 does not divide over Mesh.data = 16. Use 16" in output


PODS = sorted(
    (match[1], file.relative_to(ROOT).as_posix())
    for file in (ROOT / "configs").rglob("*.gin")
    if (match := re.search(r"^# Pod: +(\S+)", file.read_text(), re.MULTILINE))
)


def programs() -> dict[str, tuple[str, list[str]]]:
    """The files, of those that make the same program only the first, with their pods."""
    found: dict[str, tuple[str, list[str]]] = {}
    for pod, file in PODS:
        it, _ = load([str(ROOT / file)], [])
        training = (it.training.update, it.training.seed)
        optimizer = it.optimizer  # `rsqrt` never reads the steps of the decay
        if optimizer.schedule == "rsqrt":
            optimizer = dataclasses.replace(optimizer, decay_steps=0)
        key = repr((pod, it.model, it.memory, it.batch, optimizer, training, it.mesh))
        found.setdefault(key, (pod, []))[1].append(file)
    return found


def test_every_corpus_and_pod_has_its_pod():
    named = {file for _, file in PODS}
    corpora = {f"configs/{name}.gin" for name in ("pg19", "arxiv", "github", "isabelle", "c4")}
    pods = {file.relative_to(ROOT).as_posix() for file in (ROOT / "configs" / "pods").glob("*.gin")}
    assert corpora | pods <= named and len(pods) >= 4
    assert len(programs()) >= 5


@pytest.mark.pods
@needs_libtpu
@pytest.mark.parametrize(("pod", "files"), programs().values(), ids=[files[0] for _, files in programs().values()])
def test_shipped_settings_fit_their_pods(pod, files, tmp_path):
    output = finish(
        memorizing("plan", f"--gin_file={ROOT / files[0]}", f"--topology={pod}", f"--json={tmp_path / 'plan.json'}"),
        timeout=900,
    )
    figures = json.loads((tmp_path / "plan.json").read_text())
    assert figures["fits"], output
    assert figures["memory_size"] == 0 or figures["bytes_per_device"]["memory"] > 0
