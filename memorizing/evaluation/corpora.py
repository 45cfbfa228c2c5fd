"""What is evaluated on: splits of prepared tokens, each under a name."""

import re
from collections.abc import Sequence
from pathlib import Path

from memorizing.data.tokens import PreparedTokens, TokenSplit
from memorizing.errors import InputError
from memorizing.files import AnyPath
from memorizing.model.settings import ModelSettings
from memorizing.storage.workdir import readable_tokens


class Corpus:
    """A split of prepared tokens under a name; `is_own` where it is what the run evaluates on by default."""

    def __init__(self, name: str, tokens: PreparedTokens, split: str, is_own: bool):
        self.name, self.tokens, self.split_name, self.is_own = name, tokens, split, is_own
        self.split: TokenSplit = tokens.split(split)
        self.names = self.split.names()
        self._words: dict[int, int] = {}

    @property
    def sha256(self) -> str:
        """The digest of its documents' tokens."""
        return self.tokens.manifest["splits"][self.split_name]["sha256"]

    def words(self, document: int) -> int:
        """How many words whitespace divides a document's text into; counted once."""
        if document not in self._words:
            tokens = self.split.read(document, 0, int(self.split.lengths[document]))
            self._words[document] = len(self.tokens.vocabulary.decode(tokens).split())
        return self._words[document]


def open_corpora(
    named: Sequence[str], splits: Sequence[str], own: str, workdir: AnyPath, model: ModelSettings
) -> list[Corpus]:
    """The splits of prepared folders, each given as FOLDER or NAME=FOLDER; of the run's `own` if none is.

    A folder without a name has that of its source, such as `pg19`.

    Raises:
        InputError: for two folders of one name, a split named twice, or tokens that the model in `workdir` cannot read.
    """
    if len(set(splits)) < len(splits):
        raise InputError(f"--split={','.join(splits)}: name each once")
    folders: dict[str, str] = {}
    corpora = []
    for text in named or [own]:
        given = re.fullmatch(r"([\w.-]+)=(.+)", text)
        folder = given[2] if given else text
        tokens = readable_tokens(workdir, folder, model)
        name = given[1] if given else tokens.manifest["source"]
        if name in folders:
            raise InputError(
                f"--data={folder} and --data={folders[name]} would both be called {name!r}: name them, --data "
                f"NAME={folder}"
            )
        folders[name] = folder
        is_own = given is None and Path(folder).resolve() == Path(own).resolve()
        corpora += [Corpus(name, tokens, split, is_own) for split in splits]
    return corpora
