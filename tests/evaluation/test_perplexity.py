"""Perplexity against reading each document alone, its independence of layout, and the comparison of two runs."""

import dataclasses
import functools
import itertools
import json
import math
from pathlib import Path

import jax
import matplotlib.image
import numpy as np
import pytest

from memorizing.data.tokens import Tokenized, TokenSplit, write_split
from memorizing.data.vocabulary import ByteVocabulary
from memorizing.errors import InputError
from memorizing.evaluation.answers import Answers
from memorizing.evaluation.figures import Summary
from memorizing.evaluation.perplexity import (
    DocumentScores,
    EvaluationSettings,
    TrainedModel,
    reading_plan,
    score_documents,
)
from memorizing.memory.settings import MemorySettings, at_memory_size
from memorizing.model.carry import empty_carry
from memorizing.model.settings import ModelSettings
from memorizing.model.transformer import apply_model, create_model
from memorizing.parallel.mesh import MeshSettings, make_mesh
from memorizing.reports.comparison import compare
from memorizing.shapes import BEGIN_TOKEN, Batch

TOKENS = 8
MODEL = ModelSettings(
    vocabulary_size=259, layers=2, embedding_size=16, heads=2, head_size=8, feed_forward_size=32, memory_layers=(2,),
    gate_bias=0.0, dtype="float32",
)  # fmt: skip
MEMORY = MemorySettings(size=4 * TOKENS, neighbors=4, dtype="float32")
TEXTS = [
    "ünïcode " * 9,
    "a",
    "exactly8",
    "one and a half se",
    "the longest of them, told again and again " * 5,
    "xy" * 30,
]


def write(folder: Path, texts: list[str]) -> TokenSplit:
    encode = ByteVocabulary().encode
    documents = [Tokenized(str(n), "", "", encode(text), len(text.encode())) for n, text in enumerate(texts)]
    write_split(folder, documents, np.uint16)
    return TokenSplit(folder)


@pytest.fixture(scope="module")
def split(tmp_path_factory) -> TokenSplit:
    return write(tmp_path_factory.mktemp("tokens") / "test", TEXTS)


@functools.cache
def parameters():
    return create_model(MODEL, MEMORY, seed=1)[1]


def figures(split: TokenSplit, memory: MemorySettings = MEMORY, rows: int = 2, segments_per_call: int = 3) -> dict:
    summary = Summary()
    mesh = make_mesh(MeshSettings(data=1), jax.devices()[:1])
    trained = TrainedModel(MODEL, memory, TOKENS, parameters())
    settings = EvaluationSettings(batch_size=rows, segments_per_call=segments_per_call)
    for scores in score_documents(trained, split, settings, mesh):
        summary.add(scores, int(split.bytes[scores.document]))
    return summary.figures()


@pytest.mark.parametrize("size", [0, 8, 32, 64])
def test_perplexity_equals_that_of_documents_read_alone(split, size):
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
def test_figures_do_not_depend_on_the_layout(split, rows, segments_per_call):
    assert_same(figures(split), figures(split, rows=rows, segments_per_call=segments_per_call))


def test_figures_do_not_depend_on_the_order_of_documents(split, tmp_path):
    assert_same(figures(split), figures(write(tmp_path / "test", [TEXTS[at] for at in (4, 1, 0, 5, 3, 2)])))


def test_reporting_recall_changes_no_other_figure(split):
    with_recall = figures(split, dataclasses.replace(MEMORY, report_recall=True))
    assert with_recall.pop("recall") == 1.0  # the search is exact
    assert_same(with_recall, figures(split))


def assert_same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        if name != "perplexity_by_position":
            assert value == pytest.approx(other[name], rel=1e-5), name
    for a, b in zip(one["perplexity_by_position"], other["perplexity_by_position"], strict=True):
        assert a == pytest.approx(b, rel=1e-5)


def test_losses_by_position_add_up_to_the_total(split):
    found = figures(split)
    parts = found["perplexity_by_position"]
    assert [part["first_token"] for part in parts] == [0, 128]
    assert sum(part["tokens"] for part in parts) == found["tokens"]
    total = sum(part["tokens"] * math.log(part["perplexity"]) for part in parts)
    assert total / found["tokens"] == pytest.approx(found["loss_nats_per_token"])


def test_each_position_range_has_the_perplexity_of_its_own_tokens():
    """Ranges end at token 128 and at each doubling. Losses grow with the position, so ranges cannot be mixed up."""
    summary = Summary()
    for tokens in (100, 300):
        summary.add(DocumentScores(0, np.arange(tokens, dtype=np.float32) / 100, np.ones(tokens, bool)), 1)
    parts = {part["first_token"]: part for part in summary.figures()["perplexity_by_position"]}
    expected = {0: [*range(100), *range(128)], 128: [*range(128, 256)], 256: [*range(256, 300)]}
    assert parts.keys() == expected.keys()
    for first, places in expected.items():
        assert parts[first]["tokens"] == len(places)
        assert parts[first]["perplexity"] == pytest.approx(math.exp(np.mean(places) / 100), rel=1e-6)


