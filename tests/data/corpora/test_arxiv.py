"""Papers become whole texts without comments; what could not be followed or is left out is said."""

import gzip
import io
import json
import pickle
import re
import tarfile
import time
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from memorizing.data.corpora import latex_inputs
from memorizing.data.corpora.arxiv import Arxiv
from memorizing.data.corpora.corpus import Corpus, Item, ReadResult, document_items
from memorizing.data.corpora.latex import VERBATIM, scan, strip_comments, title
from memorizing.errors import InputError
from tests.shared_data import FOLDER, unpacked

PAPER = "\\documentclass{article}\n\\begin{document}\nText.\n\\end{document}\n"


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def read(folder: Path, **fields) -> ReadResult:
    """The paper in `folder`."""
    return next(Arxiv(**fields).read(Item(folder.name, None, str(folder))))


def text(folder: Path, **fields) -> str:
    reading = read(folder, **fields)
    assert reading.document is not None, reading.problems
    return reading.document.text


def messages(reading: ReadResult) -> str:
    return "\n".join(f"{problem.place} | {problem.message}" for problem in reading.problems)


def whole(body: str, before: str = "") -> str:
    return f"\\documentclass{{article}}\n{before}\\begin{{document}}\n{body}\n\\end{{document}}\n"


# Comments


@pytest.mark.parametrize(
    ("raw", "stripped"),
    [
        ("a % b\nc\n", "a \nc\n"),
        ("a\n  % b\nc\n", "a\nc\n"),
        ("a\n%\n%%\n\nc", "a\n\nc"),
        (r"5\% and \\% gone", r"5\% and \\"),
        (r"\\\% stays", r"\\\% stays"),
        (r"\verb|%| and \verb*+\%+ % x", r"\verb|%| and \verb*+\%+ "),
        (r"\lstinline[language=C]{a % b} \mintinline{c}|%d| % x", r"\lstinline[language=C]{a % b} \mintinline{c}|%d| "),
        (r"\url{http://a/%20b} \href{a%b}{c} % x", r"\url{http://a/%20b} \href{a%b}{c} "),
        ("a\n\\begin{comment}\nb\n\\end{comment} % x\nc\n", "a\nc\n"),
        ("a \\begin{comment} b \\end{comment} c", "a \n c"),
        ("\\begin{comment} not closed\n% x\n", "\\begin{comment} not closed\n"),
        ("%\\begin{verbatim}\na % b\n\\end{verbatim}", "a \n\\end{verbatim}"),
        ("% all of it", ""),
    ],
)
def test_comments_are_removed(raw, stripped):
    assert strip_comments(raw) == stripped


FRAGMENTS = [
    *"%\\\n {}|a[]",
    *("\\%", "\\\\", "\n%", "\\begin", "\\end", "{comment}", "{verbatim}", "\\begin{comment}", "\\end{comment}"),
    *("\\begin{verbatim}", "\\end{verbatim}", "\\verb", "\\lstinline", "\\url{", "\\input{x}", "\\input x", "\\verb|"),
    *(
        "\\input",
        "\\import{a}",
        "{%\nx}",
        "%\n{x",
        "\\begin{document}",
        "\\end{document}",
        "\\import{a}{b}",
        "\\olimport[a]{b}",
    ),
]
LATEX = st.lists(st.sampled_from(FRAGMENTS), max_size=25).map("".join)


@settings(max_examples=500)
@given(LATEX)
@example("\\verb\\begin{comment}\n\\end{comment}\\foo\\%")
@example("  \\begin{comment}\\end{comment} \\begin{comment}\\end{comment}\n%\n")
def test_stripping_comments_twice_changes_nothing(raw):
    once = strip_comments(raw)
    assert strip_comments(once) == once


def without_comments(raw: str) -> str:
    """The rule for lines, where nothing is verbatim."""
    kept = []
    for line in raw.split("\n"):
        cut = next((m.start(1) for m in re.finditer(r"(?<!\\)(?:\\\\)*(%)", line)), None)
        if cut is None or line[:cut].strip(" "):
            kept.append(line[:cut])
    return "\n".join(kept)


@given(st.lists(st.sampled_from(["%", "\\", "\\%", "\n", " ", "a", "\n%"]), max_size=25).map("".join))
def test_comments_outside_verbatim_follow_the_rule_for_lines(raw):
    assert strip_comments(raw).rstrip("\n") == without_comments(raw).rstrip("\n")


@given(st.sampled_from([*VERBATIM, "lstlisting*", "own"]), LATEX, st.sampled_from(["", "a\n", "a ", "\\\\ "]))
def test_verbatim_text_is_unchanged(environment, inside, before):
    inside = inside.replace(f"\\end{{{environment}}}", "")
    kept = f"\\begin{{{environment}}}{inside}\\end{{{environment}}}"
    assert strip_comments(f"{before}{kept} % gone\n", frozenset({"own"})) == f"{before}{kept} \n"


@given(LATEX)
def test_commands_have_their_line_number(raw):
    lines = raw.split("\n")
    for span in scan(raw):
        assert not span.kind or lines[span.line - 1].count(re.match(r"\\[a-z]+", span.text)[0])


def test_environments_defined_as_verbatim_are_unchanged(tmp_path):
    body = "\\begin{code}\n%d\n\\end{code}\n"
    assert "%d" not in text(write(tmp_path, {"a.tex": whole(body)}))
    assert "%d" in text(write(tmp_path, {"a.tex": whole(body, "\\lstnewenvironment{code}{}{}\n")}))


# Inputs


@pytest.mark.parametrize(
    ("command", "part"),
    [
        ("\\input{part}", "part.tex"),
        ("\\input{part.tex}", "part.tex"),
        ("\\input{ part }", "part.tex"),
        ('\\input{"two words"}', "two words.tex"),
        ("\\input part\n", "part.tex"),
        ("\\input{part.pgf}", "part.pgf"),
        ("\\input{part.v2}", "part.v2.tex"),
        ("\\input{./a/../part}", "part.tex"),
        ("\\include{a/part}", "a/part.tex"),
        ("\\subfile{a/part}", "a/part.tex"),
        ("\\subfileinclude{a/part}", "a/part.tex"),
        ("\\import{a/}{part}", "a/part.tex"),
        ("\\subimport{a}{part}", "a/part.tex"),
        ("\\subimport*{a/}{part}", "a/part.tex"),
        ("\\includefrom{a/}{part}", "a/part.tex"),
        ("\\olimport{part}", "part.tex"),
        ("\\olimport[a]{part}", "a/part.tex"),
    ],
)
@pytest.mark.parametrize("folder", ["", "sub/"])
def test_every_form_of_input_command_is_expanded(tmp_path, command, part, folder):
    files = {folder + "main.tex": whole(f"Before {command} after."), folder + part: "INSIDE\n% comment\n"}
    reading = read(write(tmp_path, files))
    assert not reading.problems
    assert re.sub(r"\s+", " ", reading.document.text) == (
        r"\documentclass{article} \begin{document} Before INSIDE after. \end{document} "
    )


@pytest.mark.parametrize(
    "text_of", ["\\inputencoding{part}", "\\verb|\\input{part}|", "%\\input{part}\n", "\\\\input{part}"]
)
def test_text_that_looks_like_an_input_is_not_expanded(tmp_path, text_of):
    reading = read(write(tmp_path, {"main.tex": whole(f"A{text_of}B"), "part.tex": "INSIDE"}))
    assert "INSIDE" not in reading.document.text and "not reached from main.tex" in messages(reading)


def test_names_are_looked_up_as_latex_does(tmp_path):
    r"""Paths start at the main file's folder, wherever \input is; \subfile and \import change it inside."""
    files = {
        "main.tex": whole("\\input{a/one}\\subfile{b/two}\\import{c/}{three}"),
        "a/one.tex": "\\input{part}",
        "b/two.tex": "\\subfile{part}",
        "c/three.tex": "\\input{part}\\subimport{d}{four}\\import{d}{four}",
        "d/four.tex": "E ",
        "c/d/four.tex": "\\input{part}",
        "a/part.tex": "WRONG",
        "part.tex": "TOP ",
        "b/part.tex": "B ",
        "c/part.tex": "C ",
        "c/d/part.tex": "D ",
    }
    assert text(write(tmp_path, files)).split("\n")[2] == "TOP B C D E "
    (tmp_path / "part.tex").unlink()  # and where that fails, from the file's own folder
    assert text(tmp_path).split("\n")[2] == "WRONGB C D E "


def test_subfiles_lose_their_preamble_and_wrapper(tmp_path):
    sub = "\\documentclass[main]{subfiles}\n\\input{macros}\n\\begin{document}\nINSIDE\n\\end{document}\nAFTER\n"
    reading = read(write(tmp_path, {"main.tex": whole("\\subfile{sub}"), "sub.tex": sub, "macros.tex": "MACROS"}))
    assert reading.document.text == whole("INSIDE")
    assert "sub.tex | 5 characters after \\end{document} left out" in messages(reading)
    assert "macros.tex" in messages(reading)


def test_inputs_without_a_file_stay_and_are_noted(tmp_path):
    stay = ["\\input{none}", "\\input{\\jobname-x}", "\\input{style.sty}", "\\input{../outside}", "\\input{main.bbl}"]
    paper = write(tmp_path / "paper", {"main.tex": "% a comment\n" + whole("\\input{part}"), "style.sty": "S"})
    write(paper, {"part.tex": "\n".join(["Part", *stay]), "../outside.tex": "SECRET", "main.bbl": "B"})
    reading = read(paper)
    assert all(command in reading.document.text for command in stay) and "SECRET" not in reading.document.text
    assert [problem.place for problem in reading.problems] == [f"paper/part.tex:{line}" for line in range(2, 7)]


def test_cycles_are_noted_and_end(tmp_path):
    files = {"main.tex": whole("\\input{a}\\input{main}"), "a.tex": "A\\input{b}", "b.tex": "B\\input{a}\\input{b}"}
    reading = read(write(tmp_path, files))
    assert "AB\\input{a}\\input{b}\\input{main}" in reading.document.text
    for place, cycle in {"a": "a.tex > b.tex > a.tex", "b": "b.tex > b.tex", "main": "main.tex > main.tex"}.items():
        assert f"\\input{{{place}}}: {cycle} is a cycle" in messages(reading)


