"""An imported model is a run like any other: read, evaluated, written with, looked into; and exported as it came."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from memorizing import open_reader
from memorizing.cli import main
from memorizing.config import load
from memorizing.data.tokens import PreparedTokens
from memorizing.errors import InputError
from memorizing.evaluation.evaluate import restore
from memorizing.memory.settings import MemorySettings
from memorizing.model.carry import empty_carry
from memorizing.model.parameters import by_path
from memorizing.model.settings import ModelSettings
from memorizing.model.transformer import abstract_model, apply_model, constant_gates, create_model
from memorizing.parallel.mesh import MeshSettings, make_mesh
from memorizing.pretrained.exporting import export
from memorizing.pretrained.importing import import_pretrained
from memorizing.runs import load_trained
from memorizing.shapes import Batch
from memorizing.storage.checkpoints import Checkpoints
from memorizing.storage.workdir import record_data
from tests.pretrained_folder import CONFIG, TEXT, tensors, tokenizer, write_folder
from tests.tiny_run import write_texts

N = 16
BINDINGS = [
    "Model.dtype = 'float32'", "Memory.dtype = 'float32'", "Memory.size = 64", "Memory.neighbors = 4",
    f"Batch.segment_length = {N}", "Batch.size = 8", "Evaluation.batch_size = 8", "Evaluation.segments_per_call = 2",
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A run with a memory in layer 2, `run`, of `folder`; and a text, `text.txt`."""
    place = tmp_path_factory.mktemp("pretrained")
    folder = write_folder(place / "folder")
    (folder / "generation_config.json").write_text("{}")
    (place / "text.txt").write_text(TEXT[:600])
    given = [f"--gin_param={binding}" for binding in BINDINGS]
    assert main(["import", f"--from={folder}", f"--workdir={place / 'run'}", "--memory_layers=2", *given]) == 0
    return place


def parameters_of(run: Path):
    mesh = make_mesh(MeshSettings(1), jax.devices()[:1])
    return restore(run, load_trained(run, [], []).model, mesh)[0]


def test_with_shut_gates_the_model_equals_the_pretrained_one(place):
    """Over several segments, so that there is something in the memory, which open gates do read."""
    it = load_trained(place / "run", [], [])
    parameters = parameters_of(place / "run")
    assert not it.model.normalize_memory_layers
    np.testing.assert_allclose(
        constant_gates(abstract_model(it.model, it.memory)[0], parameters)[2], 1 / (1 + np.exp(4)), rtol=1e-5
    )
    plain = dataclasses.replace(it.model, memory_layers=())
    bare = {**parameters, "layers": {number: dict(layer) for number, layer in parameters["layers"].items()}}
    new = {"gate"}
    bare["layers"][1]["attention"] = {n: v for n, v in parameters["layers"][1]["attention"].items() if n not in new}
    tokens = np.random.default_rng(0).integers(0, 290, (2, 3 * N)).astype(np.int32)

    def read(model, memory, parameters):
        run = jax.jit(functools.partial(apply_model, abstract_model(model, memory)[0]))
        carry, found = empty_carry(model, memory, 2, N), []
        for first in range(0, 3 * N, N):
            part = tokens[:, first : first + N]
            batch = Batch(part, part, np.ones(part.shape, bool), np.full(2, first == 0))
            logits, carry = run(parameters, batch, carry)
            found.append(logits)
        return np.concatenate(found, axis=1)

    expected = read(plain, dataclasses.replace(it.memory, size=0), bare)
    for bias, is_shut in ((-100.0, True), (0.0, False)):
        parameters["layers"][1]["attention"]["gate"]["bias_H"] = np.full(4, bias, np.float32)
        found = read(it.model, it.memory, parameters)
        assert np.allclose(found, expected, atol=1e-5) == is_shut


def test_an_imported_run_uses_its_own_vocabulary(place, capsys):
    reader = open_reader(place / "run")
    assert reader.read(TEXT) == len(tokenizer().encode(TEXT).ids)
    written = reader.write("the cat", tokens=30, seed=0)
    assert written and "<|" not in written
    assert main(["generate", f"--workdir={place / 'run'}", f"--document={place / 'text.txt'}", "--tokens=3"]) == 0
    assert main(["evaluate", f"--workdir={place / 'run'}"]) == 2
    assert "but only a vocabulary. Give prepared tokens (--data" in capsys.readouterr().err


