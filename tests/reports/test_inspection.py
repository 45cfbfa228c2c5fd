"""`memorizing inspect` and its page in a browser: the contexts shown are those of the document."""

import dataclasses
import functools
import json
from pathlib import Path

import numpy as np
import pytest
from selenium.webdriver.common.by import By

from memorizing.cli import main
from memorizing.data.tokens import PreparedTokens
from memorizing.data.vocabulary import ByteVocabulary
from memorizing.evaluation.lookups import NOWHERE
from memorizing.evaluation.perplexity import TrainedModel
from memorizing.memory.settings import MemorySettings
from memorizing.model.transformer import create_model
from memorizing.reports.inspection import Inspection, ShownRange, inspect_document
from memorizing.reports.inspection_page import write_inspection
from tests.browser import assert_sound, by_id, choose, open_browser, show
from tests.evaluation.test_lookups import MODEL
from tests.tiny_run import TEXTS, prepare_and_train

TEXT = "".join(f"line {n} of ünï </script><script>alert({n})</script> <b>&amp;\n\n\tend\n" for n in range(12))
MEMORY = MemorySettings(size=256, neighbors=4, dtype="float32", search="exact")


@functools.cache
def inspected() -> Inspection:
    """An untrained model's inspection. Every 50th token gains 1 nat and the next one loses 1, by hand."""
    tokens = ByteVocabulary().encode(TEXT)
    parameters = create_model(MODEL, MEMORY, seed=3)[1]
    trained, shown = TrainedModel(MODEL, MEMORY, 16, parameters), ShownRange(100, 300, 3)
    read = inspect_document(trained, "<b>hostile</b>", tokens, ByteVocabulary(), shown)
    places = np.arange(len(tokens))
    return dataclasses.replace(read, without_T=read.nats_T + (places % 50 == 0) - (places % 50 == 1).astype(np.float32))


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("inspect") / "page.html"
    write_inspection(inspected(), out, {"run": "a <i>run</i>", "step": 7, "memory_size": 256}, say=lambda text: None)
    return out


@pytest.fixture(scope="module")
def browser():
    with open_browser() as browser:
        yield browser


def panel(browser) -> str:
    return by_id(browser, "panel").text


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_renders_and_fits(browser, page, width, theme):
    show(browser, page.with_name("page.html"), width, theme)
    assert_sound(browser)
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    shown = browser.execute_script("return document.getElementById('text').textContent")
    assert shown == TEXT
    assert "<b>hostile</b>" in browser.find_element(By.TAG_NAME, "h1").text
    assert len(browser.find_elements(By.CSS_SELECTOR, "#figures h2")) == 5


@pytest.mark.parametrize("place", [100, 137, 250, 399])
def test_each_context_is_the_text_around_the_retrieved_token(browser, page, place):
    show(browser, page)
    inspection = inspected()
    browser.execute_script(f"document.querySelector('[data-place=\"{place}\"]').click()")
    shown = browser.execute_script(
        "return [...document.querySelectorAll('#panel .head')].map((head) => [head.dataset.head,"
        "[...head.querySelectorAll('li')].map((it) => [Number(it.querySelector('[data-jump]').dataset.jump),"
        "...['.context', 'mark', 'small'].map((part) => it.querySelector(part).textContent)])])"
    )  # fmt: skip
    assert sorted(name for name, _ in shown) == ["0.0", "0.1"]
    for name, found in shown:
        head = int(name[-1])
        places = inspection.shown.places_TLHK[place - 100, 0, head]
        assert [at for at, *_ in found] == [at for at in places if at != NOWHERE]
        for rank, (at, context, mark, details) in enumerate(found):
            if at < 0:
                continue
            plain = mark.replace("\u21b5\n", "\n").replace("\u21e5\t", "\t")
            assert plain == (inspection.texts[at] or "\u00b7")
            around = "".join(inspection.texts[max(0, at - 12) : at + 13])
            assert context.replace(mark, inspection.texts[at], 1).strip() in around
            weight = inspection.shown.weights_TLHK[place - 100, 0, head, rank]
            assert details.startswith(f"{place - at:,} tokens back") and f"weight {weight:.3f}" in details
    assert f"{inspection.nats_T[place]:.2f} nats with memory" in panel(browser)


