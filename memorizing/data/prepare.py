"""`memorizing prepare`: documents to tokens on disk. What it writes is described in `tokens.py`.

    source      -> documents, in splits               `sources.py`; for the corpora a TFDS dataset, see `builders.py`
    vocabulary  -> trained on the train split, or given
    documents   -> tokens, in parts                   each part is done once, however often the run is killed
    parts       -> the arrays, manifest, notes        under another name, and renamed when all is there

Until then everything lies in OUT.unfinished, and the same command goes on with it.
"""

import dataclasses
import gc
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from memorizing.data.bulk import Beam, BeamSettings, do, write_once
from memorizing.data.documents import SPLITS, Document, Problem, Split, writable
from memorizing.data.settings import PrepareSettings
from memorizing.data.sources import Piece, Source, open_source
from memorizing.data.tokens import (
    FORMAT_VERSION,
    MANIFEST,
    NOTES,
    PreparedTokens,
    Tokenized,
    fingerprint,
    token_type,
    write_split,
)
from memorizing.data.vocabulary import (
    ByteVocabulary,
    SentencePieceVocabulary,
    Vocabulary,
    load_vocabulary,
    save_vocabulary,
    train_sentencepiece,
)
from memorizing.errors import InputError
from memorizing.files import held, write_whole

LISTED = 1000
"""Of what is left out, so many are in the manifest; all are in the notes."""


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
        InputError: when there is something else at `out` already, or no usable documents in `raw`.
    """
    own = {"Prepare": dataclasses.asdict(settings)}
    if settings.source in sections:
        own[settings.source.capitalize()] = dataclasses.asdict(sections[settings.source])
    own = json.loads(json.dumps(own))
    out = out.absolute()
    work = out.with_name(out.name + ".unfinished")
    if out.exists():
        try:
            manifest = json.loads((out / MANIFEST).read_text())
        except (OSError, ValueError):
            manifest = {}
        if manifest.get("settings") != own or manifest.get("format_version") != FORMAT_VERSION:
            raise InputError(f"--out={out} exists already; remove it or name another folder, nothing is overwritten")
        report(f"{out} is complete already, made with these settings; remove it to prepare other documents")
        shutil.rmtree(work, ignore_errors=True)
        return manifest
    begun = time.perf_counter()
    with _unfinished(work, own, raw, out):
        source = open_source(settings, sections, beam, raw, data_dir, work)
        pieces = source.open(report)
        _same_documents(work, source)
        vocabulary = _make_vocabulary(settings, source, pieces, work / "vocabulary")
        report(f"vocabulary: {vocabulary.kind}, {vocabulary.size} tokens")
        parts = {
            split: [
                _TokenPart(work / "tokens" / split / f"{number:05}.npz", source, piece, work / "vocabulary", settings)
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
        size = sum(part.size() for part in todo)
        rate, whole = size / 1e6 / seconds, time.perf_counter() - begun
        report(f"tokenized {size:,} bytes in {seconds:.1f} s ({rate:.1f} MB/s), {whole:.1f} s in all")
        os.rename(work / "result", out)
        shutil.rmtree(work)
    return manifest


@contextmanager
def _unfinished(work: Path, own: dict, raw: Path | None, out: Path) -> Iterator[None]:
    """Holds OUT.unfinished against others, and refuses to go on there with other settings than it was begun with."""
    now = {**own, "--raw": str(raw.absolute()) if raw else None, "format": FORMAT_VERSION}
    with held(work, f"--out={out}: another `memorizing prepare` is writing it now; let it end"):
        begun = work / "settings.json"
        if begun.exists() and (before := json.loads(begun.read_text())) != now:
            is_now, was = _changed(before, now)
            raise InputError(f"{work} was begun with {was}, now {is_now}: go on as it was begun, or remove it")
        write_whole(begun, json.dumps(now))
        try:
            yield
        except BaseException:
            if not any(path.is_file() for name in ("documents", "tokens") for path in (work / name).rglob("*")):
                shutil.rmtree(work)  # there is nothing to go on with
            raise


def _same_documents(work: Path, source: Source) -> None:
    """Refuses to add to the tokens of other documents than there are now."""
    begun = work / "documents.sha256"
    if begun.exists() and begun.read_text() != source.digest:
        raise InputError(f"{work} was begun when the documents were others than now: remove it to begin anew")
    write_whole(begun, source.digest)


def _changed(before: dict, now: dict) -> tuple[str, str]:
    """The first setting that differs, as it is now and as it was."""
    flat = [
        {
            (f"{name}.{key}" if isinstance(value, dict) else name): inner
            for name, value in settings.items()
            for key, inner in (value.items() if isinstance(value, dict) else [("", value)])
        }
        for settings in (now, before)
    ]
    name = next(name for name in {**flat[0], **flat[1]} if flat[0].get(name) != flat[1].get(name))
    return f"{name} = {flat[0].get(name)!r}", f"{name} = {flat[1].get(name)!r}"


def _make_vocabulary(
    settings: PrepareSettings, source: Source, pieces: Mapping[Split, list[Piece]], folder: Path
) -> Vocabulary:
    """Made once; a killed run finds it in `folder`."""
    made = folder / "made.json"
    if not made.exists():
        if source.vocabulary is not None:
            vocabulary = source.vocabulary
        elif settings.vocabulary_from:
            vocabulary = _given_vocabulary(Path(settings.vocabulary_from))
        elif settings.vocabulary == "bytes":
            vocabulary = ByteVocabulary()
        else:
            found = itertools.chain.from_iterable(map(source.read, pieces["train"]))
            texts = (document.text for document in found if isinstance(document, Document))
            size, model, sample = settings.vocabulary_size, settings.vocabulary_model, settings.vocabulary_sample_bytes
            vocabulary = train_sentencepiece(texts, size, model, sample)
        folder.mkdir(exist_ok=True)
        save_vocabulary(vocabulary, folder)
        write_whole(made, json.dumps([vocabulary.kind, vocabulary.size]))
    return _made_vocabulary(folder)


def _made_vocabulary(folder: Path) -> Vocabulary:
    kind, size = json.loads((folder / "made.json").read_text())
    return load_vocabulary(kind, folder, size)


def _given_vocabulary(path: Path) -> Vocabulary:
    if path.is_dir():
        return PreparedTokens(path).vocabulary
    try:
        return SentencePieceVocabulary(path.read_bytes())
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"Prepare.vocabulary_from = {str(path)!r} is no prepared folder and no SentencePiece model: {error}"
        ) from error


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
            known.append((found.id, found.title, found.licence, len(encoded), len(found.text.encode("utf-8"))))
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
            Tokenized(id, title, licence, own, size)
            for (id, title, licence, _, size), own in zip(known, tokens, strict=True)
        ]
        return documents, [Problem(*problem) for problem in problems]

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
    splits, left_out, notes = {}, [], 0
    with (result / NOTES).open("w") as file:

        def note(problem: Problem) -> None:
            nonlocal notes
            notes += 1
            line = writable(f"{problem.place}: {problem.message}".replace("\n", " "))
            file.write(line + "\n")
            if problem.message.startswith("left out"):
                left_out.append(line) if len(left_out) < LISTED else None

        def documents(split: Split) -> Iterator[Tokenized]:
            for part in parts[split]:
                found, problems = part.load()
                for problem in problems:
                    note(problem)
                yield from found

        for problem in source.problems:
            note(problem)
        for split in (split for split in SPLITS if split in parts):
            counts = write_split(result / split, documents(split), token_type(vocabulary))
            if not counts.documents:
                raise InputError(
                    f"no document of the {split} split is left: see Prepare.minimum_tokens = {settings.minimum_tokens} "
                    f"and what was left out: {'; '.join(left_out[:5]) or 'nothing'}"
                )
            splits[split] = dataclasses.asdict(counts)
            report(f"{split}: {counts.documents} documents, {counts.bytes:,} bytes, {counts.tokens:,} tokens")
    for line in left_out[:20]:
        report(f"  {line}")
    if notes > len(left_out[:20]):
        report(f"  {notes} notes on what was left out or odd: {NOTES}")
    manifest = {
        "format_version": FORMAT_VERSION,
        "source": settings.source,
        "vocabulary": {"kind": vocabulary.kind, "size": vocabulary.size, "sha256": fingerprint(vocabulary)},
        "splits": splits,
        "left_out": left_out,
        "notes": notes,
        "settings": own,
    }
    (result / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest
