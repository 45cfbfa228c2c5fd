"""Intervals against simulation; gains and positions against hand-computed sums."""

import math

import numpy as np
import pytest

from memorizing.evaluation.figures import Baseline, Summary, interval
from memorizing.evaluation.perplexity import DocumentScores


def test_95_percent_intervals_contain_the_true_ratio_in_95_percent_of_samples():
    """Draws 12 documents of lognormal lengths 2,000 times around a known ratio."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(2000):
        counts = np.ceil(rng.lognormal(6, 0.5, 12))
        sums = counts * rng.normal(2.5, 0.4, 12)
        low, high = interval(sums.tolist(), counts.astype(int).tolist())
        held += low <= 2.5 <= high
    assert 0.92 <= held / 2000 <= 0.97


def test_intervals_of_equal_documents():
    """Documents of equal length have the interval of their mean: t = 4.303 for two degrees of freedom."""
    low, high = interval([10.0, 20.0, 30.0], [10, 10, 10])
    reach = 4.302653 * 1.0 / math.sqrt(3)
    assert (low, high) == (pytest.approx(2 - reach, rel=1e-5), pytest.approx(2 + reach, rel=1e-5))
    assert interval([10.0], [10]) == (None, None)


def test_gains_are_reported_by_position_and_in_total():
    """Tokens of the first of three documents gain 0.5 up to token 128 and lose 0.2 from there; the others stay."""
    change = np.where(np.arange(200) < 128, 0.5, -0.2)
    losses = {0: np.full(200, 2.0), 1: np.full(100, 1.0), 2: np.full(300, 3.0)}
    summary = Summary(Baseline(8, {number: each.astype(np.float32) for number, each in losses.items()}))
    for number, each in losses.items():
        nats_T = (each - change if number == 0 else each).astype(np.float32)
        summary.add(DocumentScores(number, nats_T, np.zeros(len(each), bool)), 100)
    gain = summary.figures()["gain"]
    assert gain["against_memory_size"] == 8
    assert gain["nats_per_token"] == pytest.approx((0.5 * 128 - 0.2 * 72) / 600, rel=1e-5)
    assert gain["tokens_gained"] == pytest.approx(128 / 600) and gain["tokens_lost"] == pytest.approx(72 / 600)
    by_position = {part["first_token"]: part["nats_per_token"] for part in gain["by_position"]}
    assert by_position[0] == pytest.approx(0.5 * 128 / 356, rel=1e-5)
    assert by_position[128] == pytest.approx(-0.2 * 72 / 200, rel=1e-5) and by_position[256] == 0
    assert gain["interval"][0] < gain["nats_per_token"] < gain["interval"][1]


def test_word_level_perplexity_divides_by_the_words_of_the_text_or_by_the_published_count():
    summary = Summary()
    for number in range(2):
        summary.add(DocumentScores(number, np.full(30, 2.0, np.float32), np.zeros(30, bool)), 100, "x", words=20)
    assert summary.figures()["word_perplexity"] == pytest.approx(math.exp(3.0))
    published = summary.figures(published_words=60)
    assert published["word_perplexity"] == pytest.approx(math.exp(2.0))
    assert (published["words"], published["published_words"]) == (40, 60)
