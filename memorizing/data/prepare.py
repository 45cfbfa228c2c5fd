"""`memorizing prepare`: documents to tokens on disk. What it writes is described in `tokens.py`.

    source      -> documents, in splits               `sources.py`; for the corpora a TFDS dataset, see `builders.py`
    vocabulary  -> trained on the train split, or given
    documents   -> tokens, in parts                   each part is done once, however often the run is killed
    parts       -> the arrays, manifest, notes        under another name, and renamed when all is there

Until then everything lies in OUT.unfinished, in folders named by what their contents depend on. So the same command
goes on with what it finds, and one with other settings with what these do not change; neither is ever in the way.
"""

import dataclasses
import gc
import hashlib
import itertools
import json
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from memorizing.data.bulk import Beam, BeamSettings, do, file_errors_named, write_once
from memorizing.data.documents import SPLITS, Document, Known, Problem, Split, assign_splits, writable
from memorizing.data.pretrained_vocabulary import PretrainedVocabulary
from memorizing.data.settings import PrepareSettings
from memorizing.data.sources import Piece, Source, open_source
from memorizing.data.tokens import (
    FORMAT_VERSION,
    MANIFEST,
    NOTES,
    ORIGIN,
    Tokenized,
    described,
    fingerprint,
    given_vocabulary,
    token_type,
    write_split,
)
from memorizing.data.vocabulary import (
    ByteVocabulary,
    Vocabulary,
    load_vocabulary,
    save_vocabulary,
    train_sentencepiece,
)
from memorizing.errors import InputError
from memorizing.files import LOCK, atomic_write, folder_lock

LISTED = 1000
"""Of what is left out, so many are in the manifest; all are counted there, and are in the notes."""
_REASONS = 100
"""So many reasons are counted each on its own."""


@file_errors_named()
def prepare(
    settings: PrepareSettings,
    sections: Mapping[str, Any],
    beam: BeamSettings,
    raw: Path | None,
    out: Path,
    data_dir: Path | None = None,
    report: Callable[[str], None] = print,
) -> dict:
    """Writes prepared tokens to `out` and returns the manifest. Nothing is at `out` until all of it is there.

    Args:
        sections: settings of the sources, by their names.
        raw: folder of the source's files, if it reads any.
        data_dir: where TFDS keeps a corpus's documents; by default they are removed once they are tokens.

    Raises:
        InputError: when something else is at `out` already (tokens of other settings or of raw files that have changed,
            say), or there are no usable documents in `raw`.
    """
    own = {"Prepare": dataclasses.asdict(settings)}
    if settings.source in sections:
        own[settings.source.capitalize()] = dataclasses.asdict(sections[settings.source])
    own = json.loads(json.dumps(own))
    raw, out = raw and raw.absolute(), out.absolute()
    work = out.with_name(out.name + ".unfinished")
    _refuse_strangers(work)
    if out.exists():
        manifest = _finished(out, own)
        _refuse_other_raw_files(out, raw, open_source(settings, sections, beam, raw, data_dir, work))
        report(f"{out} is complete already, made with these settings; remove it to prepare other documents")
        _remove(work)
        return manifest
    begun = time.perf_counter()
    with _unfinished(work, out):
        source = open_source(settings, sections, beam, raw, data_dir, work)
        given = _given_vocabulary(settings)
        pieces = source.open(report)
        given = source.vocabulary or given
        depends = {**own, "documents": source.digest, "given": given and fingerprint(given), "format": FORMAT_VERSION}
        folder = work / "vocabulary" / _digest(depends, without="minimum_tokens")
        vocabulary = _make_vocabulary(settings, source, given, pieces, folder)
        report(f"vocabulary: {vocabulary.kind}, {vocabulary.size} tokens")
        if isinstance(vocabulary, PretrainedVocabulary) and (lost := vocabulary.loses()):
            report(f"  its tokens do not give back every text as it was; it loses {', '.join(lost)}")
        tokens = work / "tokens" / _digest(depends)
        parts = {
            split: [
                _TokenPart(tokens / split / f"{number:05}.npz", source, piece, folder, settings)
                for number, piece in enumerate(pieces[split])
            ]
            for split in pieces
        }
        todo = [part for own_parts in parts.values() for part in own_parts if not part.path.exists()]
        started = time.perf_counter()
        gc.freeze()  # what stays need not be looked through again and again while lists of tokens come and go
        try:
            do(todo, "tokenizing", Beam.of(beam) if source.in_beam else None)
        finally:
            gc.unfreeze()
        seconds = time.perf_counter() - started
        manifest = _join(work, parts, source, vocabulary, own, settings, report)
        atomic_write(work / "result" / ORIGIN, json.dumps({"raw": str(raw) if raw else None, "state": source.state()}))
        size = sum(part.size() for part in todo)
        rate, whole = size / 1e6 / seconds, time.perf_counter() - begun
        report(f"tokenized {size:,} bytes in {seconds:.1f} s ({rate:.1f} MB/s), {whole:.1f} s in all")
        os.rename(work / "result", out)
        _remove(work)
    return manifest


