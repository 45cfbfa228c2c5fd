"""What an evaluation reports: sums over documents, the figures that follow, and how far they can be trusted.

    loss = total nats / total tokens,   perplexity = exp(loss),   bits per byte = total nats / ln 2 / total bytes

Documents are the unit of chance: the tokens of one are alike. So an interval is that of a ratio of sums over documents
(linearized, Student's t with `documents - 1` degrees of freedom; Cochran, Sampling Techniques, chapter 6), and the
difference between two memories is taken document by document.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.special import stdtrit

from memorizing.evaluation.perplexity import DocumentScores

CONFIDENCE = 0.95
CHANGED = 0.1
"""Nats by which a token's loss has to change to count as gained or lost."""


class DocumentRow(NamedTuple):
    """Sums over one document; words are what whitespace divides."""

    name: str
    tokens: int
    bytes: int
    words: int
    nats: float
    correct: int
    found: int
    wanted: int
    gain: float


class Baseline(NamedTuple):
    """What another memory made of the same documents: the loss of each token, by document."""

    memory_size: int
    nats_T: dict[int, Float[np.ndarray, "T"]]


class Summary:
    """Sums over documents of one reading of a split; with a `baseline`, also what was gained over it."""

    def __init__(self, baseline: Baseline | None = None):
        self._rows: dict[int, DocumentRow] = {}
        self._baseline = baseline
        self._by_position: dict[int, np.ndarray] = {}
        self._changed = np.zeros(2, np.int64)

    def add(self, scores: DocumentScores, document_bytes: int, name: str = "", words: int = 0) -> None:
        """Counts one document."""
        nats_T = scores.nats_T.astype(np.float64)
        gains_T = np.zeros(len(nats_T))
        if self._baseline is not None:
            gains_T = self._baseline.nats_T[scores.document].astype(np.float64) - nats_T
            self._changed += ((gains_T > CHANGED).sum(), (gains_T < -CHANGED).sum())
        for start, stop in positions(len(nats_T)):
            sums = self._by_position.setdefault(start, np.zeros(3))
            sums += (nats_T[start:stop].sum(), min(stop, len(nats_T)) - start, gains_T[start:stop].sum())
        self._rows[scores.document] = DocumentRow(
            name, len(nats_T), document_bytes, words, float(nats_T.sum()), int(scores.correct_T.sum()), scores.found,
            scores.wanted, float(gains_T.sum()),
        )  # fmt: skip

    def figures(self, published_words: int | None = None) -> dict:
        """As they go into the JSON file of an evaluation. `published_words` count in place of those in the text."""
        rows = list(self._rows.values())
        total = DocumentRow("", *(sum(column) for column in list(zip(*rows, strict=True))[1:]))
        low, high = interval([row.nats for row in rows], [row.tokens for row in rows])
        figures: dict[str, Any] = {
            "perplexity": math.exp(total.nats / total.tokens),
            "perplexity_interval": [_exp(low), _exp(high)],
            "loss_nats_per_token": total.nats / total.tokens,
            "bits_per_byte": total.nats / math.log(2) / total.bytes,
            "accuracy": total.correct / total.tokens,
            "tokens": total.tokens,
            "bytes": total.bytes,
            "documents": len(rows),
        }
        if total.words:
            figures |= {"words": total.words, "word_perplexity": _exp(total.nats / (published_words or total.words))}
        if published_words:
            figures["published_words"] = published_words
        if total.wanted:
            figures["recall"] = total.found / total.wanted
        by_position = sorted(self._by_position.items())
        figures["perplexity_by_position"] = [
            {"first_token": start, "tokens": int(count), "perplexity": math.exp(nats / count)}
            for start, (nats, count, _) in by_position
        ]
        if self._baseline is not None:
            figures["gain"] = {
                "against_memory_size": self._baseline.memory_size,
                "nats_per_token": total.gain / total.tokens,
                "interval": list(interval([row.gain for row in rows], [row.tokens for row in rows])),
                "tokens_gained": int(self._changed[0]) / total.tokens,
                "tokens_lost": int(self._changed[1]) / total.tokens,
                "by_position": [
                    {"first_token": start, "nats_per_token": gain / count} for start, (_, count, gain) in by_position
                ],
            }
        return figures

    def table(self) -> Iterator[tuple]:
        """A header, then a line for each document in its order in the split."""
        yield (*DocumentRow._fields, "perplexity", "bits_per_byte")
        for _, row in sorted(self._rows.items()):
            yield (*row, _exp(row.nats / row.tokens), row.nats / math.log(2) / row.bytes)


def positions(length: int) -> Iterator[tuple[int, int]]:
    """Ranges of places in a document, the first of 128 tokens, each later one reaching twice as far."""
    start, stop = 0, 128
    while start < length:
        yield start, stop
        start, stop = stop, 2 * stop


def interval(sums_D: list[float], counts_D: list[int]) -> tuple[float | None, float | None]:
    """Where the ratio of the totals lies, with 95% confidence, in documents like these; of a single one, nothing."""
    documents, ratio = len(sums_D), sum(sums_D) / sum(counts_D)
    if documents < 2:
        return None, None
    residuals_D = np.asarray(sums_D) - ratio * np.asarray(counts_D)
    error = math.sqrt((residuals_D**2).sum() * documents / (documents - 1)) / sum(counts_D)
    reach = float(stdtrit(documents - 1, (1 + CONFIDENCE) / 2)) * error
    return ratio - reach, ratio + reach


def _exp(loss: float | None) -> float | None:
    return None if loss is None or loss > 700 else math.exp(loss)  # a handful of documents says little
