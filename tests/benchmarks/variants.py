"""Measures variants of the memory: perplexity, recall task and step time, as a page of results.

    python tests/benchmarks/variants.py --raw=FOLDER --out=DIR [--seeds 3] [--jobs 2]    trains the missing runs
    python tests/benchmarks/variants.py --raw=FOLDER --out=DIR --time                    also times steps, all else idle

Every run of a task, whatever its seed, reads the same tokens in the same order with the same recipe. Runs of one seed
start from the same parameters, except those that a variant adds. The task's settings and a variant's `bindings`
override its file.

    text      configs/quickstart.gin on the files of FOLDER: 600 steps, the memory (2,048) on after a third
    recall    configs/recall.gin: 304 steps, a memory of 1,024, half of a document
"""

import argparse
import json
import os
import queue
import statistics
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
RECORD = HERE / "variants.json"
_recording = threading.Lock()
FARTHEST = 25.0
"""Percent above the recipe's perplexity: what is worse is written at the edge of the picture, not drawn to scale."""


class Variant(NamedTuple):
    """The settings of a variant, and its description for readers."""

    what: str
    file: str | None = None
    bindings: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ("text", "recall")

    @property
    def settings(self) -> list[str]:
        """Returns the settings as arguments of a command, after the task's own."""
        files = [f"--gin_file=configs/variants/{self.file}.gin"] if self.file else []
        return files + [f"--gin_param={binding}" for binding in self.bindings]


TEXT = ("text",)
VARIANTS = {
    "none": Variant("no memory", None, ("MEMORY_SIZE = 0",)),
    "base": Variant("the recipe: a gate per head, the newest tokens kept"),
    "whole": Variant("a memory of the whole document (recall)", None, ("MEMORY_SIZE = 2048",), ("recall",)),
    "gate_layer": Variant("one gate per layer", "gate_layer"),
    "gate_token": Variant("a gate per token", "gate_token"),
    "gate_score": Variant("no learned gate: best scores compared", "gate_score"),
    "gate_joint": Variant("no gate: one softmax", "gate_joint"),
    "every_layer": Variant("a memory in every layer (1 and 2)", None, ("Model.memory_layers = (1, 2)",), TEXT),
    "shared_bank": Variant(
        "the same two layers, one bank", None, ("Model.memory_layers = (1, 2)", "Model.banks_of = (2, 2)"), TEXT
    ),
    "unnormalized": Variant("queries and keys not normalized", "unnormalized"),
    "no_key_shift": Variant("keys that do not know their predecessors", None, ("Model.key_shift = False",)),
    "grouped_query": Variant("two query heads share a key head", "grouped_query", ("Model.kv_heads = 2",)),
    "dense": Variant("all of 1,024 slots attended to", "dense", ("MEMORY_SIZE = 1024",)),
    "reservoir": Variant("keeps a fair sample", "reservoir"),
    "least_used": Variant("forgets what is used least, keeps 16 first tokens", "least_used"),
    "stops_when_full": Variant("keeps the beginning", "stops_when_full"),
    "young": Variant("nothing older than 512 tokens, nor unlike", "young", ("Memory.maximum_age = 512",)),
    "sparse": Variant("every second token, no near-duplicates", "sparse"),
    "beyond_cache": Variant("only what the XL cache does not hold", "beyond_cache", (), TEXT),
    "across_documents": Variant("the memory outlasts documents", "across_documents", (), TEXT),
    "contrastive": Variant("three other rows' memories as negatives", "contrastive"),
    "memory_dropout": Variant("a quarter of the rows reads a part only", "memory_dropout"),
    "memory_growth": Variant(
        "a memory of 512 from the start, whole after two thirds",
        "memory_growth",
        ("SMALL_MEMORY = 512", "GROWS_AT = 400", "Training.memory_from_step = 0"),
        TEXT,
    ),
    "learned_index": Variant(
        "8 learned features of 32 propose 64", "learned_index", ("Model.index_size = 8", "Memory.proposals = 64")
    ),
    "projection": Variant(
        "8 random features of 32 propose 64",
        None,
        ("Memory.proposer = 'projection'", "Memory.projection_size = 8", "Memory.proposals = 64"),
    ),
    "half": Variant("half the memory (text)", None, ("MEMORY_SIZE = 1024",), TEXT),
}

TASKS = {
    "text": (
        "quickstart",
        ("NUM_STEPS = 600", "CHECKPOINT_EVERY = 600", "Training.memory_from_step = 200", "MEMORY_SIZE = 2048",
         "Folder.document = 'file'", "Prepare.validation = 0.04", "Prepare.test = 0.04", "Batch.seed = 0",
         "Evaluation.batch_size = 4"),
    ),
    "recall": ("recall", ("NUM_STEPS = 304", "CHECKPOINT_EVERY = 304", "MEMORY_SIZE = 1024", "Batch.seed = 0")),
}  # fmt: skip