def _finished(out: Path, own: dict) -> dict:
    """The manifest of what is at `out`, which must have been made with the settings `own`."""
    instead = "remove it or name another folder, nothing is overwritten"
    try:
        manifest = json.loads((out / MANIFEST).read_text())
        before, version = manifest["settings"], manifest["format_version"]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"--out={out} exists already, and holds no prepared tokens: {instead}") from None
    if version != FORMAT_VERSION:
        raise InputError(
            f"--out={out} exists already, in format {version}, and this program writes {FORMAT_VERSION}: {instead}"
        )
    if before != own:
        is_now, was = _changed(before, own)
        raise InputError(f"--out={out} exists already, made with {was}, now {is_now}: {instead}")
    return manifest


def _refuse_other_raw_files(out: Path, raw: Path | None, source: Source) -> None:
    """Refuses to take tokens of other files, or of what these were, for those of the raw files as they are now."""
    try:
        origin = json.loads((out / ORIGIN).read_text())
        of, state = origin["raw"] and Path(origin["raw"]), origin["state"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{out / ORIGIN} is missing or damaged ({error!r}): remove {out} to prepare it anew"
        ) from error
    if state != source.state():
        was, now = (f"of --raw={path}" if path else "without --raw" for path in (of, raw))
        changed = ", whose files have changed since" if was == now else f", now {now}: these are other files, or newer"
        raise InputError(f"--out={out} exists already, made {was}{changed}; remove it or name another folder")


def _changed(before: dict, now: dict) -> tuple[str, str]:
    """The first setting that differs, as it is now and as it was."""
    flat = [
        {f"{section}.{name}": value for section, own in settings.items() for name, value in own.items()}
        for settings in (now, before)
    ]
    name = next(name for name in {**flat[0], **flat[1]} if flat[0].get(name) != flat[1].get(name))
    return f"{name} = {flat[0].get(name)!r}", f"{name} = {flat[1].get(name)!r}"


@contextmanager
def _unfinished(work: Path, out: Path) -> Iterator[None]:
    """Holds OUT.unfinished against others; leaves nothing if nothing was done."""
    with folder_lock(work, f"--out={out}: another `memorizing prepare` is writing it now; let it end"):
        try:
            yield
        except BaseException:
            if not any(path.is_file() and path.name != LOCK for path in work.rglob("*")):
                _remove(work)  # there is nothing to go on with
            raise


def _refuse_strangers(work: Path) -> None:
    """OUT.unfinished is removed in the end: it must not be a folder that somebody else made."""
    if work.is_dir() and not (work / LOCK).exists() and (names := sorted(path.name for path in work.iterdir())):
        raise InputError(
            f"{work} holds {', '.join(names[:3])}, not put there by `memorizing prepare`, which would work in this "
            "folder and then remove it: move it away, or name another --out"
        )


def _remove(work: Path) -> None:
    """The lock last, so that a kill leaves what `_refuse_strangers` knows."""
    for path in sorted(work.glob("*"), key=lambda path: path.name == LOCK):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    shutil.rmtree(work, ignore_errors=True)


def _digest(depends: Mapping[str, Any], without: str = "") -> str:
    """A folder's name for what is made of these settings and documents, or with any value of one of the settings."""
    settings = {name: value for name, value in depends["Prepare"].items() if name != without}
    return hashlib.sha256(json.dumps({**depends, "Prepare": settings}).encode()).hexdigest()[:32]


