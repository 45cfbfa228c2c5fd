"""Parsers of Isabelle's files: the header of a theory, and the sessions of a ROOT.

Both read Isabelle's outer syntax: words, quoted names, nested comments. Text in cartouches, strings or braces is
skipped as a whole, so that a word in a description or a comment is never taken for a keyword.
"""

import itertools
import re
from collections.abc import Iterator
from typing import NamedTuple


class Header(NamedTuple):
    """The name of a theory and its imports, in the order of the text."""

    name: str
    imports: tuple[str, ...]


class Session(NamedTuple):
    """A session of a ROOT.

    Attributes:
        name: name in imports such as `Session.Theory`.
        folders: folders of its theories, relative to the ROOT; the first is its own.
        theories: theories that it lists, possibly as paths.
        global_theories: those of them that every session can import by their name alone.
    """

    name: str
    folders: tuple[str, ...]
    theories: tuple[str, ...]
    global_theories: tuple[str, ...]


class _Token(NamedTuple):
    text: str
    quoted: bool = False


_LEXEMES = re.compile(
    r"""(?P<space>\s+)|(?P<formal>(?:\\<(?:comment|\^(?:cancel|marker|latex|comment))>|[―—])\s*)|(?P<open>\(\*|\\<open>|‹|\{\*)|"(?P<string>(?:\\.|[^"\\])*)"|`(?:[^`])*`
    |(?P<mark>[()\[\]=+,])|(?P<word>[^\s"()\[\]=+,‹\\{`]+|.)""",
    re.VERBOSE | re.DOTALL,
)
_PAIRS = {
    "(*": re.compile(r"\(\*|\*\)"),
    r"\<open>": re.compile(r"\\<open>|\\<close>"),
    "‹": re.compile("[‹›]"),
    "{*": re.compile(r"\*\}"),
}
_SECTIONS = {
    "description", "options", "sessions", "directories", "theories", "document_theories", "document_files",
    "export_files", "export_classpath",
}  # fmt: skip
_ENDS = {"session", "chapter", "chapter_definition"}


def header(text: str) -> Header | None:
    """Returns the header of a theory, or None if there is none."""
    tokens = _tokens(text)
    for token in tokens:
        if token == _Token("theory"):
            break
    name, imports, listing = next(tokens, None), [], False
    if name is None:
        return None
    for token in tokens:
        if not token.quoted and token.text in ("begin", "keywords", "abbrevs", "uses"):
            break
        if token == _Token("imports"):
            listing = True
        elif listing:
            imports.append(token.text)
    return Header(name.text, tuple(imports))


def sessions(text: str) -> list[Session]:
    """Returns the sessions of a ROOT, in order."""
    found: list[Session] = []
    tokens = list(_tokens(text))
    starts = [place for place, token in enumerate(tokens) if not token.quoted and token.text in _ENDS]
    for start, stop in itertools.pairwise([*starts, len(tokens)]):
        if tokens[start].text == "session" and start + 1 < stop:
            found.append(_session(tokens[start + 1 : stop]))
    return found


def _session(tokens: list[_Token]) -> Session:
    name, folder, section = tokens[0].text, ".", ""
    folders, theories, shared = [], [], []
    depth = 0
    for before, token in itertools.pairwise(tokens):
        text = token.text
        if not token.quoted and text in "([":
            depth += 1
        elif not token.quoted and text in ")]":
            depth -= 1
        elif depth:
            if section == "theories" and text == "global" and before.text == "(" and theories:
                shared.append(theories[-1])
        elif not section and before == _Token("in"):
            folder = text
        elif not token.quoted and text in _SECTIONS:
            section = "theories" if text == "document_theories" else text
        elif section == "directories":
            folders.append(text)
        elif section == "theories":
            theories.append(text)
    return Session(name, (folder, *(f"{folder}/{own}" for own in folders)), tuple(theories), tuple(shared))


def _tokens(text: str) -> Iterator[_Token]:
    """Yields words, marks and quoted names. Text in cartouches counts as a quoted name; comments are skipped."""
    place = 0
    while match := _LEXEMES.match(text, place):
        place = match.end()
        if match["formal"]:  # a formal comment: a symbol, and a cartouche
            opening = _LEXEMES.match(text, place)
            if opening and opening["open"] not in (None, "(*"):
                place = _closed(text, opening.end(), opening["open"])
        elif match["open"]:
            start, place = place, _closed(text, place, match["open"])
            if match["open"] != "(*":
                yield _Token(text[start:place], quoted=True)
        elif match["string"] is not None:
            yield _Token(match["string"], quoted=True)
        elif match["mark"] or match["word"]:
            yield _Token(match["mark"] or match["word"])


def _closed(text: str, place: int, opening: str) -> int:
    """Returns the end of what `opening` starts; the end of the text if nothing closes it."""
    depth = 1
    for match in _PAIRS[opening].finditer(text, place):
        depth += 1 if match[0] == opening else -1
        if not depth:
            return match.end()
    return len(text)
