"""Real documents of five kinds become tokens and come back, byte for byte."""

import pytest

from memorizing.data.documents import FolderSettings
from memorizing.data.prepare import PrepareSettings, prepare
from memorizing.data.recall import RecallSettings
from memorizing.data.tokens import PreparedTokens
from tests.shared_data import unpacked

KINDS = {
    "pg19": ("validation", FolderSettings("file", (".txt",)), 3),
    "arxiv": ("validation", FolderSettings("entry", (".tex",)), 5),
    "github": ("test", FolderSettings("entry", (".py", ".go", ".c", ".h", ".cc", ".java", ".ts", ".rs")), 3),
    "isabelle": ("validation", FolderSettings("file", (".thy",)), None),
}


@pytest.mark.parametrize("corpus", KINDS)
@pytest.mark.parametrize("vocabulary", ["bytes", "sentencepiece"])
def test_real_documents_come_back_exactly(corpus, vocabulary, tmp_path):
    split, folder, documents = KINDS[corpus]
    raw = unpacked(corpus, split, tmp_path)
    settings = PrepareSettings(
        vocabulary=vocabulary, vocabulary_size=1000, vocabulary_model="bpe", validation=0.3, test=0.3
    )
    manifest = prepare(settings, folder, RecallSettings(), raw, tmp_path / "out", report=lambda line: None)
    prepared = PreparedTokens(tmp_path / "out")
    count = 0
    for name in manifest["splits"]:
        tokens = prepared.split(name)
        for document, id in enumerate(tokens.names()):
            text = prepared.vocabulary.decode(tokens.read(document, 0, int(tokens.lengths[document])))
            if folder.document == "file":
                assert text.encode() == (raw / id).read_bytes()
            elif (raw / id).is_dir():
                for path in (raw / id).rglob("*"):
                    if path.is_file() and path.name.endswith(folder.suffixes) and path.read_text().strip():
                        assert path.read_bytes().decode().rstrip() in text
            count += 1
    assert count == documents or (documents is None and count > 20)
