"""Isabelle: every import comes before its use, whatever way it is written, and what is missing is said."""

import pickle
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memorizing.data.corpora.isabelle import Isabelle, archive
from memorizing.data.corpora.isabelle_theories import Header, header, sessions
from memorizing.errors import InputError
from tests import shared_data


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def theory(name: str, *imports: str) -> str:
    return f"theory {name}\n  imports {' '.join(imports) or 'Main'}\nbegin\nlemma True ..\nend\n"


def read(raw: Path, **fields):
    corpus = Isabelle(**fields)
    return {item.id: next(corpus.read(item)) for item in corpus.list(raw)}


def order(text: str) -> list[str]:
    return re.findall(r"^\(\* (\S+\.thy) \*\)$", text, flags=re.MULTILINE)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("theory A imports Main begin end", Header("A", ("Main",))),
        ('theory "A-b"\nimports "HOL.M" "../C/D" E.F\nbegin', Header("A-b", ("HOL.M", "../C/D", "E.F"))),
        ("(* theory X (* nested *) imports Y *) theory A imports B begin", Header("A", ("B",))),
        ("section ‹theory X imports Y begin›\ntheory A imports B begin", Header("A", ("B",))),
        ("section \\<open>a \\<open>theory X\\<close> b\\<close>\ntheory A imports B begin", Header("A", ("B",))),
        ("header {* theory X imports Y *}\ntheory A imports B begin", Header("A", ("B",))),
        ('text "theory X"\ntheory A imports B (* C *) D keywords "imports" :: thy_decl begin', Header("A", ("B", "D"))),
        ("theory A begin", Header("A", ())),
        ("theory A imports B abbrevs \"x\" = \"y\" begin", Header("A", ("B",))),
        ("lemma x", None),
        ("(* never closed theory A imports B begin", None),
        ("", None),
    ],
)  # fmt: skip
def test_theory_headers_are_parsed(text, expected):
    assert header(text) == expected


@settings(deadline=None)
@given(st.text('abc (*)"\\<open>close‹›{}theory imports begin\n', max_size=60))
def test_no_text_breaks_the_parsers(text):
    header(text)
    sessions(text)


def test_root_files_are_parsed():
    text = """chapter AFP (* session No = X + theories Y *)
session "A-b" (AFP timing) in "src" = "HOL-Library" +
  description \\<open>session X = theories Z\\<close>
  options [timeout = 600, document = "pdf"]
  sessions "List-Index" Other
  directories "lib" "lib/deep"
  theories [document = false]
    One (global)
    "lib/Two"
  theories Three
  document_files (in "doc") "root.tex"
  export_files (in ".") [1] "*:**.hs"
session B = A +
  theories Four
"""
    one, other = sessions(text)
    assert (one.name, one.folders) == ("A-b", ("src", "src/lib", "src/lib/deep"))
    assert one.theories == ("One", "lib/Two", "Three") and one.global_theories == ("One",)
    assert (other.name, other.folders, other.theories) == ("B", (".",), ("Four",))


FORMS = {
    "thys/E/ROOT": 'session E = HOL +\n sessions F\n directories "sub" "deep/er"\n theories Last\n',
    "thys/E/Last.thy": theory("Last", "First", "Far", '"sub/Inner"', "Near"),
    "thys/E/First.thy": theory("First", '"F.Lemmas"', "F.Other", '"HOL-Library.Multiset"'),
    "thys/E/Near.thy": theory("Near", "Main"),
    "thys/E/sub/Inner.thy": theory("Inner", '"../Near"', '"../../F/Other"'),
    "thys/E/deep/er/Far.thy": theory("Far", "Inner"),
    "thys/E/Unlisted.thy": theory("Unlisted", "Last"),
    "thys/F/ROOT": "session F = HOL +\n theories Lemmas\n",
    "thys/F/Lemmas.thy": theory("Lemmas", "Other"),
    "thys/F/Other.thy": theory("Other"),
    "thys/F/Near.thy": theory("Near"),
}


def test_all_forms_of_imports_resolve_and_precede_their_use(tmp_path):
    reading = read(write(tmp_path, FORMS))["E"]
    found = order(reading.document.text)
    assert found == [f"E/{name}.thy" for name in ("First", "Near", "sub/Inner", "deep/er/Far", "Last", "Unlisted")]
    names = "HOL-Library.Multiset, Main"
    assert reading.problems == (("E", f"imports 2 theories of Isabelle that are not here: {names}"),)
    for name in found:
        assert f"(* {name} *)\n{FORMS['thys/' + name].rstrip()}\n\n" in reading.document.text


def test_imported_entries_can_come_first(tmp_path):
    reading = read(write(tmp_path, FORMS), imported_entries=True)["E"]
    found = order(reading.document.text)
    assert found[:2] == ["F/Other.thy", "F/Lemmas.thy"] and all(name.startswith("E/") for name in found[2:])
    assert len(found) == 8
    edges = archive(tmp_path).edges(found)
    assert len(edges) == 11 and all(found.index(imported) < found.index(by) for by, imported in edges)


def test_raw_can_be_the_archive_and_order_follows_the_root(tmp_path):
    files = {
        "E/ROOT": "session E = HOL + theories C A",
        "E/A.thy": theory("A"),
        "E/B.thy": theory("B"),
        "E/C.thy": theory("C"),
    }
    reading = read(write(tmp_path, files))["E"]
    assert order(reading.document.text) == ["E/C.thy", "E/A.thy", "E/B.thy"]


def test_missing_imports_are_noted(tmp_path):
    files = {
        "thys/E/ROOT": "session E = HOL + theories A Gone",
        "thys/E/A.thy": theory("A", "Nowhere", "No_Session.X", '"../x/Y"', "HOLCF"),
        "thys/E/bare.thy": "no header",
    }
    reading = read(write(tmp_path, files))["E"]
    assert [problem.message for problem in reading.problems] == [
        "lists Gone, which has no file",
        "imports Nowhere, which is not here",
        "imports No_Session.X, which is not here",
        "imports ../x/Y, which is not here",
        "it has no theory header, so its imports are unknown",
        "imports 1 theories of Isabelle that are not here: HOLCF",
    ]
    assert order(reading.document.text) == ["E/A.thy", "E/bare.thy"]


def test_cycles_are_noted_and_lose_no_theory(tmp_path):
    files = {
        f"thys/E/{name}.thy": theory(name, other) for name, other in (("A", "B"), ("B", "C"), ("C", "A"), ("D", "D"))
    }
    reading = read(write(tmp_path, files))["E"]
    assert sorted(order(reading.document.text)) == [f"E/{name}.thy" for name in "ABCD"]
    cycles = [problem.message for problem in reading.problems]
    assert cycles == [
        "imports in a cycle: E/A.thy > E/B.thy > E/C.thy > E/A.thy",
        "imports in a cycle: E/D.thy > E/D.thy",
    ]


def test_imported_entries_that_import_back_stay_in_order(tmp_path):
    files = {
        "thys/E/ROOT": "session E = HOL + theories B",
        "thys/E/A.thy": theory("A"),
        "thys/E/B.thy": theory("B", "G.Z", "G.Free"),
        "thys/G/ROOT": "session G = E + theories Z Free",
        "thys/G/Z.thy": theory("Z", "E.A"),
        "thys/G/Free.thy": theory("Free"),
    }
    reading = read(write(tmp_path, files), imported_entries=True)["E"]
    assert order(reading.document.text) == [f"{name}.thy" for name in ("G/Free", "E/A", "G/Z", "E/B")]


def test_a_long_chain_of_imports_is_followed(tmp_path):
    files = {f"thys/E/T{n}.thy": theory(f"T{n}", *([f"T{n + 1}"] if n < 2999 else [])) for n in range(3000)}
    reading = read(write(tmp_path, files))["E"]
    assert order(reading.document.text) == [f"E/T{n}.thy" for n in reversed(range(3000))]


def test_text_is_complete_to_the_last_character(tmp_path):
    texts = [theory("A") + " \t\n\n", theory("B", "A").rstrip()]
    raw = write(tmp_path, {"thys/E/A.thy": texts[0], "thys/E/B.thy": texts[1]})
    assert read(raw)["E"].document.text == f"(* E/A.thy *)\n{texts[0]}\n(* E/B.thy *)\n{texts[1]}\n\n"


