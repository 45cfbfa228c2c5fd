"""The small real corpora, for tests that need real text: in `shared/data` beside a checkout, or nowhere."""

import tarfile
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1].parent / "shared" / "data"


def unpacked(corpus: str, split: str, into: Path) -> Path:
    """The folder of a split's documents, unpacked below `into`; skips the test where there are no corpora."""
    archive = FOLDER / corpus / f"{split}.tar.xz"
    if not archive.exists():
        pytest.skip("needs the corpora that lie beside the checkout in shared/data")
    if not (into / corpus / split).exists():
        with tarfile.open(archive) as tar:
            tar.extractall(into / corpus, filter="data")
    return into / corpus / split
