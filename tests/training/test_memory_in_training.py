"""Ways to use a memory in training, by real runs: each option bit for bit the same when stopped and gone on with.

A first run never had a memory (`without`). Others begin with its parameters, or with those of a run that did.
"""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from memorizing.api import open_reader
from memorizing.cli import main
from memorizing.data.tokens import PreparedTokens
from memorizing.errors import InputError
from memorizing.memory.bank import Bank, empty_bank, readable, resize, valid
from memorizing.memory.search.exact import Exact
from memorizing.memory.settings import MemorySettings
from memorizing.memory.slot_table import SlotTable
from memorizing.model.memory_attention import attend_to_memory
from memorizing.model.parameters import by_path
from memorizing.model.settings import ModelSettings
from memorizing.model.transformer import create_model
from memorizing.parallel.mesh import MeshSettings, make_mesh
from memorizing.storage.init_from import begin_from
from memorizing.training.memory_dropout import sizes
from memorizing.training.memory_schedule import MemorySchedule
from tests.tiny_run import SETTINGS, write_texts

pytestmark = pytest.mark.large

MODEL = dict(
    vocabulary_size=259, layers=2, embedding_size=16, heads=2, head_size=8, feed_forward_size=32, dtype="float32",
    gate_bias=0.0,
)  # fmt: skip
NO_MEMORY = ("MEMORY_SIZE = 0", "Model.memory_layers = ()")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with settings, tokens, and a run without a memory; programs that are alike are compiled once."""
    folder = tmp_path_factory.mktemp("training")
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = [getattr(jax.config, name) for name in names]
    jax.config.update(names[0], str(folder / "compiled"))
    jax.config.update(names[1], 0.0)
    (folder / "settings.gin").write_text(SETTINGS)
    raw = write_texts(folder / "raw")
    given = [f"--gin_file={folder / 'settings.gin'}", f"--raw={raw}"]
    assert main(["prepare", *given, f"--out={folder / 'data'}"]) == 0
    train(folder, "without", *NO_MEMORY)
    yield folder
    for name, value in zip(names, before, strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # else JAX goes on writing to it, whatever the settings say


def train(place: Path, name: str, *bindings: str, steps: int = 8, status: int = 0) -> Path:
    """Trains to `steps` in a folder of this name."""
    own = (f"DATA = '{place / 'data'}'", f"NUM_STEPS = {steps}", "CHECKPOINT_EVERY = 4", "Optimizer.warmup_steps = 1")
    given = [f"--gin_param={binding}" for binding in (*own, *bindings)]
    arguments = ["train", f"--gin_file={place / 'settings.gin'}", *given, f"--workdir={place / name}"]
    assert main(arguments) == status
    return place / name


def saved(run: Path, step: int) -> dict:
    """Returns all arrays of a checkpoint by path."""
    folder = run / "checkpoints" / str(step)
    items = [path.name for path in folder.iterdir() if path.name in ("parameters", "progress", "memory")]
    with ocp.StandardCheckpointer() as checkpointer:
        tree = {item: checkpointer.restore((folder / item).absolute()) for item in items}
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


def assert_same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys() and len(one) > 20
    for path in one:
        np.testing.assert_array_equal(one[path], other[path], err_msg=path)


@pytest.fixture(scope="module")
def retrofitted(place) -> Path:
    """A run that adds a memory to a run without one and trains only its gates."""
    source = f"Training.init_from = '{place / 'without'}'"
    return train(place, "retrofitted", source, "Optimizer.trainable = ('gates', '*/scale_H')", "Model.key_shift = True")


def test_a_memory_is_added_and_only_the_named_parts_train(place, retrofitted, capsys):
    source = saved(place / "without", 8)
    found = saved(retrofitted, 8)
    drawn = {f"parameters/layers/1/attention/{name}" for name in ("gate/bias_H", "scale_H", "shift_HD")}
    assert {path for path in found if path.startswith("parameters/")} - source.keys() == drawn
    for path, array in source.items():
        if path.startswith("parameters/"):
            assert array.tobytes() == found[path].tobytes(), path
    fresh = by_path(create_model(ModelSettings(**MODEL, memory_layers=(2,), key_shift=True), MemorySettings(), 0)[1])
    moved = {path for path in drawn if (found[path] != fresh[path.removeprefix("parameters/")]).any()}
    assert moved == drawn - {"parameters/layers/1/attention/shift_HD"}
    kept = [path for path in found if "optimizer" in path and found[path].ndim]
    assert len(kept) == 4 and all(path.endswith(("gate/bias_H", "scale_H")) for path in kept)  # two moments of each
    told = json.loads((retrofitted / "from.json").read_text())
    assert (told["run"], told["step"], told["memory"]) == (str(place / "without"), 8, None)


def test_a_resumed_run_does_not_read_init_from_again(place, retrofitted, tmp_path, capsys):
    parts = tmp_path / "parts"
    shutil.copytree(retrofitted, parts)
    shutil.rmtree(parts / "checkpoints" / "8")
    (place / "without").rename(place / "away")
    try:
        assert main(["train", f"--workdir={parts}"]) == 0
    finally:
        (place / "away").rename(place / "without")
    output = capsys.readouterr().out
    assert "resuming after step 4" in output and "begins with" not in output
    assert " parameters, 4 of them trained, a memory of 64" in output
    assert_same(saved(parts, 8), saved(retrofitted, 8))


REFUSED = {
    "another model": (("Model.positions = 'rope'",), "Model.positions = 'rope', but the model of Training.init_from"),
    "a pattern that matches nothing": (
        ("Optimizer.trainable = ('gates', 'layers/2/*')",),
        "'layers/2/*' matches no parameter",
    ),
    "a factor of nothing": (
        ("Optimizer.learning_rate_multipliers = (('index', 2.0),)",),
        "'index' matches no parameter",
    ),
    "negatives of one memory": (
        ("Training.prebuilt_memory = 'some'", "Memory.writes = 'never'", "Training.negative_rows = 1"),
        "Training.negative_rows = 1 with Memory.writes = 'never'",
    ),
    "a snapshot across documents": (
        ("Training.prebuilt_memory = 'some'", "Memory.clear_at_documents = False"),
        "another layout than any snapshot",
    ),
    "an index of too many features": (
        ("Model.index_size = 7", "Memory.proposer = 'learned'"),
        "Model.index_size = 7 features would never be used",
    ),
    "no such step": (("Training.init_step = 3",), "has checkpoints of steps 4, 8"),
    "a snapshot of nothing": (("Training.prebuilt_memory = 'nowhere'",), "nowhere holds no memory snapshot"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_a_new_run_cannot_use_are_refused_by_name(place, name, capsys):
    bindings, words = REFUSED[name]
    train(place, "refused", f"Training.init_from = '{place / 'without'}'", *bindings, status=2)
    assert words in capsys.readouterr().err
    shutil.rmtree(place / "refused", ignore_errors=True)


@pytest.mark.parametrize(
    ("run", "change", "words"),
    [
        (
            "without",
            {"feed_forward_size": 48},
            r"other shapes: layers/0/feed_forward/in_EF of \(16, 32\) \(here \(16, 48\)\)",
        ),
        ("without", {"layers": 3}, "lacks layers/2/attention/key_EHD"),
        ("retrofitted", {"memory_layers": ()}, "has additional parameters: layers/1/attention/gate/bias_H"),
    ],
)
def test_parameters_that_do_not_fit_are_named(place, retrofitted, run, change, words):
    settings = ModelSettings(**{**MODEL, "memory_layers": (), **change})
    fresh = create_model(settings, MemorySettings(size=0), 0)[1]
    with pytest.raises(InputError, match=words):
        begin_from(str(place / run), 0, "", settings, PreparedTokens(place / "data"), fresh, print)


def test_another_vocabulary_is_refused(place, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(place / "without", other)
    told = json.loads((other / "data.json").read_text())
    (other / "data.json").write_text(json.dumps(told | {"vocabulary": "0" * 64}))
    train(place, "refused", f"Training.init_from = '{other}'", status=2)
    assert "data.json says vocabulary = " in capsys.readouterr().err


GROWS = "Training.memory_growth = ((4, 32), (8, 64))"
DROPS = ("Training.memory_dropout = 0.5", "Memory.report_recall = True")


@pytest.fixture(scope="module")
def snapshot(place, retrofitted) -> Path:
    (place / "text.txt").write_text("eine alte Geschichte und so fort, one two three " * 3)
    out = place / "snapshot"
    assert main(["memorize", f"--workdir={retrofitted}", f"--document={place / 'text.txt'}", f"--out={out}"]) == 0
    return out


@pytest.fixture(scope="module")
def beginning(place, retrofitted, snapshot) -> tuple[str, ...]:
    """The settings of a run whose documents begin with the snapshot."""
    run, memory = f"Training.init_from = '{retrofitted}'", f"Training.prebuilt_memory = '{snapshot}'"
    return (run, memory, "Model.key_shift = True", *DROPS)


@pytest.fixture(scope="module")
def whole(place, beginning) -> Path:
    """Twelve steps with everything: parameters and memory of others, a memory that grows, memory dropout."""
    return train(place, "whole", GROWS, *beginning, "Training.checkpoints_kept = 3", steps=12)


@pytest.mark.parametrize("stopped", [4, 8])
def test_a_run_with_every_option_resumes_exactly_at_a_boundary(whole, stopped, tmp_path):
    parts = tmp_path / "parts"
    shutil.copytree(whole, parts)
    for step in range(stopped + 4, 16, 4):
        shutil.rmtree(parts / "checkpoints" / str(step))
    assert main(["train", f"--workdir={parts}"]) == 0
    assert_same(saved(parts, 12), saved(whole, 12))
    banks = {step: saved(whole, step).get("memory/0/keys_BHMD", np.zeros((8, 2, 0, 8))) for step in (4, 8, 12)}
    assert [bank.shape[2] for bank in banks.values()] == [0, 32, 64]
    lines = [json.loads(line) for line in (parts / "metrics.jsonl").read_text().splitlines()]
    assert [line["memory_fill"] > 0 for line in lines] == [False, True, True]
    # How many updates ago a key was computed means nothing where documents begin with a snapshot's.
    assert "recall/layer_2" in lines[2] and "age/layer_2" not in lines[2]


def test_growing_equals_restoring_into_a_larger_memory(place, beginning, whole, capsys):
    small = (*beginning, "Training.memory_from_step = 4")
    train(place, "restored", *small, "MEMORY_SIZE = 32", steps=8)
    restored = train(place, "restored", *small, "MEMORY_SIZE = 64", steps=12)
    assert "its memory of 32 tokens moved to one of 64" in capsys.readouterr().out
    assert_same(saved(restored, 12), saved(whole, 12))


@pytest.fixture(scope="module")
def frozen_run(place, beginning) -> Path:
    own = [each for each in beginning if each not in DROPS]
    return train(place, "frozen", *own, "Memory.writes = 'never'")


def test_a_memory_that_is_never_written_stays_prebuilt(frozen_run, snapshot):
    """Frozen after a prefill pass: the snapshot is made by one run, and only read by the next."""
    frozen = saved(frozen_run, 8)
    with ocp.StandardCheckpointer() as checkpointer:
        arrays = checkpointer.restore((snapshot / "arrays").absolute())
    for name in ("keys_BHMD", "values_BHMD"):
        kept, found = np.asarray(arrays[f"banks.0.{name}"]), frozen[f"memory/0/{name}"]
        turned = np.roll(kept, int(frozen["memory/0/cursor"]) - int(arrays["banks.0.cursor"]), axis=2)
        np.testing.assert_array_equal(found, np.repeat(turned, len(found), axis=0))
        assert np.abs(found).max() > 0
    assert (frozen["memory/0/length_B"] == arrays["banks.0.length_B"]).all()


def test_a_run_that_never_writes_is_evaluated_with_its_snapshot(place, frozen_run, snapshot, tmp_path, capsys):
    run, text = f"--workdir={frozen_run}", f"--document={place / 'text.txt'}"
    with pytest.raises(InputError, match="A snapshot needs one set of parameters"):
        reader = open_reader(frozen_run, gin_params=["Memory.writes = 'segment'"])
        reader.load(snapshot)
        reader.save(tmp_path / "mixed")
    assert main(["evaluate", run]) == 2
    assert f"so no query finds anything. Name it with --memory={snapshot}, or set" in capsys.readouterr().err
    for command, *more in (["inspect"], ["memorize", f"--out={tmp_path / 'out'}"], ["generate", "--tokens=2"]):
        assert main([command, run, text, *more]) == 2
        assert "Memory.writes = 'never' without a snapshot: the memory is empty" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(["evaluate", run, "--memory_size=0,64", f"--memory={snapshot}"]) == 0
    figures = json.loads((frozen_run / "evaluations" / "test-memory-64-from-snapshot.json").read_text())
    assert figures["prebuilt_tokens"] == 64 and figures["gain"]["nats_per_token"] != 0
    assert main(["generate", run, text, f"--memory={snapshot}", "--tokens=2"]) == 0


def test_a_sweep_of_runs_that_only_read_evaluates_them_with_their_snapshot(place, beginning, snapshot):
    own = [each for each in beginning if each not in DROPS]
    settings = (f"DATA = '{place / 'data'}'", "NUM_STEPS = 4", "CHECKPOINT_EVERY = 4", *own, "Memory.writes = 'never'")
    given = [f"--gin_param={binding}" for binding in settings]
    out = place / "sweep"
    over = ["--over", "Optimizer.learning_rate=0.01"]
    assert main(["sweep", f"--gin_file={place / 'settings.gin'}", *given, *over, f"--out={out}"]) == 0
    (file,) = out.glob("points/*/evaluations/*.json")
    assert json.loads(file.read_text())["prebuilt_tokens"] == 64
    assert (out / "table.csv").exists()


def test_settings_without_effect_are_refused_before_training(place, retrofitted, capsys):
    train(place, "empty", "Memory.writes = 'never'", status=2)
    assert "the memory would stay empty. Give a snapshot" in capsys.readouterr().err
    train(place, "nothing", "MEMORY_SIZE = 0", "Optimizer.trainable = ('gates',)", status=2)
    assert "so nothing would be trained. Set Memory.size" in capsys.readouterr().err
    assert not (place / "empty").exists() and not (place / "nothing").exists()


def test_a_snapshot_of_a_model_fits_it_with_an_index_too(place, snapshot, retrofitted):
    own = (f"Training.init_from = '{retrofitted}'", "Model.key_shift = True", "Model.index_size = 2")
    run = train(place, "index-and-snapshot", *own, f"Training.prebuilt_memory = '{snapshot}'",
                "Optimizer.trainable = ('index',)")  # fmt: skip
    reader = open_reader(run)
    reader.load(snapshot)
    assert reader.tokens_in_memory == 64 and reader.read("one two three " * 10)


def test_a_prebuilt_memory_that_is_never_written_does_not_grow(place, beginning, capsys):
    given = ("Memory.writes = 'never'", "Memory.clear_at_documents = False")
    train(place, "once", GROWS, *beginning[:3], *given, steps=12, status=2)
    assert "it would keep its first size. Set Training.memory_growth = ()" in capsys.readouterr().err


def test_an_index_can_be_trained_for_a_finished_model(place, retrofitted):
    """Alone, so that nothing else changes; then searches use it, and report what it finds."""
    tuned = train(
        place, "indexed", f"Training.init_from = '{retrofitted}'", "Model.key_shift = True", "Model.index_size = 2",
        "Optimizer.trainable = ('index',)", "Memory.report_recall = True", "Memory.proposer = 'learned'",
        "Memory.proposals = 6",
    )  # fmt: skip
    before, found = (saved(run, 8) for run in (retrofitted, tuned))
    learned = {f"parameters/layers/1/attention/index_{name}_HDP" for name in ("query", "key")}
    assert {path for path in found if path.startswith("parameters/")} - before.keys() == learned
    for path in before:
        if path.startswith("parameters/"):
            assert before[path].tobytes() == found[path].tobytes(), path
    # From every few queries of eight steps; of 64 slots, six that are drawn have a tenth of the four nearest.
    assert main(["evaluate", f"--workdir={tuned}"]) == 0
    figures = json.loads((tuned / "evaluations" / "test-memory-64.json").read_text())
    assert 0.2 < figures["recall"] < 1


def test_another_snapshot_than_the_runs_is_refused(place, whole, snapshot, capsys):
    kept = (snapshot / "manifest.json").read_text()
    (snapshot / "manifest.json").write_text(kept.replace("text.txt", "other.txt"))
    arguments = ["train", f"--workdir={whole}", "--gin_param=NUM_STEPS = 16"]
    assert main(arguments) == 2
    assert "is not the snapshot that the run in" in capsys.readouterr().err
    (snapshot / "manifest.json").write_text(kept)


def test_a_snapshot_of_other_parameters_than_init_from_is_refused(place, whole, snapshot, capsys):
    train(place, "stale", f"Training.init_from = '{whole}'", f"Training.prebuilt_memory = '{snapshot}'",
          "Model.key_shift = True", status=2)  # fmt: skip
    error = capsys.readouterr().err
    assert "other parameters, of step 8" in error and f"those of Training.init_from = '{whole}', step 12" in error


def test_a_shared_bank_is_added_to_a_model_without_a_memory_and_stays(place, capsys):
    shared = ("Model.memory_layers = (1, 2)", "Model.banks_of = (2, 2)")
    run = train(place, "shared", f"Training.init_from = '{place / 'without'}'", *shared)
    assert "newly initialized, for a memory that it lacks: layers/0/attention/gate/bias_H" in capsys.readouterr().out
    train(place, "shared-again", f"Training.init_from = '{run}'", *shared)
    assert "newly initialized" not in capsys.readouterr().out


def test_settings_that_cannot_resume_do_not_replace_the_saved_ones(retrofitted, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(retrofitted, run)
    before = (run / "config.gin").read_bytes()
    given = ["--gin_param=NUM_STEPS = 12", "--gin_param=Memory.proposer = 'learned'"]
    assert main(["train", f"--workdir={run}", *given]) == 2
    assert (run / "config.gin").read_bytes() == before, capsys.readouterr().err


def test_drift_of_layers_above_a_memory_that_changed_its_size_is_refused(place, capsys):
    """A lower layer's reads from a smaller memory are not repeated; the drift of the lowest layer is still known."""
    both = ("Model.memory_layers = (1, 2)", "Optimizer.learning_rate = 1e-9")
    for name, bindings, status in (
        ("late", (*both, "Training.memory_from_step = 4"), 2),
        ("late-lowest", ("Training.memory_from_step = 4",), 0),
        ("two", both, 0),
    ):
        run = train(place, name, *bindings)
        assert main(["drift", f"--workdir={run}", f"--json={place / 'drift.json'}"]) == status
        error = capsys.readouterr().err
        assert ("(Training.memory_from_step = 4). With such settings" in error) == bool(status), error
    for layer in json.loads((place / "drift.json").read_text())["layers"].values():
        held = [each for each, tokens in zip(layer["cosine"], layer["tokens"], strict=True) if tokens]
        np.testing.assert_allclose(held, 1, atol=1e-5)


