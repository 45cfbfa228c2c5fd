"""Figures of an inspected document: losses, gains by kind of token, distances of heads, most used positions."""

from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from memorizing.data.recall import question_distances
from memorizing.reports.inspection import Inspection
from memorizing.reports.token_kinds import KINDS, kinds_of

MOST = 30
"""Number of tokens that gained most, that lost most, and of most used positions in a summary."""


def summary(inspection: Inspection) -> dict[str, Any]:
    """Returns figures over the whole document, for JSON."""
    gains_T = inspection.gains_T.astype(np.float64)
    order = np.argsort(-gains_T, kind="stable")
    most_gained, most_lost = order[:MOST], order[::-1][:MOST]
    return {
        "tokens": len(gains_T),
        "loss": float(inspection.nats_T.mean(dtype=np.float64)),
        "loss_without": float(inspection.without_T.mean(dtype=np.float64)),
        "gain": float(gains_T.mean()),
        "kinds": _kinds(inspection.texts, gains_T),
        "heads": _heads(inspection),
        "gained_most": most_gained[gains_T[most_gained] > 0].tolist(),
        "lost_most": most_lost[gains_T[most_lost] < 0].tolist(),
        "used_most": [
            {"place": int(place), "used": float(inspection.used_T[place])}
            for place in np.argsort(-inspection.used_T, kind="stable")[:MOST]
            if inspection.used_T[place] > 0
        ],
    }


def _kinds(texts: list[str], gains_T: Float[np.ndarray, "T"]) -> list[dict[str, Any]]:
    """Returns the mean gain of each kind of token, and its share of the total gain."""
    kinds_T, total = np.asarray(kinds_of(texts)), gains_T.sum()
    figures = []
    for kind in KINDS:
        if (kinds_T == kind).any():
            gains = gains_T[kinds_T == kind]
            share = float(gains.sum() / total) if total > 0 else None
            figures.append({"kind": kind, "tokens": len(gains), "gain": float(gains.mean()), "share": share})
    return figures


def _heads(inspection: Inspection) -> list[dict[str, Any]]:
    """Returns the gate of each head and how far back it looks, in tokens."""
    weights_LHR = inspection.distances_LHR
    beyond_half_LHR = np.cumsum(weights_LHR, -1) >= weights_LHR.sum(-1, keepdims=True) / 2
    return [
        {
            "layer": layer,
            "head": head,
            "gate": float(inspection.gates_LH[index, head]),
            "median_distance": 2 ** int(beyond_half_LHR[index, head].argmax()),
            "distances": _shares(weights_LHR[index, head]),
        }
        for index, layer in enumerate(inspection.layers)
        for head in range(inspection.gates_LH.shape[1])
    ]


def _shares(weights_R: Float[np.ndarray, "R"]) -> list[float]:
    return (weights_R / weights_R.sum()).round(4).tolist() if weights_R.sum() else weights_R.tolist()


def definitions_found(
    tokens_T: Int[np.ndarray, "T"], correct_T: Bool[np.ndarray, "T"], top_T: Int[np.ndarray, "T"], segment_length: int
) -> tuple[int, int]:
    """Counts answered questions in a document of the recall task, and those whose top position is a definition.

    Only questions about earlier segments that were answered right count. A definition is an earlier pair of the same
    key and value; its position is that of the key or of the value.
    """
    before_T, after_T = np.concatenate([[-1], tokens_T[:-1]]), np.concatenate([tokens_T[1:], [-1]])
    answered_T = (question_distances(tokens_T) >= segment_length) & correct_T
    place_T = np.maximum(top_T, 0)
    is_value_T = (tokens_T[place_T] == tokens_T) & (before_T[place_T] == before_T)
    is_key_T = (tokens_T[place_T] == before_T) & (after_T[place_T] == tokens_T)
    is_definition_T = (top_T >= 0) & (is_value_T | is_key_T)
    return int(answered_T.sum()), int((answered_T & is_definition_T).sum())
