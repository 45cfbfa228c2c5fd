r"""A LaTeX file without comments, and the places where it inputs other files.

A file is scanned once, from left to right, into spans: text, and commands that matter here. Only a scan can tell a
comment from an escaped `\%` (but `\\%` does start a comment) and from a `%` in verbatim text. Joined in order, the
spans are the text without comments; `latex_inputs` follows them from file to file, as LaTeX does.
"""

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from memorizing.data.corpora.corpus import Problem, decode_8_bit, decode_text

VERBATIM = {
    "verbatim", "Verbatim", "BVerbatim", "LVerbatim", "SaveVerbatim", "VerbatimOut", "VerbatimWrite",
    "spverbatim", "boxedverbatim", "semiverbatim", "verbatimtab", "listing", "listingcont", "lstlisting",
    "minted", "alltt", "filecontents", "tcblisting", "tcboutputlisting", "LTXexample", "SideBySideExample",
    "CenteredExample", "Sinput", "Soutput", "Scode", "Schunk", "knitrout", "pycode", "pyblock", "pyverbatim",
    "pyconsole", "pyconcode", "sympycode", "sympyblock", "sympyverbatim", "pylabcode", "pylabblock",
    "pylabverbatim", "luacode", "sagesilent", "sageblock", "sageverbatim", "sagecommandline", "asy", "asydef",
    "gnuplot", "CodeInput", "CodeOutput", "Code", "rcode",
}  # fmt: skip
"""Environments, with or without a star, whose content is not LaTeX."""
_DEFINES_VERBATIM = re.compile(
    r"\\(?:lstnewenvironment|DefineVerbatimEnvironment|(?:re)?newtcblisting|(?:New|Renew|Provide|Declare)TCBListing"
    r"|newverbatim)[ \t]*(?:\[[^]\n]{0,200}\])?[ \t]*\{([A-Za-z]+)\*?\}"
)
_NEW_MINTED = re.compile(r"\\newminted[ \t]*(?:\[([A-Za-z]+)\*?\])?[ \t]*\{([\w+-]+)\}")
_NEW_ENVIRONMENT = re.compile(
    r"\\(?:(?:re)?newenvironment\*?[ \t\n]*\{([A-Za-z]+)\*?\}[ \t\n]*(?:\[[^]\n]{0,200}\][ \t\n]*){0,2}"
    r"|(?:New|Renew|Provide|Declare)DocumentEnvironment[ \t\n]*\{([A-Za-z]+)\*?\}[ \t\n]*\{[^{}]{0,200}\}[ \t\n]*)"
    r"(?=\{)"
)
_IS_VERBATIM = re.compile(
    r"\\(?:VerbatimEnvironment|[Vv]erbatim(?![A-Za-z])|lstlisting|tcblisting|minted(?![A-Za-z])|alltt(?![A-Za-z]))"
    r"|\\begin[ \t]*\{(?:" + "|".join(sorted(VERBATIM)) + r")\*?\}"
)
_LONGEST_DEFINITION = 2000
"""Characters of an environment's definition in which its verbatim environment is searched."""
_EXCLUDES = re.compile(r"\\excludecomment[ \t]*\{([A-Za-z]+)\}")
_CONDITIONAL = re.compile(r"%[^\n]*|\\(?P<word>if[A-Za-z@]*|else|fi)(?![A-Za-z@])|\\.", re.DOTALL)
_NO_CONDITIONALS = {
    "iff", "ifthenelse", "ifdef", "ifundef", "ifcsdef", "ifcsundef", "ifdefmacro", "ifstrequal", "ifstrempty",
    "ifblank", "ifdefempty", "ifbool", "iftoggle", "ifboolexpr", "ifnumcomp", "ifdimcomp", "ifinlist",
    "ifpackageloaded", "ifclassloaded", "ifdefstring",
}  # fmt: skip
"""Macros named like conditionals that end without `\\fi`."""
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
    | (?P<false>\\iffalse(?![A-Za-z@]))
    | (?P<fi>\\fi(?![A-Za-z@]))
    | (?P<endinput>\\endinput(?![A-Za-z@]))
    | (?P<stop>\\(?:bye|stop|enddocument)(?![A-Za-z@])|\\end(?=[ \t]*(?:%|\n|\Z)))
    | (?P<class>\\document(?:class|style)(?![A-Za-z@]))
    | \\includestandalone[ \t]*(?:\[[^]%\n]*\])?GAP\{ARGUMENT(standalone)\}
    | \\(?P<plain>input|include|subfile|subfileinclude|InputIfFileExists)(?![A-Za-z@])
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
        kind: kind of command: `class`, `begin` and `end` (of `document`), `endinput` (end of the file), `stop` (end of
            all reading), `bibliography`, `input`, `include`, `subfile`, `import`, `subimport`; "" for plain text;
            `hidden` for characters that TeX skips.
        line: line on which a command starts, from 1; for `hidden`, the number of characters.
        folder, name: the file named by a command that inputs one.
    """

    text: str
    kind: str = ""
    line: int = 0
    folder: str = ""
    name: str = ""


def strip_comments(text: str, verbatim: frozenset[str] = frozenset()) -> str:
    r"""Returns the text without comments, `comment` environments and `\iffalse`. Lines with nothing else are removed.

    It leaves `\%`, the environments in VERBATIM and in `verbatim`, `\verb`, `\lstinline`, `\mintinline`, and addresses
    in `\url` and `\href` unchanged. Stripping twice gives the same text as stripping once.
    """
    return "".join(span.text for span in scan(text, verbatim))


def verbatim_environments(texts: Iterable[str]) -> frozenset[str]:
    """Returns the names of environments that a file of the document, or one of its packages, defines as verbatim."""
    found: set[str] = set()
    for text in texts:
        found.update(_DEFINES_VERBATIM.findall(text))
        found.update(name or f"{language}code" for name, language in _NEW_MINTED.findall(text))
        for match in _NEW_ENVIRONMENT.finditer(text):
            if _IS_VERBATIM.search(_group(text[match.end() : match.end() + _LONGEST_DEFINITION], 0) or ""):
                found.add(match[1] or match[2])
    return frozenset(found)


def excluded_environments(texts: Iterable[str]) -> frozenset[str]:
    r"""Returns the names of environments that a file of the document makes comments (`\excludecomment`)."""
    return frozenset(name for text in texts for name in _EXCLUDES.findall(text))


def scan(text: str, verbatim: frozenset[str] = frozenset(), excluded: frozenset[str] = frozenset()) -> Iterator[Span]:
    """Yields the spans of a file in order, without what `strip_comments` removes.

    Environments in `excluded` are comments, too.
    """
    place = search = counted = 0  # ends of the text that was yielded, searched, and counted
    unclosed: set[str] = set()
    ends: set[int] = set()  # places of `\\fi` whose `\\iffalse` was removed
    excluded |= {"comment"}
    false = _false_conditionals(text)
    line, fresh = 1, True  # fresh: the line of `place` has only blanks so far
    while token := _TOKEN.search(text, search):
        environment = token["environment"] or ""
        search = _end(text, token, environment, verbatim, excluded, unclosed)
        hidden = environment in excluded and search > token.end()
        if token["false"] and (skipped := false.get(token.start())):
            hidden, search = True, skipped[0]
            ends.update(skipped[1:])
        if hidden:
            yield Span("", "hidden", search - token.start())
        if token["comment"] or hidden or (token["fi"] and token.start() in ends):
            before, place = _remove(text, place, token.start(), search, fresh)
            search, (_, newline, last) = place, before.rpartition("\n")
            fresh = not last.strip(" \t") and (fresh or bool(newline))
            if before:
                yield Span(before)
        elif command := _command(token, text):
            line, counted = line + text.count("\n", counted, token.start()), token.start()
            if token.start() > place:
                yield Span(text[place : token.start()])
            yield Span(_COMMENT.sub(" " if token["bare"] else "", token[0]), command[0], line, *command[1:])
            place, fresh = search, False
    if place < len(text):
        yield Span(text[place:])


def _false_conditionals(text: str) -> dict[int, tuple[int, ...]]:
    r"""Returns the end of what each closed `\iffalse` hides, by its place; with an `\else`, also that of the `\fi`.

    One pass over the file finds the end of all of them.
    """
    found: dict[int, tuple[int, ...]] = {}
    open_ifs: list[list[int]] = []  # place of each; the end of its `\\else` follows
    for match in _CONDITIONAL.finditer(text) if "\\iffalse" in text else ():
        word = match["word"]
        if word == "fi" and open_ifs:
            place, *shown = open_ifs.pop()
            if text.startswith("\\iffalse", place):
                found[place] = (shown[0], match.start()) if shown else (match.end(),)
        elif word == "else" and open_ifs and len(open_ifs[-1]) == 1:
            open_ifs[-1].append(match.end())
        elif word and word not in ("fi", "else") and word not in _NO_CONDITIONALS:
            open_ifs.append([match.start()])
    return found


def _end(
    text: str,
    token: re.Match[str],
    environment: str,
    verbatim: frozenset[str],
    excluded: frozenset[str],
    unclosed: set[str],
) -> int:
    """Returns the end of a token. A closed environment whose content is not LaTeX is one token."""
    plain = environment.rstrip("*")
    special = environment in excluded or plain in VERBATIM or environment in verbatim or plain in verbatim
    if special and environment not in unclosed:
        closing = rf"\\end[ \t]*\{{{re.escape(environment)}\}}"
        end = re.compile(closing).search(text, token.end())
        if end and environment in excluded and f"{environment} alone" not in unclosed:
            # The package `comment` wants it on a line of its own.
            alone = re.compile(rf"^[ \t]*{closing}(?=[ \t]*$)", re.MULTILINE).search(text, token.end())
            if alone is None:
                unclosed.add(f"{environment} alone")
            end = alone or end
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


def _command(token: re.Match[str], text: str) -> tuple[str, str, str] | None:
    """Returns kind, folder and name (see `Span`) of a token that is a command, or None."""
    if token["plain"]:
        name = token["name"] if token["bare"] is None else token["bare"]
        kind = next((kind for kind in ("subfile", "include") if token["plain"].startswith(kind)), "input")
        return kind, "", name.strip(' "')
    if token["standalone"] is not None:
        return "input", "", token["standalone"].strip(' "')
    if token["endinput"] or token["stop"]:  # inside a line it is part of a definition
        starts_line = not text[text.rfind("\n", 0, token.start()) + 1 : token.start()].strip(" \t")
        return ("endinput" if token["endinput"] else "stop", "", "") if starts_line else None
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
    r"""Decodes UTF-8, or else the encoding that `inputenc` names, with `\n` as line end; returns the text and notes."""
    text, problems = decode_text(content, place)
    declared = _INPUTENC.search(content)
    if problems and declared and (encoding := ENCODINGS.get(declared[1].decode("ascii"))):
        text, name = decode_8_bit(content, encoding)
        problems = (Problem(place, f"not UTF-8, inputenc says {declared[1].decode()}: read as {name}"),)
    return text.replace("\r\n", "\n").replace("\r", "\n"), problems


ENCODINGS = {
    "ansinew": "cp1252", "latin1": "iso-8859-1", "latin2": "iso-8859-2", "latin3": "iso-8859-3", "latin4": "iso-8859-4",
    "latin5": "iso-8859-9", "latin9": "iso-8859-15", "latin10": "iso-8859-16", "cp1250": "cp1250", "cp1251": "cp1251",
    "cp1252": "cp1252", "cp1257": "cp1257", "cp437": "cp437", "cp850": "cp850", "cp852": "cp852", "cp866": "cp866",
    "koi8-r": "koi8-r", "koi8-u": "koi8-u", "applemac": "mac-roman", "macce": "mac-latin2",
}  # fmt: skip
"""Python's names of the encodings of `inputenc`."""
_INPUTENC = re.compile(rb"\\(?:usepackage|RequirePackage)[ \t]*\[([\w-]+)\][ \t]*\{inputenc\}")
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
