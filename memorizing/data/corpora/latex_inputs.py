"""A document from the LaTeX files of a folder: finds the main file and expands its inputs."""

import dataclasses
import posixpath
import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from memorizing.data.corpora.corpus import Problem
from memorizing.data.corpora.latex import Span, decode, excluded_environments, scan, verbatim_environments

TEX_SUFFIXES = (".tex", ".ltx", ".latex")
MAX_DEPTH = 50  # LaTeX's own limit is 15
MAX_INPUTS = 20_000
MAX_CHARACTERS = 1 << 27
NO_TEXT = (".sty", ".cls", ".bib", ".bst", ".clo", ".def", ".fd")
PREFERRED = ("main", "paper", "ms", "article", "manuscript")
PACKAGES = (".sty", ".cls", ".def")
README = re.compile(r"00README(\.XXX|\.txt|\.json|\.ya?ml)?", re.IGNORECASE)
"""arXiv's file that says which files of a paper are what."""
_USES = re.compile(
    r"""(?:filename:\s*)?["']?([^\s"',{}]+)["']?,?\s+(?:["']?usage["']?:\s*)?["']?(toplevel|ignore|include)"""
)


class Tree:
    """The files of a document by path (relative, with `/`). Each is read and scanned once, when it is first needed."""

    def __init__(self, files: Mapping[str, Callable[[], bytes]]):
        self._files = files
        self._texts: dict[str, tuple[str, tuple[Problem, ...]]] = {}
        self._spans: dict[str, tuple[Span, ...]] = {}
        self.toplevel, ignored = self._uses()
        self.ignored = tuple(name for name in files if name in ignored)
        tex_names = [name for name in files if name.lower().endswith(TEX_SUFFIXES) and name not in ignored]
        named = sorted(tex_names, key=lambda name: name.split("/"))
        self.binary = tuple(name for name in named if "\0" in self.text(name))
        self.tex_files = tuple(name for name in named if name not in self.binary)
        packages = [name for name in files if name.lower().endswith(PACKAGES) and "\0" not in self.text(name)]
        texts = [self.text(name) for name in (*self.tex_files, *packages)]
        self._verbatim, self._excluded = verbatim_environments(texts), excluded_environments(texts)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def text(self, name: str) -> str:
        if name not in self._texts:
            self._texts[name] = decode(self._files[name](), name)
        return self._texts[name][0]

    def problems(self, name: str) -> tuple[Problem, ...]:
        """Returns notes on the encoding of a file."""
        self.text(name)
        return self._texts[name][1]

    def spans(self, name: str) -> tuple[Span, ...]:
        if name not in self._spans:
            self._spans[name] = tuple(scan(self.text(name), self._verbatim, self._excluded))
        return self._spans[name]

    def _uses(self) -> tuple[tuple[str, ...], frozenset[str]]:
        """Returns the main files and the ignored files that arXiv's 00README names."""
        found: dict[str, str] = {}
        for name in self._files:
            if README.fullmatch(name):
                text = re.sub(r"\s*\n\s*(?=[\"']?usage)", " ", self.text(name))
                found |= dict(_USES.findall(text))
        toplevel = tuple(name for name, use in found.items() if use == "toplevel" and name in self._files)
        return toplevel, frozenset(name for name, use in found.items() if use == "ignore")

    def has(self, name: str, kind: str) -> bool:
        return any(span.kind == kind for span in self.spans(name))


class Expansion(NamedTuple):
    """A file with everything that it inputs."""

    text: str
    reached: frozenset[str]
    has_class: bool
    has_begin: bool
    problems: tuple[Problem, ...]


@dataclasses.dataclass
class Budget:
    r"""Counts the `\input` commands and characters of all expansions that share it, to stop endless expansion."""

    inputs: int = 0
    characters: int = 0

    def spent(self) -> bool:
        return self.inputs > MAX_INPUTS or self.characters > MAX_CHARACTERS


