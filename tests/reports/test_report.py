"""Report pages in Chromium, opened from the disk without a network."""

import csv
import itertools
import json
import math
import re

import pytest
from selenium.webdriver.common.by import By

from memorizing.cli import main
from memorizing.errors import InputError
from memorizing.reports.pages import embedded, page, script
from memorizing.reports.report import MOST_LINES, columns, gather_run, gather_sweep, read_settings, report_run
from memorizing.training.hardware import HARDWARE_FILE, Sessions
from tests.browser import assert_sound, by_id, chart, choose, open_browser, rows, show
from tests.tiny_run import prepare_and_train

HOSTILE = "<script>alert(1)</script></script><b>&amp;%{x}"
SECTIONS = ["training", "memory", "evaluations", "documents", "hardware", "configuration"]
PLACES = (0, 128, 256, 512)
GAIN = {0: None, 512: 0.225, 2048: 0.29}


def figures(memory: int, xl_cache: bool, scale: float = 1.0) -> dict:
    """Returns figures in the form that `evaluate` writes, with made-up numbers."""
    perplexity = scale * (17.0123 + 5 * (memory == 0) + 4 * (not xl_cache))
    made = {
        "perplexity": perplexity, "perplexity_interval": [perplexity - 2, perplexity + 3],
        "bits_per_byte": math.log2(perplexity) / 3, "accuracy": 0.41, "tokens": 4321, "bytes": 10_000, "documents": 3,
        "perplexity_by_position": [{"first_token": first, "tokens": 9, "perplexity": perplexity + 128 / (first + 64)}
                                   for first in PLACES],
        "corpus": HOSTILE, "split": "test", "memory_size": memory, "xl_cache": xl_cache, "name": "", "seconds": 2.0,
        "segment_length": 128, "search": "native", "checkpoint_step": 80,
    }  # fmt: skip
    if gain := GAIN[memory]:
        made["gain"] = {
            "against_memory_size": 0, "nats_per_token": gain, "interval": [gain - 0.1, gain + 0.1],
            "by_position": [{"first_token": first, "nats_per_token": gain * first / 512} for first in PLACES],
        }  # fmt: skip
    return made


