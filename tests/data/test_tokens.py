"""Prepared tokens: what was prepared can be read back exactly, and nothing half-made is taken for whole."""

import io
import json
import shutil

import numpy as np
import pytest
import sentencepiece

from memorizing.data import prepare as prepare_module
from memorizing.data import tokens as tokens_module
from memorizing.data.bulk import BeamSettings
from memorizing.data.documents import FolderSettings
from memorizing.data.prepare import prepare
from memorizing.data.recall import RecallSettings
from memorizing.data.settings import PrepareSettings
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
    sections = {
        "folder": folder or FolderSettings(),
        "recall": RecallSettings(documents=10, bursts=3, pairs=4, keys=40),
    }
    return prepare(settings, sections, BeamSettings(), raw, out, report=lambda line: None)


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


def test_repeating_the_command_changes_nothing_and_nothing_is_overwritten(raw, tmp_path):
    manifest = run(BYTES, raw, tmp_path / "out")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    (tmp_path / "out.unfinished").mkdir()  # as a kill leaves it between renaming the result and tidying up
    assert run(BYTES, raw, tmp_path / "out") == manifest
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == times
    assert not (tmp_path / "out.unfinished").exists()
    with pytest.raises(InputError, match="already exists"):
        run(PIECES, raw, tmp_path / "out")
    (tmp_path / "other").mkdir()
    with pytest.raises(InputError, match="already exists"):
        run(BYTES, raw, tmp_path / "other")


def test_a_failed_run_leaves_no_folder_and_the_next_run_succeeds(raw, tmp_path):
    (raw / "11.txt").write_bytes(b"\xff")
    with pytest.raises(InputError, match=r"11\.txt is not utf-8"):
        run(BYTES, raw, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    manifest = run(BYTES, raw, tmp_path / "out", FolderSettings(undecodable="skip"))
    assert len(manifest["left_out"]) == 1 and "11.txt" in manifest["left_out"][0]
    assert sum(counts["documents"] for counts in manifest["splits"].values()) == 11


def test_left_out_documents_are_noted_once_with_a_trained_vocabulary(raw, tmp_path):
    (raw / "empty.txt").write_text("")
    assert run(PIECES, raw, tmp_path / "out")["left_out"] == [
        "empty.txt: left out: 0 bytes, fewer than Folder.minimum_bytes = 1"
    ]


def test_folders_without_prepared_tokens_are_refused(raw, tmp_path):
    with pytest.raises(InputError, match=r"no manifest\.json.*memorizing prepare"):
        PreparedTokens(tmp_path)
    run(BYTES, raw, tmp_path / "out")
    with pytest.raises(InputError, match="has no split 'dev', only train, validation, test"):
        PreparedTokens(tmp_path / "out").split("dev")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    (tmp_path / "out" / "manifest.json").write_text(json.dumps({**manifest, "format_version": 99}))
    with pytest.raises(
        InputError, match=r"was prepared in format 99, and this version reads format 4\. Run `memorizing prepare` again"
    ):
        PreparedTokens(tmp_path / "out")


def test_a_missing_raw_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="--raw is missing"):
        run(BYTES, None, tmp_path / "out")


def test_generated_documents_need_no_folder(tmp_path):
    settings = PrepareSettings(source="recall")
    run(settings, None, tmp_path / "out")
    prepared = PreparedTokens(tmp_path / "out")
    assert prepared.vocabulary.kind == "words" and prepared.split("train").lengths.tolist()[0] == 3 * 4 * 2


def test_documents_below_the_minimum_are_left_out_and_listed(raw, tmp_path):
    settings = PrepareSettings(vocabulary="bytes", validation=0.0, test=0.0, minimum_tokens=500)
    manifest = run(settings, raw, tmp_path / "out")
    sizes = {path.name: path.stat().st_size for path in raw.iterdir()}
    short = sorted(name for name, size in sizes.items() if size < 500)
    expected = [f"{name}: left out: {sizes[name]} tokens, fewer than Prepare.minimum_tokens = 500" for name in short]
    assert len(short) > 1 and sorted(manifest["left_out"]) == expected
    notes = (tmp_path / "out" / "notes.txt").read_text().splitlines()
    assert sorted(notes) == expected and manifest["notes"] == len(notes)
    assert sorted(PreparedTokens(tmp_path / "out").split("train").names()) == sorted(sizes.keys() - set(short))