def test_keys_drift_with_the_weights_and_not_without(place, retrofitted, capsys):
    """Gates and query scales are no part of keys: trained alone, all keys stay what they were."""
    moving = train(place, "moving", "Optimizer.learning_rate = 0.03", "Memory.report_recall = True")
    lines = [json.loads(line) for line in (moving / "metrics.jsonl").read_text().splitlines()]
    assert 1 <= lines[-1]["age/layer_2"] <= 4
    found = {}
    for run in (retrofitted, moving):
        assert main(["drift", f"--workdir={run}", f"--json={place / 'drift.json'}"]) == 0
        found[run] = json.loads((place / "drift.json").read_text())["layers"]["2"]
    assert "layer 2: age in segments" in capsys.readouterr().out
    for head in range(2):
        still, drifting = (
            [each[head] for each, tokens in zip(one["cosine"], one["tokens"], strict=True) if tokens]
            for one in found.values()
        )
        np.testing.assert_allclose(still, 1, atol=1e-5)
        assert 0.2 < drifting[-1] < drifting[0] < 0.9999 and len(drifting) >= 3


def test_each_entry_of_the_growth_holds_from_its_step_on():
    schedule = MemorySchedule(((4, 32), (8, 64)))
    assert [schedule.at(step) for step in (0, 3, 4, 7, 8, 100)] == [0, 0, 32, 32, 64, 64]
    assert [schedule.after(step) for step in (0, 4, 5, 8, 9)] == [0, 0, 32, 32, 64]
    assert MemorySchedule(((0, 8),)).after(0) == 8 and MemorySchedule(()).at(7) == 0