def test_controls_change_colors_selection_and_heads(browser, page):
    show(browser, page)
    choose(browser, "scale", "2")
    colored = (
        "return [...document.querySelectorAll('[data-place]')].filter((it) => it.style.background)"
        ".map((it) => Number(it.dataset.place))"
    )
    places = browser.execute_script(colored)
    assert places == [place for place in range(len(inspected().texts)) if place % 50 < 2]
    by_id(browser, "next-gained").click()
    assert "at 100" in panel(browser) and "+1.00 gained" in panel(browser)
    by_id(browser, "next-gained").click()
    assert "at 150" in panel(browser)
    by_id(browser, "next-lost").click()
    assert "at 151" in panel(browser) and "-1.00 gained" in panel(browser)
    choose(browser, "head", "0.1")
    assert [it.get_attribute("data-head") for it in browser.find_elements(By.CSS_SELECTOR, "#panel .head")] == ["0.1"]
    choose(browser, "color", "none")
    assert browser.execute_script(colored) == []
    assert_sound(browser)


def test_jumps_scroll_to_the_retrieved_token_and_arrow_keys_change_the_selection(browser, page):
    show(browser, page)
    browser.execute_script("document.querySelector('[data-place=\"399\"]').click()")
    jump = browser.find_element(By.CSS_SELECTOR, "#panel [data-jump]")
    at = int(jump.get_attribute("data-jump"))
    browser.execute_script("arguments[0].click()", jump)
    seen = browser.execute_script(
        f"const own = document.querySelector('[data-place=\"{at}\"]'), it = own.getBoundingClientRect();"
        "const box = document.getElementById('text').getBoundingClientRect();"
        "return own.className.includes('flash') && it.top >= box.top && it.bottom <= box.bottom"
    )
    assert seen
    by_id(browser, "text").send_keys("\ue012")  # left
    assert "at 398" in panel(browser)
    browser.execute_script("document.querySelector('[data-place=\"3\"]').click()")
    assert "Lookups are shown for tokens 100 to 399" in panel(browser)


def test_the_page_opens_at_the_token_in_its_address(browser, page):
    show(browser, page)
    browser.get(page.as_uri() + "#333")
    browser.refresh()
    assert "at 333" in panel(browser)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return prepare_and_train(tmp_path_factory.mktemp("run"))


def test_the_command_reads_a_document_of_the_split_or_a_file(run, tmp_path, capsys):
    assert main(["evaluate", f"--workdir={run}", "--per_token"]) == 0
    arrays = np.load(run / "evaluations" / "test-memory-64.npz")
    names = [line.split(",")[0] for line in (run / "evaluations" / "test-memory-64.csv").read_text().splitlines()[1:]]
    assert main(["inspect", f"--workdir={run}", f"--document={names[1]}"]) == 0
    lines = [json.loads(line) for line in (run / "inspect" / f"{names[1]}-memory-64.jsonl").read_text().splitlines()]
    assert "".join(line["text"] for line in lines) == TEXTS[names[1]]
    evaluated = arrays["nats"][arrays["ends"][0] : arrays["ends"][1]]
    np.testing.assert_allclose([line["nats"] for line in lines], evaluated, rtol=1e-4, atol=1e-4)
    (tmp_path / "some.txt").write_text(TEXTS[names[1]])
    out = tmp_path / "page.html"
    assert main(["inspect", f"--workdir={run}", f"--document={tmp_path / 'some.txt'}", f"--out={out}"]) == 0
    assert (tmp_path / "page.jsonl").read_text() == (run / "inspect" / f"{names[1]}-memory-64.jsonl").read_text()
    assert "nats per token with memory" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--document=none"], ["--document=none", "is not a document of the test split", "nor a file"]),
        (["--document={name}", "--memory_size=0"], ["has no memory to inspect", "Memory.size = 0"]),
        (["--document={name}", "--first=100000"], ["--first=100000", "from 0 to"]),
        (["--document={name}", "--top=0"], ["--top=0", "at least 1"]),
        (["--document={name}", "--out={name}"], ["--out=", "not a page of `memorizing inspect`"]),
        (["--document={name}", "--out=lines.html"], ["--out=lines.html", "would replace lines.jsonl"]),
        (["--document={name}", "--out=new.jsonl"], ["--out=new.jsonl", "Call it new.html"]),
    ],
)
def test_unusable_arguments_are_rejected(run, arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("lines.jsonl").write_text("someone's own")
    name = PreparedTokens(run.parent / "data").split("test").names()[0]
    Path(name).write_text("someone's own")
    assert main(["inspect", f"--workdir={run}", *(each.format(name=name) for each in arguments)]) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words), message
    assert Path(name).read_text() == Path("lines.jsonl").read_text() == "someone's own"
    assert not Path("new.jsonl").exists()