def test_expansion_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(latex_inputs, "MAX_INPUTS", 500)
    files = {f"f{index}.tex": f"\\input{{f{index + 1}}}\\input{{f{index + 1}}}x" for index in range(40)}
    reading = read(write(tmp_path, {"main.tex": whole("\\input{f0}"), **files, "f40.tex": "x" * 10}))
    assert "beyond" in messages(reading) and len(reading.document.text) < 100_000


@pytest.mark.parametrize(
    ("command", "stays"),
    [
        ("\\input\n{part}", "\\input\n{part}"),
        ("\\input%\n  {part}", "\\input{part}"),
        ("\\input{%\n  part}", "\\input{part}"),
        ("\\input{part% this\n}", "\\input{part}"),
        ("\\input{\n  part\n}", "\\input{\n  part\n}"),
        ("\\input% this\npart\n", "\\input part\n"),
        ("\\import%\n{./}%\n{part}", "\\import{./}{part}"),
    ],
)
def test_commands_may_span_lines_and_comments(tmp_path, command, stays):
    main = whole(f"A {command} B")
    assert "A INSIDE" in text(write(tmp_path / "1", {"main.tex": main, "part.tex": "INSIDE"}))
    reading = read(write(tmp_path / "2", {"main.tex": main}))
    assert stays in reading.document.text and strip_comments(reading.document.text) == reading.document.text
    (problem,) = reading.problems
    assert problem.place == "2/main.tex:3" and problem.message.endswith("no such file") and "\n" not in problem.message


@pytest.mark.parametrize(
    "parts", [("\\input{", " "), ("\\input", " ", "{"), ("\\input{", "\n"), ("", "\\input{ "), ("", "\\input%")]
)
def test_unclosed_commands_take_linear_time(parts):
    raw = parts[0] + parts[1] * 100_000 + "".join(parts[2:])
    start = time.perf_counter()
    strip_comments(raw)
    assert time.perf_counter() - start < 5


def test_all_files_share_one_budget_of_inputs(tmp_path, monkeypatch):
    monkeypatch.setattr(latex_inputs, "MAX_INPUTS", 500)
    files = {f"f{index}.tex": f"\\input{{f{index + 1}}}\\input{{f{index + 1}}}x" for index in range(40)}
    calls = []
    inside = latex_inputs._Walk.file
    monkeypatch.setattr(latex_inputs._Walk, "file", lambda *args: calls.append(args[1]) or inside(*args))
    text(write(tmp_path, {"main.tex": whole("\\input{f0}"), **files, "f40.tex": "x" * 10}))
    assert len(calls) < 3 * 500


# The main file and what it does not reach


@pytest.mark.parametrize(
    ("main", "files"),
    [
        ("b.tex", {"a.tex": "A", "b.tex": PAPER}),
        ("b.tex", {"a.tex": "% \\documentclass{x}\nA", "b.tex": PAPER}),
        ("b.tex", {"a.tex": "\\verb|\\documentclass|", "b.tex": PAPER.replace("class", "style")}),
        ("b.tex", {"a.tex": "\\documentclass{x}", "b.tex": PAPER}),
        ("b.tex", {"a.tex": PAPER, "b.tex": whole("\\subfile{a}")}),
        ("b.tex", {"a.tex": "\\documentclass{x}", "b.tex": "\\input{a}\\begin{document}B\\end{document}"}),
        ("b.tex", {"a.tex": "\\begin{document}A\\end{document}", "b.tex": "\\documentclass{x}\\input{a}"}),
        ("main.tex", {"a.tex": whole("A" * 500), "main.tex": PAPER}),
        ("THIS.tex", {"a.tex": whole("A" * 500), "THIS.tex": PAPER}),
        ("b.tex", {"a.tex": PAPER, "b.tex": whole("B" * 500)}),
        ("main.tex", {"a.tex": "\\def\\x{}\\input{main}", "main.tex": whole("M"), "other.tex": whole("O" * 500)}),
        ("b.tex", {"b.tex": whole("\\subfile{main}"), "main.tex": whole("M" * 50)}),
        ("main.tex", {"a.tex": PAPER, "main.tex": whole("\\subfile{part}"), "part.tex": whole("\\subfile{main}")}),
        ("b/c.tex", {"a/b/c.tex": PAPER, "b/c.tex": PAPER, "d/c.tex": PAPER}),
        ("b.tex", {"a.tex": "\\documentclass{x}", "b.tex": "\\begin{document}" + "B" * 500}),
        ("b.tex", {"a.tex": "A" * 50, "b.tex": "\\input{a}\\input{c}", "c.tex": "C", "d.tex": "D"}),
    ],
)
def test_the_main_file_is_found(tmp_path, main, files):
    tree = latex_inputs.Tree({name: (lambda content=content: content.encode()) for name, content in files.items()})
    assert latex_inputs.main_file(tree, "this") == main


