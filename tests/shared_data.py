"""The small real corpora and malformed inputs: in `shared/data` beside a checkout, or nowhere."""

import tarfile
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1].parent / "shared" / "data"


def oddity(name: str) -> Path:
    """A malformed input; skips the test where there are none."""
    if not (FOLDER / "oddities" / name).exists():
        pytest.skip("needs the malformed inputs that lie beside the checkout in shared/data")
    return FOLDER / "oddities" / name


def unpacked_whole(corpus: str, into: Path) -> Path:
    """The folder of a corpus with all its splits."""
    return [unpacked(corpus, split, into) for split in ("train", "validation", "test")][-1].parent


def unpacked(corpus: str, split: str, into: Path) -> Path:
    """The folder of a split's documents, unpacked below `into`; skips the test where there are no corpora."""
    archive = FOLDER / corpus / f"{split}.tar.xz"
    if not archive.exists():
        pytest.skip("needs the corpora that lie beside the checkout in shared/data")
    if not (into / corpus / split).exists():
        with tarfile.open(archive) as tar:
            tar.extractall(into / corpus, filter="data")
    return into / corpus / split