def expand(tree: Tree, main: str, bbl: bool = False, budget: Budget | None = None) -> Expansion:
    r"""Returns the text that LaTeX would read, from the start of `main` to `\end{document}`.

    A name is looked up, with `.tex` added or unchanged, in the folder of the enclosing `\subfile` or `\import` if there
    is one, then in the folder of the main file, then in that of the file that names it. For `\import`, only the last
    two count. A file with its own `\documentclass` and `document` environment gives the content of that environment.
    Commands that cannot be followed stay in the text, with a note each. `\includeonly` has no effect.
    """
    walk = _Walk(tree, main, bbl, budget or Budget())
    text = "".join(walk.file(main, posixpath.dirname(main), ()))
    problems = [problem for name in sorted(walk.reached) for problem in tree.problems(name)]
    return Expansion(
        text, frozenset(walk.reached), walk.has_class, walk.has_begin, tuple(dict.fromkeys(problems + walk.problems))
    )


class _Walk:
    def __init__(self, tree: Tree, main: str, bbl: bool, budget: Budget):
        self.tree, self.main, self.bbl, self.budget = tree, main, bbl, budget
        self.reached: set[str] = set()
        self.problems: list[Problem] = []
        self.has_class = self.has_begin = self.ended = False
        self.shown = 0  # documents that the text shows, and that are still open

    def file(self, name: str, base: str, trail: tuple[str, ...]) -> Iterator[str]:
        r"""Yields the texts of a file inside those of `trail`; `base` is the folder of the enclosing `\subfile` or
        `\import`.
        """
        self.reached.add(name)
        spans = self.tree.spans(name)
        wrapped = bool(trail) and self.tree.has(name, "class") and self.tree.has(name, "begin")
        if wrapped:
            kinds = [span.kind for span in spans]
            begin = kinds.index("begin")
            end = kinds.index("end", begin) if "end" in kinds[begin:] else len(kinds)
            self._note_left_out(name, spans[end:])
            spans = spans[begin + 1 : end]
        if hidden := sum(span.line for span in spans if span.kind == "hidden"):
            self._note(name, f"{hidden:,} characters in \\iffalse or comment environments left out")
        for index, span in enumerate(spans):
            if span.kind == "hidden":
                continue
            if span.kind == "endinput":
                self._note_left_out(name, spans[index + 1 :], "\\endinput")
                return
            if span.kind == "begin" and self.has_begin:
                self.shown += 1
                self._note(f"{name}:{span.line}", "another \\begin{document}: kept as text")
            elif span.kind == "end" and self.shown:
                self.shown -= 1
            elif span.kind == "stop" or (span.kind == "end" and self.has_begin):
                self.ended = True
                yield span.text + "\n"
            if self.ended:
                self._note_left_out(name, spans[index:])
                return
            self.has_class |= span.kind == "class"
            self.has_begin |= span.kind == "begin"
            self.budget.characters += len(span.text)
            follow = span.name or (span.kind == "bibliography" and self.bbl)
            inside = self._follow(span, name, base, trail) if follow else None
            text = span.text if inside is None else "".join(inside).strip("\n")
            yield text if inside is None or span.kind != "include" else f"\n{text}\n"  # it starts a page

    def _follow(self, span: Span, within: str, base: str, trail: tuple[str, ...]) -> Iterator[str] | None:
        place, command = f"{within}:{span.line}", " ".join(span.text.split())
        if "\\" in span.name + span.folder or "#" in span.name + span.folder:
            return self._note(place, f"{command}: the file name depends on a macro; not included")
        name = self._find(span, posixpath.dirname(within), base)
        if span.kind == "bibliography" and name is None:
            return None
        if name is None:
            return self._note(place, f"{command}: no such file")
        if name.lower().endswith(NO_TEXT) or (name.lower().endswith(".bbl") and not self.bbl):
            return self._note(place, f"{command}: {name} is not part of the text; not included")
        if name == within or name in trail:
            cycle = (*trail, within, name)
            return self._note(place, f"{command}: {' > '.join(cycle[cycle.index(name) :])} is a cycle; not included")
        if "\0" in self.tree.text(name):
            return self._note(place, f"{command}: {name} holds NUL bytes, so it is not text; not included")
        self.budget.inputs += 1
        if len(trail) >= MAX_DEPTH or self.budget.spent():
            limit = f"{MAX_DEPTH} files deep, {MAX_INPUTS:,} inputs or {MAX_CHARACTERS:,} characters"
            return self._note(place, f"{command}: beyond {limit} in one document; not included")
        inside = base if span.kind in ("input", "include", "bibliography") else posixpath.dirname(name)
        return self.file(name, inside, (*trail, within))

    def _find(self, span: Span, within: str, base: str) -> str | None:
        main = posixpath.dirname(self.main)
        if span.kind == "bibliography":
            same_name = self.main.rpartition(".")[0] + ".bbl"
            others = [name for name in self.tree if name.lower().endswith(".bbl")]
            return same_name if same_name in self.tree else others[0] if len(others) == 1 else None
        for folder in (main, within) if span.kind == "import" else (base, main, within):
            path = posixpath.normpath(posixpath.join(folder, span.folder, span.name))
            for name in (path + ".tex", path):
                if name in self.tree:
                    return name
        return None

    def _note_left_out(self, name: str, spans: tuple[Span, ...], after: str = "\\end{document}") -> None:
        if text := "".join(span.text for span in spans if span.kind not in ("end", "stop")).strip():
            self._note(name, f"{len(text):,} characters after {after} left out")

    def _note(self, place: str, message: str) -> None:
        self.problems.append(Problem(place, message))


