"""Lookups, compared with brute force over all keys of a document, and with evaluation."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from memorizing.data.vocabulary import ByteVocabulary
from memorizing.evaluation.lookups import NOWHERE, read_document, segment_of
from memorizing.evaluation.perplexity import TrainedModel
from memorizing.memory.bank import valid
from memorizing.memory.settings import MemorySettings
from memorizing.model.carry import empty_carry
from memorizing.model.intermediates import Collect
from memorizing.model.settings import ModelSettings
from memorizing.model.transformer import abstract_model, apply_and_collect, apply_model, create_model
from memorizing.reports.inspection import Inspection, ShownRange, inspect_document
from memorizing.reports.inspection_figures import definitions_found, summary
from memorizing.reports.inspection_page import json_lines as lines

N, T, K = 8, 61, 5
MODEL = ModelSettings(
    vocabulary_size=259, layers=2, embedding_size=16, heads=2, head_size=8, feed_forward_size=32, memory_layers=(1,),
    gate_bias=0.0, dtype="float32", key_shift=True,
)  # fmt: skip
MEMORY = MemorySettings(size=16, neighbors=K, dtype="float32", search="exact")
TOKENS = np.random.default_rng(0).integers(97, 123, T).astype(np.int32) + 3


@functools.cache
def parameters():
    return create_model(MODEL, MEMORY, seed=3)[1]


@functools.cache
def queries_and_keys() -> tuple[np.ndarray, np.ndarray]:
    """Returns keys or queries of all inputs `[H, T, D]`; those of the first layer do not depend on the memory."""
    memory = dataclasses.replace(MEMORY, size=-(-T // N) * N)
    graph, _ = abstract_model(MODEL, memory)
    carry, queries = empty_carry(MODEL, memory, 1, N), []
    for first in range(0, T, N):
        batch, collect = segment_of(TOKENS, first, N), Collect(lookups=True)
        _, carry, intermediates = apply_and_collect(graph, parameters(), batch, carry, collect)
        queries.append(np.asarray(intermediates[1].lookups.queries_BHND[0]))
    assert np.asarray(valid(carry.banks[0])).all()
    return np.concatenate(queries, axis=1), np.asarray(carry.banks[0].keys_BHMD[0])


@pytest.mark.parametrize("size", [8, 16, 64])
def test_places_scores_and_weights_are_those_of_brute_force(size):
    memory = dataclasses.replace(MEMORY, size=size)
    queries_HTD, keys_HTD = queries_and_keys()
    seen = 0
    for segment in read_document(MODEL, memory, parameters(), TOKENS, N):
        if segment.first == 0:
            assert not segment.layers
            continue
        looked = segment.layers[1]
        held = range(max(0, segment.first - size), segment.first)  # inputs; the token read there is the one before
        for head in range(2):
            for number in range(len(segment.nats_N)):
                scores = keys_HTD[head][held] @ queries_HTD[head, segment.first + number]
                best = np.argsort(-scores, kind="stable")[:K]
                weights = np.exp(scores - scores.max())
                weights = weights[best] / weights[best].sum()
                np.testing.assert_allclose(looked.scores_HNK[head, number], scores[best], rtol=1e-4, atol=1e-5)
                np.testing.assert_allclose(looked.weights_HNK[head, number], weights, rtol=1e-3, atol=1e-5)
                gaps = np.abs(np.diff(np.sort(scores)[::-1][: K + 1]))
                if gaps.min() > 1e-4:  # else two are equal but for rounding
                    assert looked.places_HNK[head, number].tolist() == [held[place] - 1 for place in best]
                    seen += 1
    assert seen > 20


@pytest.mark.parametrize(
    "kept",
    [
        {"eviction": "reservoir", "sink": 3},
        {"eviction": "least_used", "maximum_age": 30},
        {"eviction": "none", "duplicate_score": 0.9},
        {"write_every": 4},
        {"maximum_age": 10, "write_every": 2},
        {"writes": "beyond_cache", "maximum_age": 21, "write_every": 2},
        {"clear_at_documents": False},
    ],
    ids=repr,
)
def test_lookups_report_token_positions_for_every_eviction_rule(kept):
    """The key at the place that is told has the score that is told; and the place is one that may be kept."""
    memory = dataclasses.replace(MEMORY, neighbors=8, **kept)
    queries_HTD, keys_HTD = queries_and_keys()
    places, youngest = set(), N if memory.writes == "beyond_cache" else 0
    for segment in read_document(MODEL, memory, parameters(), TOKENS, N):
        for looked in segment.layers.values():
            inputs_HNK = looked.places_HNK + 1
            exists_HNK = np.isfinite(looked.scores_HNK)
            for head, number, one in np.argwhere(exists_HNK):
                own = keys_HTD[head, inputs_HNK[head, number, one]] @ queries_HTD[head, segment.first + number]
                np.testing.assert_allclose(looked.scores_HNK[head, number, one], own, rtol=1e-4, atol=1e-4)
            found = inputs_HNK[exists_HNK]
            assert (found % memory.write_every == 0).all() and (segment.first - found > youngest).all()
            if memory.maximum_age is not None:
                assert (segment.first - found <= memory.maximum_age).all()
            places |= set(found.tolist())
    assert len(places) > 8


def test_slots_below_the_minimum_score_are_not_found_and_get_no_weight():
    memory = dataclasses.replace(MEMORY, minimum_score=0.5)
    found = [segment.layers[1] for segment in read_document(MODEL, memory, parameters(), TOKENS, N) if segment.layers]
    missing = np.concatenate([looked.places_HNK.ravel() == NOWHERE for looked in found])
    weights = np.concatenate([looked.weights_HNK.ravel() for looked in found])
    assert 0 < missing.mean() < 1 and (weights[missing] == 0).all() and (weights[~missing] > 0).all()


@functools.cache
def inspected(first: int = 0, count: int = 1000) -> Inspection:
    trained = TrainedModel(MODEL, MEMORY, N, parameters())
    return inspect_document(trained, "document", TOKENS, ByteVocabulary(), ShownRange(first, count, 3))


def test_losses_equal_those_of_evaluation_with_and_without_a_memory():
    it = inspected()
    graph, _ = abstract_model(MODEL, MEMORY)
    for memory, nats_T in ((MEMORY, it.nats_T), (dataclasses.replace(MEMORY, size=0), it.without_T)):
        graph, _ = abstract_model(MODEL, memory)
        carry = empty_carry(MODEL, memory, 1, N)
        for first in range(0, T, N):
            logits_BNV, carry = apply_model(graph, parameters(), segment_of(TOKENS, first, N), carry)
            own = TOKENS[first : first + N]
            expected = -np.asarray(jax.nn.log_softmax(logits_BNV[0]))[np.arange(len(own)), own]
            np.testing.assert_allclose(nats_T[first : first + N], expected, rtol=1e-4, atol=1e-5)
    assert np.abs(it.gains_T[N:]).max() > 1e-3 and (it.gains_T[:N] == 0).all()


def test_a_page_of_a_part_agrees_with_that_of_the_whole():
    whole, part = inspected(), inspected(13, 20)
    for one, other in zip(whole.shown[1:], part.shown[1:], strict=True):
        np.testing.assert_array_equal(one[13:33], other)
    assert summary(whole) == summary(part)
    assert list(lines(part)) == list(lines(whole))[13:33]


def test_json_lines_hold_the_text_of_retrieved_tokens():
    told = list(lines(inspected()))
    assert [line["place"] for line in told] == list(range(T))
    assert "".join(line["text"] for line in told) == ByteVocabulary().decode(TOKENS)
    retrieved = [(line, each) for line in told for head in line["heads"] for each in head["retrieved"]]
    assert len(retrieved) == (T - N) * 2 * 3
    for line, each in retrieved:
        assert -1 <= each["place"] < line["place"] - 1
        assert each["text"] == (told[each["place"]]["text"] if each["place"] >= 0 else "")


def test_all_attention_weight_is_counted():
    """The weights by place, and by distance, add up to the number of tokens that had a memory."""
    it = inspected()
    begin = it.shown.places_TLHK == -1  # of the begin token, which is no place of the text
    assert not begin.all()
    asked = T - N
    np.testing.assert_allclose(it.distances_LHR.sum(-1), asked, rtol=1e-5)
    assert it.used_T.sum() <= asked * it.gates_LH.sum() + 1e-4
    figures = summary(it)
    assert sum(kind["tokens"] for kind in figures["kinds"]) == T
    assert sum(kind["gain"] * kind["tokens"] for kind in figures["kinds"]) == pytest.approx(it.gains_T.sum(), rel=1e-4)


def test_definitions_that_were_looked_up_are_counted():
    """Pairs (key, value) in segments of 4. Far questions: fillers at 9 and 11, told at 5 and 7; a, b at 13, 15."""
    a, b, x, y = 10, 11, 50, 51
    tokens_T = np.array([a, x, b, y] + [20, 60, 21, 61] * 2 + [a, x, b, y], np.int32)
    top_T = np.full(16, NOWHERE)
    top_T[[9, 11, 13, 15]] = 5, 5, 0, 4  # the value, another key's value, the key, a filler
    assert definitions_found(tokens_T, np.ones(16, bool), top_T, 4) == (4, 2)
    assert definitions_found(tokens_T, np.arange(16) < 12, top_T, 4) == (2, 1)
