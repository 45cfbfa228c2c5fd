"""`memorizing prepare`: documents to tokens on disk. What it writes is described in `tokens.py`."""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from memorizing.data.documents import SPLITS, FolderDocuments, FolderSettings, assign_splits
from memorizing.data.recall import RecallDocuments, RecallSettings, words
from memorizing.data.tokens import FORMAT_VERSION, MANIFEST, write_split
from memorizing.data.vocabulary import (
    ByteVocabulary,
    Vocabulary,
    WordVocabulary,
    save_vocabulary,
    train_sentencepiece,
)
from memorizing.errors import InputError


@dataclasses.dataclass(frozen=True)
class PrepareSettings:
    """How raw text becomes prepared tokens.

    Attributes:
        source: `folder` (of text, see `Folder`) or `recall` (generated documents, see `Recall`).
        validation, test: shares of the documents held out.
        vocabulary: `bytes`, or `sentencepiece` trained on the train split.
        vocabulary_size: of the SentencePiece vocabulary.
        vocabulary_model: how SentencePiece finds pieces.
        vocabulary_sample_bytes: about how much text it sees.
        seed: of the splits and of generated documents.
    """

    source: Literal["folder", "recall"] = "folder"
    validation: float = 0.1
    test: float = 0.1
    vocabulary: Literal["bytes", "sentencepiece"] = "sentencepiece"
    vocabulary_size: int = 32_000
    vocabulary_model: Literal["bpe", "unigram"] = "unigram"
    vocabulary_sample_bytes: int = 10_000_000
    seed: int = 0

    def __post_init__(self):
        for name in ("validation", "test"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"Prepare.{name} = {getattr(self, name)}: a share of the documents, from 0 to below 1")
        if self.validation + self.test >= 1:
            raise InputError(
                f"Prepare.validation = {self.validation} and Prepare.test = {self.test} leave nothing to train on: "
                "their sum must be below 1"
            )
        for name, least in (("vocabulary_size", 1), ("vocabulary_sample_bytes", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise InputError(f"Prepare.{name} = {getattr(self, name)}: must be at least {least}")


def prepare(
    settings: PrepareSettings,
    folder_settings: FolderSettings,
    recall_settings: RecallSettings,
    raw: Path | None,
    out: Path,
    report: Callable[[str], None] = print,
) -> dict:
    """Writes prepared tokens to `out` and returns the manifest. Nothing is at `out` until all of it is there.

    Raises:
        InputError: when there is something at `out` already, or no usable documents in `raw`.
    """
    if out.exists():
        raise InputError(f"--out={out} exists already; remove it or name another folder, nothing is overwritten")
    if settings.source == "recall":
        documents = RecallDocuments(recall_settings, settings.seed)
    elif raw is None:
        raise InputError("--raw is missing: name the folder that holds the documents")
    else:
        documents = FolderDocuments(raw, folder_settings)
    ids = documents.ids()
    split_of = assign_splits(ids, settings.validation, settings.test, settings.seed)
    members = {split: [id for id in ids if split_of[id] == split] for split in SPLITS if split in split_of.values()}
    report(f"{len(ids)} documents: " + ", ".join(f"{len(names)} {split}" for split, names in members.items()))

    vocabulary = _make_vocabulary(settings, documents, members["train"])
    report(f"vocabulary: {vocabulary.kind}, {vocabulary.size} tokens")
    documents.skipped.clear()  # noted while training the vocabulary; they are noted again below
    unfinished = out.with_name(out.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    save_vocabulary(vocabulary, unfinished)
    splits = {}
    for split, names in members.items():
        counts = write_split(unfinished / split, documents.read(names), vocabulary)
        if not counts.tokens:
            raise InputError(f"no document of the {split} split has any text; see Folder.minimum_bytes and the files")
        splits[split] = dataclasses.asdict(counts)
        report(f"{split}: {counts.documents} documents, {counts.bytes:,} bytes, {counts.tokens:,} tokens")
    if documents.left_out:
        report(f"left out files and folders: {', '.join(documents.left_out)}")
    for line in documents.skipped:
        report(f"left out {line}")
    manifest = {
        "format_version": FORMAT_VERSION,
        "source": settings.source,
        "vocabulary": {"kind": vocabulary.kind, "size": vocabulary.size, "sha256": _fingerprint(vocabulary)},
        "splits": splits,
        "left_out": documents.left_out + documents.skipped,
        "settings": {
            "Prepare": dataclasses.asdict(settings),
            "Folder": dataclasses.asdict(folder_settings),
            "Recall": dataclasses.asdict(recall_settings),
        },
    }
    (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    unfinished.rename(out)
    return manifest


def _make_vocabulary(
    settings: PrepareSettings, documents: FolderDocuments | RecallDocuments, train: list[str]
) -> Vocabulary:
    if isinstance(documents, RecallDocuments):
        return WordVocabulary(words(documents.settings))
    if settings.vocabulary == "bytes":
        return ByteVocabulary()
    texts = (document.text for document in documents.read(train))
    size, model, sample = settings.vocabulary_size, settings.vocabulary_model, settings.vocabulary_sample_bytes
    return train_sentencepiece(texts, size, model, sample)


def _fingerprint(vocabulary: Vocabulary) -> str:
    """A digest of what the ids mean."""
    content = getattr(vocabulary, "model", None) or "\n".join(getattr(vocabulary, "words", [])).encode()
    return hashlib.sha256(vocabulary.kind.encode() + content).hexdigest()
