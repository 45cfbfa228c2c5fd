"""Metric writers (the shared suite of the family), the progress line, and FLOPs counted by hand."""

import dataclasses
from pathlib import Path

import jax
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from memorizing.memory.settings import MemorySettings
from memorizing.model.settings import ModelSettings
from memorizing.storage.checkpoints import SaveFailed
from memorizing.training.flops import device_peak_flops, executed_flops_per_token, training_flops_per_token
from memorizing.training.metrics import DAMAGED_FILE, METRICS_FILE, WRITERS, JsonLinesWriter, read_metrics
from memorizing.training.progress import Progress


def jsonl_values(workdir: Path, name: str) -> list[tuple[int, float]]:
    return [(line["step"], line[name]) for line in read_metrics(workdir / METRICS_FILE).lines]


def tensorboard_values(workdir: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(workdir / "tensorboard")).Reload()
    return [(each.step, each.value) for each in events.Scalars(name)]


READERS = {"jsonl": jsonl_values, "tensorboard": tensorboard_values}
"""The shared suite of metric writers reads back what each wrote: (step, value) of a name."""


def test_every_metric_writer_is_tested():
    assert READERS.keys() == WRITERS.keys()


@pytest.mark.parametrize("name", WRITERS)
def test_a_writer_writes_each_value_at_its_step(name, tmp_path):
    writer, values = WRITERS[name](tmp_path, 0), READERS[name]
    for step in (8, 16):
        writer.write(step, {"loss": 1 / step, "gates/layer_2/head_0": 0.25})
    writer.save()
    assert values(tmp_path, "loss") == [(8, 0.125), (16, 0.0625)]
    writer.close()
    assert values(tmp_path, "gates/layer_2/head_0") == [(8, 0.25), (16, 0.25)]


@pytest.mark.parametrize("name", WRITERS)
def test_repeated_steps_are_written_once(name, tmp_path):
    """A run is killed after step 24 and resumes from its checkpoint at step 16."""
    writer = WRITERS[name](tmp_path, 0)
    for step in (8, 16, 24):
        writer.write(step, {"loss": 1.0})
    writer.close()
    if name == "jsonl":  # the kill cut off a line
        with (tmp_path / METRICS_FILE).open("a") as file:
            file.write('{"step": 32, "lo')
    writer = WRITERS[name](tmp_path, 16)
    writer.write(24, {"loss": 2.0})
    writer.close()
    assert READERS[name](tmp_path, "loss") == [(8, 1.0), (16, 1.0), (24, 2.0)]


@pytest.mark.parametrize("name", WRITERS)
def test_a_writer_names_a_workdir_that_cannot_be_written_to(name, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SaveFailed, match=r"metrics could not be written to .*file/run"):
        WRITERS[name](tmp_path / "file" / "run", 0)


DAMAGE = {
    "NUL bytes": b"\0" * 30,
    "no UTF-8": b'{"step": 1, "\xff": 2}',
    "no object": b"[1]",
    "no step": b"{}",
    "text for a number": b'{"step": 24, "loss": "x"}',
    "half": b'{"step": 24, "lo',
    "nested": b"[" * 100_000,
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_line_is_set_aside_and_the_others_are_kept(kind, tmp_path, capsys):
    lines = [b'{"step": %d, "loss": %d.5}' % (step, step) for step in range(8, 80, 8)]
    lines.insert(4, DAMAGE[kind])
    (tmp_path / METRICS_FILE).write_bytes(b"\n".join(lines) + b'\n{"step": 80, "lo')
    found = read_metrics(tmp_path / METRICS_FILE)
    assert [line["step"] for line in found.lines] == list(range(8, 80, 8)) and found.damaged == {5: DAMAGE[kind]}
    writer = JsonLinesWriter(tmp_path, 64)
    writer.write(72, {"loss": 1.0})
    writer.close()
    assert f"{tmp_path / METRICS_FILE}: 1 damaged lines (5); moved to" in capsys.readouterr().err
    assert jsonl_values(tmp_path, "loss") == [*((step, step + 0.5) for step in range(8, 72, 8)), (72, 1.0)]
    assert (tmp_path / DAMAGED_FILE).read_bytes() == DAMAGE[kind] + b"\n"


def test_progress_in_a_log_file_is_an_occasional_line(capsys):
    progress = Progress(total=100, first=0, seconds_between_lines=1e6)
    for step in range(1, 101):
        progress.show(step, 1.5, 1234.0)
    progress.close()
    assert capsys.readouterr().out == "step 100/100  loss 1.500  1,234 tokens/s  00:00 left\n"


@pytest.mark.parametrize(("cache", "memory"), [(False, 0), (True, 0), (True, 64)])
def test_arithmetic_is_counted_by_hand(cache, memory):
    model = ModelSettings(
        vocabulary_size=100, layers=2, embedding_size=10, heads=2, head_size=3, feed_forward_size=20,
        memory_layers=(2,), xl_cache=cache,
    )  # fmt: skip
    window = 16 if cache else 8
    projections = 4 * 10 * 6 + 2 * 10 * 20  # query, key, value, out; feed-forward in and out
    attention = 2 * window * 6  # scores, and the weighted sum of values
    forward = 2 * (projections + attention) + 100 * 10
    if memory:
        forward += 2 * 4 * 6  # the same over 4 neighbors
    search = memory * 6
    settings = MemorySettings(size=memory, neighbors=4)
    found = training_flops_per_token(model, settings, segment_length=8)
    assert found == 2 * (3 * forward + search)
    assert executed_flops_per_token(model, settings, segment_length=8) == found
    # Again all but the logits and the last product of each layer.
    again = forward - 100 * 10 - 2 * 10 * 20
    remat = dataclasses.replace(model, remat=True)
    assert executed_flops_per_token(remat, settings, segment_length=8) == found + 2 * again


def test_the_peak_of_a_device_that_is_not_listed_is_measured():
    assert 1e8 < device_peak_flops(jax.devices()[0]) < 1e14