def main_file(tree: Tree, folder: str) -> str:
    r"""Returns the file to start from: that of arXiv's 00README, or the most complete document with a class.

    Best is a file with `\documentclass` or `\begin{document}` that with its inputs has both. Next is a file with one of
    them (the class may be in a precompiled format), then any file. Ties go to a file that no other inputs; one with a
    `.bbl` of its name; a usual name
    (main, paper, …) or that of the folder; the file that reaches most text; the shallowest; the first by name.
    """
    if named := [name for name in tree.toplevel if name in tree.tex_files]:
        return named[0]
    budget = Budget()
    ranks: dict[str, int] = {}
    reached: dict[str, frozenset[str]] = {}
    for name in tree.tex_files:
        expansion = expand(tree, name, budget=budget)
        has_class, has_begin = tree.has(name, "class"), tree.has(name, "begin")
        whole = (has_class or has_begin) and expansion.has_class and expansion.has_begin
        ranks[name] = 0 if whole else 1 if has_class or has_begin else 2
        reached[name] = expansion.reached
    candidates = [name for name in ranks if ranks[name] == min(ranks.values())]

    def order(name: str):
        inputting = any(name in reached[other] and other not in reached[name] for other in candidates)
        stem = posixpath.basename(name).rpartition(".")[0].lower()
        size = sum(len(tree.text(part)) for part in reached[name])
        has_bbl = f"{name.rpartition('.')[0]}.bbl" in tree  # arXiv has the bibliography of the main file
        usual = stem in (*PREFERRED, folder.lower())
        return inputting, not has_bbl, not usual, -size, name.count("/"), name.split("/")

    return min(candidates, key=order)


def document(tree: Tree, folder: str, append_unreached: bool, bbl: bool) -> tuple[str, tuple[Problem, ...]]:
    r"""Returns the text of a whole document; notes name the files that are not in it.

    If no file has a `\documentclass`, the files that the first does not reach can follow it by name, each with its
    inputs.
    """
    main = main_file(tree, folder)
    budget = Budget()
    whole = expand(tree, main, bbl, budget)
    texts, problems, reached = [whole.text], list(whole.problems), set(whole.reached)
    has_class = any(tree.has(name, "class") for name in tree.tex_files)
    if tree.ignored:
        problems.append(Problem("", f"files that 00README says to ignore are left out: {', '.join(tree.ignored)}"))
    if not has_class:
        problems.append(Problem("", f"no file has a \\documentclass: the text starts with {main}"))
    if append_unreached and not has_class:
        unreached = [name for name in tree.tex_files if name not in reached]
        search_budget = Budget()
        inner = {part for name in unreached for part in expand(tree, name, budget=search_budget).reached - {name}}
        for name in sorted(unreached, key=lambda name: (name in inner, name.split("/"))):
            if name not in reached:
                part = expand(tree, name, bbl, budget)
                texts.append(part.text)
                problems += part.problems
                reached |= part.reached
    if unreached := [name for name in tree.tex_files if name not in reached]:
        message = f"{len(unreached)} files are not reached from {main} and are left out: {', '.join(unreached)}"
        problems.append(Problem("", message))
    text = "\n".join(text.strip("\n") + "\n" for text in texts if text.strip())
    return text, tuple(dict.fromkeys(problems))
