"""The settings of `memorizing prepare`, and the table of sources."""

import dataclasses
import difflib
from typing import Any, Literal

from memorizing.data.corpora.table import CORPORA
from memorizing.data.documents import FolderSettings
from memorizing.data.recall import RecallSettings
from memorizing.errors import InputError
from memorizing.sections import LARGEST_SEED, check_range

SOURCES: dict[str, type[Any] | None] = {"folder": FolderSettings, "recall": RecallSettings, **CORPORA, "task": None}
"""The names of `Prepare.source`, each with the class of its own settings. A seqio task has none."""


@dataclasses.dataclass(frozen=True)
class PrepareSettings:
    """Settings of preparation: from raw text to tokens.

    Attributes:
        source: where documents come from: `folder` (text files, see `Folder`), `recall` (generated documents, see
            `Recall`), a corpus of the paper (with settings of the same name), or `task` (a seqio task).
        task: name of a seqio task or mixture. Each task of a mixture is read once, whatever its rate.
        task_modules: Python modules that register the task.
        validation: share of the documents held out for validation, if the source has no splits.
        test: share of the documents held out for test, if the source has no splits.
        vocabulary: kind of the vocabulary: `bytes`, `sentencepiece` (trained on the train split), or `pretrained` (the
            tokenizer of an imported model).
        vocabulary_from: prepared folder or SentencePiece model whose vocabulary is used instead of training one, so
            that corpora can share it. Its kind must be `vocabulary`. It must decode every text exactly; for
            `pretrained` (RUN/vocabulary), prepare reports what it does not decode.
        vocabulary_size: number of tokens in the SentencePiece vocabulary.
        vocabulary_model: algorithm that trains the SentencePiece vocabulary.
        vocabulary_sample_bytes: approximate size of the text that the vocabulary is trained on, in bytes.
        minimum_tokens: smallest length of a document, in tokens; shorter ones are left out and counted.
        seed: random seed of the splits and of generated documents.
        part_bytes: approximate size of a part, in bytes of text. A killed preparation loses at most one part.
    """

    source: str = "folder"
    task: str = ""
    task_modules: tuple[str, ...] = ()
    validation: float = 0.1
    test: float = 0.1
    vocabulary: Literal["bytes", "sentencepiece", "pretrained"] = "sentencepiece"
    vocabulary_from: str = ""
    vocabulary_size: int = 32_000
    vocabulary_model: Literal["bpe", "unigram"] = "unigram"
    vocabulary_sample_bytes: int = 10_000_000
    minimum_tokens: int = 1
    seed: int = 0
    part_bytes: int = 1 << 23

    def __post_init__(self):
        if self.source not in SOURCES:
            close = difflib.get_close_matches(self.source, SOURCES, n=1)
            near = f"Did you mean {close[0]!r}?" if close else f"Use one of {', '.join(map(repr, SOURCES))}"
            raise InputError(f"Prepare.source = {self.source!r} is not a source of documents. {near}")
        for name in ("validation", "test"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(
                    f"Prepare.{name} = {getattr(self, name)} is not a share of the documents. Use a "
                    "number from 0 to below 1"
                )
        if self.validation + self.test >= 1:
            raise InputError(
                f"Prepare.validation = {self.validation} and Prepare.test = {self.test} leave nothing to train on. "
                "Their sum must be less than 1"
            )
        if self.vocabulary == "pretrained" and not self.vocabulary_from:
            raise InputError(
                "Prepare.vocabulary = 'pretrained' needs Prepare.vocabulary_from. Give the folder `vocabulary` of a "
                "run that `memorizing import` made"
            )
        check_range(self, 1, 2**50, "vocabulary_sample_bytes", "minimum_tokens", "part_bytes")
        check_range(self, 1, 2**27, "vocabulary_size")
        check_range(self, 0, LARGEST_SEED, "seed")
        if (self.source == "task") != bool(self.task):
            raise InputError(
                f"Prepare.source = {self.source!r} with Prepare.task = {self.task!r}: name a task if and only if the "
                "source is 'task'"
            )