def test_left_out_documents_are_counted_by_reason(raw, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "LISTED", 3)
    (raw / "empty.txt").write_text("")
    (raw / "bad.txt").write_bytes(b"\xff")
    settings = PrepareSettings(vocabulary="bytes", validation=0.0, test=0.0, minimum_tokens=500)
    manifest = run(settings, raw, tmp_path / "out", FolderSettings(undecodable="skip"))
    short = sum(path.stat().st_size < 500 for path in raw.iterdir()) - 2
    assert short > 3 and len(manifest["left_out"]) == 3
    assert manifest["left_out_counts"] == {
        "N tokens, fewer than Prepare.minimum_tokens = N": short,
        "N bytes, fewer than Folder.minimum_bytes = N": 1,
        "is not utf-8": 1,
    }


def test_the_histogram_counts_documents_by_length(raw, tmp_path):
    counts = run(PrepareSettings(vocabulary="bytes", validation=0.0, test=0.0), raw, tmp_path / "out")["splits"][
        "train"
    ]
    lengths = [path.stat().st_size for path in raw.iterdir()]
    expected = {least: sum(least <= length < 2 * least for length in lengths) for least in (1 << n for n in range(30))}
    assert counts["lengths"] == {str(least): count for least, count in expected.items() if count}


def test_a_repeated_text_stays_in_one_split_and_is_noted(raw, tmp_path):
    for number in range(4):
        (raw / f"copy-{number}.txt").write_bytes((raw / f"{number}.txt").read_bytes())
    run(BYTES, raw, tmp_path / "out")
    prepared = PreparedTokens(tmp_path / "out")
    split_of = {name: split for split in prepared.manifest["splits"] for name in prepared.split(split).names()}
    assert all(split_of[f"copy-{number}.txt"] == split_of[f"{number}.txt"] for number in range(4))
    notes = (tmp_path / "out" / "notes.txt").read_text()
    assert all(f"{number}.txt: the same text as copy-{number}.txt: all are" in notes for number in range(4))


def test_a_vocabulary_can_be_shared(raw, tmp_path):
    run(PIECES, raw, tmp_path / "one")
    for given in (tmp_path / "one", tmp_path / "one" / "vocabulary.model"):
        settings = PrepareSettings(vocabulary_from=str(given), validation=0.0, test=0.0)
        manifest = run(settings, raw, tmp_path / f"with-{given.name}")
        assert manifest["vocabulary"] == PreparedTokens(tmp_path / "one").manifest["vocabulary"]
    with pytest.raises(InputError, match=r"Prepare\.vocabulary_from = .* nor a SentencePiece model"):
        run(PrepareSettings(vocabulary_from=str(raw / "3.txt")), raw, tmp_path / "bad")
    given = PrepareSettings(vocabulary="bytes", vocabulary_from=str(tmp_path / "one"))
    with pytest.raises(InputError, match=r"is a vocabulary of sentencepiece, but Prepare\.vocabulary = 'bytes'. Set "):
        run(given, raw, tmp_path / "bad")
    run(PrepareSettings(source="recall"), None, tmp_path / "recall")
    with pytest.raises(
        InputError, match=r"is a vocabulary of words, but Prepare\.vocabulary = 'sentencepiece'. Choose an"
    ):
        run(PrepareSettings(vocabulary_from=str(tmp_path / "recall")), raw, tmp_path / "bad")


@pytest.mark.parametrize(
    ("options", "lost"),
    [
        ({}, r"it loses line ends, .*double spaces, .*ligatures, wide letters, Chinese characters, rare"),
        (
            {
                "byte_fallback": True, "normalization_rule_name": "identity", "add_dummy_prefix": False,
                "remove_extra_whitespaces": False, "pad_id": -1, "bos_id": -1, "eos_id": -1, "model_type": "bpe",
                "user_defined_symbols": ["\u2581", "e"],
            },
            r"it loses .*spaces.*, its piece '\u2581', whose id 1 is one of pad, end and unknown, its piece 'e', whose",
        ),
    ],
    ids=["defaults", "no-special-ids"],
)  # fmt: skip
def test_a_vocabulary_that_loses_text_is_refused(raw, tmp_path, options, lost):
    model = io.BytesIO()
    lines = ["".join(chr(97 + (n * k) % 26) for k in range(20)) + " and more text" for n in range(200)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=300,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    (tmp_path / "given.model").write_bytes(model.getvalue())
    with pytest.raises(InputError, match=rf"Prepare\.vocabulary_from = .* does not decode every text exactly.*{lost}"):
        run(PrepareSettings(vocabulary_from=str(tmp_path / "given.model")), raw, tmp_path / "out")
    assert not (tmp_path / "out.unfinished").exists()


KNOWN = r"its train split's documents\.jsonl or bytes is "


def move(path, there):
    shutil.rmtree(there)
    path.rename(there)


def cut(path):
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))


