"""GitHub: a document is a repository, its source files joined by walking the tree.

    raw/OWNER__NAME/...                              one folder per repository, or
    raw/OWNER__NAME.tar.gz, .zip, ...                an archive of it, read in place, or
    raw/train|validation|test/...                    the same with the split in the layout

A file starts with the line `### path/to/file.py` and ends with an empty line. Lines of the file that look the same get
another `#` in front. A document can therefore be taken apart (`files_of`) and joined in another order
(`Github.reordered`).
"""

import dataclasses
import difflib
import functools
import random
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import ClassVar, Literal, NamedTuple

from memorizing.data.corpora import archives
from memorizing.data.corpora.corpus import (
    LFS_POINTER,
    Corpus,
    Document,
    Item,
    Problem,
    ReadResult,
    document_items,
    entries,
    file_size,
    left_out_item,
    read_file,
    require_unique,
    split_folders,
    walk,
)
from memorizing.data.corpora.github_rules import (
    LANGUAGES,
    LICENSE_FILE,
    LICENSES,
    VENDORED,
    WHOLE_LICENSE,
    code_of_notebook,
    exclusion_rule,
    license_of,
    other_language,
    product_folders,
)
from memorizing.data.documents import SPLITS, Split
from memorizing.errors import InputError
from memorizing.sections import check_range

_SUFFIXES = "|".join(re.escape(suffix) for suffixes in LANGUAGES.values() for suffix in suffixes)
_START = re.compile(rf"^(?=### .*(?:{_SUFFIXES})$)", re.MULTILINE | re.IGNORECASE)
_LIKE_START = re.compile(rf"^(?=#*### .*(?:{_SUFFIXES})$)", re.MULTILINE | re.IGNORECASE)
_ESCAPED = re.compile(rf"^#(?=#*### .*(?:{_SUFFIXES})$)", re.MULTILINE | re.IGNORECASE)
_NAMES_SHOWN = 5
_HIDDEN = "or folders that are hidden"
_VENDORED_RULE = "in vendored or built folders"
_MAX_DEPTH = 100
"""Deepest nesting of folders. Only archives made to break their readers are deeper."""
_MAX_LICENSE_BYTES = 1 << 20


class _File(NamedTuple):
    size: int
    read: Callable[[], bytes]


class _TooLarge(Exception):
    """Raised if the files of a repository exceed `max_repository_bytes`."""


