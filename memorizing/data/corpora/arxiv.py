r"""arXiv: a document is a paper. Its LaTeX files are joined at their `\input`s, and comments are removed.

    raw/PAPER/**/*.tex                       a folder per paper, or raw/train|validation|test/PAPER/**/*.tex the same
    with the split in the layout, or raw/arXiv_src_YYMM_NNN.tar               arXiv's bulk form, read in place:
    YYMM/YYMM.NNNNN.gz is a gzip of one .tex
                                             file or of a tar; a .pdf there has no source

arXiv's `arxiv-metadata-oai-snapshot.json` can be given to choose categories and for titles and licenses. The LaTeX is
processed in `latex` (one file) and `latex_inputs` (joined files).
"""

import dataclasses
import fnmatch
import functools
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath

from memorizing.data.corpora import archives, latex, latex_inputs
from memorizing.data.corpora.corpus import (
    Corpus,
    Document,
    Item,
    Problem,
    ReadResult,
    document_items,
    entries,
    left_out_item,
    read_file,
    require_unique,
    split_folders,
    walk,
)
from memorizing.data.documents import Split
from memorizing.errors import InputError

type Files = Mapping[str, Callable[[], bytes]]

_BULK = "arXiv_src_*.tar"
_LICENSES = re.compile(r"(?:licen[cs]e|copying|unlicense)(?:[.-][\w.-]*)?", re.IGNORECASE)
_PACKED = (".gz", ".pdf")
_OTHER_FORMS = {
    "PostScript": re.compile(rb"\s*(?:\x04\s*)?%!PS"),
    "a PDF": re.compile(rb"\s*%PDF"),
    "HTML": re.compile(rb"(?:\xef\xbb\xbf)?\s*<(?:!doctype\s+html|html|head)\b", re.IGNORECASE),
}
_COMMAND = re.compile(rb"\\[A-Za-z@]{2}")
_UNWANTED = -1


@dataclasses.dataclass(frozen=True)
class Arxiv(Corpus):
    r"""Settings of the arXiv corpus: papers in LaTeX.

    Attributes:
        append_unreached: if no file has a `\documentclass` (chapters of a book), whether to append the files that the
            first file does not reach, in order of name. Otherwise they are left out with a note.
        bbl: whether to replace `\bibliography` with the paper's `.bbl` file.
        metadata: path of arXiv's metadata, a JSON object per line with id, title, categories and license; "" for none.
        categories: prefixes of categories, such as `math.`; a paper must match one of them. () for any.
    """

    append_unreached: bool = True
    bbl: bool = False
    metadata: str = ""
    categories: tuple[str, ...] = ()

    def __post_init__(self):
        if self.categories and not self.metadata:
            raise InputError(
                f"Arxiv.categories = {self.categories} needs Arxiv.metadata, the file with each paper's categories. "
                "Set it to the path of arxiv-metadata-oai-snapshot.json, or set categories to ()"
            )

    def list(self, raw: Path) -> list[Item]:
        """Returns all papers by split and name. Papers of other categories are not listed; papers without metadata
        are.
        """
        folders, strays = split_folders(raw, lambda path: _is_bulk(path) or (_is_folder(path) and _has_source(path)))
        items = [*(item for split, folder in folders for item in _items(split, folder)), *strays]
        if not any(item.member or _has_source(Path(item.path)) for item in document_items(items)):
            raise InputError(
                f"--raw={raw} has no folders with .tex files and no {_BULK}, nor do its train, validation, test. Name "
                "the folder that holds a folder for each paper (unpack other archives first), or arXiv's tars"
            )
        if self.categories:
            papers = _papers(self.metadata, self.categories)
            items = [item for item in items if item.note or papers.get(_key(item.id)) != _UNWANTED]
        require_unique(items)
        return items

    def metadata_files(self, raw: Path) -> tuple[Path, ...]:
        return (Path(self.metadata),) if self.metadata else ()

    def read_documents(self, item: Item) -> Iterator[ReadResult]:
        yield self._read(item)

    def _read(self, item: Item) -> ReadResult:
        title, license, problems = "", "", ()
        if self.metadata:
            place = _papers(self.metadata, self.categories).get(_key(item.id))
            if place == _UNWANTED:
                return ReadResult(None, (Problem(item.id, f"left out: not in Arxiv.categories = {self.categories}"),))
            if place is None:
                out = ", so its categories are unknown: left out" if self.categories else ""
                problems = (Problem(item.id, f"not in {Path(self.metadata).name}{out}"),)
                if self.categories:
                    return ReadResult(None, problems)
            else:
                title, license = _title_and_license(self.metadata, place)
        document, more = _read_member(item, self) if item.member else _read_folder(item, self)
        if document:
            document = document._replace(title=title or document.title, license=license or document.license)
        return ReadResult(document, (*problems, *more))


