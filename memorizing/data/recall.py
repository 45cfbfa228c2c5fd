"""The recall task: generated documents that assign values to keys and mention them again later.

    k17 v3 k90 v41 k17 v3 ...    (a key gets a random value at its first mention and keeps it in this document)

Every document draws its own values, so only the document itself can tell them. Text comes in bursts of one segment. A
burst mentions a few keys several times each; then these keys are silent for at least `silence` segments. The first
mention in a later burst is a *far* question, which local attention cannot answer. The mentions after it are *near*
questions. Without them the model would learn nothing: keys and values in a memory get no gradient, so local attention
has to teach them to match.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int

from memorizing.data.documents import Document, Problem, Split
from memorizing.errors import InputError
from memorizing.sections import check_range


@dataclasses.dataclass(frozen=True)
class RecallSettings:
    """Settings of the recall task: the shape of its generated documents.

    Attributes:
        documents: number of documents over all splits.
        bursts: number of bursts per document.
        pairs: number of pairs of key and value in a burst. With bursts of one segment, half of `Batch.segment_length`.
        mentions: number of mentions of each key in a burst.
        keys: number of different keys.
        values: number of different values. Chance is `1 / values`.
        silence: smallest number of bursts between two that mention the same key.
    """

    documents: int = 1000
    bursts: int = 32
    pairs: int = 32
    mentions: int = 2
    keys: int = 256
    values: int = 64
    silence: int = 9

    def __post_init__(self):
        check_range(self, 1, 10_000_000, "documents", "bursts", "pairs", "mentions", "keys", "values")
        check_range(self, 0, 10_000_000, "silence")
        if self.pairs % self.mentions:
            raise InputError(
                f"Recall.pairs = {self.pairs} is not a multiple of Recall.mentions = {self.mentions}. Use one"
            )
        if self.keys < self.pairs // self.mentions * (self.silence + 1):
            raise InputError(
                f"Recall.keys = {self.keys} is too small. With {self.pairs // self.mentions} keys per burst and "
                f"Recall.silence = {self.silence}, use {self.pairs // self.mentions * (self.silence + 1)} or more"
            )


def words(settings: RecallSettings) -> list[str]:
    """Returns the vocabulary: keys `k0 k1 ...`, then values `v0 v1 ...`."""
    return [f"k{key}" for key in range(settings.keys)] + [f"v{value}" for value in range(settings.values)]


class RecallDocuments:
    """The generated documents, with the interface of `FolderDocuments`."""

    def __init__(self, settings: RecallSettings, seed: int):
        self.settings, self._seed = settings, seed
        self.problems: list[Problem] = []
        self.state = ""

    def ids(self) -> list[str]:
        return [f"recall-{number}" for number in range(self.settings.documents)]

    def split(self, id: str) -> Split | None:
        return None

    def read(self, ids: Sequence[str]) -> Iterator[Document | Problem]:
        return (generate(self.settings, id, self._seed) for id in ids)


def generate(settings: RecallSettings, id: str, seed: int) -> Document:
    """Generates a document. The same settings, name and seed give the same document."""
    rng = np.random.default_rng([seed, int(id.rpartition("-")[2])])
    value_of = rng.integers(settings.values, size=settings.keys)
    last_burst = np.full(settings.keys, -settings.silence - 1)
    text = []
    for burst in range(settings.bursts):
        rested = np.flatnonzero(burst - last_burst > settings.silence)
        chosen = rng.choice(rested, settings.pairs // settings.mentions, replace=False)
        last_burst[chosen] = burst
        for key in rng.permutation(np.repeat(chosen, settings.mentions)):
            text.append(f"k{key} v{value_of[key]}")
    return Document(id, "", " ".join(text))


def question_distances(tokens: Int[np.ndarray, "T"]) -> Int[np.ndarray, "T"]:
    """Returns the distance of each value token to its key's previous value, in tokens; 0 for all other tokens.

    Keys are drawn at random, and so is a value at the first mention of its key: these cannot be predicted.
    """
    distances = np.zeros(len(tokens), np.int64)
    last: dict[int, int] = {}
    for place in range(1, len(tokens), 2):
        key = int(tokens[place - 1])
        distances[place] = place - last.get(key, place)
        last[key] = place
    return distances
