"""`memorizing prepare`: turns documents into tokens on disk. `tokens.py` describes what it writes.

    source      -> documents, in splits               `sources.py`; a corpus goes through a TFDS dataset (`builders.py`)
    vocabulary  -> trained on the train split, or given
    documents   -> tokens, in parts                   a part is done once, however often the run is killed
    parts       -> the arrays, manifest, notes        in a temporary folder, renamed when everything is there

Until then everything lies in OUT.unfinished, in folders named by a digest of what their contents depend on. The same
command therefore resumes, and a command with other settings reuses what these do not change.
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
from typing import Any, TextIO

import numpy as np

from memorizing.data.bulk import Beam, BeamSettings, name_file_errors, run_jobs, write_once
from memorizing.data.documents import SPLITS, Document, Problem, Split, SplitKey, assign_splits, writable
from memorizing.data.pretrained_vocabulary import PretrainedVocabulary
from memorizing.data.settings import PrepareSettings
from memorizing.data.sources import Part, Source, SourceRequest, open_source
from memorizing.data.tokens import (
    FORMAT_VERSION,
    MANIFEST,
    NOTES,
    ORIGIN,
    Tokenized,
    fingerprint,
    given_vocabulary,
    token_type,
    vocabulary_entry,
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
from memorizing.sections import section_name

LISTED = 1000
"""Number of left-out documents that the manifest lists. It counts all of them, and the notes list all of them."""
_MOST_REASONS = 100
"""Number of reasons that are counted separately."""

type Report = Callable[[str], None]


@name_file_errors()
def prepare(
    settings: PrepareSettings,
    sections: Mapping[str, Any],
    beam: BeamSettings,
    raw: Path | None,
    out: Path,
    data_dir: Path | None = None,
    report: Report = print,
) -> dict:
    """Writes prepared tokens to `out` and returns the manifest. `out` appears only when it is complete.

    Args:
        settings: `Prepare` settings.
        sections: settings of the sources, by their names in `settings.SOURCES`.
        beam: Beam runner and options for the corpora.
        raw: folder of the source's files, if it reads any.
        out: folder to create.
        data_dir: folder in which TFDS stores a corpus's documents. By default they are removed once tokenized.
        report: receives progress lines.

    Raises:
        InputError: if `out` holds something else (tokens of other settings, or of raw files that have changed), or
            `raw` has no usable documents.
    """
    used = {"Prepare": dataclasses.asdict(settings)}
    if settings.source in sections:
        used[section_name(type(sections[settings.source]))] = dataclasses.asdict(sections[settings.source])
    used = json.loads(json.dumps(used))
    raw, out = raw and raw.absolute(), out.absolute()
    request = SourceRequest(settings, sections, beam, raw, data_dir)
    work = out.with_name(out.name + ".unfinished")
    _refuse_foreign_folder(work)
    if out.exists():
        manifest = _finished_manifest(out, used)
        _refuse_other_raw_files(out, raw, open_source(request, work))
        report(f"{out} is already complete with these settings. To prepare other documents, remove it first")
        _remove(work)
        return manifest
    with _unfinished(work, out):
        manifest = _prepare(request, used, work, report)
        os.rename(work / "result", out)
        _remove(work)
    return manifest


def _prepare(request: SourceRequest, used: dict, work: Path, report: Report) -> dict:
    """Writes the folder `result` in `work` and returns the manifest."""
    began = time.perf_counter()
    settings, source = request.settings, open_source(request, work)
    given = _given_vocabulary(settings)
    parts = source.open(report)
    given = source.vocabulary or given
    depends = {**used, "documents": source.digest, "given": given and fingerprint(given), "format": FORMAT_VERSION}
    folder = work / "vocabulary" / _digest(depends, without="minimum_tokens")
    vocabulary = _make_vocabulary(settings, source, given, parts, folder)
    report(f"vocabulary: {vocabulary.kind}, {vocabulary.size} tokens")
    if isinstance(vocabulary, PretrainedVocabulary) and (lost := vocabulary.loses()):
        report(f"  it does not decode every text exactly; it loses {', '.join(lost)}")
    tokens = work / "tokens" / _digest(depends)
    jobs = {
        split: [
            _TokenizeJob(tokens / split / f"{number:05}.npz", source, part, folder, settings)
            for number, part in enumerate(parts[split])
        ]
        for split in parts
    }
    missing = [job for of_split in jobs.values() for job in of_split if not job.path.exists()]
    began_tokenizing = time.perf_counter()
    gc.freeze()  # keeps the collector from scanning long-lived objects while lists of tokens come and go
    try:
        run_jobs(missing, "tokenizing", Beam.from_settings(request.beam) if source.in_beam else None)
    finally:
        gc.unfreeze()
    seconds = time.perf_counter() - began_tokenizing
    manifest = _Result(work / "result", jobs, source, vocabulary, settings, report).write(used)
    origin = {"raw": str(request.raw) if request.raw else None, "state": source.state()}
    atomic_write(work / "result" / ORIGIN, json.dumps(origin))
    size = sum(job.size() for job in missing)
    rate, total = size / 1e6 / seconds, time.perf_counter() - began
    report(f"tokenized {size:,} bytes in {seconds:.1f} s ({rate:.1f} MB/s), {total:.1f} s in all")
    return manifest


def _finished_manifest(out: Path, used: dict) -> dict:
    """Returns the manifest of `out`; raises InputError unless it was made with the settings `used`."""
    remedy = "Remove it or choose another folder; nothing is overwritten"
    try:
        manifest = json.loads((out / MANIFEST).read_text())
        before, version = manifest["settings"], manifest["format_version"]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"--out={out} already exists and holds no prepared tokens. {remedy}") from None
    if version != FORMAT_VERSION:
        raise InputError(
            f"--out={out} already exists in format {version}, and this version writes format {FORMAT_VERSION}. {remedy}"
        )
    if before != used:
        now, was = _first_difference(used, before)
        raise InputError(f"--out={out} already exists, made with {was}, now {now}. {remedy}")
    return manifest


def _refuse_other_raw_files(out: Path, raw: Path | None, source: Source) -> None:
    """Raises InputError if `out` was made from other raw files, or from files that have changed since."""
    try:
        origin = json.loads((out / ORIGIN).read_text())
        raw_before, state = origin["raw"] and Path(origin["raw"]), origin["state"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{out / ORIGIN} is missing or damaged ({error!r}). Remove {out} and prepare it again"
        ) from error
    if state != source.state():
        was, now = (f"from --raw={path}" if path else "without --raw" for path in (raw_before, raw))
        changed = ", whose files have changed since" if was == now else f", now {now}, which holds other files"
        raise InputError(f"--out={out} already exists and was made {was}{changed}. Remove it or choose another folder")


def _first_difference(one: dict, other: dict) -> tuple[str, str]:
    """Returns the first setting that differs, with its value in `one` and in `other`."""
    flat = [
        {f"{section}.{name}": value for section, values in settings.items() for name, value in values.items()}
        for settings in (one, other)
    ]
    name = next(name for name in {**flat[0], **flat[1]} if flat[0].get(name) != flat[1].get(name))
    return f"{name} = {flat[0].get(name)!r}", f"{name} = {flat[1].get(name)!r}"


@contextmanager
def _unfinished(work: Path, out: Path) -> Iterator[None]:
    """Locks OUT.unfinished; removes it after an error if no work was done."""
    with folder_lock(work, f"--out={out}: another `memorizing prepare` is writing it now. Wait until it ends"):
        try:
            yield
        except BaseException:
            if not any(path.is_file() and path.name != LOCK for path in work.rglob("*")):
                _remove(work)
            raise


def _refuse_foreign_folder(work: Path) -> None:
    """Raises InputError if `prepare` did not make OUT.unfinished, because it is removed at the end."""
    if work.is_dir() and not (work / LOCK).exists() and (names := sorted(path.name for path in work.iterdir())):
        raise InputError(
            f"{work} holds {', '.join(names[:3])}, which `memorizing prepare` did not write. It works in this folder "
            "and then removes it. Move the folder away, or choose another --out"
        )


def _remove(work: Path) -> None:
    """Removes OUT.unfinished. The lock goes last, so that `_refuse_foreign_folder` accepts the rest after a kill."""
    for path in sorted(work.glob("*"), key=lambda path: path.name == LOCK):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    shutil.rmtree(work, ignore_errors=True)


def _digest(depends: Mapping[str, Any], without: str = "") -> str:
    """Returns a folder name for results of these settings and documents; `without` names a setting to disregard."""
    settings = {name: value for name, value in depends["Prepare"].items() if name != without}
    return hashlib.sha256(json.dumps({**depends, "Prepare": settings}).encode()).hexdigest()[:32]


def _make_vocabulary(
    settings: PrepareSettings,
    source: Source,
    given: Vocabulary | None,
    parts: Mapping[Split, list[Part]],
    folder: Path,
) -> Vocabulary:
    """Returns the vocabulary in `folder`, made on the first call and loaded by a resumed run."""
    done = folder / "made.json"
    if not done.exists():
        if given is not None:
            vocabulary = given
        elif settings.vocabulary == "bytes":
            vocabulary = ByteVocabulary()
        else:
            results = itertools.chain.from_iterable(map(source.read, parts["train"]))
            texts = (document.text for document in results if isinstance(document, Document))
            size, model, sample = settings.vocabulary_size, settings.vocabulary_model, settings.vocabulary_sample_bytes
            vocabulary = train_sentencepiece(texts, size, model, sample)
        folder.mkdir(parents=True, exist_ok=True)
        save_vocabulary(vocabulary, folder)
        atomic_write(done, json.dumps([vocabulary.kind, vocabulary.size, vocabulary.begin]))
    return _load_made_vocabulary(folder)


def _load_made_vocabulary(folder: Path) -> Vocabulary:
    kind, size, begin = json.loads((folder / "made.json").read_text())
    return load_vocabulary(kind, folder, size, begin)


def _given_vocabulary(settings: PrepareSettings) -> Vocabulary | None:
    """Returns the vocabulary of `Prepare.vocabulary_from`, unless the source has its own. Runs before any reading."""
    if not settings.vocabulary_from or settings.source in ("task", "recall"):
        return None
    vocabulary = given_vocabulary(Path(settings.vocabulary_from), "Prepare.vocabulary_from")
    if vocabulary.kind != settings.vocabulary:
        is_setting = vocabulary.kind in ("bytes", "sentencepiece", "pretrained")
        remedy = f"Set Prepare.vocabulary = {vocabulary.kind!r}" if is_setting else "Choose another folder or model"
        raise InputError(
            f"Prepare.vocabulary_from = {settings.vocabulary_from!r} is a vocabulary of {vocabulary.kind}, but "
            f"Prepare.vocabulary = {settings.vocabulary!r}. {remedy}"
        )
    return vocabulary


@dataclasses.dataclass(frozen=True)
class _TokenizeJob:
    """Tokenizes a part of the documents and writes their tokens and notes to `path`."""

    path: Path
    source: Source
    part: Part
    vocabulary: Path
    settings: PrepareSettings

    def __call__(self) -> None:
        vocabulary, least = _load_made_vocabulary(self.vocabulary), self.settings.minimum_tokens
        results = list(self.source.read(self.part))
        documents = [document for document in results if isinstance(document, Document)]
        problems = [problem for problem in results if isinstance(problem, Problem)]
        index, tokens = [], []
        with ThreadPoolExecutor(_cores()) as pool:  # longest first, so that no long document is left for the end
            by_length = sorted(range(len(documents)), key=lambda number: -len(documents[number].text))
            encoding = {number: pool.submit(_encode, documents[number], vocabulary) for number in by_length}
        for number, document in enumerate(documents):
            encoded = encoding[number].result()
            if len(encoded) < least:
                short = f"left out: {len(encoded):,} tokens, fewer than Prepare.minimum_tokens = {least:,}"
                problems.append(Problem(document.id, short))
                continue
            tokens.append(encoded)
            size = len(document.text.encode("utf-8"))
            index.append((document.id, document.title, document.license, len(encoded), size))
        arrays = {
            "tokens": np.concatenate(tokens) if tokens else np.zeros(0, token_type(vocabulary)),
            "index": np.frombuffer(json.dumps([index, problems]).encode(), np.uint8),
        }
        write_once(self.path, lambda path: _save(path, arrays))

    def load(self) -> tuple[list[Tokenized], list[Problem]]:
        with np.load(self.path) as arrays:
            index, problems = json.loads(arrays["index"].tobytes())
            places = np.cumsum([0, *(length for *_, length, _ in index)])
            split_tokens = np.split(arrays["tokens"], places[1:-1]) if index else []
        documents = [
            Tokenized(id, title, license, tokens, size)
            for (id, title, license, _, size), tokens in zip(index, split_tokens, strict=True)
        ]
        return documents, [Problem(*problem) for problem in problems]

    def digests(self) -> list[tuple[str, str]]:
        """Returns the name of each document and a digest of its tokens."""
        return [(document.id, hashlib.sha256(document.tokens.tobytes()).hexdigest()) for document in self.load()[0]]

    def size(self) -> int:
        """Returns the bytes of text in the documents."""
        with np.load(self.path) as arrays:
            return sum(size for *_, size in json.loads(arrays["index"].tobytes())[0])


def _encode(document: Document, vocabulary: Vocabulary) -> np.ndarray:
    tokens = vocabulary.encode(document.text) if document.tokens is None else document.tokens
    return tokens.astype(token_type(vocabulary))


def _cores() -> int:
    """Returns the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _save(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    with path.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


type _Jobs = Mapping[Split, list[_TokenizeJob]]


def _moved(jobs: _Jobs) -> tuple[dict[Path, dict[int, Split]], list[Problem]]:
    """Returns the new split of each document that another split also holds, by job and number, and notes on these."""
    places, keys = [], []
    for split, of_split in jobs.items():
        for job in of_split:
            for number, (id, digest) in enumerate(job.digests()):
                places.append((job.path, number))
                keys.append(SplitKey(id, digest, split))
    splits, copies = assign_splits(keys, 0.0, 0.0, 0)
    moved: dict[Path, dict[int, Split]] = {}
    for (path, number), key, split in zip(places, keys, splits, strict=True):
        if split != key.split:
            moved.setdefault(path, {})[number] = split
    return moved, copies


def _reason(message: str, reasons: Collection[str]) -> str:
    """Returns why something was left out, without what varies between messages: numbers, names, text in brackets."""
    reason = re.sub(r"^left out:? ", "", message).partition(": ")[0]
    for varying, stands_for in ((r"= \([^()]*\)", "= ..."), (r" \([^()]*\)", ""), (r"'[^']*'", "'...'")):
        reason = re.sub(varying, stands_for, reason)
    reason = re.sub(r"(?<![\w-])\d[\d.,]*(?<=\d)", "N", reason)
    return reason if reason in reasons or len(reasons) < _MOST_REASONS else "other reasons"


class _Notes:
    """Writes notes.txt and counts what was left out, by reason."""

    def __init__(self, file: TextIO):
        self._file = file
        self.count, self.left_out, self.reasons = 0, [], Counter()

    def add(self, problem: Problem) -> None:
        self.count += 1
        line = writable(f"{problem.place}: {problem.message}".replace("\n", " "))
        self._file.write(line + "\n")
        if problem.message.startswith("left out"):
            self.reasons[_reason(problem.message, self.reasons)] += 1
            self.left_out.append(line) if len(self.left_out) < LISTED else None

    def report(self, report: Report) -> None:
        for line in self.left_out[:20]:
            report(f"  {line}")
        if self.count > len(self.left_out[:20]):
            report(f"  left out: {self.reasons.total():,}; see all {self.count:,} notes in {NOTES}")


@dataclasses.dataclass(frozen=True)
class _Result:
    """The prepared folder, joined from all parts."""

    folder: Path
    jobs: _Jobs
    source: Source
    vocabulary: Vocabulary
    settings: PrepareSettings
    report: Report

    def write(self, used: dict) -> dict:
        """Writes the arrays, notes and manifest, and returns the manifest; `used` are the settings it names."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        save_vocabulary(self.vocabulary, self.folder)
        with (self.folder / NOTES).open("w") as file:
            notes = _Notes(file)
            splits = self._write_splits(notes)
        notes.report(self.report)
        manifest = {
            "format_version": FORMAT_VERSION,
            "source": self.settings.source,
            "vocabulary": vocabulary_entry(self.vocabulary),
            "splits": splits,
            "left_out": notes.left_out,
            "left_out_counts": dict(notes.reasons.most_common()),
            "notes": notes.count,
            "settings": used,
        }
        (self.folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        return manifest

    def _write_splits(self, notes: _Notes) -> dict[str, dict]:
        moved, copies = _moved(self.jobs) if self.source.repeats else ({}, [])
        for problem in [*self.source.problems, *copies]:
            notes.add(problem)
        splits: dict[str, dict] = {}
        for split in (split for split in SPLITS if split in self.jobs):
            documents = self._documents(split, moved, notes)
            counts = write_split(self.folder / split, documents, token_type(self.vocabulary))
            if not counts.documents:
                raise InputError(
                    f"no document of the {split} split is left. Prepare.minimum_tokens = "
                    f"{self.settings.minimum_tokens}; left out: {'; '.join(notes.left_out[:5]) or 'nothing'}; also in "
                    f"another split: {'; '.join(copy.place for copy in copies[:5]) or 'none'}. Change what leaves "
                    "documents out, or give more documents"
                )
            splits[split] = dataclasses.asdict(counts)
            self.report(f"{split}: {counts.documents} documents, {counts.bytes:,} bytes, {counts.tokens:,} tokens")
        return splits

    def _documents(self, split: Split, moved: dict[Path, dict[int, Split]], notes: _Notes) -> Iterator[Tokenized]:
        """Yields the documents of a split, including those moved into it, and a note for each problem in its parts."""
        for home in self.jobs:
            for job in self.jobs[home]:
                new_splits = moved.get(job.path, {})
                if home != split and split not in new_splits.values():
                    continue
                documents, problems = job.load()
                for problem in problems if home == split else ():
                    notes.add(problem)
                for number, document in enumerate(documents):
                    if new_splits.get(number, home) == split:
                        yield document
