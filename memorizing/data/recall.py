"""The recall task: documents that give keys values, and use them again near by and many segments later.

    k17 v3 k90 v41 k17 v3 ...    (a value is random at its key's first mention, and the same ever after)

Every document draws its own values, so nothing but the document itself can tell them. Text comes in bursts of one
segment: a burst mentions a few keys several times each, then these keep silent for at least `silence` segments. The
first mention in a later burst is a *far* question, which local attention cannot answer; the mentions after it are
*near* questions. Without near ones nothing would be learned: keys and values take no gradient through a memory, so
it is local attention that has to teach them to match.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int

from memorizing.data.documents import Document, Problem
from memorizing.errors import InputError


@dataclasses.dataclass(frozen=True)
class RecallSettings:
    """The shape of generated documents.

    Attributes:
        documents: how many, over all splits.
        bursts: per document.
        pairs: of key and value in a burst; with bursts of one segment, half of `Batch.segment_length`.
        mentions: of each key in a burst.
        keys, values: how many there are of each; chance is `1 / values`.
        silence: bursts between two in which a key is mentioned.
    """

    documents: int = 1000
    bursts: int = 32
    pairs: int = 32
    mentions: int = 2
    keys: int = 256
    values: int = 64
    silence: int = 9

    def __post_init__(self):
        for name in ("documents", "bursts", "pairs", "mentions", "keys", "values"):
            if getattr(self, name) < 1:
                raise InputError(f"Recall.{name} = {getattr(self, name)}: must be at least 1")
        if self.silence < 0:
            raise InputError(f"Recall.silence = {self.silence}: must be 0 or more")
        if self.pairs % self.mentions:
            raise InputError(f"Recall.pairs = {self.pairs}: must be a multiple of Recall.mentions = {self.mentions}")
        if self.keys < self.pairs // self.mentions * (self.silence + 1):
            raise InputError(
                f"Recall.keys = {self.keys}: bursts of {self.pairs // self.mentions} keys that then keep silent for "
                f"{self.silence} bursts need at least {self.pairs // self.mentions * (self.silence + 1)} keys"
            )


def words(settings: RecallSettings) -> list[str]:
    """The vocabulary: keys `k0 k1 ...`, then values `v0 v1 ...`."""
    return [f"k{key}" for key in range(settings.keys)] + [f"v{value}" for value in range(settings.values)]


class RecallDocuments:
    """The generated documents, as a source beside `FolderDocuments`."""

    def __init__(self, settings: RecallSettings, seed: int):
        self.settings, self._seed = settings, seed
        self.problems: list[Problem] = []
        self.state = ""

    def ids(self) -> list[str]:
        return [f"recall-{number}" for number in range(self.settings.documents)]

    def read(self, ids: Sequence[str]) -> Iterator[Document | Problem]:
        return (generate(self.settings, id, self._seed) for id in ids)


def generate(settings: RecallSettings, id: str, seed: int) -> Document:
    """One document, the same for the same settings, name and seed."""
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
    """For each token that is a value: how many tokens ago it was last told. 0 where nobody can know.

    That is, for keys (drawn at random) and for values at the first mention of their key.
    """
    distances = np.zeros(len(tokens), np.int64)
    last: dict[int, int] = {}
    for place in range(1, len(tokens), 2):
        key = int(tokens[place - 1])
        distances[place] = place - last.get(key, place)
        last[key] = place
    return distances