def _make_vocabulary(
    settings: PrepareSettings,
    source: Source,
    given: Vocabulary | None,
    pieces: Mapping[Split, list[Piece]],
    folder: Path,
) -> Vocabulary:
    """Made once; a killed run finds it in `folder`."""
    made = folder / "made.json"
    if not made.exists():
        if given is not None:
            vocabulary = given
        elif settings.vocabulary == "bytes":
            vocabulary = ByteVocabulary()
        else:
            found = itertools.chain.from_iterable(map(source.read, pieces["train"]))
            texts = (document.text for document in found if isinstance(document, Document))
            size, model, sample = settings.vocabulary_size, settings.vocabulary_model, settings.vocabulary_sample_bytes
            vocabulary = train_sentencepiece(texts, size, model, sample)
        folder.mkdir(parents=True, exist_ok=True)
        save_vocabulary(vocabulary, folder)
        atomic_write(made, json.dumps([vocabulary.kind, vocabulary.size, vocabulary.begin]))
    return _made_vocabulary(folder)


def _made_vocabulary(folder: Path) -> Vocabulary:
    kind, size, begin = json.loads((folder / "made.json").read_text())
    return load_vocabulary(kind, folder, size, begin)


def _given_vocabulary(settings: PrepareSettings) -> Vocabulary | None:
    """That of `Prepare.vocabulary_from`, unless the source has one of its own; looked at before anything is read."""
    if not settings.vocabulary_from or settings.source in ("task", "recall"):
        return None
    vocabulary = given_vocabulary(Path(settings.vocabulary_from), "Prepare.vocabulary_from")
    if vocabulary.kind != settings.vocabulary:
        known = vocabulary.kind in ("bytes", "sentencepiece", "pretrained")
        remedy = f"set this to {vocabulary.kind!r}" if known else "name another folder or model"
        raise InputError(
            f"Prepare.vocabulary_from = {settings.vocabulary_from!r} is a vocabulary of {vocabulary.kind}, but "
            f"Prepare.vocabulary = {settings.vocabulary!r}: {remedy}"
        )
    return vocabulary


@dataclasses.dataclass(frozen=True)
class _TokenPart:
    """Tokens of some documents, and what was wrong with these."""

    path: Path
    source: Source
    piece: Piece
    vocabulary: Path
    settings: PrepareSettings

    def __call__(self) -> None:
        vocabulary, least = _made_vocabulary(self.vocabulary), self.settings.minimum_tokens
        found = list(self.source.read(self.piece))
        documents = [document for document in found if isinstance(document, Document)]
        problems = [problem for problem in found if isinstance(problem, Problem)]
        known, tokens = [], []
        with ThreadPoolExecutor(_cores()) as pool:  # long ones first, so that none is left alone at the end
            by_length = sorted(range(len(documents)), key=lambda number: -len(documents[number].text))
            encoding = {number: pool.submit(_encoded, documents[number], vocabulary) for number in by_length}
        for number, found in enumerate(documents):
            encoded = encoding[number].result()
            if len(encoded) < least:
                short = f"left out: {len(encoded):,} tokens, fewer than Prepare.minimum_tokens = {least:,}"
                problems.append(Problem(found.id, short))
                continue
            tokens.append(encoded)
            known.append((found.id, found.title, found.license, len(encoded), len(found.text.encode("utf-8"))))
        arrays = {
            "tokens": np.concatenate(tokens) if tokens else np.zeros(0, token_type(vocabulary)),
            "known": np.frombuffer(json.dumps([known, problems]).encode(), np.uint8),
        }
        write_once(self.path, lambda path: _save(path, arrays))

    def load(self) -> tuple[list[Tokenized], list[Problem]]:
        with np.load(self.path) as arrays:
            known, problems = json.loads(arrays["known"].tobytes())
            places = np.cumsum([0, *(length for *_, length, _ in known)])
            tokens = np.split(arrays["tokens"], places[1:-1]) if known else []
        documents = [
            Tokenized(id, title, license, own, size)
            for (id, title, license, _, size), own in zip(known, tokens, strict=True)
        ]
        return documents, [Problem(*problem) for problem in problems]

    def digests(self) -> list[tuple[str, str]]:
        """The name of each document, and a digest of its tokens."""
        return [(document.id, hashlib.sha256(document.tokens.tobytes()).hexdigest()) for document in self.load()[0]]

    def size(self) -> int:
        """Bytes of text in it."""
        with np.load(self.path) as arrays:
            return sum(size for *_, size in json.loads(arrays["known"].tobytes())[0])


