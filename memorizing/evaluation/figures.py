"""Figures of an evaluation, from sums over documents, with 95% confidence intervals.

    loss = total nats / total tokens,   perplexity = exp(loss),   bits per byte = total nats / ln 2 / total bytes

Tokens of one document resemble each other, so the sampling unit is the document. An interval is that of a ratio of sums
over documents: linearized, Student's t with `documents - 1` degrees of freedom (Cochran, Sampling Techniques,
chapter 6). The gain of one memory over another is computed document by document.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.special import stdtrit

from memorizing.evaluation.perplexity import LARGEST_LOSS, DocumentScores

CONFIDENCE = 0.95
CHANGED = 0.1
"""Change of a token's loss, in nats, from which the token counts as gained or lost."""


class DocumentSums(NamedTuple):
    """Sums over the tokens of one document; words are separated by whitespace. The fields are columns of the CSV file.

    Attributes:
        nats: summed loss.
        correct: tokens that had the largest logit.
        neighbors_found, true_neighbors: see `DocumentScores`.
        gain: summed loss with the baseline's memory less `nats`; 0 without a baseline.
    """

    name: str
    tokens: int
    bytes: int
    words: int
    nats: float
    correct: int
    neighbors_found: int
    true_neighbors: int
    gain: float


class Baseline(NamedTuple):
    """Losses of the same documents with another memory, in nats for each token, by document."""

    memory_size: int
    nats_T: dict[int, Float[np.ndarray, "T"]]


class Summary:
    """Sums over the documents of one evaluation; with a `baseline`, also the gain over it."""

    def __init__(self, baseline: Baseline | None = None):
        self._documents: dict[int, DocumentSums] = {}
        self._baseline = baseline
        self._by_position: dict[int, np.ndarray] = {}
        self._changed = np.zeros(2, np.int64)

    def add(self, scores: DocumentScores, document_bytes: int, name: str = "", words: int = 0) -> None:
        """Adds one document."""
        nats_T = scores.nats_T.astype(np.float64)
        gains_T = np.zeros(len(nats_T))
        if self._baseline is not None:
            gains_T = self._baseline.nats_T[scores.document].astype(np.float64) - nats_T
            self._changed += ((gains_T > CHANGED).sum(), (gains_T < -CHANGED).sum())
        for start, stop in positions(len(nats_T)):
            sums = self._by_position.setdefault(start, np.zeros(3))
            sums += (nats_T[start:stop].sum(), min(stop, len(nats_T)) - start, gains_T[start:stop].sum())
        self._documents[scores.document] = DocumentSums(
            name, len(nats_T), document_bytes, words, float(nats_T.sum()), int(scores.correct_T.sum()),
            scores.neighbors_found, scores.true_neighbors, float(gains_T.sum()),
        )  # fmt: skip

    def figures(self, published_words: int | None = None) -> dict:
        """Returns the content of an evaluation's JSON file.

        `published_words`, if given, replaces the number of words in the text for the word-level perplexity.
        """
        documents = list(self._documents.values())
        total = DocumentSums("", *(sum(column) for column in list(zip(*documents, strict=True))[1:]))
        tokens = [sums.tokens for sums in documents]
        low, high = interval([sums.nats for sums in documents], tokens)
        figures: dict[str, Any] = {
            "perplexity": math.exp(total.nats / total.tokens),
            "perplexity_interval": [_exp(low), _exp(high)],
            "loss_nats_per_token": total.nats / total.tokens,
            "bits_per_byte": total.nats / math.log(2) / total.bytes,
            "accuracy": total.correct / total.tokens,
            "tokens": total.tokens,
            "bytes": total.bytes,
            "documents": len(documents),
        }
        if total.words:
            figures |= {"words": total.words, "word_perplexity": _exp(total.nats / (published_words or total.words))}
        if published_words:
            figures["published_words"] = published_words
        if total.true_neighbors:
            figures["recall"] = total.neighbors_found / total.true_neighbors
        by_position = sorted(self._by_position.items())
        figures["perplexity_by_position"] = [
            {"first_token": start, "tokens": int(count), "perplexity": math.exp(nats / count)}
            for start, (nats, count, _) in by_position
        ]
        if self._baseline is not None:
            figures["gain"] = {
                "against_memory_size": self._baseline.memory_size,
                "nats_per_token": total.gain / total.tokens,
                "interval": list(interval([sums.gain for sums in documents], tokens)),
                "tokens_gained": int(self._changed[0]) / total.tokens,
                "tokens_lost": int(self._changed[1]) / total.tokens,
                "by_position": [
                    {"first_token": start, "nats_per_token": gain / count} for start, (_, count, gain) in by_position
                ],
            }
        return figures

    def table(self) -> Iterator[tuple]:
        """Yields the lines of the CSV file: a header, then each document in its order in the split."""
        yield (*DocumentSums._fields, "perplexity", "bits_per_byte")
        for _, sums in sorted(self._documents.items()):
            yield (*sums, _exp(sums.nats / sums.tokens), sums.nats / math.log(2) / sums.bytes)


def positions(length: int) -> Iterator[tuple[int, int]]:
    """Yields ranges of positions in a document: tokens 0 to 127, then 128 to 255, 256 to 511, 512 to 1,023 ..."""
    start, stop = 0, 128
    while start < length:
        yield start, stop
        start, stop = stop, 2 * stop


def interval(sums_D: list[float], counts_D: list[int]) -> tuple[float | None, float | None]:
    """Returns the 95% confidence interval of the ratio of the totals, or (None, None) for a single document."""
    documents, ratio = len(sums_D), sum(sums_D) / sum(counts_D)
    if documents < 2:
        return None, None
    residuals_D = np.asarray(sums_D) - ratio * np.asarray(counts_D)
    error = math.sqrt((residuals_D**2).sum() * documents / (documents - 1)) / sum(counts_D)
    reach = float(stdtrit(documents - 1, (1 + CONFIDENCE) / 2)) * error
    return ratio - reach, ratio + reach


def _exp(loss: float | None) -> float | None:
    return None if loss is None or loss > LARGEST_LOSS else math.exp(loss)  # the bound of a wide interval may overflow
