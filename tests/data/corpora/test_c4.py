"""C4: every line is a page or a named problem, and a shard that is cut off is refused."""

import gzip
import json
import shutil

import pytest

from memorizing.data.corpora.c4 import C4
from memorizing.errors import InputError
from tests import shared_data


def write(path, pages):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [page if isinstance(page, bytes) else json.dumps(page).encode() for page in pages]
    content = b"\n".join(lines) + b"\n"
    path.write_bytes(gzip.compress(content) if path.name.lower().endswith(".gz") else content)


def page(text, url="https://example.org/a"):
    return {"text": text, "timestamp": "2020-01-01T00:00:00Z", "url": url}


def read(raw, **fields):
    corpus = C4(**fields)
    return [reading for item in corpus.list(raw) for reading in corpus.read(item)]


def test_pages_are_whole_and_named_by_their_address(tmp_path):
    text = "naïve \u2028 \U0001f600 text\n" * 200
    write(tmp_path / "c4-train.00000-of-00001.json.gz", [page(text), page(text + "b", None), {"text": text + "c"}])
    found = [reading.document for reading in read(tmp_path)]
    assert [document.text for document in found] == [text, text + "b", text + "c"]
    assert [document.id for document in found] == [
        "https://example.org/a",
        *(f"c4-train.00000-of-00001.json.gz, line {number}" for number in (2, 3)),
    ]


def test_splits_come_from_the_name_or_the_folder(tmp_path):
    for name in ("c4-train.00000-of-00001.json.gz", "c4-validation.00000-of-00001.json.gz", "other.jsonl"):
        write(tmp_path / "a" / name, [page("x")])
        write(tmp_path / "b" / "test" / name, [page("x")])
    with pytest.raises(InputError, match=r"other\.jsonl has no split in its name, but c4-train.* has\. Rename it"):
        C4().list(tmp_path / "a")
    (tmp_path / "a" / "other.jsonl").unlink()
    assert [item.split for item in C4().list(tmp_path / "a")] == ["train", "validation"]
    assert [item.split for item in C4().list(tmp_path / "b")] == ["test"] * 3


def test_short_pages_are_left_out_with_a_note(tmp_path):
    write(tmp_path / "a.json", [page("x" * 99, "short"), page("é" * 50, "enough"), page("y" * 100, "also")])
    found = read(tmp_path, minimum_bytes=100)
    assert [reading.document.id for reading in found if reading.document] == ["enough", "also"]
    (problem,) = found[0].problems
    assert problem == ("short", "left out: 99 bytes, fewer than C4.minimum_bytes = 100")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"", "an empty line"),
        (b'{"text": "a', "not a JSON object"),
        (b"[" * 100_000, "not a JSON object"),
        (b'["text"]', 'not a JSON object with "text"'),
        (b'{"url": "u"}', 'not a JSON object with "text"'),
        (b'{"text": null}', 'not a JSON object with "text"'),
        (b'{"text": 7}', 'not a JSON object with "text"'),
        (b'{"text": ""}', "no text"),
        (b'{"text": "\xff"}', "byte 0xff at offset 10 of the line is not UTF-8"),
        (b'{"text": "\\ud800 half"}', "half of a surrogate pair at character 0"),
    ],
)
def test_a_bad_line_is_noted_and_the_others_are_read(tmp_path, line, words):
    write(tmp_path / "a.json.gz", [page("first" * 1000), line, page("last" * 2000)])
    first, bad, last = read(tmp_path)
    assert first.document.text == "first" * 1000 and last.document.text == "last" * 2000
    (problem,) = bad.problems
    assert bad.document is None and words in problem.message and problem.message.startswith("left out: ")
    assert problem.place == "a.json.gz, line 2"


def test_an_empty_shard_is_refused_if_compressed_and_noted_otherwise(tmp_path):
    write(tmp_path / "c4.0.JSON.GZ", [page("x")])
    (tmp_path / "c4.1.json").touch()
    (tmp_path / "c4.2.json.gz").write_bytes(gzip.compress(b""))
    found = [reading.problems or reading.document.text for reading in read(tmp_path, minimum_bytes=0)]
    assert found == ["x", *(((f"c4.{name}", "left out: it has no lines"),) for name in ("1.json", "2.json.gz"))]
    (tmp_path / "c4.3.json.gz").touch()
    with pytest.raises(InputError, match=r"c4\.3\.json\.gz: cut off or damaged after line 0 \(0 bytes"):
        read(tmp_path)


def test_a_folder_without_shards_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"--raw=.* has no \.json, .* files"):
        C4().list(tmp_path)


def test_malformed_inputs(tmp_path):
    shutil.copy(shared_data.oddity("bad-lines.json.gz"), tmp_path)
    found = read(tmp_path, minimum_bytes=0)
    assert [reading.document is not None for reading in found] == [True] + [False] * 7 + [True]
    assert [problem.place.endswith(f"line {n}") for n, r in enumerate(found, 1) for problem in r.problems].count(
        True
    ) == 6
    (tmp_path / "bad-lines.json.gz").unlink()
    shutil.copy(shared_data.oddity("truncated.json.gz"), tmp_path)
    with pytest.raises(InputError, match=r"truncated\.json\.gz: cut off or damaged after line \d+ .*Fetch it again"):
        read(tmp_path)


def test_the_shared_corpus(tmp_path):
    folders = [shared_data.unpacked("c4", split, tmp_path) for split in ("train", "validation", "test")]
    corpus = C4(minimum_bytes=0)
    items = corpus.list(folders[0].parent)
    counts = {split: 0 for split in ("train", "validation", "test")}
    for item in items:
        for reading in corpus.read(item):
            assert reading.document and not reading.problems
            counts[item.split] += 1
    assert counts == {"train": 149, "validation": 10, "test": 18}
    short = [reading for reading in read(folders[0].parent, minimum_bytes=16_000) if reading.document is None]
    assert len(short) == 27 + 2 + 1


def test_a_byte_order_mark_loses_no_page(tmp_path):
    write(tmp_path / "a.json", [b"\xef\xbb\xbf" + json.dumps(page("x", "first")).encode(), page("y", "second")])
    assert [reading.document.id for reading in read(tmp_path, minimum_bytes=1)] == ["first", "second"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 319000000\n", "git lfs pull"),
        (b"<!DOCTYPE html>\n<title>404</title>\n", "a web page, probably of an error"),
        (b"<html><body>403</body></html>\n", "a web page, probably of an error"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>\n", "an XML message"),
    ],
)
def test_what_is_found_in_place_of_a_shard_is_refused_by_its_name(content, words, tmp_path):
    (tmp_path / "c4-train.00000-of-00001.json.gz").write_bytes(content)
    with pytest.raises(InputError, match=rf"c4-train\.00000-of-00001\.json\.gz is .*{words}"):
        read(tmp_path)