@dataclasses.dataclass(frozen=True)
class Github(Corpus):
    """Settings of the GitHub corpus: repositories of source code.

    Left out, with a note for each rule: files in other languages; hidden files and folders; vendored and build folders
    (`github_rules.VENDORED`, `product_folders`); generated and minified files (`exclusion_rule`); files above
    `max_file_bytes`; files that are not UTF-8 text; empty files; files more than 100 folders deep, or with a line break
    in their names. Notebooks give their code cells.

    Attributes:
        languages: languages to read, by the names of `github_rules.LANGUAGES`; by default the paper's.
        order: order of files: `depth_first` by name, or `shuffled`: random, with each sub-folder together (the paper).
        orders: documents made of each repository of the train split, each in another random order, so that every epoch
            shows another order. Their names are OWNER/NAME, OWNER/NAME#2, ...
        seed: random seed of the orders.
        max_file_bytes: larger files are left out.
        max_repository_bytes: repositories with more bytes to read are left out, because a repository is read into
            memory.
        licenses: repositories without one of these SPDX names (`github_rules.LICENSES`) are left out; () for no limit.
    """

    languages: tuple[str, ...] = ("c", "c++", "java", "python", "go", "typescript")
    order: Literal["depth_first", "shuffled"] = "depth_first"
    orders: int = 1
    seed: int = 0
    max_file_bytes: int = 400_000
    max_repository_bytes: int = 1 << 30
    licenses: tuple[str, ...] = ()

    has_orders: ClassVar = True

    def __post_init__(self):
        for setting, known in (("languages", tuple(LANGUAGES)), ("licenses", LICENSES)):
            for name in getattr(self, setting):
                if name not in known:
                    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
                    near = f"Did you mean {close[0]!r}?" if close else f"Use {', '.join(known)}"
                    raise InputError(f"Github.{setting} has {name!r}, which is unknown. {near}")
        if self.orders < 1 or (self.orders > 1 and self.order != "shuffled"):
            raise InputError(
                f"Github.orders = {self.orders} with Github.order = {self.order!r}: orders must be at least 1, and "
                "more than 1 needs Github.order = 'shuffled'"
            )
        check_range(self, 1, 2**50, "max_file_bytes", "max_repository_bytes")
        check_range(self, 1, 1000, "orders")

    def list(self, raw: Path) -> list[Item]:
        """Returns all repositories by split and name."""
        folders, strays = split_folders(raw, _is_repository)
        items = [*(item for split, folder in folders for item in _items(split, folder)), *strays]
        if not document_items(items):
            raise InputError(
                f"--raw={raw} has no folders or archives ({', '.join(archives.SUFFIXES)}), nor do its train, "
                "validation, test. Give the folder that holds one for each repository (OWNER__NAME)"
            )
        require_unique(items)
        return items

    def read_documents(self, item: Item) -> Iterator[ReadResult]:
        try:
            yield from self._read(item)
        except _TooLarge:
            reason = f"left out: its files have more than Github.max_repository_bytes = {self.max_repository_bytes:,}"
            yield ReadResult(None, (Problem(item.id, reason),))

    def _read(self, item: Item) -> Iterator[ReadResult]:
        files: dict[str, _File] = {}
        hidden: dict[str, None] = {}
        problems: list[Problem] = []
        path = Path(item.path)
        for entry in _archived_files(path, self) if path.is_file() else _folder_files(path):
            if isinstance(entry, Problem):
                problems.append(entry)
            elif name := _hidden(entry[0]):
                hidden[name] = None
            else:
                files[entry[0]] = entry[1]
        license, parts = _license(files)
        if parts:
            named = ", ".join(f"{name} ({of or 'unknown'})" for name, of in parts.items())
            problems.append(Problem(item.id, f"licenses of parts, which do not count for the whole: {named}"))
        if self.licenses and not set(license.split(" OR ")) & set(self.licenses):
            reason = f"left out: its license ({license or 'unknown'}) is not in Github.licenses = {self.licenses}"
            yield ReadResult(None, (*problems, Problem(item.id, reason)))
            return
        texts, skipped = _source_files(self, files)
        if hidden:
            skipped[_HIDDEN] = list(hidden)
        problems += [Problem(item.id, _summary(rule, names)) for rule, names in skipped.items()]
        if not texts:
            reason = f"left out: no file in Github.languages = {self.languages}; {_languages(files)}"
            yield ReadResult(None, (*problems, Problem(item.id, reason)))
            return
        for number in range(self.orders if item.split in ("train", None) else 1):
            rng = random.Random(f"{self.seed}:{item.id}:{number}") if self.order == "shuffled" else None
            text = "".join(_framed(name, texts[name]) for name in _walked(texts, rng))
            id = f"{item.id}#{number + 1}" if number else item.id
            yield ReadResult(Document(id, item.id, text, license), tuple(problems) if not number else ())

    @staticmethod
    def reordered(text: str, seed: int) -> str:
        """Returns a document with its files in another random order; files of a folder stay together."""
        framed = {part.partition("\n")[0].removeprefix("### "): part for part in _framed_files(text)}
        return "".join(framed[name] for name in _walked(framed, random.Random(seed)))


def files_of(text: str) -> dict[str, str]:
    """Returns a document's files by path, in the document's order."""
    found = {}
    for framed in _framed_files(text):
        header, _, body = framed.partition("\n")
        found[header.removeprefix("### ")] = _ESCAPED.sub("", body.removesuffix("\n"))
    return found


def _framed(name: str, text: str) -> str:
    text = _LIKE_START.sub("#", text)
    return f"### {name}\n{text}" + ("\n" if text.endswith("\n") else "\n\n")