def settings_of(task: str, out: Path) -> list[str]:
    config, bindings = TASKS[task]
    return [
        f"--gin_file=configs/{config}.gin",
        *(f"--gin_param={binding}" for binding in (*bindings, f"DATA = '{out / task / 'data'}'")),
    ]


def memorizing(*arguments: str, cores: set[int] | None = None, log: Path | None = None) -> None:
    """Runs a command to its end, on these cores; what it prints goes to `log`."""
    command = [sys.executable, "-m", "memorizing.cli", *arguments]
    if cores is not None:
        command = ["taskset", "--cpu-list", ",".join(map(str, cores)), *command]
    environment = os.environ | {"JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu")}
    if log is None:
        subprocess.run(command, check=True, cwd=ROOT, env=environment)
        return
    with log.open("a") as stream:
        subprocess.run(command, check=True, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT)


def recorded() -> dict[str, Any]:
    """`runs`: of each, by task, variant and seed, what was found and by which version; `step_seconds`: by variant."""
    return json.loads(RECORD.read_text()) if RECORD.exists() else {"runs": {}, "step_seconds": {}}


def record(part: str, found: dict[str, Any]) -> None:
    with _recording:
        kept = recorded()
        kept[part] = dict(sorted((kept[part] | found).items()))
        RECORD.write_text(json.dumps(kept, indent=1) + "\n")