def test_unreached_files_are_noted_or_appended_without_a_class(tmp_path):
    parts = {"root.tex": "ROOT\n\\input{a}", "a.tex": "AAA\n", "z.tex": "Z\n", "w/y.tex": "Y", "x.tex": "X\\input{w/y}"}
    reading = read(write(tmp_path, parts))
    assert reading.document.text == "ROOT\nAAA\n\nXY\n\nZ\n"
    assert "no file has a \\documentclass: the text starts with root.tex" in messages(reading)
    alone = read(tmp_path, append_unreached=False)
    assert alone.document.text == "ROOT\nAAA\n"
    assert "3 files are not reached from root.tex and are left out: w/y.tex, x.tex, z.tex" in messages(alone)
    classed = read(write(tmp_path, {"root.tex": whole("\\input{a}")}))
    assert "AAA" in classed.document.text and "Z" not in classed.document.text
    assert "left out: w/y.tex, x.tex, z.tex" in messages(classed)


def test_the_text_ends_with_the_document(tmp_path):
    reading = read(write(tmp_path, {"a.tex": PAPER + "Notes to self.\n% comment\n"}))
    assert reading.document.text == PAPER
    assert "14 characters after \\end{document} left out" in messages(reading)
    assert not read(write(tmp_path, {"a.tex": PAPER + "\n%%% Local Variables:\n"})).problems
    # Before the document starts the words are part of a definition.
    assert "BODY" in text(write(tmp_path, {"a.tex": whole("BODY", "\\def\\bye{\\end{document}}\n")}))


# What else is known of a paper


def test_encodings_line_ends_and_binary_files(tmp_path):
    files = {
        "main.tex": b"\xef\xbb\xbf" + whole("na\u00efve\n\\input{old}\n\\input{bin}").encode().replace(b"\n", b"\r\n"),
        "old.tex": "caf\u00e9\rnew".encode("latin-1"),
        "bin.tex": b"\0\1\2",
    }
    reading = read(write(tmp_path / "p", files))
    assert "na\u00efve\ncaf\u00e9\nnew\n" in reading.document.text and reading.document.text.startswith(
        "\\documentclass"
    )
    assert "\r" not in reading.document.text
    assert "p/old.tex | not UTF-8 (byte 0xe9 at offset 3): read as ISO-8859-1" in messages(reading)
    assert "p/bin.tex | left out: holds NUL bytes" in messages(reading)


def test_styles_and_bibliographies_are_not_text_except_a_requested_bbl(tmp_path):
    body = "See.\n\\bibliography{refs}\n"
    paper = write(tmp_path, {"main.tex": whole(body), "main.bbl": "BBL\n", "refs.bib": "BIB", "a.sty": "STY"})
    assert "\\bibliography{refs}" in text(paper) and not read(paper).problems
    with_bbl = text(paper, bbl=True)
    assert "BBL" in with_bbl and "\\bibliography" not in with_bbl
    assert not any(word in text(paper) + with_bbl for word in ("BIB", "STY"))


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("\\title{A title}", "A title"),
        ("\\title[Short]{A \\textbf{long}\\\\ title\\thanks{To {me}.}\n of $x^{2}$}", "A {long} title of $x^{2}$"),
        ("\\title\n{\\Large\\bf Loud}", "Loud"),
        ("\\title{\\textbf{All bold}}", "All bold"),
        ("\\titleformat{x}\\newcommand{\\title}[1]{y}", ""),
        ("\\title{not closed", ""),
        ("\\title{}\\title{Second}", "Second"),
    ],
)
def test_titles_come_from_the_markup(raw, expected):
    assert title(raw) == expected


def test_title_and_license_come_from_the_files_of_the_paper(tmp_path):
    named = {"main.tex": whole("\\title{T}"), "LICENSE.md": "\n## The license\n\nmore", "sub/COPYING": "another"}
    document = read(write(tmp_path / "a", named)).document
    assert (document.id, document.title, document.license) == ("a", "T", "The license")
    document = read(write(tmp_path / "b", {"main.tex": PAPER, "license_plate.tex": "x"})).document
    assert (document.id, document.title, document.license) == ("b", "b", "")


@pytest.mark.parametrize(
    "files", [{"notes.txt": "x"}, {"main.tex": "% withdrawn\n"}, {"main.tex": b"\0"}, {".a.tex": PAPER}]
)
def test_a_paper_without_text_is_left_out_with_a_note(tmp_path, files):
    reading = read(write(tmp_path / "paper", files))
    assert reading.document is None and "left out: " in messages(reading)


# Layouts


def test_splits_come_from_folders_and_ids_are_unique(tmp_path):
    write(tmp_path, {"b/main.tex": PAPER, "a/x/main.tex": PAPER, ".git/main.tex": PAPER, "stray.tex": PAPER})
    assert [item.id for item in Arxiv().list(tmp_path)] == ["a", "b", ".git", "stray.tex"]
    assert [item.id for item in document_items(Arxiv().list(tmp_path))] == ["a", "b"]
    splits = write(tmp_path / "splits", {"test/p/a.tex": PAPER, "train/q/a.tex": PAPER, "train/o/a.tex": PAPER})
    items = Arxiv().list(splits)
    assert [(item.id, item.split) for item in items] == [("o", "train"), ("q", "train"), ("p", "test")]
    write(splits, {"train/p/a.tex": PAPER})
    with pytest.raises(InputError, match="both document p"):
        Arxiv().list(splits)


def test_a_folder_without_papers_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "none", write(tmp_path / "c", {"a/b.txt": "x"})):
        with pytest.raises(InputError, match=re.escape(f"--raw={folder} has no folders with .tex files")):
            Arxiv().list(folder)


