"""The floors: modules import only from lower floors, as the map in memorizing/README.md says."""

import ast
import graphlib
import os
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "memorizing"
FLOORS = [
    {"errors"},
    {"files", "sections", "shapes"},
    {"bindings", "parallel"},
    {"memory"},
    {"model", "data"},
    {"storage"},
    {"training"},
    {"evaluation", "generation"},
    {"reports", "planning"},
    {"config"},
    {"runs"},
    {"api", "sweep", "pretrained", "benchmarks"},
    {"commands"},
    {"cli"},
]
STRANGERS = {("data", "memory")}
"""Pairs of rooms: the first may not import the second, although it is lower."""
PREPARATION = {"memorizing.data.builders", "memorizing.data.tasks"}
"""Modules that need TensorFlow: only `prepare` loads them, by name, and only for the sources that they serve."""
LEVEL = {room: level for level, floor in enumerate(FLOORS) for room in floor}


def imports(path: Path) -> set[str]:
    """The modules that a file imports, at its top or within functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): imports(path) for path in PACKAGE.rglob("*.py")}


def test_modules_import_from_lower_floors_or_their_own_folder():
    checked = 0
    for module, imported in MODULES.items():
        room = module.split(".")[1] if "." in module else None
        for other in imported:
            if room is None or not other.startswith("memorizing."):
                continue
            target = other.split(".")[1]
            assert target == room or LEVEL[target] < LEVEL[room], f"{module} imports {other}"
            assert (room, target) not in STRANGERS, f"{module} imports {other}"
            checked += 1
    assert checked > 100


def test_there_are_no_circles():
    graph = {module: imported & MODULES.keys() - {module} for module, imported in MODULES.items()}
    # A package's __init__ is loaded with each of its modules; only what it imports itself counts here.
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(MODULES)


def test_only_bindings_imports_gin_and_only_preparation_tensorflow():
    for module, imported in MODULES.items():
        tops = {name.split(".")[0] for name in imported}
        assert "gin" not in tops or module == "memorizing.bindings"
        assert module in PREPARATION or not tops & {"tensorflow", "seqio", "tensorflow_datasets", "apache_beam"}, module
        assert module in PREPARATION or not imported & PREPARATION, module


def test_libraries_of_pretrained_models_are_imported_in_one_place_each():
    places = {"tokenizers": "memorizing.data.pretrained_vocabulary", "safetensors": "memorizing.pretrained.tensors"}
    for module, imported in MODULES.items():
        tops = {name.split(".")[0] for name in imported}
        assert not tops & {"torch", "transformers", "huggingface_hub"}, module
        for library, place in places.items():
            assert library not in tops or module == place, module


def test_commands_load_only_the_modules_they_need(tmp_path):
    """Not even where it is installed: stand-ins for it lie on the path, and some packages take it when they find it."""
    stand_ins = ("tensorflow", "seqio", "tensorflow_datasets", "apache_beam", "tokenizers", "safetensors")
    for name in stand_ins:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    modules = ", ".join(sorted(MODULES.keys() - PREPARATION))
    program = f"import sys, {modules}; print([name for name in sys.modules if name.split('.')[0] in {stand_ins}])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(PACKAGE.parent)])}
    ran = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert ran.stdout == "[]\n", ran.stderr