def test_isabelle_hol_has_a_document_for_each_session(tmp_path):
    files = {
        "thys/E/A.thy": theory("A", "Main", '"HOL-Library.Multiset"'),
        "src/HOL/ROOT": "session HOL (main) = Pure +\n theories Main (global) Complex_Main (global)\n"
        'session "HOL-Library" (main) in Library = HOL +\n theories Multiset\n',
        "src/HOL/Main.thy": theory("Main", "Nat"),
        "src/HOL/Nat.thy": theory("Nat", "Pure"),
        "src/HOL/Complex_Main.thy": theory("Complex_Main", "Main"),
        "src/HOL/Library/Multiset.thy": theory("Multiset", "Main"),
    }
    found = read(write(tmp_path, files))
    assert list(found) == ["E", "HOL", "HOL-Library"]
    assert order(found["HOL"].document.text) == ["HOL/Nat.thy", "HOL/Main.thy", "HOL/Complex_Main.thy"]
    assert order(found["HOL-Library"].document.text) == ["HOL/Library/Multiset.thy"]
    assert not found["E"].problems  # everything that it imports is here
    whole = order(read(tmp_path, imported_entries=True)["E"].document.text)
    assert whole == ["HOL/Nat.thy", "HOL/Main.thy", "HOL/Library/Multiset.thy", "E/A.thy"]


def test_splits_licenses_odd_files_and_links(tmp_path):
    write(
        tmp_path,
        {"train/thys/E/A.thy": theory("A"), "test/thys/F/B.thy": theory("B", "E.A"), "train/thys/LICENSE": "x"},
    )
    (tmp_path / "test/thys/F/latin.thy").write_bytes(b"theory latin imports B begin (* \xe9 *) end")
    (tmp_path / "test/thys/F/nul.thy").write_bytes(b"theory nul\0")
    (tmp_path / "test/thys/F/loop.thy").symlink_to("loop.thy")
    (tmp_path / "test/thys/F/up").symlink_to(tmp_path / "test")
    corpus = Isabelle()
    items = corpus.list(tmp_path)
    assert [(item.id, item.split) for item in items] == [("E", "train"), ("F", "test")]
    assert pickle.loads(pickle.dumps((corpus, items))) == (corpus, items)
    one, other = (next(corpus.read(item)) for item in items)
    assert (one.document.license, other.document.license) == ("BSD-3-Clause", "")
    assert order(other.document.text) == ["F/B.thy", "F/latin.thy"] and "é" in other.document.text
    messages = " ".join(problem.message for problem in other.problems)
    assert "imports E.A, which is not here" in messages  # other splits are never looked at
    assert "left out: a NUL byte at offset 10" in messages and "read as ISO-8859-1" in messages
    with pytest.raises(InputError, match=r"has no \.thy files in thys/ENTRY"):
        corpus.list(tmp_path / "train" / "thys" / "E")


@pytest.mark.parametrize(
    ("marks", "license"),
    [
        (("", "License: BSD"), "BSD-3-Clause"),
        (("    License:    LGPL", ""), "BSD-3-Clause AND LGPL-2.1"),
        (("License: LGPL (see COPYING)", " * License:\tLGPL"), "LGPL-2.1"),
        (("License: LGPL or BSD", "is under the License: LGPL"), "BSD-3-Clause"),
    ],
)
def test_licenses_follow_the_marks_in_the_theories(tmp_path, marks, license):
    texts = {
        f"thys/E/{name}.thy": f"(* Title\n{mark}\n*)\n{theory(name)}" for name, mark in zip("AB", marks, strict=True)
    }
    assert read(write(tmp_path, {"thys/LICENSE": "all", **texts}))["E"].document.license == license


def test_two_distributions_are_refused(tmp_path):
    root = "session HOL = Pure + theories Main"
    write(tmp_path, {f"Isabelle202{n}/src/HOL/{name}": root for n in (4, 5) for name in ("ROOT", "Main.thy")})
    with pytest.raises(InputError, match=r"several distributions of Isabelle: .*Isabelle2024 and .*Isabelle2025"):
        Isabelle().list(tmp_path)