def version() -> str:
    """The last commit that changed what a run is made of, marked where the working tree differs from it."""
    parts = ["--", "memorizing", "configs", "tests/benchmarks/variants.py"]
    git = lambda *command: subprocess.run(  # noqa: E731
        ["git", *command, *parts], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    return git("log", "-1", "--format=%h") + ("-dirty" if git("status", "--porcelain") else "")


def run(out: Path, task: str, name: str, seed: int, cores: set[int]) -> None:
    """Trains and evaluates one run."""
    workdir, log = out / task / f"{name}-{seed}", out / task / f"{name}-{seed}.log"
    given = [*settings_of(task, out), f"--gin_param=SEED = {seed}", *VARIANTS[name].settings]
    if not list((workdir / "evaluations").glob("test-memory-*.json")):
        memorizing("train", *given, f"--workdir={workdir}", cores=cores, log=log)
        memorizing("evaluate", f"--workdir={workdir}", cores=cores, log=log)
    (file,) = (workdir / "evaluations").glob("test-memory-*.json")
    figures = json.loads(file.read_text())
    value = figures["perplexity"] if task == "text" else figures["answers"]["far"]["exact"]
    record("runs", {f"{task}/{name}-{seed}": {"value": value, "version": version()}})


def train_all(raw: Path, out: Path, names: Sequence[str], seeds: int, jobs: int) -> list[str]:
    """Trains everything, a seed of these variants after another; names what failed."""
    for task, source in (("text", [f"--raw={raw}"]), ("recall", [])):
        if not (out / task / "data" / "manifest.json").exists():
            memorizing("prepare", *settings_of(task, out), *source, f"--out={out / task / 'data'}")
    wanted: queue.Queue[tuple[str, str, int]] = queue.Queue()
    for seed in range(seeds):
        for name in names:
            for task in VARIANTS[name].tasks:
                if f"{task}/{name}-{seed}" not in recorded()["runs"]:
                    wanted.put((task, name, seed))
    failed: list[str] = []
    cores = sorted(os.sched_getaffinity(0))

    def work(number: int) -> None:
        while True:
            try:
                task, name, seed = wanted.get_nowait()
            except queue.Empty:
                return
            try:
                run(out, task, name, seed, set(cores[number :: min(jobs, len(cores))]))
            except subprocess.CalledProcessError:
                failed.append(f"{out / task}/{name}-{seed}.log")

    workers = [threading.Thread(target=work, args=(number,)) for number in range(jobs)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return failed


def experiment(out: Path, task: str, name: str) -> Any:
    """The settings of a variant's runs, as `memorizing train` reads them."""
    from memorizing.config import load

    given = [*settings_of(task, out), *VARIANTS[name].settings]
    files = [ROOT / it.removeprefix("--gin_file=") for it in given if it.startswith("--gin_file=")]
    return load(files, [it.removeprefix("--gin_param=") for it in given if it.startswith("--gin_param=")])[0]


def step_times(out: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds of a step of the text task with a full memory, for each variant in turn: a list of rounds."""
    from memorizing.benchmarks.step import Stepping
    from memorizing.benchmarks.timing import in_turn

    steppings = {}
    for name, variant in VARIANTS.items():
        if "text" not in variant.tasks:
            continue
        it = experiment(out, "text", name)
        steppings[name] = Stepping(it.model, it.memory, it.batch, it.optimizer, it.training)
        print(f"compiled: {name}", flush=True)
    times = in_turn({name: stepping.measure for name, stepping in steppings.items()}, rounds)
    return {name: list(timing.seconds) for name, timing in times.items()}


def figures(seeds: int) -> dict[str, dict[str, list[float]]]:
    """Returns, for each variant and seed, the perplexity of the text and the share of far questions answered."""
    found: dict[str, dict[str, list[float]]] = {}
    runs = recorded()["runs"]
    for name, variant in VARIANTS.items():
        for task in variant.tasks:
            names = [f"{task}/{name}-{seed}" for seed in range(seeds)]
            if all(each in runs for each in names):
                found.setdefault(name, {})[task] = [runs[each]["value"] for each in names]
    return found


def deviation(values: Sequence[float]) -> float:
    """The standard deviation over seeds; 0 of one."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def with_error(values: Sequence[float], form: str) -> str:
    """Mean and standard deviation over seeds."""
    return f"{statistics.mean(values):{form}} ± {deviation(values):{form}}"


def against(own: Sequence[float], base: Sequence[float]) -> list[float]:
    """Percent by which perplexities are above those of runs of the same seeds."""
    return [100 * (one / other - 1) for one, other in zip(own, base, strict=True)]


def page(found: dict[str, dict[str, list[float]]], times: dict[str, list[float]], seeds: int) -> str:
    """The table, and how to read it."""
    base = found["base"]
    lines = [
        "| | what | perplexity | against the recipe | far questions answered | a step |",
        "|---|---|---|---|---|---|",
    ]
    for name, own in found.items():
        variant = VARIANTS[name]
        cells = ["–"] * 4
        if "text" in own:
            cells[0] = with_error(own["text"], ".2f")
            if name != "base":
                cells[1] = with_error(against(own["text"], base["text"]), "+.1f").replace("± +", "± ") + " %"
        if "recall" in own:
            cells[2] = with_error([100 * share for share in own["recall"]], ".1f") + " %"
        if name in times:
            pairs = zip(times[name], times["none"], strict=True)
            cells[3] = f"{statistics.median(one / other for one, other in pairs):.2f}"
        label = f"[{name}](../../configs/variants/{variant.file}.gin)" if variant.file else name
        lines.append(f"| {label} | {variant.what} | " + " | ".join(cells) + " |")
    template = (HERE / "variants_page.md").read_text()
    return template.format(table="\n".join(lines), seeds=seeds)


def draw(found: dict[str, dict[str, list[float]]], file: Path) -> None:
    """Draws both tasks: mean and standard deviation of each variant; text relative to the recipe with the same seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 7.5), layout="constrained")
    titles = {"text": "perplexity against the recipe's, % (less is better)", "recall": "far questions answered, %"}
    for axis, (task, title) in zip(axes, titles.items(), strict=True):
        names = [name for name in found if task in found[name]][::-1]
        shown = {name: [100 * value for value in found[name][task]] for name in names}
        if task == "text":
            shown = {name: against(found[name]["text"], found["base"]["text"]) for name in names}
            axis.set_xlim(-20, FARTHEST + 10)
        for place, name in enumerate(names):
            mean, color = statistics.mean(shown[name]), {"none": "#b3431e", "base": "#1f6f50"}.get(name, "#3b5b92")
            if task == "text" and mean > FARTHEST:
                axis.annotate(f"{mean:+.0f} % →", (FARTHEST, place), color=color, va="center", fontsize=9)
                continue
            axis.errorbar(mean, place, xerr=deviation(shown[name]), fmt="o", color=color, capsize=3)
        if "base" in names:
            axis.axvline(statistics.mean(shown["base"]), color="#1f6f50", linewidth=0.8, linestyle=":")
        axis.set_yticks(range(len(names)), names)
        axis.set_title(title, fontsize=11)
        axis.grid(axis="x", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", type=Path, required=True, help="text: each file a document")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--variants", type=lambda names: names.split(","), default=list(VARIANTS), help="only these")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each with its share of the cores")
    parser.add_argument("--time", action="store_true", help="time the steps too; nothing else may run")
    parser.add_argument("--rounds", type=int, default=6, help="of timing, in which all variants take turns")
    options = parser.parse_args()
    out = options.out.absolute()
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(out / "compiled"))  # all seeds of a variant run one program
    failed = train_all(options.raw.absolute(), out, options.variants, options.seeds, options.jobs)
    if options.time:
        record("step_seconds", step_times(out, options.rounds))
    found = figures(options.seeds)
    if "base" in found:
        (HERE / "VARIANTS.md").write_text(page(found, recorded()["step_seconds"], options.seeds))
        draw(found, HERE / "variants.png")
    if failed:
        raise SystemExit("failed, see " + ", ".join(failed))


if __name__ == "__main__":
    main()
