r"""A LaTeX file without comments, and the places where it inputs other files.

A file is scanned once, from left to right, into spans: text, and commands that matter here. Only a scan can tell a
comment from an escaped `\%` (but `\\%` does start a comment) and from a `%` in verbatim text. Joined in order, the
spans are the text without comments; `latex_inputs` follows them from file to file, as LaTeX does.
"""

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from memorizing.data.corpora.corpus import Problem, decode_text

VERBATIM = ("verbatim", "Verbatim", "BVerbatim", "LVerbatim", "lstlisting", "minted", "alltt", "filecontents")
_DEFINES_VERBATIM = re.compile(
    r"\\(?:lstnewenvironment|DefineVerbatimEnvironment|newtcblisting|newverbatim)[ \t]*\{([A-Za-z]+)\}"
)
# Before an argument and in its braces, TeX treats a line's end, with its comment, as a blank.
# Possessive quantifiers (`*+`) keep a long run of blanks from taking quadratic time or worse.
_GAP = r"[ \t]*+(?:(?:%[^\n]*+)?\n[ \t]*+)?+"
_NAME = r"(?:[ \t]*+(?:%[^\n]*+)?\n)?+(?P<NAME>[^{}%\n]*+)(?:(?:%[^\n]*+)?\n[ \t]*+)?+"
_ARGUMENT = re.compile(r"ARGUMENT\((\w+)\)")
_COMMENT = re.compile(r"%[^\n]*\n[ \t]*")
_TOKEN = re.compile(
    _ARGUMENT.sub(
        lambda argument: _NAME.replace("NAME", argument[1]),
        r"""
    \\[^A-Za-z]                                                                      # \% \\ and the like
    | (?P<comment>%[^\n]*)
    | (?P<inline>\\verb\*?(?P<bar>[^A-Za-z\s*\\%{}])[^\n]*?(?P=bar)
        | \\(?:lstinline|mintinline[ \t]*(?:\[[^]\n]*\])?\{[^{}\n]*\})(?:\[[^]\n]*\])?
          (?:\{[^{}\n]*\}|(?P<rule>[^A-Za-z\s*\\%{}[])[^\n]*?(?P=rule))
        | \\(?:url|nolinkurl|path|href)[ \t]*\{[^{}\n]*\})                           # % is not a comment in these
    | \\begin[ \t]*\{(?P<environment>[A-Za-z]+\*?)\}
    | (?P<end>\\end[ \t]*\{document\})
    | (?P<class>\\document(?:class|style)(?![A-Za-z@]))
    | \\(?P<plain>input|include|subfile|subfileinclude)(?![A-Za-z@])
        (?:GAP\{ARGUMENT(name)\}|(?![^\s%])GAP(?P<bare>[^\s{}\\%[\]$&,]+))
    | \\(?P<from>(?:sub)?(?:import|inputfrom|includefrom))\*?
        GAP\{ARGUMENT(folder)\}GAP\{ARGUMENT(file)\}
    | \\olimport\*?GAP(?:\[(?P<olfolder>[^]%\n]*)\])?GAP\{ARGUMENT(olfile)\}
    | (?P<bibliography>\\(?:bibliography[ \t]*\{[^{}\n]*\}|printbibliography(?![A-Za-z@])))
    """.replace("GAP", _GAP),
    ),
    re.VERBOSE,
)
_REST_IS_BLANK = re.compile(r"[ \t]*(?:%[^\n]*)?(?=\n|\Z)")


class Span(NamedTuple):
    """A stretch of a file without its comments.

    Attributes:
        kind: kind of command: `class`, `begin` and `end` (of `document`), `bibliography`, `input`, `subfile`, `import`,
            `subimport`; "" for plain text.
        line: line on which a command starts, from 1.
        folder, name: file that an inputting command names.
    """

    text: str
    kind: str = ""
    line: int = 0
    folder: str = ""
    name: str = ""


def strip_comments(text: str, verbatim: frozenset[str] = frozenset()) -> str:
    r"""Returns the text without comments and `comment` environments. Lines that held nothing else are removed.

    It leaves `\%`, the environments in VERBATIM and in `verbatim`, `\verb`, `\lstinline`, `\mintinline`, and addresses
    in `\url` and `\href` unchanged. Stripping twice gives the same text as stripping once.
    """
    return "".join(span.text for span in scan(text, verbatim))


def verbatim_environments(texts: Iterable[str]) -> frozenset[str]:
    """Returns the names of environments that a file of the document defines as verbatim."""
    return frozenset(name for text in texts for name in _DEFINES_VERBATIM.findall(text))