def test_corpora_and_items_can_be_pickled(tmp_path):
    corpus = Arxiv(bbl=True)
    items = corpus.list(write(tmp_path, {"b/main.tex": PAPER}))
    assert isinstance(corpus, Corpus)
    other, copies = pickle.loads(pickle.dumps((corpus, items)))
    assert [next(other.read(item)) for item in copies] == [next(corpus.read(item)) for item in items]


def tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def bulk(folder: Path, papers: dict[str, bytes], name: str = "arXiv_src_1503_001.tar") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(tar(papers))
    return folder


def test_the_bulk_form_is_read_in_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    several = tar({"ms.tex": whole("\\input{sec/a}").encode(), "sec/a.tex": b"INSIDE", "__MACOSX/._ms.tex": b"\0"})
    papers = {
        "1503/1503.00001.gz": gzip.compress(PAPER.encode()),
        "1503/1503.00002.gz": gzip.compress(several),
        "1503/1503.00003.pdf": b"%PDF",
        "1503/1503.00004.gz": gzip.compress(several)[:-30],
        "1503/1503.00005.gz": gzip.compress(several[:1600]),
        "1503/math0309136.gz": gzip.compress(PAPER.encode()),
        "1503/README": b"hello",
        "../outside.gz": gzip.compress(PAPER.encode()),
    }
    raw = bulk(tmp_path / "raw", papers)
    before = sorted(tmp_path.rglob("*"))
    readings = {item.id: next(Arxiv().read(item)) for item in Arxiv().list(raw)}
    documents = {id: reading.document.text for id, reading in readings.items() if reading.document}
    assert documents == {"1503.00001": PAPER, "1503.00002": whole("INSIDE"), "math/0309136": PAPER}
    assert not any(readings[id].problems for id in documents)
    assert "1503/1503.00003.pdf | left out: a PDF" in messages(readings["1503.00003"])
    assert "damaged" in messages(readings["1503.00004"]) and "damaged" in messages(readings["1503.00005"])
    for name, words in {
        "1503/README": "the name of a paper ends in",
        "../outside.gz": "leads out of the archive",
    }.items():
        assert words in messages(readings[f"arXiv_src_1503_001.tar: {name}"])
    assert sorted(tmp_path.rglob("*")) == before


def test_packed_papers_that_are_not_latex_are_left_out_with_a_note(tmp_path):
    forms = {
        "1": (b"%!PS-Adobe-2.0\n(\\050 \\pageno) show", "PostScript, without LaTeX source"),
        "2": (b"<!DOCTYPE html>\n<p>\\alpha", "HTML, without LaTeX source"),
        "3": (b"This paper is withdrawn (50\\% of it).", "a file without any LaTeX command"),
        "4": (b"%PDF-1.4 \\alpha", "a PDF, without LaTeX source"),
        "5": (b"%!TEX root\nPlain \\bf TeX", ""),
    }
    papers = {f"1503/1503.0000{name}.gz": gzip.compress(content) for name, (content, _) in forms.items()}
    raw = bulk(tmp_path, papers)
    for item, (_, reason) in zip(Arxiv().list(raw), forms.values(), strict=True):
        (reading,) = Arxiv().read(item)
        assert (reading.document is None) == bool(reason)
        assert not reason or [problem.message for problem in reading.problems] == [f"left out: {reason}"]


def test_a_truncated_bulk_tar_is_refused(tmp_path):
    raw = bulk(tmp_path, {f"1503/1503.0000{i}.gz": gzip.compress(PAPER.encode()) for i in range(3)})
    path = raw / "arXiv_src_1503_001.tar"
    path.write_bytes(path.read_bytes()[:1024])
    with pytest.raises(InputError, match="cut off or damaged after member"):
        Arxiv().list(raw)


METADATA = [
    {"id": "1503.00001", "title": "One\n  two", "categories": "math.AG math.NT", "license": "http://l/1"},
    {"id": "1503.00002", "title": "", "categories": "cs.LG math-ph", "license": None},
    {"id": "math/0309136", "title": "Old", "categories": "hep-th math.AG", "license": None},
]


@pytest.fixture
def described(tmp_path) -> tuple[Path, str]:
    """Three papers that metadata know, one of them by a version, and one that they do not."""
    papers = {name: gzip.compress(PAPER.encode()) for name in ("1503/1503.00002.gz", "1503/math0309136.gz")}
    raw = write(bulk(tmp_path / "raw", papers), {"1503.00001v2/a.tex": PAPER, "1503.99999/a.tex": PAPER})
    metadata = tmp_path / "metadata.json"
    metadata.write_text("".join(json.dumps(paper) + "\n" for paper in METADATA))
    return raw, str(metadata)


def test_metadata_gives_titles_and_licenses(described):
    raw, metadata = described
    corpus = Arxiv(metadata=metadata)
    readings = {item.id: next(corpus.read(item)) for item in corpus.list(raw)}
    known = {id: (reading.document.title, reading.document.license) for id, reading in readings.items()}
    assert known == {
        "1503.00001v2": ("One two", "http://l/1"),
        "1503.00002": ("1503.00002", ""),
        "math/0309136": ("Old", ""),
        "1503.99999": ("1503.99999", ""),
    }
    assert [id for id, reading in readings.items() if reading.problems] == ["1503.99999"]


