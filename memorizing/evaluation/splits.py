"""The splits of prepared tokens that an evaluation reads, each under the name of its corpus."""

import re
from collections.abc import Sequence
from pathlib import Path

from memorizing.data.tokens import PreparedTokens, TokenSplit
from memorizing.errors import InputError
from memorizing.files import AnyPath
from memorizing.model.settings import ModelSettings
from memorizing.storage.workdir import readable_tokens


class EvaluationSplit:
    """A split of a folder of prepared tokens.

    Attributes:
        corpus: name of the folder in figures and file names.
        tokens: the prepared folder.
        name: name of the split, such as `test`.
        is_default: True if the folder is the one that the run evaluates on by default.
        split: the documents' tokens.
        document_names: names of the documents, in order.
    """

    def __init__(self, corpus: str, tokens: PreparedTokens, name: str, is_default: bool):
        self.corpus, self.tokens, self.name, self.is_default = corpus, tokens, name, is_default
        self.split: TokenSplit = tokens.split(name)
        self.document_names = self.split.names()
        self._words: dict[int, int] = {}

    @property
    def sha256(self) -> str:
        """The digest of the documents' tokens."""
        return self.tokens.manifest["splits"][self.name]["sha256"]

    def words(self, document: int) -> int:
        """Returns the number of words in a document, split at whitespace; decodes each document once."""
        if document not in self._words:
            tokens = self.split.read(document, 0, int(self.split.lengths[document]))
            self._words[document] = len(self.tokens.vocabulary.decode(tokens).split())
        return self._words[document]


def open_splits(
    folders: Sequence[str], names: Sequence[str], default: str, workdir: AnyPath, model: ModelSettings
) -> list[EvaluationSplit]:
    """Opens the named splits of each folder of prepared tokens.

    Args:
        folders: FOLDER or NAME=FOLDER each; empty for the folder `default` alone. A folder without a name takes the
            name of its source, such as `pg19`.
        names: names of the splits.

    Raises:
        InputError: if two folders or splits have one name, or the run in `workdir` cannot read the tokens.
    """
    if len(set(names)) < len(names):
        raise InputError(f"--split={','.join(names)} names a split twice. Give each split once")
    folder_of: dict[str, str] = {}
    splits = []
    for argument in folders or [default]:
        named = re.fullmatch(r"([\w.-]+)=(.+)", argument)
        folder = named[2] if named else argument
        tokens = readable_tokens(workdir, folder, model)
        corpus = named[1] if named else tokens.manifest["source"]
        if corpus in folder_of:
            raise InputError(
                f"--data={folder} and --data={folder_of[corpus]} would both be called {corpus!r}. Names must differ: "
                f"use --data NAME={folder}"
            )
        folder_of[corpus] = folder
        is_default = named is None and Path(folder).resolve() == Path(default).resolve()
        splits += [EvaluationSplit(corpus, tokens, name, is_default) for name in names]
    return splits