def scan(text: str, verbatim: frozenset[str] = frozenset()) -> Iterator[Span]:
    """Yields the spans of a file in order, without what `strip_comments` removes."""
    place = search = counted = 0  # ends of the text that was yielded, searched, and counted
    unclosed: set[str] = set()
    line, fresh = 1, True  # fresh: the line of `place` has only blanks so far
    while token := _TOKEN.search(text, search):
        environment = token["environment"] or ""
        search = _end(text, token, environment, verbatim, unclosed)
        if token["comment"] or (environment == "comment" and search > token.end()):
            before, place = _remove(text, place, token.start(), search, fresh)
            search, (_, newline, last) = place, before.rpartition("\n")
            fresh = not last.strip(" \t") and (fresh or bool(newline))
            if before:
                yield Span(before)
        elif command := _command(token):
            line, counted = line + text.count("\n", counted, token.start()), token.start()
            if token.start() > place:
                yield Span(text[place : token.start()])
            yield Span(_COMMENT.sub(" " if token["bare"] else "", token[0]), command[0], line, *command[1:])
            place, fresh = search, False
    if place < len(text):
        yield Span(text[place:])


def _end(text: str, token: re.Match[str], environment: str, verbatim: frozenset[str], unclosed: set[str]) -> int:
    """Returns the end of a token. A closed environment whose content is not LaTeX is one token."""
    special = environment == "comment" or environment.rstrip("*") in VERBATIM or environment in verbatim
    if special and environment not in unclosed:
        end = re.compile(rf"\\end[ \t]*\{{{re.escape(environment)}\}}").search(text, token.end())
        if end:
            return end.end()
        unclosed.add(environment)  # later ones are not closed either; searching for each would take quadratic time
    return token.end()


def _remove(text: str, place: int, start: int, end: int, fresh: bool) -> tuple[str, int]:
    """Returns the text from `place` on if `start` to `end` is removed, and the place where the text continues."""
    blank = _REST_IS_BLANK.match(text, end)
    head, newline, tail = text[place:start].rpartition("\n")
    if not tail.strip(" \t") and (fresh or newline):  # it starts its line
        return (head + newline, min(blank.end() + 1, len(text))) if blank else (text[place:start], end)
    if blank:
        return text[place:start], blank.end()
    return text[place:start] + "\n", end  # keeps the text on both sides from joining into a command


def _command(token: re.Match[str]) -> tuple[str, str, str] | None:
    """Returns kind, folder and name (see `Span`) of a token that is a command, or None."""
    if token["plain"]:
        name = token["name"] if token["bare"] is None else token["bare"]
        return "subfile" if token["plain"].startswith("subfile") else "input", "", name.strip(' "')
    if token["from"]:
        kind = "subimport" if token["from"].startswith("sub") else "import"
        return kind, token["folder"].strip(' "'), token["file"].strip(' "')
    if token["olfile"] is not None:  # the Open Logic Text's name for \subimport
        return "subimport", (token["olfolder"] or "").strip(), token["olfile"].strip()
    if token["environment"] == "document":
        return "begin", "", ""
    kind = next((kind for kind in ("class", "end", "bibliography") if token[kind]), None)
    return (kind, "", "") if kind else None


def decode(content: bytes, place: str) -> tuple[str, tuple[Problem, ...]]:
    r"""Decodes UTF-8, or else ISO-8859-1, with `\n` as line end; returns the text and notes."""
    text, problems = decode_text(content, place)
    return text.replace("\r\n", "\n").replace("\r", "\n"), problems


_TITLE = re.compile(r"\\title[ \t\n]*(?:\[[^]]*\])?[ \t\n]*\{")
_DECORATION = re.compile(
    r"\\(?:text(?:bf|it|rm|sc|sf|tt|up|sl|md)|emph|bfseries|itshape|scshape|sffamily|bf|it|sc|sf|rm|em"
    r"|Huge|huge|LARGE|Large|large|normalsize|boldmath|protect|centering)(?![A-Za-z])[ \t]*"
)


def title(text: str) -> str:
    r"""Returns the argument of `\title` on one line, without fonts, footnotes and outer braces; "" if not found."""
    for match in _TITLE.finditer(text):
        content = _group(text, match.end() - 1)
        if content is None or "#" in content:
            continue
        while (note := re.search(r"\\(?:thanks|footnote|label)[ \t]*\{", content)) is not None:
            inside = _group(content, note.end() - 1)
            if inside is None:
                break
            content = content[: note.start()] + content[note.end() + len(inside) + 1 :]
        content = re.sub(r"\\\\(?:\[[^]]*\])?|~", " ", content)
        content = " ".join(_DECORATION.sub("", content).split())
        while content.startswith("{") and _group(content, 0) == content[1:-1]:
            content = content[1:-1].strip()
        if content:
            return content
    return ""


def _group(text: str, start: int) -> str | None:
    """Returns the text between the brace at `start` and its closing brace, or None."""
    depth = 0
    for token in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if depth == 0:
            return text[start + 1 : token.start()]
    return None
