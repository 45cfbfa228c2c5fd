"""`memorizing inspect`: one document as a model with a memory read it, as a page to look at and as JSON lines.

    gain of a token = its loss without a memory - its loss with one            (nats; the XL cache is there in both)

Where to read on: `lookups.py` (how it is read), `pages/inspect.js` (the page).
"""

import base64
import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from memorizing.data.documents import FolderSettings, Problem, read_path
from memorizing.data.recall import question_distances
from memorizing.data.tokens import PreparedTokens
from memorizing.data.vocabulary import Vocabulary, encoded_text
from memorizing.errors import InputError
from memorizing.evaluation.lookups import NOWHERE, read_document
from memorizing.files import AnyPath, atomic_write
from memorizing.memory.settings import MemorySettings
from memorizing.model.settings import ModelSettings
from memorizing.model.transformer import Parameters, gates
from memorizing.reports.pages import check_replaceable, page, script
from memorizing.reports.token_kinds import KINDS, kinds_of, texts_of
from memorizing.storage.snapshots import read_text_of

CONTEXT = 12
"""Tokens on each side of a retrieved one that are shown with it."""
LINES = ".jsonl"
MOST = 30
"""Of the most used memories, and of the tokens that gained or lost most."""


class Shown(NamedTuple):
    """What is kept of the lookups: the best of each token of a part of the document, `L` layers in order.

    Attributes:
        first: the place of the first token of that part.
        gates_TLH: how far each head's gate was open; 0 where nothing was found.
    """

    first: int
    places_TLHK: Int[np.ndarray, "T L H K"]
    scores_TLHK: Float[np.ndarray, "T L H K"]
    weights_TLHK: Float[np.ndarray, "T L H K"]
    gates_TLH: Float[np.ndarray, "T L H"]


@dataclasses.dataclass(frozen=True)
class Inspection:
    """A document that was read with a memory, and without.

    Attributes:
        name, texts: of the document, and of each of its tokens.
        nats_T, without_T, correct_T: losses with a memory and without, and whether the model's first choice was right.
        layers, gates_LH: the memory layers, and how far their heads' gates are open: as learned; or, where that depends
            on the token, the mean over all that found something.
        gates_are_learned: which of the two.
        top_T: the place that all heads together made most of (weights times gates), or `NOWHERE`.
        used_T: how much of that each place was given, over all later tokens.
        distances_LHR: for each head, how much of its weight went back 2^R to 2^(R+1) tokens.
    """

    name: str
    tokens_T: Int[np.ndarray, "T"]
    texts: list[str]
    nats_T: Float[np.ndarray, "T"]
    without_T: Float[np.ndarray, "T"]
    correct_T: Bool[np.ndarray, "T"]
    layers: list[int]
    gates_LH: Float[np.ndarray, "L H"]
    gates_are_learned: bool
    top_T: Int[np.ndarray, "T"]
    used_T: Float[np.ndarray, "T"]
    distances_LHR: Float[np.ndarray, "L H R"]
    shown: Shown

    @property
    def gains_T(self) -> Float[np.ndarray, "T"]:
        return self.without_T - self.nats_T


