"""PG-19 and C4 as TFDS publishes them, fetched by its own loaders: what a corpus is without raw files."""

import dataclasses
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from memorizing.data.bulk import Beam, BeamSettings
from memorizing.data.corpora.source import Item, Reading
from memorizing.data.documents import SPLITS, Document, Problem
from memorizing.errors import InputError

PUBLISHED = {
    "pg19": ("pg19", {"text": "book_text", "id": "book_id", "title": "book_title"}),
    "c4": ("c4/en", {"text": "text", "id": "url", "title": "url"}),
}
_TOGETHER = 256


@dataclasses.dataclass(frozen=True)
class Published:
    """A dataset of TFDS, in the splits that it has.

    Attributes:
        name: of the corpus.
        data_dir: where TFDS keeps what it fetched.
        minimum_bytes: shorter documents are left out, see `C4`.
        beam: runner and options for what TFDS itself does on Beam (C4: weeks on one machine, says TFDS).
    """

    name: str
    data_dir: str
    minimum_bytes: int = 1
    beam: BeamSettings = dataclasses.field(default_factory=BeamSettings, repr=False, compare=False)

    def list(self, raw: Path | None) -> list[Item]:
        """Ranges of documents, after fetching all of them.

        Raises:
            InputError: when they cannot be fetched.
        """
        builder, (runner, options) = self._builder(), Beam.of(self.beam)
        tfds = importlib.import_module("tensorflow_datasets")
        config = tfds.download.DownloadConfig(beam_runner=runner, beam_options=options)
        try:
            builder.download_and_prepare(download_config=config)
        except Exception as error:  # of the network, the file system, Beam: TFDS has no error of its own for it
            raise InputError(
                f"TFDS {PUBLISHED[self.name][0]} could not be fetched ({type(error).__name__}: {str(error)[:300]}): it "
                "needs a network that reaches storage.googleapis.com; where there is none, fetch the raw files "
                "elsewhere and name their folder with --raw"
            ) from error
        counts = {split: builder.info.splits[split].num_examples for split in SPLITS if split in builder.info.splits}
        return [
            Item(f"{split}[{first}:{min(first + _TOGETHER, count)}]", split, self.data_dir)
            for split, count in counts.items()
            for first in range(0, count, _TOGETHER)
        ]

    def read(self, item: Item) -> Iterator[Reading]:
        tfds = importlib.import_module("tensorflow_datasets")
        in_order = tfds.ReadConfig(interleave_cycle_length=1)
        builder, fields = self._builder(), PUBLISHED[self.name][1]
        for example in tfds.as_numpy(builder.as_dataset(split=item.id, read_config=in_order)):
            text, id, title = (_text(example[fields[name]]) for name in ("text", "id", "title"))
            if len(text.encode("utf-8")) < self.minimum_bytes:
                short = f"left out: fewer than {self.minimum_bytes:,} bytes"
                yield Reading(None, (Problem(id, short),))
            else:
                yield Reading(Document(id, title, text))

    def _builder(self) -> Any:
        tfds = importlib.import_module("tensorflow_datasets")
        return tfds.builder(PUBLISHED[self.name][0], data_dir=self.data_dir)


def _text(value: Any) -> str:
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)
