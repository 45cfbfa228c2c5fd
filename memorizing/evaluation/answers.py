"""Answers to the questions of the recall task (`data/recall.py`), counted by the distance to the definition."""

import numpy as np
from jaxtyping import Bool, Int

from memorizing.data.recall import question_distances


class Answers:
    """Counts of questions and of exact answers, for near and for far definitions.

    A near definition lies less than a segment back; a far one lies `FAR` segments back or more.
    """

    FAR = 8

    def __init__(self, segment_length: int):
        self._segment_length = segment_length
        self._counts = {"near": np.zeros(2, np.int64), "far": np.zeros(2, np.int64)}

    def add(self, tokens_T: Int[np.ndarray, "T"], correct_T: Bool[np.ndarray, "T"]) -> None:
        """Adds the questions of one document."""
        distances_T = question_distances(tokens_T)
        near_T = (distances_T > 0) & (distances_T < self._segment_length)
        far_T = distances_T >= self.FAR * self._segment_length
        for kind, question_T in (("near", near_T), ("far", far_T)):
            self._counts[kind] += (int(question_T.sum()), int(correct_T[question_T].sum()))

    def figures(self) -> dict[str, dict[str, int | float]]:
        """Returns the number of questions and the share of exact answers, for each kind."""
        return {
            kind: {"questions": int(questions), "exact": float(exact / max(questions, 1))}
            for kind, (questions, exact) in self._counts.items()
        }
