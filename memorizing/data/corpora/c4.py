"""C4(4K+): a document is a web page of C4's JSON-lines shards.

    raw/c4-train.00000-of-01024.json.gz ...          the split is in the name, or
    raw/train|validation|test/*.json.gz              in the layout; .json and .jsonl are read as well

A line is `{"text": ..., "timestamp": ..., "url": ...}`. Only a vocabulary tells which pages have 4,096 tokens, so
`Prepare.minimum_tokens` decides. This reader leaves out pages that are too short in any vocabulary.
"""

import codecs
import dataclasses
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, ClassVar, cast

from memorizing.data.corpora.corpus import (
    Corpus,
    Document,
    Item,
    Problem,
    PublishedForm,
    ReadResult,
    document_items,
    entries,
    left_out_item,
    open_file,
    split_folders,
)
from memorizing.data.documents import Split
from memorizing.errors import InputError
from memorizing.sections import check_range

_SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")


@dataclasses.dataclass(frozen=True)
class C4(Corpus):
    """Settings of C4: long web pages.

    Attributes:
        minimum_bytes: shorter pages are left out. A token has at least one byte, so the value of
            `Prepare.minimum_tokens` loses no page that would be used, and saves encoding most of C4.
    """

    minimum_bytes: int = 4096

    published: ClassVar = PublishedForm("c4/en", {"text": "text", "id": "url", "title": "url"})
    task_minimum_tokens: ClassVar = 4096

    def __post_init__(self):
        check_range(self, 0, 2**50, "minimum_bytes")

    def list(self, raw: Path) -> list[Item]:
        """Returns all shards, by split and name. An item is a file with many documents."""
        folders, strays = split_folders(raw, lambda path: any(map(_is_shard, [path, *entries(path)])))
        items = [*(item for split, folder in folders for item in _items(split, folder)), *strays]
        in_splits = [item for item in document_items(items) if item.split]
        strays = [item for item in document_items(items) if not item.split]
        if in_splits and strays:
            raise InputError(
                f"{strays[0].path} has no split in its name, but {Path(in_splits[0].path).name} has. Rename it (as in "
                "c4-train.00000-of-01024.json.gz), or move it into train/, validation/ or test/"
            )
        if not document_items(items):
            raise InputError(
                f"--raw={raw} has no {', '.join(_SUFFIXES)} files, nor do its train, validation, test. Give the folder "
                "that holds C4's shards (c4-train.00000-of-01024.json.gz)"
            )
        return items

    def read_documents(self, item: Item) -> Iterator[ReadResult]:
        """Yields a page per line, or a note if the page is left out."""
        number = 0
        for number, line in enumerate(_lines(Path(item.path)), 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
                _check_shard(Path(item.path), line)
            place = f"{item.id}, line {number}"
            try:
                page = json.loads(line.decode("utf-8"))
                text = page["text"]
                text.encode("utf-8")  # JSON can escape half of a surrogate pair, which is not a character
            except UnicodeDecodeError as error:
                reason = f"byte {line[error.start]:#04x} at offset {error.start} of the line is not UTF-8"
            except UnicodeEncodeError as error:
                reason = f"half of a surrogate pair at character {error.start} of its text"
            except (ValueError, RecursionError) as error:
                reason = f"not a JSON object ({error})" if line.strip() else "an empty line"
            except (KeyError, TypeError, AttributeError):
                reason = 'not a JSON object with "text": "..."'
            else:
                size = len(text.encode("utf-8"))
                url = page.get("url") if isinstance(page.get("url"), str) else ""
                if size >= max(self.minimum_bytes, 1):
                    yield ReadResult(Document(url or place, url or place, text))
                    continue
                place = url or place
                reason = f"{size:,} bytes, fewer than C4.minimum_bytes = {self.minimum_bytes:,}" if size else "no text"
            yield ReadResult(None, (Problem(place, f"left out: {reason}"),))
        if not number:
            yield ReadResult(None, (Problem(item.id, "left out: it has no lines"),))


def _check_shard(path: Path, first_line: bytes) -> None:
    """Rejects a file that is something else than a shard, whose pages would be missing.

    Raises:
        InputError: says what the file is and how to get the shard.
    """
    for start, what in NO_SHARD.items():
        if first_line.lstrip()[: len(start)].lower() == start:
            raise InputError(f"{path} is {what}")


NO_SHARD = {
    b"version https://git-lfs": "a pointer of Git LFS, not the shard. Run `git lfs pull` in the repository",
    b"<!doctype html": "a web page, probably of an error, not the shard. Fetch it again",
    b"<html": "a web page, probably of an error, not the shard. Fetch it again",
    b"<?xml": "an XML message, probably of an error, not the shard. Fetch it again",
}
"""Starts of files that are found in place of a shard, and what they are."""


def _items(split: Split | None, folder: Path) -> Iterator[Item]:
    for path in entries(folder):
        if _is_shard(path):
            name = f"{split}/{path.name}" if split else path.name
            yield Item(name, split or _split(path.name), str(path))
        else:
            yield left_out_item(path, split, f"not a file of type {', '.join(_SUFFIXES)}")


def _is_shard(path: Path) -> bool:
    return path.name.lower().endswith(_SUFFIXES) and not path.name.startswith(".") and path.is_file()


def _split(name: str) -> Split | None:
    match = re.search(r"(?:^|[.-])(train|validation|test)[.-]", name)
    return cast(Split, match[1]) if match else None


def _lines(path: Path) -> Iterator[bytes]:
    with open_file(path) as raw:
        head = raw.read(2)
        raw.seek(0)
        is_gzip = head == b"\x1f\x8b"
        file = cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if is_gzip else raw
        number = 0
        try:
            if not head and path.name.lower().endswith(".gz"):
                raise EOFError("0 bytes, fewer than any gzip file has")  # Python's gzip accepts an empty file
            for line in file:
                yield line
                number += 1
        except (EOFError, OSError, zlib.error) as error:
            raise InputError(
                f"{path}: cut off or damaged after line {number} ({error}); pages would be missing. Fetch it "
                "again, or move it away to continue without it"
            ) from error