def test_the_reading_plan_reads_every_segment_once_in_order():
    lengths = np.array([5, 0, 17, 9, 33, 1])
    plan = reading_plan(lengths, rows=3, segment_length=8)
    for row in range(3):
        places = [step[row] for step in plan if step[row] is not None]
        assert all(b == (a[0], a[1] + 1) or b[1] == 0 for a, b in itertools.pairwise(places))
    everything = sorted(place for step in plan for place in step if place is not None)
    assert everything == [(d, s) for d, length in enumerate(lengths) for s in range(-(-length // 8))]


def test_answers_are_counted_by_the_distance_to_the_definition():
    """Segments have 4 tokens: near is less than one segment back, far is 8 or more back, all else is neither.

    place    0     2     4     6    ...    24     26     38     40
    pair     a 1   a 1   b 2   c 3   ...    b 2    d 4    a 1    c 3        (fillers between, each once)
                   near                     20            far 36 far 34
    """
    a, b, c, d = 10, 11, 12, 13
    fillers = iter(range(100, 200))
    pairs = {0: (a, 1), 2: (a, 1), 4: (b, 2), 6: (c, 3), 24: (b, 2), 26: (d, 4), 38: (a, 1), 40: (c, 3)}
    tokens = np.array([pairs.get(place, (next(fillers), 5)) for place in range(0, 42, 2)]).reshape(-1)
    correct = np.zeros(42, bool)
    correct[[3, 27, 39]] = True  # the near question, a value that nobody can know, the first of two far questions
    answers = Answers(segment_length=4)
    answers.add(tokens, correct)
    assert answers.figures() == {"near": {"questions": 1, "exact": 1.0}, "far": {"questions": 2, "exact": 0.5}}
    answers.add(tokens, np.ones(42, bool))
    assert answers.figures() == {"near": {"questions": 2, "exact": 1.0}, "far": {"questions": 4, "exact": 0.75}}


def evaluation(size: int, perplexity: float, tokens: int = 100) -> dict:
    return {
        "perplexity": perplexity, "bits_per_byte": 1.0, "tokens": tokens, "bytes": 300, "documents": 3,
        "checkpoint_step": 800, "memory_size": size,
        "perplexity_by_position": [{"first_token": 0, "tokens": 9, "perplexity": perplexity}],
    }  # fmt: skip


def write_run(folder, evaluations: list[dict]) -> None:
    (folder / "evaluations").mkdir(parents=True)
    for each in evaluations:
        (folder / "evaluations" / f"test-memory-{each['memory_size']}.json").write_text(json.dumps(each))


def test_compare_gathers_two_runs(tmp_path):
    one, others = evaluation(0, 20.0), [evaluation(size, 18.0 - size / 100) for size in (512, 0, 64)]
    write_run(tmp_path / "a", [one])
    write_run(tmp_path / "b", others)
    said = []
    compare(tmp_path / "a", tmp_path / "b", "test", tmp_path / "out", said.append)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results == {"without_memory": one, "with_memory": [others[1], others[2], others[0]]}  # by size
    assert "-35.6%" in "\n".join(said)  # 12.88 against 20
    picture = matplotlib.image.imread(tmp_path / "out" / "results.png")
    assert picture.shape[0] > 300 and picture.shape[1] > 800 and picture.std() > 0.01


def test_compare_rejects_runs_that_cannot_be_compared(tmp_path):
    write_run(tmp_path / "a", [evaluation(0, 20.0, tokens=99)])
    write_run(tmp_path / "b", [evaluation(64, 18.0)])
    with pytest.raises(InputError, match="different text"):
        compare(tmp_path / "a", tmp_path / "b", "test", tmp_path / "out")
    write_run(tmp_path / "c", [evaluation(0, 20.0), evaluation(64, 18.0) | {"checkpoint_step": 1600}])
    with pytest.raises(InputError, match="was evaluated at several checkpoints, of steps 800, 1600"):
        compare(tmp_path / "a", tmp_path / "c", "test", tmp_path / "out")
    with pytest.raises(InputError, match="no evaluations of the validation split"):
        compare(tmp_path / "a", tmp_path / "b", "validation", tmp_path / "out")
    with pytest.raises(InputError, match=r"with a memory of 64 only.*--memory_size=0"):
        compare(tmp_path / "b", tmp_path / "b", "test", tmp_path / "out")
    assert not (tmp_path / "out").exists()