def _framed_files(text: str) -> list[str]:
    return [part for part in _START.split(text) if part]


def _walked(names: Mapping[str, object], rng: random.Random | None) -> Iterator[str]:
    """Yields the names depth-first: in each folder files by name, then folders by name, or all of them in random
    order.
    """

    def walk(names: list[str], depth: int) -> Iterator[str]:
        files = sorted(name for name in names if name.count("/") == depth)
        folders: dict[str, list[str]] = {}
        for name in names:
            if name.count("/") > depth:
                folders.setdefault(name.split("/")[depth], []).append(name)
        parts = [[name] for name in files] + [folders[name] for name in sorted(folders)]
        if rng:
            rng.shuffle(parts)
        for part in parts:
            if len(part) == 1 and part[0].count("/") == depth:
                yield part[0]
            else:
                yield from walk(part, depth + 1)

    return walk(list(names), 0)


def _items(split: Split | None, folder: Path) -> Iterator[Item]:
    for path in entries(folder):
        if archives.stem(path.name) in SPLITS and path.is_file() and not path.is_symlink():
            raise InputError(
                f"{path} is named like a split, so it is not read as a repository. Unpack it, as a folder of that name"
            )
        if _is_repository(path):
            yield Item(_stem(path).replace("__", "/", 1), split, str(path))
        elif path.is_symlink():
            yield left_out_item(path, split, "a link, which may lead anywhere; replace it with its target")
        elif path.name.startswith("."):
            yield left_out_item(path, split, "hidden")
        else:
            yield left_out_item(path, split, f"neither a folder nor an archive ({', '.join(archives.SUFFIXES)})")


def _is_repository(path: Path) -> bool:
    return bool(_stem(path)) and not path.name.startswith(".") and not path.is_symlink()


def _stem(path: Path) -> str:
    """Returns the name of a repository; "" if the path is neither a folder nor an archive."""
    if path.is_dir():
        return path.name
    stem = archives.stem(path.name) if path.is_file() else None
    return stem if stem and stem not in SPLITS else ""


type _Files = Iterator[tuple[str, _File] | Problem]


def _hidden(name: str) -> str:
    """Returns the path of the first hidden file or folder in a path; "" if there is none."""
    parts = name.split("/")
    depth = next((depth for depth, part in enumerate(parts, 1) if part.startswith(".")), 0)
    return "/".join(parts[:depth])


def _folder_files(root: Path) -> _Files:
    for folder, folders, names in walk(root):
        hidden = [name for name in folders if name.startswith(".")]
        folders[:] = sorted(set(folders).difference(hidden))
        for path in (folder / name for name in sorted([*names, *hidden])):
            name = path.relative_to(root).as_posix()
            size = 0 if path.name.startswith(".") else file_size(path)  # hidden files are not read
            if size is None:
                yield Problem(f"{root.name}/{name}", "left out: a link or a device")
            else:
                yield name, _File(size, functools.partial(read_file, path))


def _archived_files(path: Path, settings: Github) -> _Files:
    """Yields the files of an archive, without the single top folder of GitHub's archives."""
    total = 0

    def is_wanted(name: str, size: int) -> bool:
        """Returns whether to read a member; its first folder may or may not turn out to be the single top folder."""
        nonlocal total
        if not any(_is_read(settings, candidate, size) for candidate in (name, name.partition("/")[2])):
            return False
        total += size
        if total > settings.max_repository_bytes:
            raise _TooLarge
        return True

    members = list(archives.members(path, wanted=is_wanted))
    tops = {member.name.partition("/")[0] for member in members if not isinstance(member, Problem)}
    nested = all("/" in member.name for member in members if not isinstance(member, Problem))
    for member in members:
        if isinstance(member, Problem):
            yield member
            continue
        name = member.name.partition("/")[2] if len(tops) == 1 and nested else member.name
        content = member.content if isinstance(member, archives.Member) else b""
        size = len(content) if isinstance(member, archives.Member) else member.size
        yield name, _File(size, functools.partial(bytes, content))