def inspect(
    model: ModelSettings,
    memory: MemorySettings,
    parameters: Parameters,
    segment_length: int,
    name: str,
    tokens_T: Int[np.ndarray, "T"],
    vocabulary: Vocabulary,
    first: int = 0,
    count: int = 10_000,
    top: int = 4,
) -> Inspection:
    """Reads a document twice; keeps the `top` neighbors of each token and head in `count` tokens from `first` on."""
    length, layers = len(tokens_T), sorted(model.memory_layers)
    nats_T, without_T = np.zeros(length, np.float32), np.zeros(length, np.float32)
    correct_T = np.zeros(length, bool)
    nothing = dataclasses.replace(memory, size=0)
    for segment in read_document(model, nothing, parameters, tokens_T, segment_length, vocabulary.begin):
        without_T[segment.first : segment.first + len(segment.nats_N)] = segment.nats_N
    stop, heads = min(first + count, length), model.heads
    top = min(top, memory.retrieved)
    shape = (stop - first, len(layers), heads, top)
    shown = Shown(
        first, np.full(shape, NOWHERE, np.int32), *(np.zeros(own, np.float32) for own in (shape, shape, shape[:3]))
    )
    opened_LH, asked_LH = np.zeros(shape[1:3]), np.zeros(shape[1:3], int)
    top_T, used_T = np.full(length, NOWHERE, np.int64), np.zeros(length)
    distances_LHR = np.zeros((len(layers), heads, 1 + int(length).bit_length()))
    for segment in read_document(model, memory, parameters, tokens_T, segment_length, vocabulary.begin):
        own = slice(segment.first, segment.first + len(segment.nats_N))
        nats_T[own], correct_T[own] = segment.nats_N, segment.correct_N
        if not segment.layers:
            continue
        places_NLHK, scores_NLHK, weights_NLHK, gates_NLH = (
            np.stack([segment.layers[layer][part].swapaxes(0, 1) for layer in layers], axis=1) for part in range(4)
        )
        opened_LH += gates_NLH.sum(0, dtype=np.float64)
        asked_LH += (gates_NLH > 0).sum(0)
        part, at = _overlap(own, slice(first, stop))
        for kept, new in zip(shown[1:4], (places_NLHK, scores_NLHK, weights_NLHK), strict=True):
            kept[at] = new[part][..., :top]
        shown.gates_TLH[at] = gates_NLH[part]
        mass_NLHK = weights_NLHK * gates_NLH[..., None]
        ago_NLHK = np.arange(own.start, own.stop)[:, None, None, None] - places_NLHK
        for layer in range(len(layers)):
            for head in range(heads):
                bins = np.log2(np.maximum(ago_NLHK[:, layer, head], 1)).astype(int)
                np.add.at(distances_LHR[layer, head], bins.ravel(), weights_NLHK[:, layer, head].ravel())
        np.add.at(used_T, np.maximum(places_NLHK, 0).ravel(), np.where(places_NLHK >= 0, mass_NLHK, 0.0).ravel())
        top_T[own] = [_heaviest(*pair) for pair in zip(places_NLHK, mass_NLHK, strict=True)]
    texts, learned = texts_of(vocabulary.pieces(tokens_T)), gates(parameters)
    gates_LH = opened_LH / np.maximum(asked_LH, 1)
    if learned:
        gates_LH = np.stack([np.broadcast_to(learned[layer], heads) for layer in layers])
    return Inspection(
        name, tokens_T, texts, nats_T, without_T, correct_T, layers, gates_LH, bool(learned), top_T, used_T,
        distances_LHR, shown,
    )  # fmt: skip


def _overlap(one: slice, other: slice) -> tuple[slice, slice]:
    """What two ranges share, counted from the start of each."""
    start, stop = max(one.start, other.start), max(max(one.start, other.start), min(one.stop, other.stop))
    return slice(start - one.start, stop - one.start), slice(start - other.start, stop - other.start)


def _heaviest(places_LHK: Int[np.ndarray, "L H K"], mass_LHK: Float[np.ndarray, "L H K"]) -> int:
    """The place with the largest sum; the earliest of equal ones; `NOWHERE` where nothing was found."""
    there = places_LHK != NOWHERE
    if not there.any():
        return NOWHERE
    places, index = np.unique(places_LHK[there], return_inverse=True)
    return int(places[np.argmax(np.bincount(index, mass_LHK[there]))])


