"""Prepared tokens: what was prepared can be read back exactly, and nothing half-made is taken for whole."""

import json

import numpy as np
import pytest

from memorizing.data import tokens as tokens_module
from memorizing.data.documents import FolderSettings
from memorizing.data.prepare import PrepareSettings, prepare
from memorizing.data.recall import RecallSettings
from memorizing.data.tokens import PreparedTokens
from memorizing.errors import InputError

BYTES = PrepareSettings(vocabulary="bytes", validation=0.2, test=0.2)
PIECES = PrepareSettings(vocabulary_size=300, vocabulary_model="bpe", validation=0.2, test=0.2)


@pytest.fixture
def raw(tmp_path):
    folder = tmp_path / "raw"
    folder.mkdir()
    for number in range(12):
        lines = "".join(f"line {line * number} of dœument {number}\r\n" for line in range(5 * number + 1))
        (folder / f"{number}.txt").write_bytes(lines.encode())
    return folder


def run(settings, raw, out, folder=None):
    return prepare(settings, folder or FolderSettings(), RecallSettings(), raw, out, report=lambda line: None)


@pytest.mark.parametrize("settings", [BYTES, PIECES], ids=["bytes", "sentencepiece"])
def test_tokens_give_back_every_document_exactly(raw, tmp_path, settings, monkeypatch):
    monkeypatch.setattr(tokens_module, "_CHUNK", 100)  # so that documents lie across chunks
    manifest = run(settings, raw, tmp_path / "out")
    prepared, found = PreparedTokens(tmp_path / "out"), {}
    for name, counts in manifest["splits"].items():
        split = prepared.split(name)
        assert split.names() and counts["tokens"] == split.lengths.sum() and counts["bytes"] == split.bytes.sum()
        for document, id in enumerate(split.names()):
            length = int(split.lengths[document])
            text = prepared.vocabulary.decode(split.read(document, 0, length))
            assert len(text.encode()) == split.bytes[document]
            np.testing.assert_array_equal(split.read(document, 3, 9), split.read(document, 0, length)[3:9])
            assert len(split.read(document, length - 2, length + 50)) == 2  # cut at its end
            assert id not in found
            found[id] = text
    assert found == {path.name: path.read_bytes().decode() for path in raw.iterdir()}


def test_preparing_is_deterministic(raw, tmp_path):
    for name in ("one", "other"):
        run(PIECES, raw, tmp_path / name)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert len(files) > 10
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "other" / file).read_bytes()


def test_nothing_is_overwritten(raw, tmp_path):
    run(BYTES, raw, tmp_path / "out")
    with pytest.raises(InputError, match="exists already"):
        run(BYTES, raw, tmp_path / "out")


def test_a_failure_leaves_nothing_that_looks_whole_and_does_not_disturb_the_next_try(raw, tmp_path):
    (raw / "11.txt").write_bytes(b"\xff")
    with pytest.raises(InputError, match=r"11\.txt is not utf-8"):
        run(BYTES, raw, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    manifest = run(BYTES, raw, tmp_path / "out", FolderSettings(undecodable="skip"))
    assert len(manifest["left_out"]) == 1 and "11.txt" in manifest["left_out"][0]
    assert sum(counts["documents"] for counts in manifest["splits"].values()) == 11


def test_what_is_left_out_is_noted_once_with_a_trained_vocabulary(raw, tmp_path):
    (raw / "empty.txt").write_text("")
    assert run(PIECES, raw, tmp_path / "out")["left_out"] == ["empty.txt: shorter than Folder.minimum_bytes = 1"]


def test_what_is_no_prepared_folder_is_refused(raw, tmp_path):
    with pytest.raises(InputError, match=r"no manifest\.json.*memorizing prepare"):
        PreparedTokens(tmp_path)
    run(BYTES, raw, tmp_path / "out")
    with pytest.raises(InputError, match="has no split 'dev', only train, validation, test"):
        PreparedTokens(tmp_path / "out").split("dev")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    (tmp_path / "out" / "manifest.json").write_text(json.dumps({**manifest, "format_version": 99}))
    with pytest.raises(InputError, match="was prepared in format 99, this program reads format 1"):
        PreparedTokens(tmp_path / "out")


def test_a_raw_folder_is_asked_for(tmp_path):
    with pytest.raises(InputError, match="--raw is missing"):
        run(BYTES, None, tmp_path / "out")


def test_generated_documents_need_no_folder(tmp_path):
    settings = PrepareSettings(source="recall")
    small = RecallSettings(documents=10, bursts=3, pairs=4, keys=40)
    prepare(settings, FolderSettings(), small, None, tmp_path / "out", report=lambda line: None)
    prepared = PreparedTokens(tmp_path / "out")
    assert prepared.vocabulary.kind == "words" and prepared.split("train").lengths.tolist()[0] == 3 * 4 * 2
