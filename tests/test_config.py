"""Settings: what is refused and with which words, and that the written configuration makes the same run again."""

import dataclasses
import json
import math
import re
import time
from pathlib import Path

import jax
import pytest

from memorizing.config import RENAMED_SETTINGS, SECTIONS, ConfigError, Experiment, load
from memorizing.data.tokens import PreparedTokens
from memorizing.errors import InputError
from memorizing.files import atomic_write
from memorizing.model.transformer import abstract_model
from memorizing.runs import CONFIG_FILE, differences, load_trained, open_workdir
from memorizing.storage.workdir import check_data, open_tokens

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
BASE = CONFIGS / "base.gin"

REFUSED = {
    "an unknown section": ("Modle.layers = 3", ["no section 'Modle'", "did you mean 'Model'"]),
    "an unknown setting": ("Model.layer = 3", ["no setting 'layer'", "did you mean 'layers'"]),
    "a misspelled macro": ("MEMRY_SIZE = 3", ["MEMRY_SIZE = 3", "did you mean 'MEMORY_SIZE'"]),
    "an undefined macro": ("Model.layers = %LAYERS", ["%LAYERS", "add `LAYERS = VALUE`"]),
    "a macro of itself": ("MEMORY_SIZE = %MEMORY_SIZE", ["refers to itself", "plain value"]),
    "no value": ("MEMORY_SIZE", ["'MEMORY_SIZE'", "Write settings as 'Section.name = value'"]),
    "text for a number": ("MEMORY_SIZE = '8k'", ["Memory.size = '8k'", "a whole number"]),
    "a fraction for a whole number": ("Model.layers = 2.5", ["Model.layers = 2.5", "a whole number"]),
    "a truth value for a number": ("Model.layers = True", ["Model.layers = True", "a whole number"]),
    "a number for a truth value": ("Model.remat = 1", ["Model.remat = 1", "True or False"]),
    "text for a fraction": ("Model.dropout = 'x'", ["Model.dropout = 'x'", "a number"]),
    "a wrong member": ("Model.memory_layers = ('a',)", ["Model.memory_layers = ('a',)", "a tuple such as (3,)"]),
    "an unknown choice": ("Memory.search = 'x'", ["Memory.search = 'x'", "'auto', 'exact'"]),
    "text for an optional number": ("Model.query_scale = 'x'", ["Model.query_scale = 'x'", "a number or None"]),
    "segments that do not divide the memory": ("MEMORY_SIZE = 8000", ["Memory.size = 8000", "512", "8192 or 7680"]),
    "key heads that are no groups": ("Model.kv_heads = 3", ["Model.kv_heads = 3", "Use 1, 2, 4, 8"]),
    "a bank for too few layers": ("Model.banks_of = (9, 9)", ["Model.banks_of = (9, 9)", "Model.memory_layers = (9,)"]),
    "a layer out of range": ("Model.memory_layers = (13,)", ["(13,)", "layer 13", "Model.layers = 12"]),
    "layers out of order": ("Model.memory_layers = (9, 3)", ["(9, 3)", "in rising order"]),
    "a memory that no layer uses": ("Model.memory_layers = ()", ["Memory.size = 8192", "or set Memory.size = 0"]),
    "more neighbors than slots": ("Memory.neighbors = 9000", ["9000", "Memory.size = 8192", "at most 8192"]),
    "no neighbors": ("Memory.neighbors = 0", ["Memory.neighbors = 0", "at least 1"]),
    "a negative memory": ("MEMORY_SIZE = -512", ["Memory.size = -512", "at least 0"]),
    "no slots in a block": ("Blocked.block_size = 0", ["Blocked.block_size = 0", "at least 1"]),
    "all neighbors of an approximate search": (
        "Pallas.recall_target = 1.0",
        ["Pallas.recall_target = 1.0", "'blocked'"],
    ),
    "a stride that does not divide a segment": (
        "Memory.write_every = 3",
        ["Memory.write_every = 3", "Batch.segment_length = 512"],
    ),
    "a sink without room beside it": ("Memory.sink = 8000", ["Memory.sink = 8000", "at most 7680"]),
    "no cache to fall out of": (
        "Memory.writes = 'beyond_cache'\nModel.xl_cache = False",
        ["Memory.writes = 'beyond_cache'", "Model.xl_cache = False"],
    ),
    "too old when written": (
        "Memory.writes = 'beyond_cache'\nMemory.maximum_age = 512",
        ["Memory.maximum_age = 512", "all would be ignored"],
    ),
    "a reservoir of the newest": (
        "Memory.eviction = 'reservoir'\nMemory.maximum_age = 512",
        ["Memory.maximum_age = 512", "tokens of all ages"],
    ),
    "no layers": ("Model.layers = 0", ["Model.layers = 0", "at least 1"]),
    "odd buckets": ("Model.position_buckets = 5", ["Model.position_buckets = 5", "even"]),
    "a short distance": ("Model.position_max_distance = 9", ["Model.position_max_distance = 9", "must exceed half"]),
    "all dropped": ("Model.dropout = 1.0", ["Model.dropout = 1.0", "below 1"]),
    "no rows": ("BATCH_SIZE = 0", ["Batch.size = 0", "at least 1"]),
    "an unknown encoding": ("Folder.encoding = 'nope'", ["Folder.encoding = 'nope'", "Use 'utf-8'"]),
    "an empty vocabulary": ("Prepare.vocabulary_size = 0", ["Prepare.vocabulary_size = 0", "at least 1"]),
    "a scope": ("big/Model.layers = 3", ["settings have no scopes", "write Model.layers ="]),
    "a memory that is never used": (
        "Training.memory_from_step = 500_000",
        ["Training.memory_from_step = 500000", "Training.steps = 500000", "memory of 8192"],
    ),
    "steps that no call ends at": ("NUM_STEPS = 1001", ["Training.steps = 1001", "1000 or 1008"]),
    "a checkpoint in the middle of a call": ("CHECKPOINT_EVERY = 3", ["Training.checkpoint_every = 3", "0 or 8"]),
    "a growth that stops short": (
        "Training.memory_growth = ((0, 512), (800, 1024))",
        ["ends with 1024 slots", "Memory.size = 8192"],
    ),
    "a growth that shrinks": ("Training.memory_growth = ((0, 512), (800, 256))", ["that both rise"]),
    "a growth by uneven segments": (
        "Training.memory_growth = ((0, 100), (800, 8192))",
        ["memory_growth = ((0, 100), (800, 8192))", "100 is not a multiple of Batch.segment_length"],
    ),
    "a growth of no numbers": ("Training.memory_growth = 512", ["pairs of whole numbers such as ((0, 512)"]),
    "a factor without its part": (
        "Optimizer.learning_rate_multipliers = (16.0,)",
        ["pairs of a name and a number such as (('gates', 16.0),)"],
    ),
    "a snapshot of no run": ("Training.prebuilt_memory = 'some'", ["Start from these: set Training.init_from"]),
    "a share beyond all": ("Training.memory_dropout = 1.5", ["Training.memory_dropout = 1.5", "from 0 to 1"]),
    "a switch in the middle of a call": ("Training.memory_from_step = 3", ["memory_from_step = 3", "0 or 8"]),
    "no checkpoints": ("CHECKPOINT_EVERY = 0", ["Training.checkpoint_every = 0", "at least 1"]),
    "no learning": ("Optimizer.learning_rate = 0", ["Optimizer.learning_rate = 0.0", "above 0"]),
    "more than all numbers": ("Optimizer.learning_rate = 1e400", ["Optimizer.learning_rate = inf", "finite"]),
    "a negative warm-up": ("Optimizer.warmup_steps = -1", ["Optimizer.warmup_steps = -1", "0 or more"]),
    "a negative norm": ("Optimizer.clip_norm = -1", ["Optimizer.clip_norm = -1.0", "0 or more"]),
    "growing weights": ("Optimizer.weight_decay = -0.1", ["Optimizer.weight_decay = -0.1", "0 or more"]),
    "a mean over all time": ("Optimizer.beta2 = 1.0", ["Optimizer.beta2 = 1.0", "below 1"]),
    "a seed that numpy refuses": ("SEED = -1", ["Batch.seed = -1", "at least 0"]),
    "a seed of documents, too": ("Prepare.seed = -1", ["Prepare.seed = -1", "at least 0"]),
    "a share above one": ("Prepare.test = 1.5", ["Prepare.test = 1.5", "from 0 to below 1"]),
    "a float beyond float32": ("Optimizer.clip_norm = 1e300", ["Optimizer.clip_norm = 1e+300", "float32"]),
    "an epsilon that hides all": ("Model.norm_epsilon = 1e30", ["Model.norm_epsilon = 1e+30", "at most 1"]),
    "a scale that overflows": ("Model.embedding_scale = 1e30", ["Model.embedding_scale = 1e+30", "overflow"]),
    "a bound that nothing meets": (
        "Memory.minimum_score = 1e30",
        ["Memory.minimum_score = 1e+30", "None sets no bound"],
    ),
    "no rows to evaluate": ("Evaluation.batch_size = 0", ["Evaluation.batch_size = 0", "at least 1"]),
    "keys that are never mentioned": ("Recall.mentions = 0", ["Recall.mentions = 0", "at least 1"]),
    "less than no silence": ("Recall.silence = -1", ["Recall.silence = -1", "at least 0"]),
    "bursts that do not come out even": ("Recall.mentions = 3", ["Recall.pairs = 32", "Recall.mentions = 3"]),
    "too few keys to keep silent": ("Recall.keys = 100", ["Recall.keys = 100", "use 160 or more"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_impossible_setting_is_refused_with_name_value_and_way_out(case):
    binding, words = REFUSED[case]
    with pytest.raises(ConfigError) as caught:
        load([BASE], [binding])
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("bindings", "words"),
    [
        (["Prepare.test = 0.5", "Prepare.validation = 0.5"], ["Prepare.validation = 0.5", "nothing to train on"]),
        (["NUM_STEPS = 800", "Optimizer.schedule = 'cosine'"], ["Optimizer.decay_steps = 800", "shorten the warm-up"]),
        (["Model.positions = 'rope'", "Model.head_size = 3"], ["Model.head_size = 3", "even"]),
        (["Memory.proposer = 'int8'", "Memory.key_dtype = 'float8'"], ["'int8'", "'float8'", "no smaller"]),
        (["BATCH_SIZE = 4", "Training.negative_rows = 4"], ["Training.negative_rows = 4", "only 3 other rows"]),
        (["Memory.search = 'dense'", "Memory.proposer = 'int8'"], ["Memory.proposer = 'int8'", "attends to all slots"]),
        (
            ["Memory.search = 'ivf'", "Ivf.candidates = 31"],
            ["candidates = 31", "neighbors = 32", "Set Ivf.candidates = 32"],
        ),
        (
            ["Memory.search = 'lsh'", "Lsh.candidates = 99", "Memory.proposer = 'int8'"],
            ["Lsh.candidates = 99", "Memory.proposals = 128"],
        ),
        (["Memory.search = 'ivf'", "Ivf.lists = 9000"], ["Ivf.lists = 9000", "Memory.size = 8192"]),
        (
            ["Memory.search = 'lsh'", "Lsh.bits = 14", "Lsh.probes = 8193"],
            ["Lsh.probes = 8193", "Memory.size = 8192", "at most 8192"],
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(bindings, words):
    with pytest.raises(ConfigError) as caught:
        load([BASE], bindings)
    for word in words:
        assert word in str(caught.value)


def test_settings_of_other_searches_are_accepted():
    load([BASE], ["Ivf.lists = 9000", "Ivf.candidates = 1"])
    load([BASE], ["Memory.search = 'ivf'", "Ivf.candidates = 8192", "Ivf.lists = 9000"])  # looks at all slots


def test_a_missing_gin_file_is_named():
    with pytest.raises(ConfigError, match=r"--gin_file=none\.gin: no such file"):
        load(["none.gin"], [])


@pytest.mark.parametrize("old", RENAMED_SETTINGS)
def test_a_renamed_setting_is_refused_with_its_new_name(old):
    new = RENAMED_SETTINGS[old]
    with pytest.raises(ConfigError, match=rf"{re.escape(old)} is now {re.escape(new)}"):
        load([], [f"{old} = 1"])
    names = re.findall(r"(\w+)\.([a-z]\w*)", new)
    assert names and all(name in {field.name for field in dataclasses.fields(SECTIONS[part])} for part, name in names)


def test_includes_are_found_from_the_file_that_names_them(tmp_path):
    """A user's file in another folder includes a shipped one, which includes its own neighbor; also nested."""
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "deep.gin").write_text("include 'deeper.gin'\nMEMORY_SIZE = 1024\n")
    (tmp_path / "inner" / "deeper.gin").write_text(f"include '{CONFIGS / 'quickstart.gin'}'\nMEMORY_SIZE = 512\n")
    (tmp_path / "mine.gin").write_text("SEED = 3\ninclude 'inner/deep.gin'\nModel.heads = 2\n")
    config, _ = load([tmp_path / "mine.gin"], [])
    shipped, _ = load([CONFIGS / "quickstart.gin"], ["MEMORY_SIZE = 1024", "Model.heads = 2"])
    assert config == shipped


def test_a_file_that_includes_itself_is_refused(tmp_path):
    (tmp_path / "a.gin").write_text("include 'b.gin'\n")
    (tmp_path / "b.gin").write_text("include 'a.gin'\n")
    with pytest.raises(ConfigError, match=r"a\.gin includes itself, via .*b\.gin -> .*a\.gin"):
        load([tmp_path / "a.gin"], [])


def test_an_error_in_an_included_file_names_that_file(tmp_path):
    (tmp_path / "run.gin").write_text("include 'wrong.gin'\n")
    (tmp_path / "wrong.gin").write_text("Model.layers = 3\nModel.layer = 3\n")
    with pytest.raises(ConfigError, match=r"wrong\.gin, line 2: Model has no setting 'layer'; did you mean 'layers'"):
        load([tmp_path / "run.gin"], [])


def test_a_missing_include_is_named(tmp_path):
    (tmp_path / "run.gin").write_text("include 'nowhere.gin'\n")
    with pytest.raises(ConfigError, match=r"nowhere\.gin"):
        load([tmp_path / "run.gin"], [])


def test_missing_or_unsuitable_data_is_refused(tmp_path, monkeypatch):
    experiment, _ = load([BASE], [])
    with pytest.raises(InputError, match=r"Training\.data = ''"):
        open_tokens("", experiment.model)
    with pytest.raises(InputError, match="holds no prepared tokens"):
        open_tokens(str(tmp_path), experiment.model)
    monkeypatch.setattr(PreparedTokens, "__init__", lambda self, folder: None)
    monkeypatch.setattr(PreparedTokens, "vocabulary_size", 40_000, raising=False)
    with pytest.raises(InputError, match=r"Model\.vocabulary_size = 32000.*40000"):
        open_tokens(str(tmp_path), experiment.model)


def test_a_run_keeps_to_its_data_once_it_has_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(PreparedTokens, "__init__", lambda self, folder: setattr(self, "folder", folder))
    monkeypatch.setattr(PreparedTokens, "digests", lambda self: {"vocabulary": "words", "train": str(self.folder)})
    (tmp_path / "data.json").write_text(json.dumps({"folder": "some", "vocabulary": "words", "train": "some"}))
    check_data(tmp_path, PreparedTokens("other"), train=True)  # nothing was learned from the first
    (tmp_path / "checkpoints" / "40").mkdir(parents=True)
    check_data(tmp_path, PreparedTokens("some"), train=True)
    check_data(tmp_path, PreparedTokens("other"), train=False)
    with pytest.raises(InputError, match=r"other has another train split .* started with .*some"):
        check_data(tmp_path, PreparedTokens("other"), train=True)
    monkeypatch.setattr(PreparedTokens, "digests", lambda self: {"vocabulary": "bytes", "train": "some"})
    with pytest.raises(InputError, match="has another vocabulary"):
        check_data(tmp_path, PreparedTokens("some"), train=False)


@pytest.mark.parametrize(
    "files",
    [[path.name] for path in sorted(CONFIGS.glob("*.gin"))]
    + [[f"{corpus}.gin", "sizes/short.gin"] for corpus in ("pg19", "arxiv", "github", "isabelle", "c4")]
    + [["base.gin", f"sizes/{path.name}"] for path in sorted((CONFIGS / "sizes").glob("*.gin"))]
    + [["base.gin", f"memory/{path.name}"] for path in sorted((CONFIGS / "memory").glob("*.gin"))]
    + [
        ["base.gin", f"variants/{path.name}"]
        for path in sorted((CONFIGS / "variants").glob("*.gin"))
        if path.stem not in ("retrofit", "frozen_memory")
    ],  # these need a run to begin with
    ids=lambda files: "+".join(files),
)
def test_every_shipped_file_loads_and_writes_itself_out_in_full(files, tmp_path):
    experiment, text = load([CONFIGS / file for file in files], ["Prepare.seed = 7"])
    (tmp_path / "config.gin").write_text(text)
    again, same_text = load([tmp_path / "config.gin"], [])
    assert again == experiment and same_text == text
    longer, _ = load([tmp_path / "config.gin"], ["NUM_STEPS = 8_000_000"])
    assert {name for name, _, _ in differences(longer, experiment)} == {"Training.steps", "Optimizer.decay_steps"}


def test_macros_inside_values_survive_being_written_out(tmp_path):
    experiment, text = load([BASE], ["LAYER = 5", "Model.memory_layers = (%LAYER, 9)"])
    assert experiment.model.memory_layers == (5, 9)
    (tmp_path / "config.gin").write_text(text)
    assert load([tmp_path / "config.gin"], ["LAYER = 6"])[0].model.memory_layers == (6, 9)


def test_a_setting_may_be_given_a_value_past_its_macro(tmp_path):
    """MEMORY_SIZE then governs nothing: no reason to call it misspelled, but to say so when it is set later."""
    experiment, text = load([BASE], ["Memory.size = 512"])
    assert experiment.memory.size == 512
    (tmp_path / "config.gin").write_text(text)
    assert load([tmp_path / "config.gin"], [])[0] == experiment
    with pytest.raises(ConfigError, match=r"macro MEMORY_SIZE = 1024 is used by no setting"):
        load([tmp_path / "config.gin"], ["MEMORY_SIZE = 1024"])


@pytest.mark.parametrize("binding", ["DATA = 'test'", "Training.data = 'test'", "Evaluation.data = 'test'"])
def test_data_is_found_from_any_folder(binding, tmp_path, monkeypatch):
    """A folder named like the value of another setting: `Evaluation.split = 'test'` has to stay."""
    monkeypatch.chdir(tmp_path)
    began = start(Path("run"), [binding])
    monkeypatch.chdir(tmp_path.parent)
    found = load_trained(tmp_path / "run", [], [])
    (changed,) = differences(found, began)
    assert changed[0] in ("Training.data", "Evaluation.data") and changed[1:] == (str(tmp_path / "test"), "test")


@pytest.mark.parametrize(("size", "billions"), [("200m", 0.2), ("1b", 1.0), ("8b", 8.0)])
def test_sizes_have_about_the_parameters_of_their_name(size, billions):
    experiment, _ = load([BASE, CONFIGS / "sizes" / f"{size}.gin"], [])
    _, parameters = abstract_model(experiment.model, experiment.memory)
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(parameters))
    assert 0.9 < count / (billions * 1e9) < 1.1


def test_the_memory_sizes_are_the_papers():
    sizes = {path.stem: load([BASE, path], [])[0].memory.size for path in (CONFIGS / "memory").glob("*.gin")}
    assert sizes == {"none": 0, "1536": 1536, "8k": 8192, "65k": 65536, "131k": 131072, "262k": 262144}


def test_run_settings_can_be_built_in_python():
    assert load([], [])[0] == Experiment()


def start(workdir: Path, bindings: list[str]) -> Experiment:
    """Does what `memorizing train` does with settings before it computes."""
    experiment, text = open_workdir(workdir, [BASE], bindings)
    atomic_write(workdir / CONFIG_FILE, text)
    return experiment


def test_a_workdir_needs_settings_once(tmp_path):
    run = tmp_path / "run"
    with pytest.raises(ConfigError, match=r"holds no run yet, and no --gin_file"):
        open_workdir(run, [], [])
    began = start(run, ["NUM_STEPS = 80"])
    assert open_workdir(run, [], [])[0] == began
    (run / "checkpoints" / "40.orbax-checkpoint-tmp").mkdir(parents=True)  # of a save that a kill cut short
    assert start(run, ["Model.layers = 9"]).model.layers == 9  # nothing trained yet
    (run / "checkpoints" / "40").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"Model\.layers = 12, but the run in .* started with 9"):
        open_workdir(run, [BASE], [])
    with pytest.raises(ConfigError, match=r"Memory\.eviction = 'none', but the run in .* started with 'fifo'"):
        open_workdir(run, [], ["Memory.eviction = 'none'"])
    with pytest.raises(ConfigError, match=r"Model\.heads = 4, but the model in .* was trained with 8"):
        load_trained(run, [], ["Model.heads = 4"])
    assert load_trained(run, [], ["MEMORY_SIZE = 512"]).memory.size == 512


def test_a_run_can_be_made_longer_unless_its_schedule_would_change(tmp_path):
    said = []
    for schedule, refused in (("rsqrt", False), ("cosine", True)):
        run = tmp_path / schedule
        start(run, [f"Optimizer.schedule = '{schedule}'"])
        (run / "checkpoints" / "40").mkdir(parents=True)
        if refused:
            with pytest.raises(ConfigError, match=r"decay_steps = 600000, but .* \"Optimizer\.decay_steps = 500000\""):
                open_workdir(run, [], ["NUM_STEPS = 600_000"])
        kept = ["Optimizer.decay_steps = 500000"] if refused else []
        longer, _ = open_workdir(run, [], ["NUM_STEPS = 600_000", *kept], said.append)
        assert longer.training.steps == 600_000
    assert said == ["Training.steps = 600000 from here on; the run started with 500000"] * 2


@pytest.mark.parametrize("header", ["# Every setting of this run.", "# memorizing run, format 1: every setting"])
def test_a_run_of_another_format_is_refused(header, tmp_path):
    start(tmp_path, [])
    text = (tmp_path / CONFIG_FILE).read_text()
    (tmp_path / CONFIG_FILE).write_text(header + text[text.index("\n") :])
    (tmp_path / "checkpoints" / "40").mkdir(parents=True)
    refused = r"config\.gin is of format 1, but this version of memorizing reads format 2\. Train the run again"
    with pytest.raises(ConfigError, match=refused):
        load_trained(tmp_path, [], [])
    with pytest.raises(ConfigError, match=refused):
        open_workdir(tmp_path, [], [])


def test_sections_are_named_after_their_classes():
    for name, settings in Experiment().sections.items():
        assert type(settings).__name__ in (name, f"{name}Settings")


HUGE = 10**12
WHOLE = sorted(
    f"{name}.{field.name}"
    for name, kind in SECTIONS.items()
    for field in dataclasses.fields(kind)
    if field.type in (int, int | None) and field.repr
)


@pytest.mark.parametrize("setting", WHOLE)
def test_a_size_beyond_all_machines_is_refused_at_once_or_harmless(setting):
    """Loading makes and loops over nothing of the size that a setting names."""
    start = time.process_time()
    for value in (HUGE, 2**63 - 1):
        try:
            load([BASE], [f"{setting} = {value}"])
        except ConfigError as error:
            assert setting in str(error) or "Batch." in str(error), error
    assert time.process_time() - start < 2


def test_sizes_that_become_arrays_have_bounds():
    for setting in (
        "Model.layers",
        "Model.heads",
        "Model.embedding_size",
        "Memory.size",
        "Batch.size",
        "Training.steps",
    ):
        with pytest.raises(ConfigError, match=rf"{setting} = 1000000000000: must be at most [\d,]+$"):
            load([BASE], [f"{setting} = {HUGE}"])
