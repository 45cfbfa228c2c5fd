"""For the recall task (`data/recall.py`): how many values were told exactly, by how long ago they were defined."""

import numpy as np
from jaxtyping import Bool, Int

from memorizing.data.recall import question_distances


class Answers:
    """Counts of questions and exact answers, near ones and far ones."""

    FAR = 8
    """Segments after which a question counts as far."""

    def __init__(self, segment_length: int):
        self._segment_length = segment_length
        self._counts = {"near": np.zeros(2, np.int64), "far": np.zeros(2, np.int64)}

    def add(self, tokens_T: Int[np.ndarray, "T"], correct_T: Bool[np.ndarray, "T"]) -> None:
        """Counts the questions of one document."""
        distances_T = question_distances(tokens_T)
        near_T = (distances_T > 0) & (distances_T < self._segment_length)
        far_T = distances_T >= self.FAR * self._segment_length
        for kind, asked_T in (("near", near_T), ("far", far_T)):
            self._counts[kind] += (int(asked_T.sum()), int(correct_T[asked_T].sum()))

    def figures(self) -> dict[str, dict[str, int | float]]:
        """Per kind: how many questions, and the share answered exactly."""
        return {
            kind: {"questions": int(asked), "exact": float(exact / max(asked, 1))}
            for kind, (asked, exact) in self._counts.items()
        }