def test_dropped_sizes_are_spread_over_every_doubling_and_are_the_same_on_any_mesh():
    """P(m >= n) = 1 - log(n + 1) / log(M + 1) for the share of rows that drop; all slots for the others."""
    slots, share, rows = 1023, 0.25, 80_000
    drawn = np.asarray(sizes(jax.random.key(3), rows, slots, share))
    assert drawn.min() == 0 and drawn.max() == slots
    for n in (1, 3, 15, 255, 1000):
        expected = 1 - share * np.log(n + 1) / np.log(slots + 1)
        np.testing.assert_allclose((drawn >= n).mean(), expected, atol=0.006)
    mesh = make_mesh(MeshSettings())
    with jax.set_mesh(mesh):
        spread = jax.jit(
            lambda rng: sizes(rng, rows, slots, share),
            out_shardings=jax.NamedSharding(mesh, jax.sharding.PartitionSpec("data")),
        )(jax.random.key(3))
    np.testing.assert_array_equal(spread, drawn)
    assert (np.asarray(sizes(jax.random.key(3), 100, slots, 0.0)) == slots).all()


def test_rows_with_memory_dropout_read_like_a_smaller_memory():
    rng = np.random.default_rng(0)
    keys, values = rng.normal(size=(2, 3, 2, 32, 4)).astype(np.float32)
    bank = empty_bank(3, 2, 4, MemorySettings(size=32, neighbors=4, dtype="float32"))
    bank = bank._replace(
        keys_BHMD=jnp.asarray(keys),
        values_BHMD=jnp.asarray(values),
        cursor=jnp.int32(8),
        length_B=jnp.array([32, 32, 8]),
    )
    query = jnp.asarray(rng.normal(size=(3, 2, 8, 4)), jnp.float32)
    limited = bank._replace(visible_B=jnp.array([16, 0, 16]))
    assert readable(limited).tolist() == valid(limited).sum(1).tolist() == [16, 0, 8]
    newest = SlotTable(jnp.array([[3, 9, -1, 7]]), *[jnp.array([10])] * 5)
    kept = Bank(*[jnp.zeros((1, 2, 4, 4))] * 2, jnp.int32(0), jnp.array([3]), slot_table=newest)
    assert valid(kept._replace(visible_B=jnp.array([2]))).tolist() == [[False, True, False, True]]
    read, found_BHN, *_ = attend_to_memory(query, limited, Exact(), 4)
    small = attend_to_memory(query, resize(bank, 16, 8), Exact(), 4).output
    both = jnp.array([0, 2])
    np.testing.assert_allclose(read.out_BHND[both], small.out_BHND[both], rtol=1e-5)
    assert found_BHN[both].all() and not found_BHN[1].any() and not np.asarray(read.out_BHND[1]).any()