def _items(split: Split | None, folder: Path) -> Iterator[Item]:
    tars, others = [], []
    for path in entries(folder):
        if _is_bulk(path):
            tars.append(path)
        elif _is_folder(path):
            yield Item(path.name, split, str(path))
        else:
            others.append(left_out_item(path, split, f"neither a paper's folder nor one of arXiv's tars ({_BULK})"))
    for path in tars:
        yield from _members(split, path)
    yield from others


def _is_bulk(path: Path) -> bool:
    return fnmatch.fnmatchcase(path.name, _BULK) and path.is_file()


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.name.startswith(".")


def _has_source(root: Path) -> bool:
    return any(name.lower().endswith(latex_inputs.TEX_SUFFIXES) for _, _, names in walk(root) for name in names)


def _members(split: Split | None, path: Path) -> Iterator[Item]:
    """Yields the papers of a tar of arXiv's bulk form, and notes for its other members."""
    for name in archives.names(path):
        if isinstance(name, Problem):
            yield Item(name.place, split, str(path), note=name.message)
        elif name.endswith(_PACKED):
            yield Item(_id(PurePosixPath(name).stem), split, str(path), name)
        else:
            note = f"left out: the name of a paper ends in {' or '.join(_PACKED)}"
            yield Item(f"{path.name}: {name}", split, str(path), note=note)


def _id(name: str) -> str:
    """Returns the id of a paper: math0309136 in the bulk form is math/0309136 elsewhere."""
    old = re.fullmatch(r"([a-z-]+)(\d{7})", name)
    return f"{old[1]}/{old[2]}" if old else name


def _key(id: str) -> str:
    """Returns the id that the metadata has for a paper, which is without a version."""
    return _id(re.sub(r"(?<=\d)v\d+$", "", id))


def _read_folder(item: Item, settings: Arxiv) -> ReadResult:
    files: dict[str, Callable[[], bytes]] = {}
    problems: list[Problem] = []
    root = Path(item.path)
    for folder, folders, names in walk(root):
        folders[:] = [name for name in folders if not _hidden(name)]
        for path in (folder / name for name in names if not _hidden(name)):
            name = path.relative_to(root).as_posix()
            if path.is_file() and path.resolve().is_relative_to(root.resolve()):
                files[name] = functools.partial(read_file, path)
            else:
                problems.append(Problem(f"{item.id}/{name}", "left out: a device, or a link out of this paper"))
    document, more = _document(item.id, files, settings)
    return ReadResult(document, (*problems, *more))


