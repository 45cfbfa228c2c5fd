"""Isabelle: a document is an entry of the Archive of Formal Proofs, or a session of Isabelle/HOL, with its theories.

    raw/thys/ENTRY/ROOT, raw/thys/ENTRY/**/*.thy     the archive; raw itself can be `thys`
    raw/src/HOL/ROOT, raw/src/HOL/**/*.thy           Isabelle's distribution, if it is there
    raw/train|validation|test/...                    the same with the split in the layout

Every imported theory comes before the theory that uses it, so that a memory can hold it when it is needed.
"""

import dataclasses
import functools
import itertools
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from memorizing.data.corpora.corpus import (
    Corpus,
    Document,
    Item,
    Problem,
    ReadResult,
    decode_text,
    document_items,
    entries,
    left_out_item,
    read_file,
    require_unique,
    split_folders,
    walk,
)
from memorizing.data.corpora.isabelle_theories import Header, Session, header, sessions
from memorizing.data.documents import SPLITS
from memorizing.errors import InputError

_OF_DISTRIBUTION = re.compile(
    r"(Main|Complex_Main|Pure|HOLCF|IFOL|FOL|ZF|ZFC|(HOL|ZF|FOL|FOLP|CCL|CTT|Cube|LCF|Sequents|Pure|Tools|Haskell|SPARK)(-[\w-]+)?\..+)"
)
# The archive's LICENSE: BSD for all files except those marked LGPL.
_LICENSES = ("BSD-3-Clause", "LGPL-2.1")
_READ = re.compile(r"thys|src|Isabelle.*")
_NO_ENTRY = re.compile(r"ROOTS?|LICENSE.*")
_MARKED_LGPL = re.compile(r"^[ *]*License:\s*LGPL(?! or BSD)", re.MULTILINE)


_ROOTS = ("~~/src/", "$ISABELLE_HOME/src/", "$AFP/", "$AFP_BASE/thys/")
"""Starts of paths that Isabelle expands: its distribution, and the Archive."""


@dataclasses.dataclass(frozen=True)
class Isabelle(Corpus):
    """Settings of the Isabelle corpus: entries of the Archive of Formal Proofs.

    Attributes:
        imported_entries: whether theories that are imported from other entries, directly or not, come first, so that a
            lemma's definition is in the document. Entries of other splits are never read.
    """

    imported_entries: bool = False

    def list(self, raw: Path) -> list[Item]:
        """Returns all entries by split and name, then sessions of Isabelle/HOL in the order of its ROOT."""
        folders, items = split_folders(raw, _has_theories)
        for split, base in folders:
            items += [Item(id, split, str(base), id) for id in archive(base).entries]
            items += [left_out_item(path, split, reason) for path, reason in archive(base).others]
        if not document_items(items):
            raise InputError(
                f"--raw={raw} has no .thy files in thys/ENTRY or src/HOL, nor do its train, validation, test. Give the "
                "folder that holds the Archive of Formal Proofs (with thys in it)"
            )
        require_unique(items)
        return items

    def read_documents(self, item: Item) -> Iterator[ReadResult]:
        theories = archive(Path(item.path))
        order, problems = theories.order(item.id, self.imported_entries)
        texts, marked = [], 0
        for path in order:
            text, problem = theories.text(path)
            problems += problem
            if text is not None:
                marked += bool(_MARKED_LGPL.search(text))
                texts.append(f"(* {path} *)\n{text}" + ("\n" if text.endswith("\n") else "\n\n"))
        if not texts:
            yield ReadResult(None, (*problems, Problem(item.id, "left out: it has no theory")))
            return
        license = " AND ".join(
            name for name, part in zip(_LICENSES, (len(texts) - marked, marked), strict=True) if part
        )
        yield ReadResult(
            Document(item.id, item.id, "".join(texts), license if theories.has_license else ""), tuple(problems)
        )


class Entry(NamedTuple):
    """The theories of an entry by path, those listed in its ROOT first; listed theories without a file; and links."""

    theories: dict[str, None]
    absent: tuple[str, ...]
    links: tuple[str, ...]