def summary(it: Inspection) -> dict[str, Any]:
    """Figures over the whole document."""
    kinds, gains_T = np.asarray(kinds_of(it.texts)), it.gains_T.astype(np.float64)
    order = np.argsort(-gains_T, kind="stable")
    of_kinds = [(kind, gains_T[kinds == kind]) for kind in KINDS if (kinds == kind).any()]
    halves = np.cumsum(it.distances_LHR, -1) >= it.distances_LHR.sum(-1, keepdims=True) / 2
    return {
        "tokens": len(gains_T),
        "loss": float(it.nats_T.mean(dtype=np.float64)),
        "loss_without": float(it.without_T.mean(dtype=np.float64)),
        "gain": float(gains_T.mean()),
        "kinds": [
            {"kind": kind, "tokens": len(own), "gain": float(own.mean()), "share": _share(own.sum(), gains_T.sum())}
            for kind, own in of_kinds
        ],
        "heads": [
            {
                "layer": layer,
                "head": head,
                "gate": float(it.gates_LH[number, head]),
                "median_distance": 2 ** int(halves[number, head].argmax()),
                "distances": _shares(it.distances_LHR[number, head]),
            }
            for number, layer in enumerate(it.layers)
            for head in range(it.gates_LH.shape[1])
        ],
        "gained_most": order[:MOST][gains_T[order[:MOST]] > 0].tolist(),
        "lost_most": order[::-1][:MOST][gains_T[order[::-1][:MOST]] < 0].tolist(),
        "used_most": [
            {"place": int(place), "used": float(it.used_T[place])}
            for place in np.argsort(-it.used_T, kind="stable")[:MOST]
            if it.used_T[place] > 0
        ],
    }


def _share(part: float, whole: float) -> float | None:
    return float(part / whole) if whole > 0 else None


def _shares(parts: Float[np.ndarray, "R"]) -> list[float]:
    return (parts / parts.sum()).round(4).tolist() if parts.sum() else parts.tolist()


def definitions_found(
    tokens_T: Int[np.ndarray, "T"], correct_T: Bool[np.ndarray, "T"], top_T: Int[np.ndarray, "T"], segment_length: int
) -> tuple[int, int]:
    """Of a document of the recall task: how many questions of earlier segments were answered right, and in how many of
    these the token looked up before all others is of the definition: of the same key and value, told before."""
    before_T, after_T = np.concatenate([[-1], tokens_T[:-1]]), np.concatenate([tokens_T[1:], [-1]])
    asked_T = (question_distances(tokens_T) >= segment_length) & correct_T
    place_T = np.maximum(top_T, 0)
    is_value_T = (tokens_T[place_T] == tokens_T) & (before_T[place_T] == before_T)
    is_key_T = (tokens_T[place_T] == before_T) & (after_T[place_T] == tokens_T)
    told_T = (top_T >= 0) & (is_value_T | is_key_T)
    return int(asked_T.sum()), int((asked_T & told_T).sum())


def lines(it: Inspection) -> Iterator[dict[str, Any]]:
    """One for each token of the part that is shown: its losses, and what each head retrieved, best first."""
    for number in range(len(it.shown.places_TLHK)):
        place = it.shown.first + number
        found = []
        for layer, own in enumerate(it.layers):
            for head in range(it.gates_LH.shape[1]):
                parts = zip(*(part[number, layer, head].tolist() for part in it.shown[1:4]), strict=True)
                retrieved = [
                    {"place": at, "text": it.texts[at] if at >= 0 else "", "score": score, "weight": weight}
                    for at, score, weight in parts
                    if at != NOWHERE
                ]
                if retrieved:
                    gate = float(it.shown.gates_TLH[number, layer, head])
                    found.append({"layer": own, "head": head, "gate": gate, "retrieved": retrieved})
        yield {
            "place": place,
            "token": int(it.tokens_T[place]),
            "text": it.texts[place],
            "nats": float(it.nats_T[place]),
            "nats_without": float(it.without_T[place]),
            "correct": bool(it.correct_T[place]),
            "heads": found,
        }


def chosen_document(
    tokens: PreparedTokens, split: str, document: str, folder: FolderSettings, say: Callable[[str], None] = print
) -> tuple[str, Int[np.ndarray, "T"]]:
    """Name and tokens of a document of the split; or else of a text file, or of a folder, all of it as one document.

    Raises:
        InputError: when there is no such thing, or no text in it.
    """
    path = Path(document)
    # An imported model may have a vocabulary alone.
    own = tokens.split(split) if tokens.manifest["splits"] or not path.exists() else None
    names = own.names() if own else []
    if own and document in names:
        number = names.index(document)
        return document, own.read(number, 0, int(own.lengths[number]))
    if not path.exists():
        some = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        raise InputError(
            f"--document={document}: no document of the {split} split of {tokens.folder}, which has {some}, and no "
            "file or folder"
        )
    texts = []
    for part in read_path("--document", path, folder):
        if isinstance(part, Problem):
            say(f"{part.place}: {part.message}")
        else:
            texts.append(part.text)
    encoded = encoded_text(tokens.vocabulary, "".join(texts), f"--document={document}")
    if not len(encoded):
        raise InputError(f"--document={document}: is empty")
    return path.resolve().name, encoded


