"""The page of `memorizing inspect` and its JSON lines; and the choice of the document.

The page draws itself: `pages/inspect.js`.
"""

import base64
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from memorizing.data.documents import FolderSettings, Problem, read_path
from memorizing.data.tokens import PreparedTokens
from memorizing.data.vocabulary import encoded_text
from memorizing.errors import InputError
from memorizing.evaluation.lookups import NOWHERE
from memorizing.files import AnyPath, atomic_write
from memorizing.reports.inspection import Inspection
from memorizing.reports.inspection_figures import definitions_found, summary
from memorizing.reports.pages import check_replaceable, page, script
from memorizing.storage.snapshots import read_text_of

CONTEXT = 12
"""Number of tokens shown on each side of a retrieved one."""
LINES = ".jsonl"


def choose_document(
    tokens: PreparedTokens, split: str, document: str, folder: FolderSettings, say: Callable[[str], None] = print
) -> tuple[str, Int[np.ndarray, "T"]]:
    """Returns the name and the tokens of a document of the split, of a text file, or of a folder read as one document.

    Raises:
        InputError: if there is no such document, file or folder, or it has no text.
    """
    path = Path(document)
    # Prepared tokens of a vocabulary alone have no splits.
    documents = tokens.split(split) if tokens.manifest["splits"] or not path.exists() else None
    names = documents.names() if documents else []
    if documents and document in names:
        number = names.index(document)
        return document, documents.read(number, 0, int(documents.lengths[number]))
    if not path.exists():
        examples = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        raise InputError(
            f"--document={document} is not a document of the {split} split of {tokens.folder}, nor a file or folder. "
            f"Give one of {examples}, or a file or folder"
        )
    texts = []
    for item in read_path("--document", path, folder):
        if isinstance(item, Problem):
            say(f"{item.place}: {item.message}")
        else:
            texts.append(item.text)
    encoded = encoded_text(tokens.vocabulary, "".join(texts), f"--document={document}")
    if not len(encoded):
        raise InputError(f"--document={document} is empty. Give a file or folder with text")
    return path.resolve().name, encoded


def page_name(document: str, name: str, tokens_T: Int[np.ndarray, "T"], memory_size: int) -> str:
    """Returns the default file name of a page. For a file it has a digest, since files may share a name."""
    parts = [re.sub(r"[^\w.-]+", "_", name)]
    if Path(document).exists():
        parts.append(read_text_of(tokens_T, name).sha256[:8])
    return "-".join([*parts, "memory", f"{memory_size}.html"])


def check_out(out: AnyPath) -> None:
    """Refuses to replace anything but an earlier page of `memorizing inspect` and its JSON lines.

    Raises:
        InputError: names the file in the way.
    """
    lines_file = out.with_suffix(LINES)
    if out == lines_file:
        raise InputError(
            f"--out={out} ends in {LINES}, which is the suffix of the JSON lines next to the page. Call it "
            f"{out.with_suffix('.html')}"
        )
    check_replaceable("--out", out, "inspect")
    if lines_file.exists() and not out.exists():
        raise InputError(
            f"--out={out} would replace {lines_file}, which does not belong to such a page. Choose another file, or "
            "remove that one"
        )


def json_lines(inspection: Inspection) -> Iterator[dict[str, Any]]:
    """Yields an object for each token of the shown range: its losses, and what each head retrieved, best first."""
    shown, texts = inspection.shown, inspection.texts
    for number in range(len(shown.places_TLHK)):
        place = shown.first + number
        heads = []
        for index, layer in enumerate(inspection.layers):
            for head in range(inspection.gates_LH.shape[1]):
                neighbors = zip(*(array[number, index, head].tolist() for array in shown[1:4]), strict=True)
                retrieved = [
                    {"place": source, "text": texts[source] if source >= 0 else "", "score": score, "weight": weight}
                    for source, score, weight in neighbors
                    if source != NOWHERE
                ]
                if retrieved:
                    gate = float(shown.gates_TLH[number, index, head])
                    heads.append({"layer": layer, "head": head, "gate": gate, "retrieved": retrieved})
        yield {
            "place": place,
            "token": int(inspection.tokens_T[place]),
            "text": texts[place],
            "nats": float(inspection.nats_T[place]),
            "nats_without": float(inspection.without_T[place]),
            "correct": bool(inspection.correct_T[place]),
            "heads": heads,
        }


def write_inspection(
    inspection: Inspection,
    out: AnyPath,
    about: dict[str, Any],
    recall_segment: int | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Writes the page `out` and its JSON lines, which have the same name with the suffix `.jsonl`.

    Args:
        about: the run, the step of its checkpoint, and its memory size, for the page's heading.
        recall_segment: segment length, if the document is one of the recall task; then found definitions are counted.
    """
    data = _page_data(inspection, about)
    body = f"<style>\n{script('inspect.css')}\n</style>"
    title = f"{inspection.name}: memory lookups"
    atomic_write(out, page(title, body, [script("inspect.js")], data, "inspect"))
    lines_file = out.with_suffix(LINES)
    atomic_write(lines_file, "".join(json.dumps(line) + "\n" for line in json_lines(inspection)))
    figures, first, stop = data["summary"], data["about"]["first"], data["about"]["stop"]
    say(
        f"{inspection.name}: {figures['tokens']:,} tokens, {figures['loss']:.4f} nats per token with memory, "
        f"{figures['loss_without']:.4f} without"
    )
    if recall_segment is not None:
        answered, found = definitions_found(inspection.tokens_T, inspection.correct_T, inspection.top_T, recall_segment)
        say(
            f"{answered} questions about earlier segments were answered right; {found} of them looked up the definition"
        )
    if (length := len(inspection.texts)) > stop - first:
        say(f"the page shows lookups of tokens {first:,} to {stop - 1:,} of {length:,} (see --first and --tokens)")
    say(f"page: {out}\nJSON lines: {lines_file}")


def _page_data(inspection: Inspection, about: dict[str, Any]) -> dict[str, Any]:
    """Returns the data that `pages/inspect.js` draws; arrays are packed as base64."""
    shown = inspection.shown
    stop = shown.first + len(shown.places_TLHK)
    return {
        "about": about | {"document": inspection.name, "first": shown.first, "stop": stop, "context": CONTEXT},
        "summary": summary(inspection),
        "layers": inspection.layers,
        "gates": _packed(shown.gates_TLH, np.float32),
        "gates_are_learned": inspection.gates_are_learned,
        "texts": inspection.texts,
        "gains": _packed(inspection.gains_T, np.float32),
        "nats": _packed(inspection.nats_T, np.float32),
        "correct": _packed(inspection.correct_T, np.uint8),
        "shape": list(shown.places_TLHK.shape),
        "places": _packed(shown.places_TLHK, np.int32),
        "scores": _packed(shown.scores_TLHK, np.float32),
        "weights": _packed(shown.weights_TLHK, np.float32),
    }


def _packed(values: np.ndarray, dtype: type) -> str:
    return base64.b64encode(np.ascontiguousarray(values, dtype).astype(np.dtype(dtype).newbyteorder("<"))).decode()