@pytest.mark.parametrize("name", ["import-cycle", "missing-import"])
def test_malformed_inputs(name):
    reading = read(shared_data.oddity(name).parent)[name]
    messages = [problem.message for problem in reading.problems]
    if name == "import-cycle":
        cycle = f"imports in a cycle: {name}/Cycle_A.thy > {name}/Cycle_B.thy > {name}/Cycle_A.thy"
        assert cycle in messages and len(order(reading.document.text)) == 2
    else:
        assert messages[:4] == [
            "lists Listed_But_Absent, which has no file",
            "imports No_Such_Theory, which is not here",
            "imports No_Such_Session.Absent, which is not here",
            "imports ../nowhere/Gone, which is not here",
        ]


def test_the_shared_corpus_has_no_import_after_its_use(tmp_path):
    raw = shared_data.unpacked_whole("isabelle", tmp_path)
    corpus, edges, of_entries, of_folders, of_isabelle, of_license = Isabelle(), 0, {}, {}, {}, {}
    items = corpus.list(raw)
    for item in items:
        (reading,) = corpus.read(item)
        found, its = order(reading.document.text), archive(Path(item.path))
        assert sorted(found) == sorted(its.entries[item.id].theories)
        for by, imported in its.edges(found):
            assert found.index(imported) < found.index(by), (by, imported)
            edges += 1
        for path in found:
            for name, place in its.imports(path).items():
                of_entries[item.split] = of_entries.get(item.split, 0) + (place is not None and place not in found)
                of_folders[item.split] = of_folders.get(item.split, 0) + ("/" in name)
                of_isabelle[item.split] = of_isabelle.get(item.split, 0) + (place is None)
        of_license.setdefault(reading.document.license, []).append(item.id)
    assert len(items) == 100 and edges == 780
    assert {license: len(ids) for license, ids in of_license.items()} == {
        "BSD-3-Clause": 91,
        "LGPL-2.1": 6,
        "BSD-3-Clause AND LGPL-2.1": 3,
    }
    lgpl = {"Abstract-Rewriting", "Decreasing-Diagrams-II", "First_Order_Terms", "Matrix", "Diophantine_Eqns_Lin_Hom"}
    assert lgpl.isdisjoint(of_license["BSD-3-Clause"])  # what the corpus's own description names
    assert of_entries == {"train": 92, "validation": 2, "test": 2}
    assert of_folders == {"train": 53, "validation": 2, "test": 0}
    assert of_isabelle == {"train": 274, "validation": 33, "test": 13}
    whole = Isabelle(imported_entries=True)
    for item in whole.list(raw):
        (reading,) = whole.read(item)
        found, its = order(reading.document.text), archive(Path(item.path))
        assert all(found.index(imported) < found.index(by) for by, imported in its.edges(found))
        assert all(place in found for path in found for place in its.imports(path).values() if place)


@pytest.mark.parametrize(
    "imports",
    [
        r"A \<comment> \<open>see Manual.Chapter and B\<close> Main",
        "A ― ‹not B› Main",
        r"A \<^cancel>\<open>B\<close> Main (* nor C *)",
    ],
)
def test_formal_comments_in_headers_import_nothing(imports):
    found = header(f"theory T\nimports {imports}\nbegin\n")
    assert found is not None and found.imports == ("A", "Main")


def test_paths_that_isabelle_expands_are_resolved(tmp_path):
    theory = "theory {0}\nimports {1}\nbegin\nend\n".format
    write(tmp_path, {
        "src/HOL/ROOT": "session HOL =\n  directories \"Library\"\n  theories \"Library/Multiset\"\n",
        "src/HOL/Library/Multiset.thy": theory("Multiset", ""),
        "thys/Alpha/Part.thy": theory("Part", ""),
        "thys/Beta/B.thy": theory("B", '"~~/src/HOL/Library/Multiset" "$AFP/Alpha/Part" "$AFP/Alpha/None"'),
    })  # fmt: skip
    index = archive(tmp_path)
    assert index.imports("Beta/B.thy") == {
        "~~/src/HOL/Library/Multiset": "HOL/Library/Multiset.thy", "$AFP/Alpha/Part": "Alpha/Part.thy",
        "$AFP/Alpha/None": None,
    }  # fmt: skip
