"""Corpora that TFDS publishes, fetched by TFDS's own loaders when no raw files are given."""

import dataclasses
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from memorizing.data.bulk import Beam, BeamSettings
from memorizing.data.corpora.corpus import Item, PublishedForm, ReadResult
from memorizing.data.corpora.table import CORPORA
from memorizing.data.documents import SPLITS, Document, Problem
from memorizing.errors import InputError

_DOCUMENTS_PER_ITEM = 256


@dataclasses.dataclass(frozen=True)
class Published:
    """A TFDS dataset, in its own splits.

    Attributes:
        name: name of the corpus.
        data_dir: folder in which TFDS stores what it fetched.
        minimum_bytes: shorter documents are left out (see `C4`).
        beam: runner and options for datasets that TFDS builds on Beam. C4 takes weeks on one machine, says TFDS.
    """

    name: str
    data_dir: str
    minimum_bytes: int = 1
    beam: BeamSettings = dataclasses.field(default_factory=BeamSettings, repr=False, compare=False)

    def list(self, raw: Path | None) -> list[Item]:
        """Fetches the dataset and returns ranges of its documents.

        Raises:
            InputError: if the dataset cannot be fetched.
        """
        builder, (runner, options) = self._builder(), Beam.from_settings(self.beam)
        tfds = importlib.import_module("tensorflow_datasets")
        config = tfds.download.DownloadConfig(beam_runner=runner, beam_options=options)
        try:
            builder.download_and_prepare(download_config=config)
        except Exception as error:  # network, file system and Beam errors: TFDS has no common class for them
            raise InputError(
                f"TFDS {self._form.name} could not be fetched ({type(error).__name__}: {str(error)[:300]}). It needs a "
                "network that reaches storage.googleapis.com. Without one, fetch the raw files elsewhere and name "
                "their folder with --raw"
            ) from error
        counts = {split: builder.info.splits[split].num_examples for split in SPLITS if split in builder.info.splits}
        return [
            Item(f"{split}[{first}:{min(first + _DOCUMENTS_PER_ITEM, count)}]", split, self.data_dir)
            for split, count in counts.items()
            for first in range(0, count, _DOCUMENTS_PER_ITEM)
        ]

    def read(self, item: Item) -> Iterator[ReadResult]:
        """Yields the documents of a range."""
        tfds = importlib.import_module("tensorflow_datasets")
        in_order = tfds.ReadConfig(interleave_cycle_length=1)
        builder, features = self._builder(), self._form.features
        for example in tfds.as_numpy(builder.as_dataset(split=item.id, read_config=in_order)):
            text, id, title = (_text(example[features[name]]) for name in ("text", "id", "title"))
            if len(text.encode("utf-8")) < self.minimum_bytes:
                short = f"left out: fewer than {self.minimum_bytes:,} bytes"
                yield ReadResult(None, (Problem(id, short),))
            else:
                yield ReadResult(Document(id, title, text))

    @property
    def _form(self) -> PublishedForm:
        form = CORPORA[self.name].published
        assert form is not None, self.name
        return form

    def _builder(self) -> Any:
        tfds = importlib.import_module("tensorflow_datasets")
        return tfds.builder(self._form.name, data_dir=self.data_dir)


def _text(value: Any) -> str:
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)