def _encoded(document: Document, vocabulary: Vocabulary) -> np.ndarray:
    tokens = vocabulary.encode(document.text) if document.tokens is None else document.tokens
    return tokens.astype(token_type(vocabulary))


def _cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _save(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    with path.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def _moved(parts: Mapping[Split, list[_TokenPart]]) -> tuple[dict[Path, dict[int, Split]], list[Problem]]:
    """Documents that are in another split as well, which they go to: by part and number. And what is repeated."""
    places, known = [], []
    for split, own_parts in parts.items():
        for part in own_parts:
            for number, (id, digest) in enumerate(part.digests()):
                places.append((part.path, number))
                known.append(Known(id, digest, split))
    splits, copies = assign_splits(known, 0.0, 0.0, 0)
    moved: dict[Path, dict[int, Split]] = {}
    for (path, number), document, split in zip(places, known, splits, strict=True):
        if split != document.split:
            moved.setdefault(path, {})[number] = split
    return moved, copies


def _reason(message: str, known: Collection[str]) -> str:
    """Why something was left out, without what differs from one to the next: numbers, what is in brackets, names."""
    reason = re.sub(r"^left out:? ", "", message).partition(": ")[0]
    for varying, stands_for in ((r"= \([^()]*\)", "= ..."), (r" \([^()]*\)", ""), (r"'[^']*'", "'...'")):
        reason = re.sub(varying, stands_for, reason)
    reason = re.sub(r"(?<![\w-])\d[\d.,]*(?<=\d)", "N", reason)
    return reason if reason in known or len(known) < _REASONS else "other reasons"


def _join(
    work: Path,
    parts: Mapping[Split, list[_TokenPart]],
    source: Source,
    vocabulary: Vocabulary,
    own: dict,
    settings: PrepareSettings,
    report: Callable[[str], None],
) -> dict:
    """All parts as arrays, and what is known about them."""
    result = work / "result"
    shutil.rmtree(result, ignore_errors=True)
    result.mkdir()
    save_vocabulary(vocabulary, result)
    splits, left_out, reasons, notes = {}, [], Counter(), 0
    with (result / NOTES).open("w") as file:

        def note(problem: Problem) -> None:
            nonlocal notes
            notes += 1
            line = writable(f"{problem.place}: {problem.message}".replace("\n", " "))
            file.write(line + "\n")
            if problem.message.startswith("left out"):
                reasons[_reason(problem.message, reasons)] += 1
                left_out.append(line) if len(left_out) < LISTED else None

        moved, copies = _moved(parts) if source.repeats else ({}, [])

        def documents(split: Split) -> Iterator[Tokenized]:
            for home in parts:
                for part in parts[home]:
                    goes = moved.get(part.path, {})
                    if home != split and split not in goes.values():
                        continue
                    found, problems = part.load()
                    for problem in problems if home == split else ():
                        note(problem)
                    yield from (own for number, own in enumerate(found) if goes.get(number, home) == split)

        for problem in [*source.problems, *copies]:
            note(problem)
        for split in (split for split in SPLITS if split in parts):
            counts = write_split(result / split, documents(split), token_type(vocabulary))
            if not counts.documents:
                raise InputError(
                    f"no document of the {split} split is left: see Prepare.minimum_tokens = {settings.minimum_tokens}"
                    f", what was left out ({'; '.join(left_out[:5]) or 'nothing'}), and documents that are in another "
                    f"split too ({'; '.join(copy.place for copy in copies[:5]) or 'none'})"
                )
            splits[split] = dataclasses.asdict(counts)
            report(f"{split}: {counts.documents} documents, {counts.bytes:,} bytes, {counts.tokens:,} tokens")
    for line in left_out[:20]:
        report(f"  {line}")
    if notes > len(left_out[:20]):
        report(f"  left out: {reasons.total():,}; {notes:,} notes on what was left out or odd: {NOTES}")
    manifest = {
        "format_version": FORMAT_VERSION,
        "source": settings.source,
        "vocabulary": described(vocabulary),
        "splits": splits,
        "left_out": left_out,
        "left_out_counts": dict(reasons.most_common()),
        "notes": notes,
        "settings": own,
    }
    (result / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest
