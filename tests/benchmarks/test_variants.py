"""The study of variants (tests/benchmarks/variants.py): what its settings come to. It is run by hand."""

import importlib.util
from pathlib import Path

import pytest

from memorizing.runs import differences

FILE = Path(__file__).parent / "variants.py"
SPEC = importlib.util.spec_from_file_location("variants", FILE)
variants = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(variants)
ELSEWHERE = {  # other tokens than the study's, see variants_page.md; or at this depth the same as another
    "retrofit", "frozen_memory", "top_third",
}  # fmt: skip


@pytest.mark.parametrize("task", variants.TASKS)
def test_each_variant_changes_only_the_settings_it_is_about(task):
    base = variants.experiment(Path("out"), task, "base")
    for name, variant in variants.VARIANTS.items():
        if task not in variant.tasks or name == "base":
            continue
        own = variants.experiment(Path("out"), task, name)
        changed = {setting for setting, *_ in differences(own, base)}
        assert changed and all(each.startswith(("Model.", "Memory.", "Training.")) for each in changed), (name, changed)
        assert own.training.steps == base.training.steps and own.batch == base.batch
        if name == "dense":
            assert own.memory.size == 1024 and own.memory.search == "dense"
        if name == "memory_growth":
            assert own.training.memory_growth == ((0, 512), (400, 2048))


def test_every_file_is_in_the_study():
    files = {path.stem for path in (variants.ROOT / "configs" / "variants").glob("*.gin")}
    assert files - {variant.file for variant in variants.VARIANTS.values()} == ELSEWHERE | {"shared_bank"}


def test_a_page_has_a_line_for_each_variant_that_all_seeds_have():
    found = {
        "none": {"text": [10.0, 12.0], "recall": [0.01, 0.03]},
        "base": {"text": [8.0, 9.0], "recall": [0.8, 0.9]},
        "dense": {"text": [8.8, 9.9]},
    }
    times = {"none": [1.0, 2.0, 3.0], "base": [1.5, 3.0, 4.0]}
    lines = variants.page(found, times, 2).splitlines()
    none, base, dense = (line for line in lines if line.startswith(("| none", "| base", "| [dense]")))
    assert none.split(" | ")[2:] == ["11.00 ± 1.41", "+29.2 ± 5.9 %", "2.0 ± 1.4 %", "1.00 |"]
    assert base.split(" | ")[2:] == ["8.50 ± 0.71", "–", "85.0 ± 7.1 %", "1.50 |"]
    assert dense.split(" | ")[2:] == ["9.35 ± 0.78", "+10.0 ± 0.0 %", "–", "– |"]
