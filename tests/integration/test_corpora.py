"""The five real corpora, raw files to tokens and back, byte for byte, in both vocabularies."""

import pytest

from memorizing.config import SECTIONS
from memorizing.data.bulk import BeamSettings
from memorizing.data.prepare import prepare
from memorizing.data.settings import PrepareSettings
from memorizing.data.tokens import PreparedTokens
from tests.shared_data import unpacked_whole

pytest.importorskip("memorizing.data.builders")

COUNTS = {
    "pg19": (22, 3, 4),
    "arxiv": (43, 5, 5),
    "github": (14, 3, 3),  # and one repository in Rust
    "isabelle": (79, 13, 8),
    "c4": (149, 10, 18),  # less what is too short
}


@pytest.mark.parametrize("corpus", COUNTS)
def test_a_corpus_decodes_exactly(corpus, tmp_path):
    raw = unpacked_whole(corpus, tmp_path)
    settings = SECTIONS[corpus.capitalize()]()
    texts = {
        reading.document.id: reading.document.text
        for item in settings.list(raw)
        for reading in settings.read(item)
        if reading.document
    }
    for vocabulary in ("bytes", "sentencepiece"):
        how = PrepareSettings(
            source=corpus,
            vocabulary=vocabulary,
            vocabulary_size=8000,
            vocabulary_model="bpe",
            vocabulary_sample_bytes=1_000_000,
            minimum_tokens=4096 if corpus == "c4" else 1,
        )
        out = tmp_path / vocabulary
        sections, beam, say = {corpus: settings}, BeamSettings(), lambda line: None
        manifest = prepare(how, sections, beam, raw, out, tmp_path / "documents", say)
        tokens, found = PreparedTokens(out), {}
        for split in manifest["splits"]:
            own = tokens.split(split)
            for number, id in enumerate(own.names()):
                found[id] = tokens.vocabulary.decode(own.read(number, 0, int(own.lengths[number])))
        assert all(texts[id] == text for id, text in found.items())
        counts = tuple(manifest["splits"][split]["documents"] for split in ("train", "validation", "test"))
        if corpus == "c4":
            left_out = [line for line in manifest["left_out"] if "fewer than" in line]
            assert sum(counts) + len(left_out) == 177 and 0 < len(left_out) < 60
            assert all(least < count for least, count in zip((100, 5, 10), counts, strict=True))
        else:
            assert counts == COUNTS[corpus] and found.keys() == texts.keys()
