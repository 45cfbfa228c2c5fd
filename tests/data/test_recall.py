"""Generated documents keep their promises, and questions are found as brute force finds them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memorizing.data.recall import RecallSettings, generate, question_distances, words
from memorizing.data.vocabulary import WordVocabulary
from memorizing.errors import InputError

SETTINGS = RecallSettings(bursts=12, pairs=6, mentions=2, keys=20, values=5, silence=4)


def pairs(id: str, settings: RecallSettings = SETTINGS, seed: int = 0) -> list[tuple[str, str]]:
    text = generate(settings, id, seed).text.split(" ")
    return list(zip(text[::2], text[1::2], strict=True))


def test_a_key_keeps_its_value_in_a_document_but_not_in_the_next():
    first, second = dict(pairs("recall-0")), dict(pairs("recall-1"))
    assert all(first[key] == value for key, value in pairs("recall-0"))
    assert any(first[key] != second[key] for key in first.keys() & second.keys())


def test_keys_are_silent_after_their_burst():
    told = [key for key, _ in pairs("recall-3")]
    bursts = [told[first : first + 6] for first in range(0, len(told), 6)]
    for number, burst in enumerate(bursts):
        assert all(burst.count(key) == 2 for key in burst)
        for silent in bursts[number + 1 : number + 1 + SETTINGS.silence]:
            assert not set(burst) & set(silent)
    assert any(set(bursts[0]) & set(later) for later in bursts[5:])


def test_documents_are_the_same_for_the_same_name_and_seed():
    assert pairs("recall-5") == pairs("recall-5")
    assert pairs("recall-5") != pairs("recall-6") != pairs("recall-6", seed=1)


def test_every_word_is_in_the_vocabulary():
    vocabulary = WordVocabulary(words(SETTINGS))
    assert vocabulary.size == 3 + 20 + 5
    text = generate(SETTINGS, "recall-7", 0).text
    assert vocabulary.decode(vocabulary.encode(text)) == text


@given(st.lists(st.integers(0, 6), max_size=60))
def test_distances_are_to_the_last_mention_of_the_key(keys):
    tokens = np.array([token for key in keys for token in (key, 100 + key)], np.int64)
    distances = question_distances(tokens)
    for place in range(len(tokens)):
        earlier = [at for at in range(1, place, 2) if place % 2 and tokens[at - 1] == tokens[place - 1]]
        assert distances[place] == (place - earlier[-1] if earlier else 0)


def test_impossible_recall_documents_are_refused():
    with pytest.raises(InputError, match=r"Recall\.pairs = 7 is not a multiple of Recall\.mentions = 2"):
        RecallSettings(pairs=7)
    with pytest.raises(InputError, match=r"Recall\.keys = 14 is too small.* use 15"):
        RecallSettings(pairs=6, keys=14, silence=4)