@pytest.mark.parametrize(
    ("categories", "papers"),
    [
        (("math.",), {"1503.00001v2", "math/0309136"}),
        (("math.NT", "cs."), {"1503.00001v2", "1503.00002"}),
        (("math",), {"1503.00001v2", "1503.00002", "math/0309136"}),
        (("q-bio",), set()),
    ],
)
def test_a_category_filter_notes_papers_without_metadata(described, categories, papers):
    raw, metadata = described
    corpus = Arxiv(metadata=metadata, categories=categories)
    readings = {item.id: next(corpus.read(item)) for item in corpus.list(raw)}
    assert {id for id, reading in readings.items() if reading.document} == papers
    assert set(readings) == papers | {"1503.99999"}
    assert "not in metadata.json, so its categories are unknown: left out" in messages(readings["1503.99999"])


def test_unusable_metadata_is_refused(described, tmp_path):
    raw, _ = described
    with pytest.raises(InputError, match=r"Arxiv\.categories = \('math\.',\) needs Arxiv\.metadata"):
        Arxiv(categories=("math.",))
    with pytest.raises(InputError, match=r"Arxiv\.metadata = .* does not exist"):
        Arxiv(metadata=str(tmp_path / "none"), categories=("math.",)).list(raw)
    for bad in ('{"id": "cut', "[]", "{}"):
        path = tmp_path / f"bad{len(bad)}.json"
        path.write_text(json.dumps(METADATA[0]) + f"\n{bad}\n")
        with pytest.raises(InputError, match="line 2 is not a JSON object"):
            Arxiv(metadata=str(path), categories=("math.",)).list(raw)


# Real and odd text


def oddity(name: str) -> Path:
    if not (FOLDER / "oddities" / name).exists():
        pytest.skip("needs the corpora that lie beside the checkout in shared/data")
    return FOLDER / "oddities" / name


def test_a_cycle_of_inputs_is_noted():
    reading = read(oddity("input-cycle"))
    assert reading.document.text.count("This part includes the file that includes it.") == 1
    assert messages(reading).split("\n") == [
        "input-cycle/part.tex:2 | \\input{main}: main.tex > part.tex > main.tex is a cycle; not included",
        "input-cycle/main.tex:4 | \\input{no-such-file}: no such file",
    ]


def test_circular_links_in_a_folder_and_in_a_tar_are_left_out(tmp_path):
    with tarfile.open(oddity("symlink-loop.tar")) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    write(tmp_path / "unpacked", {"main.tex": whole("\\input{leak}")})
    (tmp_path / "secret.tex").write_text("SECRET")
    (tmp_path / "unpacked" / "leak.tex").symlink_to(tmp_path / "secret.tex")
    (tmp_path / "unpacked" / "loop" / "again").symlink_to(tmp_path / "unpacked", target_is_directory=True)
    reading = read(tmp_path / "unpacked")
    assert reading.document.text == whole("\\input{leak}")
    assert all(
        f"unpacked/{name} | left out: a device, or a link" in messages(reading)
        for name in ("leak.tex", "loop/again", "loop/self.py", "loop/dangling.py")
    )


