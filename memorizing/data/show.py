"""`memorizing show_data`: checks a prepared folder, and prints its contents and the segments of a document."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from memorizing.data.tokens import NOTES, PreparedTokens, TokenSplit
from memorizing.data.vocabulary import Vocabulary
from memorizing.errors import InputError

_SAMPLE = 1500
_EDGE = 32
_SHOWN = 6


def show_data(
    folder: Path, split: str, document: str | None, segment_length: int, report: Callable[[str], None] = print
) -> None:
    """Prints the manifest, compares all files with their digests, and shows a document and its segments.

    Raises:
        InputError: if the folder is damaged, or has no such split or document.
    """
    if segment_length < 1:
        raise InputError(f"--segment_length={segment_length} is too small. Use 1 or more")
    tokens = PreparedTokens(folder)
    manifest = tokens.manifest
    vocabulary = manifest["vocabulary"]
    report(f"{folder}: {manifest['source']}, {vocabulary['kind']} vocabulary of {vocabulary['size']} tokens")
    for name, counts in manifest["splits"].items():
        tokens.check(name, tokens.split(name))
        report(
            f"\n{name}: {counts['documents']:,} documents, {counts['tokens']:,} tokens, {counts['bytes']:,} bytes "
            f"({counts['bytes'] / max(counts['tokens'], 1):.2f} per token), sha256 {counts['sha256'][:12]} as on disk"
        )
        _histogram(counts["lengths"], report)
    counts = manifest["left_out_counts"]
    report(f"\nleft out: {sum(counts.values()):,}; {manifest['notes']:,} notes in {folder / NOTES}")
    for reason, count in counts.items():
        report(f"  {count:>8,} {reason}")
    for line in manifest["left_out"][:_SHOWN]:
        report(f"  {line}")
    report("\nsettings:")
    for section, settings in manifest["settings"].items():
        report("  " + ", ".join(f"{section}.{name} = {value!r}" for name, value in settings.items()))
    token_split = tokens.split(split)
    names = token_split.names()
    if document is not None and document not in names:
        raise InputError(
            f"--document={document} is not in the {split} split. Its first documents are {', '.join(names[:5])}"
        )
    _document(token_split, names.index(document) if document else 0, tokens.vocabulary, segment_length, report)


def _histogram(lengths: Mapping[str, int], report: Callable[[str], None]) -> None:
    most = max(lengths.values())
    for least, count in lengths.items():
        report(f"  {int(least):>10,} tokens or more {count:>8,} {'#' * max(1, round(40 * count / most))}")


def _document(
    split: TokenSplit, number: int, vocabulary: Vocabulary, segment_length: int, report: Callable[[str], None]
) -> None:
    entry, length = split.documents()[number], int(split.lengths[number])
    segments = -(-length // segment_length)
    report(f"\ndocument {entry['id']} ({entry['title'] or 'no title'}; license {entry['license'] or 'unknown'}): ")
    report(f"{length:,} tokens, {segments:,} segments of {segment_length}\n")
    sample = vocabulary.decode(split.read(number, 0, _SAMPLE // 4))
    report("\n".join(f"  | {line[: shutil.get_terminal_size().columns - 6]}" for line in sample.splitlines()[:20]))
    report("\nsegments: number, first token, and the text before and after its start")
    shown = [place for place in range(segments) if place < _SHOWN or place == segments - 1]
    for place in shown:
        start = place * segment_length
        before = vocabulary.decode(split.read(number, max(0, start - _EDGE), start))[-30:] if start else ""
        after = vocabulary.decode(split.read(number, start, start + _EDGE))[:30]
        report(f"  {place:>6} {start:>10,}  {before!r:>34} | {after!r}")
        if place == _SHOWN - 1 and segments > _SHOWN + 1:
            report("     ...")