def metrics(count: int) -> list[dict]:
    return [
        {"step": 8 * i, "loss": 2 + 6 / i, "accuracy": i / 100, "gradient_norm": 1 / i, "learning_rate": 1e-3,
         "tokens_per_second": 1000.0 + i, "model_flops_utilization": 0.1, "memory_fill": min(i / 5, 1),
         "recall/layer_2": 0.9, "gates/layer_2/head_0": 0.3, "gates/layer_2/head_1": 0.3 + i / 100,
         "gate_value/layer_3/head_0": 0.5 + i / 100}
        for i in range(1, count + 1)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A workdir without a model: settings, metrics with a truncated last line, and six evaluations."""
    workdir = tmp_path_factory.mktemp("report") / "a run & <more>"
    (workdir / "evaluations").mkdir(parents=True)
    (workdir / "config.gin").write_text(
        "# Every setting\n\nMEMORY_SIZE = 2048\nModel.layers = 2\nModel.embedding_size = 64\n"
        "Model.memory_layers = (2,)\nModel.xl_cache = True\nMemory.size = %MEMORY_SIZE\n"
        "Batch.size = 8\nBatch.segment_length = 128\n"
        f"Training.steps = 100\nTraining.data = '{HOSTILE}'\n"
    )
    text = "".join(json.dumps(line) + "\n" for line in metrics(10))
    (workdir / "metrics.jsonl").write_text(text + '{"step": 88, "lo')
    for memory, xl_cache in itertools.product(GAIN, (True, False)):
        path = workdir / "evaluations" / f"test-memory-{memory}{'' if xl_cache else '-no-xl'}.json"
        path.write_text(json.dumps(figures(memory, xl_cache)))
        with path.with_suffix(".csv").open("w") as file:
            writer = csv.writer(file)
            names = "name,tokens,bytes,words,nats,correct,found,wanted,gain,perplexity,bits_per_byte"
            writer.writerow(names.split(","))
            for name, tokens, perplexity in (("short", 100, 30.5), (HOSTILE, 2000, 20.25), ("long", 9000, 10.125)):
                nats = tokens * math.log(perplexity)
                row = (name, tokens, 3 * tokens, 9, nats, 5, 0, 0, (memory > 0) * tokens * 0.125, perplexity, 1.5)
                writer.writerow(row)
    (workdir / "evaluations" / "broken.json").write_text("{")
    report_run(workdir, None, say=lambda line: None)
    return workdir


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """A sweep over two memory sizes and two seeds; one point failed and one is waiting."""
    folder = tmp_path_factory.mktemp("sweep")
    points = []
    for memory, seed in itertools.product((0, 512), (0, 1)):
        failed, waiting = (memory, seed) == (512, 1), (memory, seed) == (0, 1)
        loss = [{"step": step, "loss": 5 - step / 100 + seed} for step in (8, 16, 24)]
        points.append({
            "name": f"memory {memory} seed {seed}", "values": {"MEMORY_SIZE": memory}, "seed": seed,
            "workdir": f"points/m{memory}#{seed}", "status": "failed" if failed else "waiting" if waiting else "done",
            "error": HOSTILE if failed else None, "seconds": {"train": 3.0, "evaluate": None},
            "evaluations": [] if failed else [figures(size, True, 1 + seed / 10) for size in sorted({0, memory})],
            "training": [] if failed else loss,
        })  # fmt: skip
    (folder / "points" / "m512#0").mkdir(parents=True)
    (folder / "points" / "m512#0" / "report.html").write_text("a report")
    content = {"over": {"MEMORY_SIZE": [0, 512]}, "seeds": [0, 1], "arguments": ["--over", HOSTILE], "points": points}
    (folder / "sweep.json").write_text(json.dumps({**content, "settings": "Memory.size = 0\n"}))
    assert main(["report", f"--sweep={folder}"]) == 0
    return folder


@pytest.fixture(scope="module")
def browser():
    with open_browser() as browser:
        yield browser


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_pages_show_all_sections_and_fit_every_screen(browser, run, sweep, width, theme):
    for path, sections in ((run, SECTIONS), (sweep, ["results", "curves", "points", "configuration"])):
        show(browser, path / "report.html", width, theme)
        assert_sound(browser)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        for section in sections:
            assert by_id(browser, section).is_displayed(), section
        charts = browser.find_elements(By.CSS_SELECTOR, ".chart")
        assert len(charts) > 2 and all(each.find_elements(By.CSS_SELECTOR, "svg .xaxislayer-above") for each in charts)
        assert browser.execute_script("return document.documentElement.dataset.theme") == theme


def test_the_page_of_a_run_shows_the_content_of_its_files(browser, run):
    show(browser, run / "report.html")
    lines = metrics(10)
    for name, key in (
        ("learning-rate", "learning_rate"),
        ("throughput", "tokens_per_second"),
        ("recall-2", "recall/layer_2"),
    ):
        assert chart(browser, f"{name}-chart", "data[0].x") == [line["step"] for line in lines]
        assert chart(browser, f"{name}-chart", "data[0].y") == [line[key] for line in lines]
    assert chart(browser, "loss-chart", "data[0].y") == [line["loss"] for line in lines]
    for head in (0, 1):
        values = [line[f"gates/layer_2/head_{head}"] for line in lines]
        assert chart(browser, "gates-2-chart", f"data[{head}].y") == values
    assert chart(browser, "gate_value-3-chart", "data[0].y") == [line["gate_value/layer_3/head_0"] for line in lines]
    shown = {(row[1], row[2]): row for row in rows(browser, "evaluations-table")}
    assert len(shown) == 6
    for memory, xl_cache in itertools.product(GAIN, (True, False)):
        expected, row = figures(memory, xl_cache), shown[f"{memory:,}", "yes" if xl_cache else "no"]
        assert row[0] == f"{HOSTILE} · test"
        assert row[3] == f"{expected['perplexity']:.3f}" and row[5] == f"{expected['bits_per_byte']:.4f}"
        assert row[4] == "[{:.3f}, {:.3f}]".format(*expected["perplexity_interval"])
        assert row[6] == (f"{GAIN[memory]:+.4f}" if memory else "–")
    by_size = chart(browser, "size-chart", "data.map((it) => it.y)")
    assert by_size == [[figures(size, xl)["perplexity"] for size in GAIN] for xl in (True, False)]
    documents = {row[0]: row for row in rows(browser, "documents-table")}
    assert documents[HOSTILE][1:] == ["2,000", "6,000", "20.250", "1.5000", "+0.1250"]
    browser.execute_script("Plotly.Fx.hover('documents-chart', [{ curveNumber: 0, pointNumber: 1 }])")
    assert HOSTILE in by_id(browser, "documents-chart").find_element(By.CSS_SELECTOR, ".hovertext").text
    text = by_id(browser, "main").text
    assert "a run & <more>" in text and HOSTILE in text and "80 of 100" in text and "broken.json" in text
    assert "no hardware.json" in text


def test_controls_of_a_run_change_its_charts_and_tables(browser, run):
    show(browser, run / "report.html")
    for control, name, axis in (
        ("log-steps", "loss-chart", "xaxis"), ("log-steps", "gates-2-chart", "xaxis"),
        ("log-loss", "loss-chart", "yaxis"), ("log-positions", "gain-chart", "xaxis"),
        ("log-perplexity", "position-chart", "yaxis"), ("log-tokens", "documents-chart", "xaxis"),
    ):  # fmt: skip
        seen = set()
        for value in (True, False):
            choose(browser, control, value)
            seen.add((value, chart(browser, name, f"_fullLayout.{axis}.type")))
        assert seen == {(True, "log"), (False, "linear")}, control

    losses = [line["loss"] for line in metrics(10)]
    choose(browser, "smoothing", "0.5")
    weights = [0.5 ** (10 - i) for i in range(1, 11)]
    mean = sum(w * loss for w, loss in zip(weights, losses, strict=True)) / sum(weights)
    assert chart(browser, "loss-chart", "data[1].y.at(-1)") == pytest.approx(mean)
    choose(browser, "smoothing", "0")
    choose(browser, "quantity", "perplexity")
    assert chart(browser, "loss-chart", "data.length") == 1
    assert chart(browser, "loss-chart", "data[0].y") == pytest.approx([math.exp(loss) for loss in losses])

    choose(browser, "xl", "without")
    expected = [[place["perplexity"] for place in figures(size, False)["perplexity_by_position"]] for size in GAIN]
    assert chart(browser, "position-chart", "data.map((it) => it.y)") == expected
    choose(browser, "evaluation", "0")  # the smallest memory, the baseline of gains
    assert chart(browser, "documents-chart", "data[0].y") == [30.5, 20.25, 10.125]

    by_id(browser, "settings").find_element(By.TAG_NAME, "summary").click()
    by_id(browser, "settings-search").send_keys("memory.size")
    assert rows(browser, "settings-table") == [["Memory.size", "2048"]]
    assert_sound(browser)


def test_tables_sort_by_a_column_and_mark_it(browser, run):
    show(browser, run / "report.html")
    head = by_id(browser, "evaluations-table").find_elements(By.CSS_SELECTOR, "thead th")[3]
    for order, sign in (("ascending", 1), ("descending", -1)):
        head.find_element(By.TAG_NAME, "button").send_keys("\ue007")  # Enter: by keyboard
        assert head.get_attribute("aria-sort") == order
        shown = [sign * float(row[3]) for row in rows(browser, "evaluations-table")]
        assert shown == sorted(shown)


def test_the_theme_follows_the_system_until_the_button_changes_it(browser, run):
    show(browser, run / "report.html")
    seen = []
    for theme in ("light", "dark", "light"):
        seen.append([
            chart(browser, "loss-chart", "layout.font.color"), chart(browser, "loss-chart", "data[0].line.color"),
            browser.execute_script("return getComputedStyle(document.body).backgroundColor"),
        ])  # fmt: skip
        assert browser.execute_script("return document.documentElement.dataset.theme") == theme
        by_id(browser, "theme").click()
    assert seen[0] == seen[2] and all(a != b for a, b in zip(seen[0], seen[1], strict=True))
    show(browser, run / "report.html", theme="dark")
    assert chart(browser, "loss-chart", "layout.font.color") == seen[1][0]


def test_the_page_of_a_sweep_shows_its_points(browser, sweep):
    show(browser, sweep / "report.html")
    points = {row[0]: row for row in rows(browser, "points-table")}
    assert [row[3] for row in points.values()] == ["done", "waiting", "done", "failed"]
    assert points["memory 512 seed 1"][-1] == HOSTILE
    (link,) = by_id(browser, "points-table").find_elements(By.TAG_NAME, "a")
    assert link.text == "memory 512 seed 0"
    assert link.get_attribute("href") == (sweep / "points" / "m512#0" / "report.html").as_uri()
    zero, seeds = figures(0, True)["perplexity"], [1.0, 1.1]
    results = {tuple(row[:3]): row for row in rows(browser, "results-table")}
    assert len(results) == 3
    low, high = (zero * each for each in seeds)
    assert results["0", "128", "0"][4] == f"{(low + high) / 2:.3f} [{low:.3f}, {high:.3f}]"
    assert results["512", "128", "512"][4] == f"{figures(512, True)['perplexity']:.3f}"
    # Lines: the band's edges, then the mean.
    expected = [[zero, figures(512, True)["perplexity"]], [high, figures(512, True)["perplexity"]]]
    assert chart(browser, "size-chart", "data.slice(0, 2).map((it) => it.y)") == [pytest.approx(it) for it in expected]
    choose(browser, "smoothing", "0")
    assert chart(browser, "training-chart", "data.map((it) => it.y.at(-1))") == pytest.approx([4.76, 5.76, 5.26, 4.76])
    choose(browser, "memories", "any")
    assert chart(browser, "size-chart", "data.filter((it) => it.name).at(-1).x") == ["0", "512"]
    assert_sound(browser)


def test_the_page_names_missing_metrics_evaluations_and_settings(browser, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    assert main(["report", f"--workdir={tmp_path}"]) == 0
    show(browser, tmp_path / "report.html")
    text = by_id(browser, "main").text
    for sentence in ("No metrics yet", "No evaluations yet", "No settings were found"):
        assert sentence in text
    assert_sound(browser)


def test_a_report_replaces_only_an_earlier_report(run, tmp_path):
    out = tmp_path / "page.html"
    for _ in range(2):
        assert main(["report", f"--workdir={run}", f"--out={out}"]) == 0
    out.write_text("<!doctype html> something of mine")
    with pytest.raises(InputError, match="not a page of `memorizing report`"):
        report_run(run, out)
    assert out.read_text().endswith("mine")
    for data in (gather_run, lambda folder: gather_sweep(folder, out)):
        with pytest.raises(InputError, match="is no"):
            data(tmp_path)


def test_data_cannot_end_its_script_element_and_titles_are_escaped():
    data = {"</script>": ["<!--<script>", "\u2028&lt;"]}
    assert json.loads(embedded(data)) == data and not re.search("[<>&]", embedded(data))
    with pytest.raises(ValueError):
        embedded([math.nan])
    assert "<b>" not in page("<b>", "", data=data)


def test_a_damaged_hardware_file_is_named(tmp_path):
    (tmp_path / HARDWARE_FILE).write_text("[{")
    with pytest.raises(InputError, match=f"{HARDWARE_FILE} is damaged .*Remove it"):
        Sessions(tmp_path, 0, {})


def test_many_lines_of_metrics_are_averaged():
    lines = [{"step": step, "loss": float(step), **({"late": 1.0} if step > 8000 else {})} for step in range(1, 9001)]
    shown = columns(lines)
    assert len(shown["step"]) <= MOST_LINES and shown["step"][-1] == 9000
    assert shown["loss"][:2] == [2.0, 5.0] and shown["late"][0] is None and shown["late"][-1] == 1.0


def test_settings_are_read_as_values_and_macros_are_resolved():
    text = "# words\nA = 3\nModel.x = %A\nModel.y = ('a', 'b')\nModel.z = @other()\nModel.w = %UNKNOWN\n"
    expected = {"A": 3, "Model.x": 3, "Model.y": ("a", "b"), "Model.z": "@other()", "Model.w": "%UNKNOWN"}
    assert read_settings(text) == expected


def contrast(one: str, other: str) -> float:
    """Returns the contrast ratio of two colors, by WCAG 2."""

    def luminance(color: str) -> float:
        parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1])
def test_colors_have_enough_contrast(theme):
    block = re.findall(r":root[^{]*\{(.*?)\}", script("page.css"), flags=re.DOTALL)[theme]
    colors = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block))
    assert contrast(colors["accent"], colors["on-accent"]) >= 4.5
    for name, color in colors.items():
        if name in ("text", "muted", "accent", "good", "bad", "warn"):
            assert all(contrast(color, colors[ground]) >= 4.5 for ground in ("surface", "panel", "raised")), name
        if re.match("series|ramp|baseline", name):
            assert contrast(color, colors["panel"]) >= 3 or name == "ramp-low", name


def test_the_page_shows_the_hardware_of_each_training_session(tmp_path):
    workdir = prepare_and_train(tmp_path, "NUM_STEPS = 8")
    again = [f"--gin_file={tmp_path / 'settings.gin'}", f"--gin_param=DATA = '{tmp_path / 'data'}'"]
    assert main(["train", *again, "--gin_param=NUM_STEPS = 16", f"--workdir={workdir}"]) == 0
    first, second = gather_run(workdir)["hardware"]
    assert (first["from_step"], first["to_step"], second["from_step"], second["to_step"]) == (0, 8, 8, 16)
    assert first["device_kind"] == "cpu" and first["started"] <= first["until"] <= second["started"]
    assert main(["evaluate", f"--workdir={workdir}", "--memory_size=0,64"]) == 0
    gathered = gather_run(workdir)
    for each in gathered["evaluations"]:
        written = json.loads((workdir / "evaluations" / each["file"]).read_text())
        assert each["figures"] == written and len(each["documents"]) == written["documents"]
        assert sum(row["nats"] for row in each["documents"]) / written["tokens"] == pytest.approx(
            written["loss_nats_per_token"]
        )
    assert gathered["training"]["step"] == [4, 8, 12, 16] and gathered["notices"] == []