def page_name(document: str, name: str, tokens_T: Int[np.ndarray, "T"], memory_size: int) -> str:
    """What its page is called, if nobody says; files that have a name in common are told apart by what is in them."""
    parts = [re.sub(r"[^\w.-]+", "_", name)]
    if Path(document).exists():
        parts.append(read_text_of(tokens_T, name).sha256[:8])
    return "-".join([*parts, "memory", f"{memory_size}.html"])


def check_out(out: AnyPath) -> None:
    """Refuses to write where something else lies than an earlier page of `memorizing inspect` with its JSON lines.

    Raises:
        InputError: naming what is in the way.
    """
    beside = out.with_suffix(LINES)
    if out == beside:
        raise InputError(
            f"--out={out}: {LINES} is for the JSON lines beside the page: name it {out.with_suffix('.html')}"
        )
    check_replaceable("--out", out, "inspect")
    if beside.exists() and not out.exists():
        raise InputError(
            f"--out={out}: the JSON lines would go to {beside}, which is there without such a page: name another "
            "file, or remove it"
        )


def check_range(first: int, count: int, top: int, length: int) -> None:
    """Refuses a part to show that is not in a document of `length` tokens."""
    if not 0 <= first < length:
        raise InputError(f"--first={first}: the document has tokens 0 to {length - 1}")
    for name, value in (("tokens", count), ("top", top)):
        if value < 1:
            raise InputError(f"--{name}={value}: must be at least 1")


def write(
    it: Inspection,
    out: AnyPath,
    about: dict[str, Any],
    recall_segment: int | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Writes the page `out` and, beside it, the JSON lines `out` with the ending `.jsonl`.

    For a document of the recall task `recall_segment` is the segment length: it says how many definitions were found.
    """
    stop = it.shown.first + len(it.shown.places_TLHK)
    data = {
        "about": about | {"document": it.name, "first": it.shown.first, "stop": stop, "context": CONTEXT},
        "summary": summary(it),
        "layers": it.layers,
        "gates": _packed(it.shown.gates_TLH, np.float32),
        "gates_are_learned": it.gates_are_learned,
        "texts": it.texts,
        "gains": _packed(it.gains_T, np.float32),
        "nats": _packed(it.nats_T, np.float32),
        "correct": _packed(it.correct_T, np.uint8),
        "shape": list(it.shown.places_TLHK.shape),
        "places": _packed(it.shown.places_TLHK, np.int32),
        "scores": _packed(it.shown.scores_TLHK, np.float32),
        "weights": _packed(it.shown.weights_TLHK, np.float32),
    }
    body = f"<style>\n{script('inspect.css')}\n</style>"
    atomic_write(out, page(f"{it.name}: what the memory is asked", body, [script("inspect.js")], data, "inspect"))
    atomic_write(out.with_suffix(LINES), "".join(json.dumps(line) + "\n" for line in lines(it)))
    about_gain = data["summary"]
    say(
        f"{it.name}: {about_gain['tokens']:,} tokens, {about_gain['loss']:.4f} nats each with the memory, "
        f"{about_gain['loss_without']:.4f} without"
    )
    if recall_segment is not None:
        asked, told = definitions_found(it.tokens_T, it.correct_T, it.top_T, recall_segment)
        say(
            f"of {asked} questions of earlier segments that were answered right, {told} looked up the definition "
            "before all else"
        )
    if (length := len(it.texts)) > stop - it.shown.first:
        say(
            f"what was retrieved is kept for tokens {it.shown.first:,} to {stop - 1:,} of {length:,}; for others, say "
            "--first and --tokens"
        )
    say(f"page: {out}\nJSON lines: {out.with_suffix(LINES)}")


def _packed(values: np.ndarray, dtype: type) -> str:
    return base64.b64encode(np.ascontiguousarray(values, dtype).astype(np.dtype(dtype).newbyteorder("<"))).decode()
