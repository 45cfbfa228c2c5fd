"""What a run writes down, and what it says while it goes on."""

import dataclasses
import json

import jax
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from memorizing.memory.settings import MemorySettings
from memorizing.model.settings import ModelSettings
from memorizing.training.flops import device_peak_flops, executed_flops_per_token, training_flops_per_token
from memorizing.training.metrics import MetricsWriter, Progress, read_lines


def test_metrics_go_to_lines_and_to_tensorboard(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    for step in (8, 16):
        writer.write(step, {"loss": 1 / step, "gates/layer_2/head_0": 0.25})
    writer.close()
    assert read_lines(tmp_path / "metrics.jsonl") == [
        {"step": step, "loss": 1 / step, "gates/layer_2/head_0": 0.25} for step in (8, 16)
    ]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(each.step, each.value) for each in events.Scalars("loss")] == [(8, 0.125), (16, 0.0625)]


def test_steps_that_are_repeated_are_told_once(tmp_path):
    """A run is killed after step 24, cut off in mid-line, and goes on from its checkpoint at 16."""
    writer = MetricsWriter(tmp_path, 0)
    for step in (8, 16, 24):
        writer.write(step, {"loss": 1.0})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 32, "lo')
    writer = MetricsWriter(tmp_path, 16)
    writer.write(24, {"loss": 2.0})
    writer.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(8, 1.0), (16, 1.0), (24, 2.0)]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(each.step, each.value) for each in events.Scalars("loss")] == [(8, 1.0), (16, 1.0), (24, 2.0)]


def test_progress_in_a_log_file_is_a_line_now_and_then(capsys):
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