def _read_member(item: Item, settings: Arxiv) -> ReadResult:
    """Reads a paper that is a member of arXiv's tars. If it is damaged, only this paper is left out."""
    place = f"{Path(item.path).name}: {item.member}"
    content = archives.member(Path(item.path), item.member)
    if isinstance(content, Problem):
        return ReadResult(None, (content,))
    if item.member.endswith(".pdf"):
        return ReadResult(None, (Problem(place, "left out: a PDF, without LaTeX source"),))
    files: dict[str, Callable[[], bytes]] = {}
    problems: list[Problem] = []
    try:
        with gzip.open(io.BytesIO(content)) as file:
            unpacked = file.read(archives.MAX_BYTES + 1)
        if len(unpacked) > archives.MAX_BYTES:
            return ReadResult(None, (Problem(place, f"left out: more than {archives.MAX_BYTES:,} bytes"),))
        if not archives.is_tar(unpacked):
            if reason := _no_latex(unpacked):
                return ReadResult(None, (Problem(place, f"left out: {reason}"),))
            files = {f"{PurePosixPath(item.id).name}.tex": lambda: unpacked}
        else:
            for part in archives.members_of(unpacked, place):
                if isinstance(part, Problem):
                    problems.append(part)
                elif not any(_hidden(name) for name in part.name.split("/")):
                    files[part.name] = functools.partial(bytes, part.content)
    except (OSError, EOFError, zlib.error, InputError) as error:
        return ReadResult(None, (*problems, Problem(place, f"left out: damaged ({error})")))
    document, more = _document(item.id, files, settings)
    return ReadResult(document, (*problems, *more))


def _no_latex(content: bytes) -> str | None:
    """Returns the form of a single-file paper that is not LaTeX, or None. arXiv gives other forms the same names."""
    for kind, start in _OTHER_FORMS.items():
        if start.match(content):
            return f"{kind}, without LaTeX source"
    return None if _COMMAND.search(content) else "a file without any LaTeX command"


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _document(id: str, files: Files, settings: Arxiv) -> ReadResult:
    tree = latex_inputs.Tree(files)
    problems = [Problem(f"{id}/{name}", "left out: holds NUL bytes, so it is not text") for name in tree.binary]
    if not tree.tex_files:
        return ReadResult(None, (*problems, Problem(id, "left out: no .tex file")))
    text, more = latex_inputs.document(tree, PurePosixPath(id).name, settings.append_unreached, settings.bbl)
    problems += [Problem(f"{id}/{place}" if place else id, message) for place, message in more]
    if not text.strip():
        return ReadResult(None, (*problems, Problem(id, "left out: it has no text except comments")))
    return ReadResult(Document(id, latex.title(text) or id, text, _license(files)), tuple(problems))


def _license(files: Files) -> str:
    """Returns the first line with words of the license file; of several, of the shallowest and first by name."""
    named = [name for name in files if _LICENSES.fullmatch(PurePosixPath(name).name)]
    for name in sorted(named, key=lambda name: (name.count("/"), name)):
        for line in latex.decode(files[name](), name)[0].split("\n"):
            if words := line.strip(" \t#=*-"):
                return words
    return ""


@functools.lru_cache(maxsize=2)
def _papers(metadata: str, categories: tuple[str, ...]) -> Mapping[str, int]:
    """Returns the place of each paper's line in the metadata, or `_UNWANTED` for other categories. Read once per
    process.
    """
    places: dict[str, int] = {}
    path = Path(metadata)
    if not path.is_file():
        raise InputError(
            f"Arxiv.metadata = {metadata!r} does not exist. Name arXiv's metadata, or set it to '' for none"
        )
    with path.open("rb") as file:
        place = 0
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    paper = json.loads(line)
                    id, found = str(paper["id"]), str(paper.get("categories") or "").split()
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    raise InputError(
                        f"Arxiv.metadata = {metadata!r}: line {number} is not a JSON object with an id ({error!r}). "
                        "Each line must be one paper, as in arxiv-metadata-oai-snapshot.json. Fetch it again"
                    ) from error
                wanted = not categories or any(category.startswith(categories) for category in found)
                places[id] = place if wanted else _UNWANTED
            place += len(line)
    return places


def _title_and_license(metadata: str, place: int) -> tuple[str, str]:
    with Path(metadata).open("rb") as file:
        file.seek(place)
        paper = json.loads(file.readline())
    return " ".join(str(paper.get("title") or "").split()), str(paper.get("license") or "")