class Archive:
    """An index of the theories below a folder: their paths and their names in sessions."""

    def __init__(self, base: Path):
        self.entries: dict[str, Entry] = {}
        self.others: list[tuple[Path, str]] = []  # neither entries nor sessions, and why
        self._files: dict[str, Path] = {}
        self._sessions: dict[str, dict[str, str]] = {}  # per session: theory name in imports -> path
        self._global: dict[str, str] = {}
        self._headers: dict[str, Header | None] = {}
        self._named: dict[tuple[str, str], list[str]] = {}
        self._entry_of: dict[str, str] = {}
        thys = base / "thys" if (base / "thys").is_dir() else base
        for folder in entries(thys):
            if folder.name in ("src", *SPLITS) or _NO_ENTRY.fullmatch(folder.name):
                continue
            if folder.is_symlink() or not folder.is_dir():
                self.others.append((folder, "a link" if folder.is_symlink() else "not the folder of an entry"))
            elif not self._add(folder.name, folder, sessions(_decoded(folder / "ROOT"))):
                self.others.append((folder, "a folder without theories"))
        if thys != base:
            strays = [path for path in entries(base) if not _READ.fullmatch(path.name)]
            self.others += [(path, "neither thys nor Isabelle's distribution") for path in strays]
        distribution = [*base.glob("src/HOL/ROOT"), *sorted(base.glob("Isabelle*/src/HOL/ROOT"))]
        if len(distribution) > 1:
            several = " and ".join(str(path.parents[2]) for path in distribution)
            raise InputError(f"{base} holds several distributions of Isabelle: {several}. Keep one")
        for session in sessions(_decoded(distribution[0])) if distribution else ():
            self._add(session.name, distribution[0].parent, [session], deep=False)
        self.has_license = (thys / "LICENSE").is_file()

    def _add(self, entry: str, folder: Path, sessions_of_entry: list[Session], deep: bool = True) -> bool:
        """Indexes an entry: all files below its folder, or only those in its sessions' folders. Returns whether it has
        any.
        """
        found: dict[str, Path] = {}
        links: list[str] = []
        places = {posixpath.normpath(place) for session in sessions_of_entry for place in session.folders}
        for root, folders, names in walk(folder):
            folders.sort()
            inside = root.relative_to(folder).as_posix()
            for name in sorted(names):
                if name.endswith(".thy") and (deep or inside in places):
                    path = posixpath.normpath(f"{folder.name}/{inside}/{name}")
                    if (root / name).is_symlink():
                        links.append(path)
                    else:
                        found[path] = root / name
        if not found:
            return False
        listed: dict[str, None] = {}
        absent = []
        for session in sessions_of_entry:
            named = self._sessions.setdefault(session.name, {})
            for place in session.folders:
                prefix = posixpath.normpath(f"{folder.name}/{place}")
                named.update({_stem(path): path for path in found if posixpath.dirname(path) == prefix})
            for name in session.theories:
                path = posixpath.normpath(f"{folder.name}/{session.folders[0]}/{name}.thy")
                path = path if path in found else named.get(_stem(name), "")
                if path:
                    listed[path] = None
                    named[_stem(path)] = path
                    if name in session.global_theories:
                        self._global[_stem(path)] = path
                elif "." not in name:  # a dotted name is of another session
                    absent.append(name)
        for path in found:
            self._named.setdefault((entry, _stem(path)), []).append(path)
        self._entry_of.update(dict.fromkeys(found, entry))
        self._files.update(found)
        self.entries[entry] = Entry({**listed, **dict.fromkeys(found)}, tuple(absent), tuple(links))
        return True

    def order(self, entry: str, imported_entries: bool) -> tuple[list[str], list[Problem]]:
        """Returns the paths with imports first, otherwise in the order of the ROOT and then by path; and notes."""
        its_entry = self.entries[entry]
        problems = [Problem(f"{entry}/ROOT", f"lists {name}, which has no file") for name in its_entry.absent]
        problems += [Problem(path, "left out: a link") for path in its_entry.links]
        done: dict[str, bool] = {}  # False while its imports are followed
        order: list[str] = []
        outside: dict[str, None] = {}

        def imports_of(path: str) -> Iterator[str]:
            """Yields the imports of a theory that go into the document; notes the unusual ones."""
            if self.header(path) is None:
                problems.append(Problem(path, "it has no theory header, so its imports are unknown"))
            for name, found in self.imports(path).items():
                if found is not None:
                    if imported_entries or found in its_entry.theories:
                        yield found
                elif _OF_DISTRIBUTION.fullmatch(name):
                    outside[name] = None
                else:
                    problems.append(Problem(path, f"imports {name}, which is not here"))

        trail: dict[str, Iterator[str]] = {}  # a stack, because chains of imports can exceed Python's recursion limit
        for root in its_entry.theories:
            trail = {root: imports_of(root)} if root not in done else {}
            while trail:
                path, imports = next(reversed(trail.items()))
                done[path] = False
                found = next(imports, None)
                if found is None:
                    done[path] = True
                    order.append(path)
                    del trail[path]
                elif found in trail:
                    cycle = [*itertools.dropwhile(lambda step, to=found: step != to, trail), found]
                    problems.append(Problem(found, f"imports in a cycle: {' > '.join(cycle)}"))
                elif found not in done:
                    trail[found] = imports_of(found)
        if outside:
            names = ", ".join(outside)
            problems.append(Problem(entry, f"imports {len(outside)} theories of Isabelle that are not here: {names}"))
        # Imported entries come first where possible. Some of their theories may import theories of this entry.
        late: set[str] = set()
        for path in order:
            if path in its_entry.theories or not late.isdisjoint(self.imports(path).values()):
                late.add(path)
        return sorted(order, key=late.__contains__), problems

    def edges(self, order: Sequence[str]) -> list[tuple[str, str]]:
        """Returns each import among these theories, as paths of the importing and the imported theory."""
        known = set(order)
        return [(path, found) for path in order for found in self.imports(path).values() if found in known]

    def text(self, path: str) -> tuple[str | None, tuple[Problem, ...]]:
        """Returns the text of a theory, or None if it is binary, and notes."""
        raw = read_file(self._files[path])
        if b"\0" in raw:
            return None, (Problem(path, f"left out: a NUL byte at offset {raw.index(0)}, so it is not text"),)
        return decode_text(raw, path, "utf-8")

    def header(self, path: str) -> Header | None:
        """Returns the header of a theory, or None if it has none."""
        if path not in self._headers:
            self._headers[path] = header(self.text(path)[0] or "")
        return self._headers[path]

    def imports(self, path: str) -> Mapping[str, str | None]:
        """Returns the imports of a theory as written, each with its path, or None if it is not in the archive."""
        found = self.header(path)
        return {name: self._resolve(name, path) for name in found.imports} if found else {}

    def _resolve(self, name: str, path: str) -> str | None:
        """Returns the path of an import as Isabelle resolves it: a path, `Session.Theory`, or a name within the
        session.
        """
        for prefix in _ROOTS:
            if name.startswith(prefix):
                path = posixpath.normpath(name.removeprefix(prefix) + ".thy")
                return path if path in self._files else None
        near = posixpath.normpath(posixpath.join(posixpath.dirname(path), name + ".thy"))
        if near in self._files and (("/" in name) or "." not in name):
            return near
        session, _, theory = name.partition(".")
        if theory and "/" not in name:
            return self._sessions.get(session, {}).get(theory)
        same_name = self._named.get((self._entry_of[path], _stem(name)), [])
        if "/" not in name and len(same_name) == 1:
            return same_name[0]
        return self._global.get(name)


@functools.lru_cache(maxsize=8)
def archive(base: Path) -> Archive:
    """Returns the index of a folder, made once per process."""
    return Archive(base)


def _stem(path: str) -> str:
    return posixpath.basename(path).removesuffix(".thy")


def _decoded(path: Path) -> str:
    return read_file(path).decode("utf-8", errors="replace").replace("\r\n", "\n") if path.is_file() else ""


def _has_theories(path: Path) -> bool:
    return path.is_dir() and any(name.endswith(".thy") for *_, names in walk(path) for name in names)