@pytest.mark.parametrize("name", ["symlink-loop.tar", "path-traversal.tar", "truncated.tar.xz"])
def test_malformed_papers_of_a_bulk_tar_write_no_files_and_are_noted(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    content = oddity(name).read_bytes()
    packed = {"1503/1503.00001.gz": gzip.compress(content), "1503/1503.00002.gz": gzip.compress(PAPER.encode())}
    raw = bulk(tmp_path / "raw", packed)
    before = sorted(tmp_path.rglob("*"))
    odd, good = [next(Arxiv().read(item)) for item in Arxiv().list(raw)]
    assert odd.document is None and odd.problems and good.document.text == PAPER
    assert sorted(tmp_path.rglob("*")) == before and not Path("/tmp/absolute.py").exists()


COMMAND = re.compile(
    r"\\(?:(?:input|include|subfile) *\{([^}]*)\}|input ([a-z]+)|subimport\*?\{([^}]*)\}\{([^}]*)\}"
    r"|olimport(?:\[([^]]*)\])?\{([^}]*)\})"
)


def body(raw: str, is_main: bool) -> list[str]:
    """The lines of a file that count, by the rule for lines: the corpus has no command or mark in a verbatim text."""
    lines = without_comments(re.sub(r"\\begin\{comment\}.*?\\end\{comment\}", "", raw, flags=re.DOTALL)).split("\n")
    begin = next((index for index, line in enumerate(lines) if "\\begin{document}" in line), None)
    end = next(
        (index for index, line in enumerate(lines) if "\\end{document}" in line and begin is not None), len(lines)
    )
    own_class = any("\\documentclass" in line for line in lines)
    return lines[0 if is_main or begin is None or not own_class else begin + 1 : end]


def independent_counts(folder: Path, main: str, left_out: set[str]) -> tuple[int, int, list[str]]:
    """Commands in the files of a paper that name a file that is there, those that do not, and lines that must stay."""
    there, missing, lines = 0, 0, []
    for path in sorted(folder.rglob("*.tex")):
        name = path.relative_to(folder).as_posix()
        if name in left_out:
            continue
        text = re.sub(r"(?ms)^[ \t]*\\iffalse\b.*?^[ \t]*\\fi\b", "", path.read_text("utf-8-sig"))
        kept = body(text, name == main)
        lines += [line for line in kept if "%" not in line and not COMMAND.search(line)]
        for found in COMMAND.finditer("\n".join(kept)):
            plain, bare, sub_folder, sub_file, ol_folder, ol_file = found.groups()
            target = PurePosixPath(sub_folder or ol_folder or "", plain or bare or sub_file or ol_file)
            bases = (folder, path.parent) if plain or bare else (path.parent,)
            exists = any((base / f"{target}{end}").is_file() for base in bases for end in ("", ".tex"))
            there, missing = there + exists, missing + (not exists)
    return there, missing, lines


@pytest.mark.parametrize(
    ("split", "papers", "put_in", "listed"),
    [("train", 43, 745, 101), ("validation", 5, 26, 0), ("test", 5, 41, 1)],
)
def test_real_papers_are_complete(tmp_path_factory, split, papers, put_in, listed):
    """Counted by other means: every input with a file is put in, every other is listed, no line is lost."""
    raw = unpacked("arxiv", split, tmp_path_factory.mktemp("raw")).parent
    items = Arxiv().list(raw)
    assert len(items) == papers and {item.split for item in items} == {split}
    totals = [0, 0]
    for item in items:
        reading = next(Arxiv().read(item))
        output, folder = reading.document.text, Path(item.path)
        said = re.search(r"files are not reached from (\S+) and are left out: (.*)", messages(reading))
        main, left_out = (said[1], set(said[2].split(", "))) if said else (only_root(folder), set())
        there, missing, lines = independent_counts(folder, main, left_out)
        totals = [totals[0] + there, totals[1] + missing]
        assert sum(problem.place.rpartition(":")[2].isdigit() for problem in reading.problems) == missing, item.id
        assert sum(1 for _ in COMMAND.finditer(output)) == missing, item.id
        lost = set(lines) - set(output.split("\n"))
        assert not [line for line in lost if line not in output], item.id  # in the line of the command that put it in
        assert output.count("\\begin{document}") == output.count("\\end{document}") == 1
    assert totals == [put_in, listed]


def only_root(folder: Path) -> str:
    (root,) = [path.name for path in folder.glob("*.tex") if "\\begin{document}" in path.read_text()]
    return root


def test_real_papers_read_the_same_from_a_folder_and_a_tar(tmp_path):
    """A paper in the bulk form gives the same text as in its folder."""
    raw = unpacked("arxiv", "validation", tmp_path)
    folder = raw / "flt-blueprint"
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    packed = bulk(tmp_path / "bulk", {"1503/flt-blueprint.gz": gzip.compress(tar(files))})
    (item,) = Arxiv().list(packed)
    assert next(Arxiv().read(item)) == read(folder)


def text_of(tmp_path, files: dict[str, str | bytes]):
    reading = read(write(tmp_path / "p", files))
    return reading.document.text, messages(reading)


STYLE = r"""
\lstnewenvironment{mycode}{}{}
\DefineVerbatimEnvironment{myverb}{Verbatim}{}
\newenvironment{showcode}{\VerbatimEnvironment\begin{VerbatimOut}{x}}{\end{VerbatimOut}}
\NewDocumentEnvironment{shown}{m}{\begin{lstlisting}}{\end{lstlisting}}
"""


@pytest.mark.parametrize(
    ("environment", "preamble"),
    [
        *((name, "\\usepackage{mine}") for name in ("mycode", "myverb", "showcode", "shown")),
        ("ccode", "\\newminted{c}{linenos}"),
        ("console", "\\newminted[console]{bash}{}"),
        ("shell", "\\newtcblisting[auto counter]{shell}{listing only}"),
        *((name, "") for name in ("spverbatim", "luacode*", "Sinput", "pyblock", "tcblisting", "SaveVerbatim")),
    ],
)
def test_every_verbatim_environment_keeps_its_text(environment, preamble, tmp_path):
    shown = "\\documentclass{x} % kept\n\\begin{document}\n100 % kept \\input{a}\n\\end{document}\n\\iffalse kept\n"
    main = (
        f"\\documentclass{{article}}\n{preamble}\n\\begin{{document}}\n\\input{{chapter}}\nafter\n\\end{{document}}\n"
    )
    chapter = f"before % gone\n\\begin{{{environment}}}\n{shown}\\end{{{environment}}}\nbehind\n"
    text, _ = text_of(tmp_path, {"main.tex": main, "chapter.tex": chapter, "mine.sty": STYLE, "a.tex": "no"})
    assert shown in text and "gone" not in text and all(word in text for word in ("before", "behind", "after"))


def test_a_document_that_an_unknown_environment_shows_is_kept_and_noted(tmp_path):
    shown = "\\begin{weird}\n\\begin{document}\nshown\n\\end{document}\n\\end{weird}\n"
    main = f"\\documentclass{{article}}\n\\begin{{document}}\nfirst\n{shown}last\n\\end{{document}}\nnotes\n"
    text, notes = text_of(tmp_path, {"main.tex": main})
    assert shown in text and "last" in text and "notes" not in text
    assert "another \\begin{document}: kept as text" in notes


@pytest.mark.parametrize("end", ["\\bye", "\\stop", "\\end", "\\enddocument"])
def test_what_tex_never_reads_is_left_out_and_measured(end, tmp_path):
    text, notes = text_of(
        tmp_path,
        {"a.tex": f"\\magnification=1200\nread\n\\input b\n{end}\nunread\n", "b.tex": "also\n\\endinput\nold draft\n"},
    )
    assert "read" in text and "also" in text and "unread" not in text and "draft" not in text
    assert "9 characters after \\endinput left out" in notes and "6 characters after" in notes


def test_an_end_of_reading_inside_a_definition_ends_nothing(tmp_path):
    main = whole("\\def\\x{\\endinput} one\n\\newcommand{\\y}{\\bye} two $\\iff$ three\n")
    assert all(word in text_of(tmp_path, {"main.tex": main})[0] for word in ("one", "two", "three"))


def test_conditionals_that_are_false_are_left_out_whole(tmp_path):
    body = (
        "one\n\\iffalse\nold \\input{old} \\ifdraft x\\else y\\fi $a \\iff b$ % \\fi\n\\fi\ntwo\n"
        "\\iffalse gone \\else shown \\ifx a b\\fi\\fi three\n\\ifdraft kept \\else also \\fi\n\\iffalse never closed\n"
    )
    text, notes = text_of(tmp_path, {"main.tex": whole(body), "old.tex": "very old"})
    assert "old" not in text and "gone" not in text
    assert re.search(r"shown \\ifx a b\\fi\s+three", text)
    for part in (
        "one\ntwo\n",
        "\\ifdraft kept \\else also \\fi",
        "\\iffalse never closed",
    ):
        assert part in text
    assert "characters in \\iffalse or comment environments left out" in notes


def test_comment_environments_end_on_a_line_of_their_own(tmp_path):
    body = "\\begin{comment} a \\end{comment} b\nc\n\\end{comment}\nkept\n\\begin{old}\nd\n\\end{old}\n"
    body += "\\begin{comment}e\\end{comment}f\n"
    main = whole(body).replace("\\begin{document}", "\\excludecomment{old}\n\\begin{document}")
    text, _ = text_of(tmp_path, {"main.tex": main})
    assert text.split("\\begin{document}\n")[1].split("\\end{document}")[0].split() == ["kept", "f"]


def test_inputs_of_every_form_stay_apart(tmp_path):
    body = "\\include{a}\\include{b}\n\\InputIfFileExists{c}{}{missing}\n\\includestandalone[width=1cm]{d}\n"
    text, _ = text_of(tmp_path, {"main.tex": whole(body), **{f"{name}.tex": f"text-{name}" for name in "abcd"}})
    assert re.search(r"text-a\s+text-b\s+text-c", text) and "text-d" in text


@pytest.mark.parametrize(
    ("name", "readme"),
    [
        ("00README.XXX", "old.tex ignore\nfig.tex include\nnew.tex toplevelfile\n"),
        (
            "00README.json",
            '{"sources": [{"filename": "old.tex", "usage": "ignore"}, {"filename": "new.tex", "usage": "toplevel"}]}',
        ),
        (
            "00README.yaml",
            "sources:\n  - filename: old.tex\n    usage: ignore\n  - filename: new.tex\n    usage: toplevel\n",
        ),
    ],
)
def test_the_readme_of_arxiv_names_the_main_file(name, readme, tmp_path):
    text, notes = text_of(
        tmp_path, {name: readme, "old.tex": whole("an old and longer version"), "new.tex": whole("new")}
    )
    assert "new" in text and "old" not in text
    assert "files that 00README says to ignore are left out: old.tex" in notes


def test_the_file_with_a_bibliography_of_its_name_is_the_main_file(tmp_path):
    files = {"a.tex": whole("supplement, and longer"), "b.tex": whole("paper"), "b.bbl": "\\begin{thebibliography}{}"}
    assert "paper" in text_of(tmp_path, files)[0]


@pytest.mark.parametrize(
    ("option", "content", "text", "encoding"),
    [("latin1", b"\x93x\x94", "“x”", "windows-1252"), ("latin2", "ž".encode("iso-8859-2"), "ž", "iso-8859-2"),
     ("koi8-r", "да".encode("koi8-r"), "да", "koi8-r")],
)  # fmt: skip
def test_the_encoding_is_that_of_inputenc(option, content, text, encoding, tmp_path):
    main = whole("@").replace("\\begin{document}", f"\\usepackage[{option}]{{inputenc}}\n\\begin{{document}}").encode()
    found, notes = text_of(tmp_path, {"main.tex": main.replace(b"@", content)})
    assert text in found and f"inputenc says {option}: read as {encoding}" in notes


@pytest.mark.parametrize(
    "phrase", ["\\iffalse ", "\\begin{comment}", "\\ifx \\fi ", "\\newenvironment{a}{", "\\newminted"]
)
def test_repeated_commands_take_linear_time(phrase, tmp_path):
    start = time.process_time()
    text_of(tmp_path, {"main.tex": whole(phrase * (300_000 // len(phrase)))})
    assert time.process_time() - start < 20
