"""Settings of `memorizing prepare`, whatever the source."""

import dataclasses
from typing import Literal

from memorizing.errors import InputError


@dataclasses.dataclass(frozen=True)
class PrepareSettings:
    """How raw text becomes prepared tokens.

    Attributes:
        source: `folder` (of text, see `Folder`), `recall` (generated documents, see `Recall`), one of the paper's
            corpora (each with settings of its name), or `task` (of seqio's registry).
        task: name of a seqio task, or of a mixture, whose tasks are each read once whatever its rates.
        task_modules: Python modules that register it.
        validation, test: shares of the documents held out, where the source itself has no splits.
        vocabulary: `bytes`, `sentencepiece` trained on the train split, or `pretrained`, that of an imported model.
        vocabulary_from: a prepared folder or SentencePiece model whose vocabulary, of the kind that `vocabulary` says,
            is used instead of training one, so that several corpora share it. It must give back all text exactly; of a
            `pretrained` one (RUN/vocabulary) it is said what it does not.
        vocabulary_size: of the SentencePiece vocabulary.
        vocabulary_model: how SentencePiece finds pieces.
        vocabulary_sample_bytes: about how much text it sees.
        minimum_tokens: documents with fewer are left out.
        seed: of the splits and of generated documents.
        part_bytes: about how much text is tokenized between two moments from which a killed run can go on.
    """

    source: Literal["folder", "recall", "pg19", "arxiv", "github", "isabelle", "c4", "task"] = "folder"
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
        for name in ("validation", "test"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"Prepare.{name} = {getattr(self, name)}: a share of the documents, from 0 to below 1")
        if self.validation + self.test >= 1:
            raise InputError(
                f"Prepare.validation = {self.validation} and Prepare.test = {self.test} leave nothing to train on: "
                "their sum must be below 1"
            )
        if self.vocabulary == "pretrained" and not self.vocabulary_from:
            raise InputError(
                "Prepare.vocabulary = 'pretrained' without Prepare.vocabulary_from: name the folder `vocabulary` of a "
                "run that `memorizing import` made"
            )
        least = {"vocabulary_size": 1, "vocabulary_sample_bytes": 1, "minimum_tokens": 1, "seed": 0, "part_bytes": 1}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise InputError(f"Prepare.{name} = {getattr(self, name)}: must be at least {value}")
        if (self.source == "task") != bool(self.task):
            raise InputError(
                f"Prepare.source = {self.source!r} with Prepare.task = {self.task!r}: a task's name goes with the "
                "source 'task', and only with it"
            )