def _source_files(settings: Github, files: Mapping[str, _File]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Returns the text of the files to take, and the names of the others by the rule that leaves them out."""
    texts: dict[str, str] = {}
    skipped: dict[str, list[str]] = {}
    total, products = 0, product_folders(files)
    for name, file in files.items():
        text, rule = "", _unread(settings, name, file.size)
        if not rule and any(name.startswith(f"{folder}/") for folder in products):
            rule = _VENDORED_RULE
        if not rule:
            total += file.size
            if total > settings.max_repository_bytes:
                raise _TooLarge
            text, rule = _text(name, file.read())
        if rule:
            skipped.setdefault(rule, []).append(name)
        else:
            texts[name] = text
    return texts, skipped


def _unread(settings: Github, name: str, size: int) -> str | None:
    """Returns the rule that leaves a file out without reading it, or None."""
    folders = PurePosixPath(name).parts[:-1]
    if not name.lower().endswith(tuple(suffix for language in settings.languages for suffix in LANGUAGES[language])):
        return "in other languages"
    if VENDORED.intersection(folders):
        return _VENDORED_RULE
    if size > settings.max_file_bytes and not name.lower().endswith(".ipynb"):  # a notebook's bytes are mostly pictures
        return f"larger than Github.max_file_bytes = {settings.max_file_bytes:,}"
    if len(folders) > _MAX_DEPTH:
        return f"nested in more than {_MAX_DEPTH} folders"
    return "with a line break in their names" if "\n" in name else None


def _text(name: str, raw: bytes) -> tuple[str, str | None]:
    """Returns the text of a file, and the rule that leaves it out nevertheless, or None."""
    if b"\0" in raw:
        return "", "with NUL bytes, so not text"
    if raw.startswith(LFS_POINTER):
        return "", "that are pointers of Git LFS"
    try:
        text = raw.decode("utf-8-sig")
        if name.lower().endswith(".ipynb"):
            text, language = code_of_notebook(text)
            if language != "python":
                return "", "with code in other languages: notebooks"
    except UnicodeDecodeError:
        return "", "not UTF-8"
    except InputError as error:
        return "", f"named .ipynb, but {error}"
    if other := other_language(name, text):
        return "", f"with {other} under the suffix of another language"
    return text, exclusion_rule(name, text) if text.strip() else "empty"


def _is_read(settings: Github, name: str, size: int) -> bool:
    """Returns whether the content of a file is needed, as source code or as a license."""
    return _is_license(name, size) or (not _hidden(name) and not _unread(settings, name, size))


def _is_license(name: str, size: int) -> bool:
    return "/" not in name and LICENSE_FILE.fullmatch(name) is not None and size <= _MAX_LICENSE_BYTES


def _license(files: Mapping[str, _File]) -> tuple[str, dict[str, str]]:
    """Returns the license by the top-level license files, and the licenses of parts, by file.

    If a file is named as the license of the whole project, others are those of parts; else all are alternatives.
    """
    names = sorted(name for name, file in files.items() if _is_license(name, file.size))
    found = {name: license_of(files[name].read().decode("utf-8", errors="replace")) for name in names}
    whole = {name: found[name] for name in names if WHOLE_LICENSE.fullmatch(name) and found[name]} or found
    license = " OR ".join(dict.fromkeys(name for name in whole.values() if name))
    return license, {name: found[name] for name in names if name not in whole}


def _summary(rule: str, names: list[str]) -> str:
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    shown = (name if name.isprintable() else ascii(name) for name in names[:_NAMES_SHOWN])
    return f"left out {len(names)} files {rule}: {', '.join(shown)}{more}"


def _languages(files: Mapping[str, object]) -> str:
    found = [
        f"{language} ({count})"
        for language, suffixes in LANGUAGES.items()
        if (count := sum(name.lower().endswith(suffixes) for name in files))
    ]
    return f"it has {', '.join(found)}" if found else "it has no source files"
