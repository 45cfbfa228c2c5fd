"""Perplexity against reading each document alone; its independence of layout; the files that evaluations leave."""

import functools
import itertools
import json
import math

import jax
import numpy as np
import pytest

from memorizing.data.documents import Document
from memorizing.data.tokens import TokenSplit, write_split
from memorizing.data.vocabulary import ByteVocabulary
from memorizing.errors import InputError
from memorizing.evaluation.compare import compare
from memorizing.evaluation.evaluate import Answers, at_memory_size
from memorizing.evaluation.perplexity import Summary, reading_plan, score_documents
from memorizing.memory.settings import MemorySettings
from memorizing.model.settings import ModelSettings
from memorizing.model.transformer import apply_model, create_model, empty_carry
from memorizing.shapes import BEGIN_TOKEN, Batch

TOKENS = 8
MODEL = ModelSettings(
    vocabulary_size=259, layers=2, embedding_size=16, heads=2, head_size=8, feed_forward_size=32, memory_layers=(2,),
    gate_bias=0.0, dtype="float32",
)  # fmt: skip
MEMORY = MemorySettings(size=4 * TOKENS, neighbours=4, dtype="float32")
TEXTS = [
    "ünïcode " * 9,
    "a",
    "exactly8",
    "one and a half se",
    "the longest of them, told again and again " * 5,
    "xy" * 30,
]


@pytest.fixture(scope="module")
def split(tmp_path_factory) -> TokenSplit:
    folder = tmp_path_factory.mktemp("tokens") / "test"
    write_split(folder, [Document(str(number), text) for number, text in enumerate(TEXTS)], ByteVocabulary())
    return TokenSplit(folder)


@functools.cache
def parameters():
    return create_model(MODEL, MEMORY, seed=1)[1]


def figures(split: TokenSplit, memory: MemorySettings = MEMORY, rows: int = 2, segments_per_call: int = 3) -> dict:
    summary = Summary()
    for scores in score_documents(MODEL, memory, parameters(), split, TOKENS, rows, segments_per_call):
        summary.add(scores, int(split.bytes[scores.document]))
    return summary.figures()


@pytest.mark.parametrize("size", [0, 8, 32, 64])
def test_perplexity_is_that_of_each_document_read_alone(split, size):
    memory = at_memory_size(MEMORY, size)
    graph, _ = create_model(MODEL, memory, seed=1)
    run = jax.jit(functools.partial(apply_model, graph))
    nats, tokens = 0.0, 0
    for text in TEXTS:
        ids = ByteVocabulary().encode(text)
        carry = empty_carry(MODEL, memory, 1, TOKENS)
        for first in range(0, len(ids), TOKENS):
            known = np.concatenate([[BEGIN_TOKEN], ids])[first : first + TOKENS]
            targets = ids[first : first + TOKENS]
            inputs = np.zeros((1, TOKENS), np.int32)
            inputs[0, : len(targets)] = known[: len(targets)]
            batch = Batch(inputs, inputs, inputs >= 0, np.array([first == 0]))
            logits, carry = run(parameters(), batch, carry)
            logs = np.asarray(jax.nn.log_softmax(logits[0]), np.float64)
            nats -= sum(logs[place, target] for place, target in enumerate(targets))
            tokens += len(targets)
    found = figures(split, memory)
    assert found["tokens"] == tokens and found["documents"] == len(TEXTS)
    assert found["bytes"] == sum(len(text.encode()) for text in TEXTS)
    assert found["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / found["bytes"], rel=1e-5)


@pytest.mark.parametrize(("rows", "segments_per_call"), [(1, 1), (3, 2), (9, 7)])
def test_no_figure_depends_on_the_layout(split, rows, segments_per_call):
    one, other = figures(split), figures(split, rows=rows, segments_per_call=segments_per_call)
    assert one.keys() == other.keys()
    for name, value in one.items():
        if name != "perplexity_by_position":
            assert value == pytest.approx(other[name], rel=1e-5), name
    for a, b in zip(one["perplexity_by_position"], other["perplexity_by_position"], strict=True):
        assert a == pytest.approx(b, rel=1e-5)


def test_positions_add_up_to_the_whole(split):
    found = figures(split)
    parts = found["perplexity_by_position"]
    assert [part["first_token"] for part in parts] == [0, 128]
    assert sum(part["tokens"] for part in parts) == found["tokens"]
    total = sum(part["tokens"] * math.log(part["perplexity"]) for part in parts)
    assert total / found["tokens"] == pytest.approx(found["loss_nats_per_token"])


def test_the_reading_plan_reads_every_segment_once_in_order():
    lengths = np.array([5, 0, 17, 9, 33, 1])
    plan = reading_plan(lengths, rows=3, segment_length=8)
    for row in range(3):
        places = [step[row] for step in plan if step[row] is not None]
        assert all(b == (a[0], a[1] + 1) or b[1] == 0 for a, b in itertools.pairwise(places))
    everything = sorted(place for step in plan for place in step if place is not None)
    assert everything == [(d, s) for d, length in enumerate(lengths) for s in range(-(-length // 8))]


def test_answers_are_counted_by_how_long_ago_they_were_told():
    # Key 5 is told at place 1 and asked at 3 (near) and 35 (far, 32 tokens on); key 6 is told at 37 only.
    tokens = np.tile([7, 8], 20)
    tokens[[0, 2, 34]], tokens[36] = 5, 6
    answers = Answers(segment_length=4)
    correct = np.zeros(40, bool)
    correct[[3, 37]] = True
    answers.add(tokens, correct)
    counted = answers.figures()
    assert counted["far"] == {"questions": 1, "exact": 0.0}
    # The pairs 7 8 are asked every 2 tokens: 19 - 4 places hold them, all but the first near, and two gaps of 4.
    assert counted["near"]["exact"] == pytest.approx(1 / counted["near"]["questions"])


def evaluation(size: int, perplexity: float, tokens: int = 100) -> dict:
    return {
        "perplexity": perplexity, "bits_per_byte": 1.0, "tokens": tokens, "bytes": 300, "documents": 3,
        "memory_size": size, "perplexity_by_position": [{"first_token": 0, "tokens": 9, "perplexity": perplexity}],
    }  # fmt: skip


def write_run(folder, evaluations: list[dict]) -> None:
    (folder / "evaluations").mkdir(parents=True)
    for each in evaluations:
        (folder / "evaluations" / f"test-memory-{each['memory_size']}.json").write_text(json.dumps(each))


def test_compare_gathers_two_runs(tmp_path):
    write_run(tmp_path / "a", [evaluation(0, 20.0)])
    write_run(tmp_path / "b", [evaluation(size, 18.0 - size / 100) for size in (512, 0, 64)])
    said = []
    compare(tmp_path / "a", tmp_path / "b", "test", tmp_path / "out", said.append)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["without_memory"]["perplexity"] == 20.0
    assert [each["memory_size"] for each in results["with_memory"]] == [0, 64, 512]
    assert (tmp_path / "out" / "results.png").read_bytes().startswith(b"\x89PNG")
    assert "-35.6%" in "\n".join(said)  # 12.88 against 20


def test_compare_refuses_what_cannot_be_compared(tmp_path):
    write_run(tmp_path / "a", [evaluation(0, 20.0, tokens=99)])
    write_run(tmp_path / "b", [evaluation(64, 18.0)])
    with pytest.raises(InputError, match="different text"):
        compare(tmp_path / "a", tmp_path / "b", "test", tmp_path / "out")
    with pytest.raises(InputError, match="no evaluations of the validation split"):
        compare(tmp_path / "a", tmp_path / "b", "validation", tmp_path / "out")