def test_tokens_of_a_pretrained_vocabulary_start_with_its_begin_token(place, capsys):
    raw = write_texts(place / "raw")
    settings = [f"--gin_param=Prepare.vocabulary_from = '{place / 'run/vocabulary'}'"]
    data = ["prepare", f"--raw={raw}", f"--out={place / 'data'}", *settings]
    assert main(data) == 2  # the kind of vocabulary is not said
    assert "Set Prepare.vocabulary = 'pretrained'" in capsys.readouterr().err
    assert main([*data, "--gin_param=Prepare.vocabulary = 'pretrained'"]) == 0
    tokens = PreparedTokens(place / "data")
    assert tokens.manifest["vocabulary"]["begin"] == 290 and tokens.split("test").begin == 290
    assert main(["evaluate", f"--workdir={place / 'run'}", f"--data={place / 'data'}", "--memory_size=0,64"]) == 0
    figures = json.loads((place / "run/evaluations/folder-test-memory-64.json").read_text())
    # Of random weights: near that of a guess, and not the same without memory.
    assert 100 < figures["perplexity"] < 2000 and figures["checkpoint_step"] == 0
    # By hand: the first segment of a document, predicted from the begin token on.
    it = load_trained(place / "run", [], [])
    document = tokens.split("test").read(0, 0, N)
    inputs = np.concatenate([[290], document[:-1]])[None].astype(np.int32)
    graph, memory = abstract_model(it.model, it.memory)[0], dataclasses.replace(it.memory, size=0)
    graph = abstract_model(it.model, memory)[0]
    mask = np.ones(inputs.shape, bool)
    logits, _ = apply_model(graph, parameters_of(place / "run"), Batch(inputs, inputs, mask, np.array([True])),
                            empty_carry(it.model, memory, 1, N))  # fmt: skip
    nats = -jax.nn.log_softmax(logits[0])[np.arange(N), document]
    assert main(["evaluate", f"--workdir={place / 'run'}", f"--data=x={place / 'data'}", "--per_token"]) == 0
    found = np.load(place / "run/evaluations/x-test-memory-64.npz")["nats"][:N]
    np.testing.assert_allclose(found, nats, atol=1e-4)


def test_a_text_file_can_be_inspected(place):
    run, text = place / "run", place / "text.txt"
    assert main(["inspect", f"--workdir={run}", f"--document={text}", f"--out={place / 'page.html'}"]) == 0
    lines = (place / "page.jsonl").read_text().splitlines()
    assert "".join(json.loads(line).get("text", "") for line in lines).count("the") > 10 or len(lines) > 50


def test_a_run_of_parameters_alone_cannot_resume_but_can_initialize_another(place, capsys):
    assert main(["prepare", f"--raw={place / 'raw'}", f"--out={place / 'data'}",
                 f"--gin_param=Prepare.vocabulary_from = '{place / 'run/vocabulary'}'",
                 "--gin_param=Prepare.vocabulary = 'pretrained'"]) == 0  # fmt: skip
    given = [f"--gin_file={place / 'run/config.gin'}", f"--gin_param=Training.data = '{place / 'data'}'"]
    assert main(["train", f"--workdir={place / 'run'}", *given]) == 2
    assert "holds only parameters" in capsys.readouterr().err
    given += [f"--gin_param={binding}" for binding in (
        f"Training.init_from = '{place / 'run'}'", "Training.steps = 8", "Training.checkpoint_every = 8",
        "Batch.segments_per_call = 4", "Optimizer.trainable = ('memory_layers',)", "Optimizer.warmup_steps = 1",
    )]  # fmt: skip
    assert main(["train", f"--workdir={place / 'tuned'}", *given]) == 0
    before, after = (by_path(parameters_of(place / name)) for name in ("run", "tuned"))
    moved = {path for path in before if not np.array_equal(before[path], after[path])}
    assert moved and all(path.startswith("layers/1/") for path in moved)
    export(place / "tuned", place / "tuned-out", ["gates"])  # with all that came with the model that it began with
    assert json.loads((place / "tuned-out/config.json").read_text()) == CONFIG
    for name in ("tokenizer.json", "generation_config.json"):
        assert (place / "tuned-out" / name).read_bytes() == (place / "folder" / name).read_bytes()


