"""Settings of every test: CPU devices, eight of them, quick compilation, and one cache of compiled programs."""

import os
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # inherited by the processes that tests start
# Tests compile programs more often than they run them: XLA's default level, 3, takes four times as long as 0.
os.environ["XLA_FLAGS"] = " ".join(
    ["--xla_backend_optimization_level=0"] * (os.environ["JAX_PLATFORMS"] == "cpu")
    + os.environ.get("XLA_FLAGS", "").split()
)

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)

DAYS_IN_CACHE = 2


def pytest_configure(config: pytest.Config) -> None:
    """Shares compiled programs between tests, the processes that they start, and later runs.

    JAX names an entry by the program, the versions and the flags. `pytest --cache-clear` deletes the entries.
    """
    folder = config.cache.mkdir("jax")
    if not hasattr(config, "workerinput"):
        delete_old(folder)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def delete_old(folder: Path) -> None:
    oldest = time.time() - DAYS_IN_CACHE * 24 * 60 * 60
    for path in folder.iterdir():
        if path.stat().st_mtime < oldest:
            path.unlink(missing_ok=True)


# Tests that `-m` or `-k` deselects, by the reason that the summary names: the first of these markers, or none of them.
MARKERS = ("slow", "pods", "gpu", "tpu", "browser", "prepare", "integration", "large")
FIRST = ("planning/test_plan.py", "integration/", "training/")  # the longest files, so that both workers end together
left_out: Counter[str] = Counter()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks tests by their folder and by what they use, and starts the longest files first."""
    for item in items:
        if "/integration/" in item.path.as_posix():
            item.add_marker("integration")
        if "browser" in getattr(item, "fixturenames", ()):
            item.add_marker("browser")

    def place(item: pytest.Item) -> int:
        path = item.path.as_posix()
        return next((number for number, part in enumerate(FIRST) if f"tests/{part}" in path), len(FIRST))

    items.sort(key=place)


def pytest_deselected(items: list[pytest.Item]) -> None:
    for item in items:
        left_out[next((name for name in MARKERS if item.get_closest_marker(name)), "-k or -m")] += 1


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = dict(left_out)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    """Takes the counts of one xdist worker: each worker collects every test."""
    left_out.clear()
    left_out.update(getattr(node, "workeroutput", {}).get("left_out", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints which tests did not run, and why."""
    described = dict(line.split(": ", 1) for line in terminalreporter.config.getini("markers") if ": " in line)
    reasons = Counter({f"{name} ({described[name]})" if name in described else name: n for name, n in left_out.items()})
    skipped = (report.longrepr[-1].removeprefix("Skipped: ") for report in terminalreporter.stats.get("skipped", []))
    reasons += Counter(f"skipped: {reason}" for reason in skipped)
    if reasons:
        terminalreporter.section("not run")
        for reason, number in reasons.most_common():
            terminalreporter.write_line(f"{number:5} {reason}")
