"""Memorizing Transformers (arXiv 2203.08913): train them, measure them, use them. The command is in `cli.py`.

from memorizing import open_reader
"""

from typing import Any


def __getattr__(name: str) -> Any:
    """`open_reader`, loaded when it is asked for: the rest of the package needs nothing of it."""
    if name != "open_reader":
        raise AttributeError(f"module 'memorizing' has no attribute {name!r}")
    from memorizing.api import open_reader

    return open_reader