def test_export_and_import_are_inverse(place, tmp_path, capsys):
    run = place / "run"
    assert main(["export", f"--workdir={run}", f"--out={tmp_path / 'out'}"]) == 2
    assert (
        "gates (and with them the memory of layers 2)" in (said := capsys.readouterr().err) and "--omit=gates" in said
    )
    assert main(["export", f"--workdir={run}", f"--out={tmp_path / 'out'}", "--omit=gates"]) == 0
    assert "left out: gates" in capsys.readouterr().out
    exported = load_file(tmp_path / "out/model.safetensors")
    assert exported.keys() == tensors().keys()
    for name, tensor in tensors().items():
        np.testing.assert_array_equal(exported[name], tensor)
    assert json.loads((tmp_path / "out/config.json").read_text()) == CONFIG
    for name in ("tokenizer.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (place / "folder" / name).read_bytes()
    again = ["export", f"--workdir={run}", f"--out={tmp_path / 'out'}", "--omit=gates"]
    assert main(again) == 0 and f"{tmp_path / 'out'} already holds this model" in capsys.readouterr().out
    config = (tmp_path / "out/config.json").read_text()
    (tmp_path / "out/config.json").write_text("{}")
    assert main(again) == 2 and "holds another model" in capsys.readouterr().err  # nothing is replaced
    assert (tmp_path / "out/config.json").read_text() == "{}"
    (tmp_path / "out/config.json").write_text(config)
    import_pretrained(tmp_path / "out", tmp_path / "again", [2], [], BINDINGS)
    jax.tree.map(np.testing.assert_array_equal, parameters_of(tmp_path / "again"), parameters_of(run))
    with pytest.raises(InputError, match="exists already"):
        import_pretrained(tmp_path / "out", tmp_path / "again", [2], [], BINDINGS)


def own_run(folder: Path, data: Path, **settings) -> Path:
    """A run as training leaves one, of settings of one's own."""
    model = ModelSettings(
        **{"vocabulary_size": 300, "layers": 1, "embedding_size": 8, "heads": 2, "head_size": 4, "feed_forward_size": 8,
           "memory_layers": (), "dtype": "float32"} | settings
    )  # fmt: skip
    lines = [f"Model.{field.name} = {getattr(model, field.name)!r}" for field in dataclasses.fields(model)]
    record_data(folder, PreparedTokens(data))
    _, text = load([], [*lines, "Memory.size = 0", f"Training.data = {str(data)!r}"])
    (folder / "config.gin").write_text(text)
    with Checkpoints(folder, keep=1) as checkpoints:
        checkpoints.save_parameters(0, create_model(model, MemorySettings(size=0), 0)[1])
    return folder


LLAMA = {"positions": "rope", "feed_forward": "swiglu", "embedding_scale": 1.0, "tie_embeddings": False}


def test_a_model_trained_here_is_exported_if_its_architecture_exists(place, tmp_path, capsys):
    data = place / "run/vocabulary"
    run = own_run(tmp_path / "run", data, **LLAMA)
    export(run, tmp_path / "out")
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (place / "folder/tokenizer.json").read_bytes()
    with pytest.raises(InputError, match=r"--omit=gates: .* has no gates. Leave that out"):
        export(run, tmp_path / "none", ["gates"])
    assert json.loads((tmp_path / "out/config.json").read_text())["bos_token_id"] == 290
    import_pretrained(tmp_path / "out", tmp_path / "again", [], [], ["Model.dtype = 'float32'"])
    jax.tree.map(np.testing.assert_array_equal, parameters_of(tmp_path / "again"), parameters_of(run))
    for name, settings, message in (
        ("t5", {**LLAMA, "positions": "t5"}, r"nearest, llama, differs in Model\.positions \('rope', here 't5'\)$"),
        ("scale", {**LLAMA, "embedding_scale": None}, r"Model\.embedding_scale"),
        ("both", {**LLAMA, "memory_layers": (1,), "key_shift": True}, r"gates .*normalization .*key_shift"),
    ):
        with pytest.raises(InputError, match=message):
            export(own_run(tmp_path / name, data, **settings), tmp_path / "none")
    assert not (tmp_path / "none").exists()