def change(folder, **values):
    manifest = {**json.loads((folder / "manifest.json").read_text()), **values}
    kept = {name: value for name, value in manifest.items() if value is not None}
    (folder / "manifest.json").write_text(json.dumps(kept))


def damage(path, content=None):
    content = path.read_bytes() if content is None else content
    path.write_bytes(content[:-20] + bytes(byte ^ 1 for byte in content[-20:]))


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda folder: damage(folder / "train" / "tokens" / "c" / "0"), r"train.tokens is missing or damaged: .*"),
        (lambda folder: (folder / "train" / "tokens" / "c" / "0").unlink(), "train split is missing some of its files"),
        (lambda folder: (folder / "train" / "ends" / "zarr.json").unlink(), "train is missing or damaged"),
        (lambda folder: (folder / "vocabulary.model").unlink(), r"vocabulary\.model cannot be read: .*No such file"),
        (lambda folder: (folder / "train").rename(folder / "x") and (folder / "test").rename(folder / "train"), "but"),
        (lambda folder: damage(folder / "manifest.json"), r"manifest\.json is damaged"),
        (lambda folder: move(folder / "test" / "bytes", folder / "train" / "bytes"), KNOWN + "4 documents of"),
        (lambda folder: (folder / "train" / "bytes" / "c" / "0").unlink(), KNOWN + "4 documents of 0 bytes"),
        (lambda folder: (folder / "train" / "documents.jsonl").unlink(), r"documents\.jsonl is missing or damaged"),
        (lambda folder: cut(folder / "train" / "documents.jsonl"), KNOWN),
        (
            lambda folder: change(folder, vocabulary=None),
            r"manifest\.json is damaged: vocabulary missing\. Run `memorizing prepare`",
        ),
        (lambda folder: change(folder, splits={"train": {"tokens": 3}}), r"damaged: splits\.train\.documents, splits"),
    ],
    ids=[
        "chunk",
        "no-chunk",
        "no-ends",
        "no-vocabulary",
        "other-split",
        "manifest",
        "other-bytes",
        "no-bytes",
        "no-documents",
        "fewer-documents",
        "no-key",
        "no-counts",
    ],
)
def test_damaged_folders_are_refused(raw, tmp_path, harm, words):
    run(PIECES, raw, tmp_path / "out")
    harm(tmp_path / "out")
    with pytest.raises(InputError, match=words):
        PreparedTokens(tmp_path / "out").split("train")


def test_another_vocabulary_or_tokens_of_another_folder_are_refused(raw, tmp_path):
    run(PIECES, raw, tmp_path / "one")
    (raw / "1.txt").write_text("something else entirely " * 30)
    run(PIECES, raw, tmp_path / "two")
    for name in ("vocabulary.model", "train"):
        mixed = tmp_path / f"mixed-{name}"
        shutil.copytree(tmp_path / "one", mixed)
        shutil.rmtree(mixed / name, ignore_errors=True)
        copy = shutil.copytree if (tmp_path / "two" / name).is_dir() else shutil.copyfile
        copy(tmp_path / "two" / name, mixed / name)
        with pytest.raises(InputError, match=r"its (vocabulary|train.*) is .*, but manifest\.json says .*"):
            PreparedTokens(mixed).split("train")


def test_damage_in_large_splits_is_found_when_it_is_read(raw, tmp_path, monkeypatch):
    run(BYTES, raw, tmp_path / "out")
    damage(tmp_path / "out" / "train" / "tokens" / "c" / "0")
    monkeypatch.setattr(tokens_module, "CHECKED_WHOLE", 10)
    split = PreparedTokens(tmp_path / "out").split("train")
    with pytest.raises(InputError, match="is missing or damaged"):
        split.read(0, 0, 10)
