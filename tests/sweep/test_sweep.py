"""Sweeps without running any: what is read, which points follow, what is refused, the table, the plots and the jobs."""

import csv
import json
import os
import shlex
import statistics
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memorizing.cli import main
from memorizing.errors import InputError
from memorizing.sweep import plots, published, table
from memorizing.sweep.grid import combinations, parse_axis, split_values
from memorizing.sweep.records import merged, point_record
from tests.tiny_run import SETTINGS, TEXTS, write_texts

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Settings, and tokens of two corpora."""
    place = tmp_path_factory.mktemp("sweep")
    (place / "settings.gin").write_text(SETTINGS)
    for name, texts in (("one", TEXTS), ("other", {name: text.upper() for name, text in TEXTS.items()})):
        raw = write_texts(place / f"{name}_raw", texts)
        assert main(["prepare", f"--gin_file={place / 'settings.gin'}", f"--raw={raw}", f"--out={place / name}"]) == 0
    return place


def sweep(place: Path, out: Path | str, *arguments: str) -> int:
    given = [f"--gin_file={place / 'settings.gin'}", f"--gin_param=Training.data = '{place / 'one'}'"]
    return main(["sweep", f"--out={out}", *given, *arguments])


@pytest.mark.parametrize(
    ("text", "gin"),
    [
        ("MEMORY_SIZE=0,512,65_536", ["0", "512", "65536"]),
        ("Model.memory_layers=(1,),(1, 2)", ["(1,)", "(1, 2)"]),
        ("Memory.search=exact,'native'", ["'exact'", "'native'"]),
        ("Optimizer.learning_rate=1e-3, 0.5", ["0.001", "0.5"]),
        ("Model.xl_cache=True,False", ["True", "False"]),
        ("Memory.size=%MEMORY_SIZE", ["%MEMORY_SIZE"]),
        ("Prepare.source='a,b',\"c\"", ["'a,b'", "'c'"]),
    ],
)
def test_values_become_gin_literals(text, gin):
    axis = parse_axis(text)
    assert axis.name == text.partition("=")[0]
    assert [value.gin for value in axis.values] == gin


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("MEMORY_SIZE", ["NAME=VALUE"]),
        ("MEMORY_SIZE=", ["a value is empty"]),
        ("MEMORY_SIZE=1,,2", ["a value is empty"]),
        ("MEMORY_SIZE=1,1", ["1 appears twice"]),
        ("Model.memory_layers=(1,2", ["not closed"]),
        ("Model.xl_cache=true", ["true", "not a gin value"]),
        ("MEMORY_SIZE=8 k", ["8 k", "not a gin value"]),
        ("SEED=0,1", ["--seeds"]),
    ],
)
def test_invalid_axes_are_refused(text, words):
    with pytest.raises(InputError) as caught:
        parse_axis(text)
    for word in words:
        assert word in str(caught.value)


literals = st.recursive(
    st.integers() | st.booleans() | st.text("ab,()[]'\" ", max_size=5),
    lambda inner: st.lists(inner, max_size=3).map(tuple),
    max_leaves=5,
)


@given(st.lists(literals, min_size=1, max_size=4))
def test_commas_divide_outside_brackets_and_quotes_only(values):
    assert [part.strip() for part in split_values(", ".join(map(repr, values)))] == [repr(value) for value in values]


def test_points_are_the_product_and_named_by_their_values():
    axes = [parse_axis("MEMORY_SIZE=0,512"), parse_axis("Model.memory_layers=(1,),(1, 2)")]
    points = combinations(axes, [3, 4])
    assert len(points) == 8 == len({point.name for point in points})
    assert points[3].name == "MEMORY_SIZE=0,Model.memory_layers=1_2,seed=4"
    assert points[3].bindings == ("MEMORY_SIZE = 0", "Model.memory_layers = (1, 2)")
    assert points[3].values == {"MEMORY_SIZE": 0, "Model.memory_layers": [1, 2]} and points[3].seed == 4
    assert all("/" not in point.name and " " not in point.name for point in points)


def test_datasets_are_named_as_given_or_by_their_source(place):
    (unnamed,) = parse_axis(f"DATA={place / 'one'}").values
    assert (unnamed.shown, unnamed.gin) == ("folder", repr(str(place / "one")))
    first, second = combinations([parse_axis(f"DATA=a={place / 'one'},b={place / 'other'}")], [0])
    assert (first.name, first.corpus, first.data) == ("DATA=a,seed=0", "a", str(place / "one"))
    assert (second.corpus, second.data, second.bindings) == ("b", str(place / "other"), ())
    with pytest.raises(InputError, match="give them names"):
        parse_axis(f"DATA={place / 'one'},{place / 'other'}")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--over=MEMORY_SIZE=0,100"], ["point MEMORY_SIZE=100,seed=0", "not a multiple of Batch.segment_length"]),
        (["--over=Model.layer=1,2"], ["no setting 'layer'"]),
        (["--over=MEMORY_SIZE=0", "--over=MEMORY_SIZE=16"], ["appears twice"]),
        (["--over=VOCABULARY_SIZE=259,100"], ["VOCABULARY_SIZE=100", "has 259 tokens"]),
        (["--over=DATA=/nowhere"], ["/nowhere", "no prepared tokens"]),
        (["--over=MEMORY_SIZE=0,64", "--split=tset"], ["point MEMORY_SIZE=0", "no split 'tset'"]),
        (["--over=MEMORY_SIZE=0", "--memory_size=0,24"], ["Memory.size = 24"]),
        (["--over=MEMORY_SIZE=0,64", "--gin_param=Memory.size = 32"], ["have the same settings"]),
        (["--seeds=0"], ["--seeds=0"]),
        (["--point=7", "--over=MEMORY_SIZE=0,64"], ["--point=7", "from 0 to 1", "MEMORY_SIZE=64,seed=0"]),
        (["--workdir=nowhere"], ["--workdir=nowhere holds no run"]),
        (["--collect"], ["holds no sweep"]),
        (["--write=xpk"], ["gs://"]),
    ],
)
def test_invalid_sweeps_are_refused_before_anything_runs(arguments, words, place, tmp_path, capsys):
    assert sweep(place, tmp_path / "out", *arguments) == 2
    message = capsys.readouterr().err
    for word in words:
        assert word in message
    assert not (tmp_path / "out").exists()


def test_a_sweep_leaves_the_devices_to_its_points(place):
    """Devices of accelerators serve one process only; here asking for any fails."""
    command = [sys.executable, "-m", "memorizing.cli", "sweep", f"--out={place / 'none'}", "--dry_run"]
    given = [f"--gin_file={place / 'settings.gin'}", f"--over=DATA={place / 'one'}", "--memory_size=0,64"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "abacus"}
    done = subprocess.run([*command, *given], env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_a_dry_run_prints_the_commands_and_makes_nothing(place, tmp_path, capsys):
    assert sweep(place, tmp_path / "out", "--over=MEMORY_SIZE=0,64", "--seeds=2", "--dry_run", "--xl_cache=both") == 0
    commands = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert [command[1] for command in commands] == ["train", "evaluate"] * 4
    workdirs = [word for command in commands for word in command if word.startswith("--workdir")]
    assert workdirs[2] == workdirs[3] == f"--workdir={tmp_path}/out/points/MEMORY_SIZE=0,seed=1"
    assert "--gin_param=Training.seed = 1" in commands[2] and "--xl_cache=both" in commands[3]
    assert not (tmp_path / "out").exists()


def reading(corpus: str, memory: int, perplexity: float | None, context: int = 512, **more) -> dict:
    return {
        "corpus": corpus, "split": "test", "segment_length": context, "memory_size": memory, "xl_cache": True,
        "perplexity": perplexity, "bits_per_byte": 1.5, "checkpoint_step": 8,
        "perplexity_by_position": [{"first_token": 0, "perplexity": 9.0}, {"first_token": 128, "perplexity": 5.0}],
    } | more  # fmt: skip


def point(seed: int, *evaluation_arguments: dict, status: str = "done", **values) -> dict:
    return {
        "name": f"{values},{seed}", "values": values, "seed": seed, "workdir": "w", "steps": 8, "status": status,
        "error": None if status == "done" else "train ended with status 2", "planned": list(evaluation_arguments),
        "evaluations": [each for each in evaluation_arguments if each["perplexity"] is not None],
        "training": [{"step": 4, "loss": 1.0}, {"step": 8, "loss": 0.5}],
    }  # fmt: skip


RESULTS = {
    "over": {"DATA": ["arxiv", "mine"], "MEMORY_SIZE": [0, 8192]},
    "seeds": [0, 1],
    "points": [
        point(0, reading("arxiv", 0, 4.0), DATA="arxiv", MEMORY_SIZE=0),
        point(1, reading("arxiv", 0, 6.0), DATA="arxiv", MEMORY_SIZE=0),
        point(0, reading("arxiv", 8192, 3.0), DATA="arxiv", MEMORY_SIZE=8192),
        point(1, reading("arxiv", 8192, None), status="failed", DATA="arxiv", MEMORY_SIZE=8192),
        point(0, reading("mine", 0, 7.0), DATA="mine", MEMORY_SIZE=0),
        point(1, reading("mine", 0, 7.5), DATA="mine", MEMORY_SIZE=0),
        point(0, reading("mine", 8192, None), status="failed", DATA="mine", MEMORY_SIZE=8192),
        point(1, reading("mine", 8192, None), status="failed", DATA="mine", MEMORY_SIZE=8192),
    ],
}


def test_the_table_has_the_layout_of_the_papers(tmp_path):
    shown = table.lines(table.make_table(RESULTS))
    assert shown == [
        ["context", "memory", "XL cache", "arxiv", "arxiv, paper", "mine"],
        ["512", "none", "512", f"5.000 ± {statistics.stdev([4, 6]):.3f}", "2.67", "7.250 ± 0.354"],
        ["512", "8,192", "512", "3.000 (1 failed)", "2.37", "failed"],
    ]
    told = table.write_table(RESULTS, tmp_path)
    assert any("Published, of another model and vocabulary" in line for line in told)
    with (tmp_path / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["corpus"], row["perplexity"], row["failed"], row["paper"]) for row in rows] == [
        ("arxiv", "5.0", "0", "2.67"), ("mine", "7.25", "0", ""),
        ("arxiv", "3.0", "1", "2.37"), ("mine", "", "2", ""),
    ]  # fmt: skip
    markdown = (tmp_path / "table.md").read_text()
    assert markdown.count("|---|---|---|") == 2 and "train ended with status 2" in markdown


def test_settings_outside_the_papers_columns_get_columns():
    points = [
        point(0, reading("a", 0, 4.0), reading("a", 64, 3.0), MEMORY_SIZE=size, **{"Model.layers": layers})
        for size in (0, 64)
        for layers in (2, 3)
    ]
    made = table.make_table({"over": {"MEMORY_SIZE": [0, 64], "Model.layers": [2, 3]}, "points": points})
    # trained with one memory and evaluated at both, so that the column `memory` does not tell which
    assert made.others == ("MEMORY_SIZE", "Model.layers") and len(made.cells) == 8
    points = [point(0, reading("a", size, 4.0), MEMORY_SIZE=size) for size in (0, 64)]
    assert table.make_table({"over": {"MEMORY_SIZE": [0, 64]}, "points": points}).others == ()


def test_published_figures_stand_only_beside_rows_and_names_of_the_paper():
    assert len(published.MAIN_TABLE) == 10
    row = table.TableRow(512, 65536, True, ())
    assert table.published(row, "github") == 1.87 and table.published(row, "mine") is None
    assert table.published(row._replace(context=128), "github") is None
    small = [point(0, reading("c4", 0, 4.0, context=128), MEMORY_SIZE=0)]
    made = table.make_table({"over": {"MEMORY_SIZE": [0]}, "points": small})
    assert table.lines(made)[0] == ["context", "memory", "XL cache", "c4"]
    assert [line[-1] for line in table.paper_lines(made)][:3] == ["c4", "17.20", "14.81"]
    mine = [point(0, reading("mine", 0, 4.0), MEMORY_SIZE=0)]
    assert not table.paper_lines(table.make_table({"over": {"MEMORY_SIZE": [0]}, "points": mine}))


def test_curves_are_means_over_seeds(tmp_path):
    made = table.make_table(RESULTS)
    by_size = plots.sizes(made)
    assert by_size["arxiv"].at == [0, 8192] and by_size["arxiv"].mean == [5.0, 3.0]
    assert by_size["mine"].at == [0] and by_size["mine"].spread == [pytest.approx(statistics.stdev([7, 7.5]))]
    by_position = plots.positions(RESULTS, made)[("arxiv", "test"), 0, ""]
    assert (by_position.at, by_position.mean) == ([0, 128], [9.0, 5.0])
    in_training = plots.trainings(RESULTS, made)[("mine", "test"), 8192, ""]
    assert in_training.at == [4, 8] and in_training.mean == pytest.approx([2.718281828, 1.6487212707])
    plots.draw(RESULTS, tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").stat().st_size > 10_000


def test_a_larger_grid_adds_points_and_another_kind_of_sweep_is_refused(tmp_path):
    def grid(*sizes: int) -> dict:
        points = [{"name": f"MEMORY_SIZE={size}"} for size in sizes]
        return {"over": {"MEMORY_SIZE": list(sizes)}, "seeds": [0], "run": None, "points": points}

    both = merged(grid(0, 64), grid(64, 128), tmp_path)
    assert [each["name"] for each in both["points"]] == ["MEMORY_SIZE=64", "MEMORY_SIZE=128", "MEMORY_SIZE=0"]
    assert both["over"] == {"MEMORY_SIZE": [0, 64, 128]}
    for other in ({"over": {"DATA": ["a"]}}, {"run": "runs/a"}):
        with pytest.raises(InputError, match="holds a sweep over MEMORY_SIZE"):
            merged(grid(0), grid(0) | other, tmp_path)


def test_a_point_whose_files_are_damaged_has_failed(tmp_path):
    described = point(0, DATA="a") | {"name": "a", "steps": None}
    described["workdir"] = str(tmp_path / "run")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert point_record(tmp_path, described)["status"] == "done"  # nothing was asked for
    (tmp_path / "run" / "evaluations").mkdir()
    (tmp_path / "run" / "evaluations" / "test-memory-0.json").write_text("{")
    found = point_record(tmp_path, described)
    assert found["status"] == "failed" and "test-memory-0.json is damaged" in found["error"]


@pytest.fixture
def trained(place, tmp_path) -> Path:
    """A sweep of one point with only the files that mark it as trained."""
    workdir = tmp_path / "out" / "points" / "seed=0"
    given = [f"--gin_file={place / 'settings.gin'}", f"--gin_param=Training.data = '{place / 'one'}'"]
    assert main(["train", *given, f"--workdir={workdir}"]) == 0
    return tmp_path / "out"


@pytest.mark.parametrize("binding", ["Optimizer.learning_rate = 0.5", "MEMORY_SIZE = 32", "NUM_STEPS = 4"])
def test_a_run_with_other_settings_is_not_taken_for_a_point(place, trained, binding, capsys):
    assert sweep(place, trained, "--dry_run") == 0
    assert sweep(place, trained, "--dry_run", "--gin_param=NUM_STEPS = 16") == 0  # it goes on
    assert sweep(place, trained, "--dry_run", f"--gin_param={binding}") == 2
    message = capsys.readouterr().err
    assert binding.partition(" = ")[2] in message and "was trained with" in message and "another --out" in message


def test_evaluation_settings_may_change_after_points_are_trained(place, trained, capsys):
    evaluation = ["--gin_param=Evaluation.split = 'validation'", "--gin_param=Evaluation.batch_size = 16"]
    assert sweep(place, trained, "--dry_run", *evaluation) == 0
    _, evaluate = map(shlex.split, capsys.readouterr().out.splitlines())
    assert main(evaluate[1:]) == 0
    assert [path.name for path in (trained / "points" / "seed=0" / "evaluations").glob("*.json")] == [
        "validation-memory-64.json"
    ]


def test_an_evaluation_under_two_names_counts_once(tmp_path):
    figures = reading("c4", 0, 10.0) | {"checkpoint_step": 0}
    described = point(0) | {"steps": None, "workdir": str(tmp_path / "run")}
    described["planned"] = [{"corpus": "c4", "split": "test", "memory_size": size} for size in (0, 64)]
    (tmp_path / "run" / "evaluations").mkdir(parents=True)
    for name in ("test-memory-0.json", "c4-test-memory-0.json"):
        (tmp_path / "run" / "evaluations" / name).write_text(json.dumps(figures))
    found = point_record(tmp_path, described | {"name": "a"})
    assert found["status"] == "waiting" and found["evaluations"] == [figures]


def checked(script: Path) -> None:
    """Returns True if shellcheck finds nothing."""
    shellcheck = Path(sysconfig.get_path("scripts")) / "shellcheck"
    done = subprocess.run([shellcheck, "-x", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout


def test_the_slurm_array_runs_each_point_of_the_same_sweep(place, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments = ["--over=MEMORY_SIZE=0,64", "--over=Model.layers=2,3", "--seeds=2", "--memory_size=0,64"]
    assert sweep(place, tmp_path / "a sweep", *arguments, "--write=slurm") == 0
    script = tmp_path / "a sweep" / "slurm.sbatch"
    checked(script)
    text = script.read_text()
    for option in ("--array=0-7", "--requeue", "--signal=B:TERM@120", "--open-mode=append", "--job-name=a-sweep"):
        assert f"\n#SBATCH {option}\n" in text[: text.index("set -euo pipefail")]
    variables = {"PATH": os.environ["PATH"], "SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "5"}
    done = subprocess.run(
        ["bash", script, "--dry_run"], env=variables, cwd="/", capture_output=True, text=True, timeout=60, check=True
    )
    run, tell, requeue = map(shlex.split, done.stdout.splitlines())
    assert run[:2] == ["memorizing", "sweep"] and set(arguments) <= set(run)
    assert f"--out={tmp_path / 'a sweep'}" in run and f"--gin_file={place / 'settings.gin'}" in run
    assert run[-2:] == ["--point=5", "--launcher=srun --kill-on-bad-exit=0 --wait=120"]
    # the task by its own number: that of its job may be the whole array's
    assert (tell[-1], requeue[-1]) == ("17_5", "17_5")
    waiting = json.loads((tmp_path / "a sweep" / "sweep.json").read_text())["points"]
    assert len(waiting) == 8 and {each["status"] for each in waiting} == {"waiting"}
    assert sweep(place, tmp_path / "a sweep", "--collect") == 0
    assert "waiting" in (tmp_path / "a sweep" / "table.md").read_text()
