"""The pages that people read: links lead somewhere, commands exist with settings that load, Python examples run."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import memorizing
from memorizing.cli import make_parser
from memorizing.config import load
from tests.tiny_run import SETTINGS, prepare_and_train

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = (".github", "configs", "launch", "memorizing", "tests")
PAGES = [*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.md")))]
SCRIPTS = {path.name for path in (ROOT / "launch").iterdir()}
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ +(.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def code_lines(page: Path) -> list[str]:
    """Lines of the page's code blocks, indented or fenced, continued lines joined."""
    fenced, lines = False, []
    for line in page.read_text().splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            lines.append(line.strip())
    return re.sub(r"\\\n *", " ", "\n".join(lines)).splitlines()


def commands(page: Path, program: str) -> list[list[str]]:
    """The words of each command on the page that starts with `program`, without comments and elisions."""
    found = []
    for line in code_lines(page):
        line = re.sub(r"^(\w+=\S* +)+", "", line)  # variables of the environment
        if not line.startswith(program + " "):
            continue
        line = re.sub(r"\[(-[^\]]*)\]", r"\1", line)  # optional arguments
        words = shlex.split(re.split(r" && | \|\| | \| ", line)[0], comments=True)
        if "..." not in words:  # else some of its arguments are left out
            found.append([word for word in words if word not in ("--gin_file=...", "--gin_param=...")])
    return found


@each_page
def test_links_lead_to_files_and_headings_of_the_project(page):
    text = re.sub(r"`[^`\n]*`", "", page.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://|mailto:", target):
            continue
        name, _, anchor = target.partition("#")
        there = (page.parent / name).resolve() if name else page
        assert there.exists(), f"{page.relative_to(ROOT)}: {target}"
        assert there.is_relative_to(ROOT), f"{page.relative_to(ROOT)}: {target} leads out of the project"
        if anchor:
            assert anchor in anchors(there), f"{page.relative_to(ROOT)}: {target}"


@each_page
def test_commands_have_the_arguments_and_settings_that_the_page_shows(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    parser = make_parser()
    for words in commands(page, "memorizing"):
        try:
            options = parser.parse_args(words[1:])
        except SystemExit as error:
            if error.code:
                pytest.fail(f"{page.relative_to(ROOT)}: {shlex.join(words)}")
            continue
        files = [
            file for file in getattr(options, "gin_file", []) if (ROOT / file).exists() or file.startswith("configs/")
        ]
        bindings = getattr(options, "gin_param", [])
        if files or bindings:
            load(
                [*(["configs/base.gin"] if not files else []), *files], [each for each in bindings if "..." not in each]
            )


@each_page
def test_scripts_exist_and_tell_their_usage(page):
    for words in commands(page, "bash"):
        script = ROOT / words[1]
        assert script.is_file(), f"{page.relative_to(ROOT)}: {shlex.join(words)}"
        if script.parent.name == "launch" and "--help" in script.read_text():
            told = subprocess.run(["bash", script, "--help"], capture_output=True, text=True, timeout=60, cwd=ROOT)
            for option in re.findall(r"--[a-z_]+", " ".join(words[2:]).split(" -- ")[0]):
                assert told.returncode == 0 and (option in told.stdout or "memorizing" in told.stdout), words


@pytest.mark.parametrize("form", sorted((ROOT / ".github/ISSUE_TEMPLATE").iterdir()), ids=lambda path: path.name)
def test_issue_forms_have_only_keys_that_github_knows(form):
    content = yaml.safe_load(form.read_text())
    assert set(content) == {"name", "description", "body"}
    for element in content["body"]:
        assert element["type"] == "textarea" and set(element) <= {"type", "attributes", "validations"}
        assert {"label"} <= set(element["attributes"]) <= {"label", "description"}


def test_pages_have_commands():
    assert sum(len(commands(page, "memorizing")) for page in PAGES) > 20


def test_the_front_page_is_short_and_has_the_words_that_people_search_for():
    front = (ROOT / "README.md").read_text()
    assert len(front.splitlines()) <= 150
    for word in ("resume", "fine-tune", "inference", "learning rate", "batch size", "FSDP", "SLURM", "checkpoint"):
        assert word in front, word


def python_examples(page: Path) -> list[str]:
    """Returns the page's code blocks that import the package."""
    blocks = re.findall(r"(?:^    .*\n(?:\n(?=    ))*)+", page.read_text(), re.MULTILINE)
    examples = ("\n".join(line[4:] for line in block.splitlines()) for block in blocks)
    return [example for example in examples if re.search(r"^(from|import) memorizing", example, re.MULTILINE)]


EXAMPLES = [
    pytest.param(example, id=f"{page.relative_to(ROOT)} {number}")
    for page in PAGES
    for number, example in enumerate(python_examples(page))
]


@pytest.fixture(scope="module")
def user_folder(tmp_path_factory) -> Path:
    """A folder that looks like a clone after the quickstart, with a tiny model and little text."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "made").mkdir()
    run = prepare_and_train(folder / "made", "Folder.suffixes = ('.py',)")
    (folder / "runs/quickstart").mkdir(parents=True)
    (folder / "runs/quickstart/with").symlink_to(run)
    (folder / "runs/quickstart/data").symlink_to(run.parent / "data")
    for name in ("configs", "memorizing"):
        (folder / name).mkdir()
    (folder / "configs/quickstart.gin").write_text(SETTINGS)
    (folder / "memorizing/model").symlink_to(ROOT / "memorizing/model/gates")
    (folder / "argparse.py").write_text("parser = ArgumentParser()\n" * 9)
    for name in ("README.md", "LICENSE"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.mark.parametrize("example", EXAMPLES)
def test_python_examples_are_short_and_run(example, user_folder, monkeypatch, capsys):
    assert len(example.splitlines()) <= 25
    monkeypatch.chdir(user_folder)
    exec(re.sub(r"NUM_STEPS = \d+", "NUM_STEPS = 16", example), {})
    assert not example.count("print(") or capsys.readouterr().out.strip()


def test_examples_cover_what_the_package_exports():
    imported = {name for each in EXAMPLES for name in re.findall(r"\w+", " ".join(imports(each.values[0])))}
    assert imported >= set(memorizing._MODULE_OF) - {"Bank", "Carry", "clear"}


def imports(example: str) -> list[str]:
    """Returns the names that an example imports from the package."""
    return [
        alias.name
        for node in ast.walk(ast.parse(example))
        if isinstance(node, ast.ImportFrom) and node.module == "memorizing"
        for alias in node.names
    ]


def test_the_package_imports_nothing_and_types_what_it_exports():
    code = "import sys; before = set(sys.modules); import memorizing; print(*sorted(set(sys.modules) - before))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {name.partition(".")[0] for name in told.stdout.split()} & {"jax", "flax", "numpy", "gin", "optax"}
    tree = ast.parse(Path(memorizing.__file__).read_text())
    typed = {
        (node.module, alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("memorizing.")
        for alias in node.names
    }
    assert typed == {(f"memorizing.{module}", name) for name, module in memorizing._MODULE_OF.items()}
    for name in memorizing._MODULE_OF:
        assert getattr(memorizing, name) and name in dir(memorizing)
    with pytest.raises(AttributeError, match=r"no attribute 'open_writer'. It has .*open_reader"):
        memorizing.open_writer  # noqa: B018
