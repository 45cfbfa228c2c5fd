"""seqio tasks: they give the tokens that `prepare` writes, and any other task can be prepared by its name."""

import sys

import numpy as np
import pytest

from memorizing.data.bulk import BeamSettings
from memorizing.data.corpora.github import Github, files_of
from memorizing.data.corpora.pg19 import Pg19
from memorizing.data.prepare import prepare
from memorizing.data.settings import PrepareSettings
from memorizing.data.tokens import PreparedTokens
from memorizing.errors import InputError

tasks = pytest.importorskip("memorizing.data.tasks")
seqio = pytest.importorskip("seqio")

CORPORA = ("pg19", "arxiv", "github", "isabelle", "c4")
OWN_TASKS = '''
import functools
import seqio
import tensorflow as tf

def texts(split, shuffle_files=False, seed=None):
    return tf.data.Dataset.from_tensor_slices({"text": [f"{split} number {n} " * (n + 2) for n in range(6)]})

for name, vocabulary in (("own_bytes", seqio.ByteVocabulary(16)), ("own_numbers", seqio.PassThroughVocabulary(40))):
    if name == "own_bytes":
        steps = [functools.partial(seqio.preprocessors.rekey, key_map={"targets": "text"})]
        steps += [seqio.preprocessors.tokenize, seqio.preprocessors.append_eos]
    else:
        length = lambda example: tf.strings.length(example["text"]) // 9
        steps = [lambda data: data.map(lambda example: {"targets": tf.range(3, 3 + length(example))})]
    for task, splits in ((name, ["train", "validation", "dev"]), (f"{name}_only", ["dev"])):
        seqio.TaskRegistry.add(
            task, source=seqio.FunctionDataSource(texts, splits), preprocessors=steps,
            output_features={"targets": seqio.Feature(vocabulary)},
        )
seqio.TaskRegistry.add(
    "own_inputs", source=seqio.FunctionDataSource(texts, ["train"]), preprocessors=steps,
    output_features={"inputs": seqio.Feature(seqio.ByteVocabulary())},
)
seqio.MixtureRegistry.add("own_mixture", [("own_bytes", 1)])

def add(name, examples, feature=seqio.Feature(seqio.PassThroughVocabulary(100)), splits=("train", "validation")):
    def dataset(split, shuffle_files=False, seed=None):
        return tf.data.Dataset.from_generator(
            lambda: ({"targets": targets} for targets in examples[split]),
            output_signature={"targets": tf.TensorSpec([None] * feature.rank, feature.dtype)})
    seqio.TaskRegistry.add(name, source=seqio.FunctionDataSource(dataset, splits), preprocessors=[],
                           output_features={"targets": feature})

for name, first, count in (("own_forty", 0, 40), ("own_seven", 50, 7)):
    add(name, {"train": [[first + n, 1] for n in range(count)], "validation": [[first + n, 2] for n in range(count)]})
seqio.MixtureRegistry.add("own_uneven", [("own_forty", 1.0), ("own_seven", 3.0)])
add("own_wrong", {"train": [[5], [1, 2, 70000, -1]]}, splits=["train"])
add("own_repeats", {"train": [[5], [6], [6]], "validation": [[7], [6], [8, 8]]})
for name, rank, kind in (("own_float", 1, tf.float32), ("own_table", 2, tf.int32)):
    add(name, {"train": []}, seqio.Feature(seqio.PassThroughVocabulary(9), rank=rank, dtype=kind), ["train"])
def broken(data):
    raise ValueError("no such thing")
seqio.TaskRegistry.add(
    "own_broken", source=seqio.FunctionDataSource(texts, ["train"]), preprocessors=[broken],
    output_features={"targets": seqio.Feature(seqio.ByteVocabulary())},
)
'''  # fmt: skip


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Books as prepared tokens in both vocabularies, and the data_dir with their documents."""
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "raw").mkdir()
    for number in range(24):
        text = f"Title: Book {number}\n\n" + f"Line of naïve \u2581 book {number}, which ends.\r\n\t\n" * (30 + number)
        (folder / "raw" / f"{number}-0.txt").write_text(text, newline="")
    for kind in ("bytes", "sentencepiece"):
        settings = PrepareSettings(
            source="pg19", vocabulary=kind, vocabulary_size=300, vocabulary_model="bpe", part_bytes=9000
        )
        prepare(
            settings, {"pg19": Pg19()}, BeamSettings(), folder / "raw", folder / kind, folder / "data",
            report=lambda line: None,
        )  # fmt: skip
    return folder


def run(task, out, data_dir=None, report=lambda line: None, **fields):
    settings = PrepareSettings(source="task", task=task, **fields)
    return prepare(settings, {}, BeamSettings(), None, out, data_dir, report)


def texts(folder, split):
    tokens = PreparedTokens(folder)
    own = tokens.split(split)
    return [tokens.vocabulary.decode(own.read(n, 0, int(own.lengths[n]))) for n in range(len(own.lengths))]


def test_all_corpora_have_their_tasks():
    names = {f"{corpus}_{kind}" for corpus in (*CORPORA, "github_shuffled") for kind in ("bytes", "sentencepiece")}
    assert names <= set(seqio.TaskRegistry.names())


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_tasks_give_the_tokens_that_prepare_writes(prepared, tmp_path, kind, monkeypatch):
    tasks.use(prepared / "data", prepared / "sentencepiece")
    task = seqio.get_mixture_or_task(f"pg19_{kind}")
    direct = PreparedTokens(prepared / kind)
    for split in ("train", "validation", "test"):
        own = direct.split(split)
        examples = list(task.get_dataset(None, split, shuffle=False).as_numpy_iterator())
        assert sorted(example["document_id"].decode() for example in examples) == sorted(own.names())
        for example in examples:
            number = own.names().index(example["document_id"].decode())
            np.testing.assert_array_equal(example["targets"], own.read(number, 0, 10**9))
            text = example["targets_pretokenized"].decode()
            assert task.output_features["targets"].vocabulary.decode(example["targets"].tolist()) == text
    monkeypatch.setattr(tasks, "_given_vocabulary", [])
    manifest = run(f"pg19_{kind}", tmp_path / "out", prepared / "data", vocabulary_from=str(prepared / "sentencepiece"))
    assert manifest["splits"] == direct.manifest["splits"] and manifest["vocabulary"] == direct.manifest["vocabulary"]


def test_a_sentencepiece_task_without_a_vocabulary_is_refused(monkeypatch, prepared):
    monkeypatch.setattr(tasks, "_given_vocabulary", [])
    monkeypatch.delenv("MEMORIZING_VOCABULARY", raising=False)
    vocabulary = seqio.get_mixture_or_task("c4_sentencepiece").output_features["targets"].vocabulary
    with pytest.raises(InputError, match="MEMORIZING_VOCABULARY"):
        vocabulary.encode("text")
    monkeypatch.setenv("MEMORIZING_VOCABULARY", str(prepared / "bytes"))
    with pytest.raises(InputError, match="has a vocabulary of bytes"):
        vocabulary.encode("text")
    monkeypatch.setenv("MEMORIZING_VOCABULARY", str(prepared / "sentencepiece" / "vocabulary.model"))
    assert vocabulary.decode(vocabulary.encode("naïve \u2581 text\n")) == "naïve \u2581 text\n"
    assert vocabulary.vocab_size == 300 and (vocabulary.pad_id, vocabulary.eos_id, vocabulary.unk_id) == (0, 1, 2)


def test_shuffled_repositories_change_order_every_time(tmp_path):
    for number in range(6):
        (tmp_path / "raw" / f"o__r{number}").mkdir(parents=True)
        for name in "abcdefgh":
            (tmp_path / "raw" / f"o__r{number}" / f"{name}.py").write_text(f"{name}\n")
    settings = PrepareSettings(source="github", vocabulary="bytes", validation=0.0, test=0.0)
    sections, beam = {"github": Github()}, BeamSettings()
    prepare(settings, sections, beam, tmp_path / "raw", tmp_path / "out", tmp_path / "data", report=lambda line: None)
    tasks.use(tmp_path / "data")
    task = seqio.get_mixture_or_task("github_shuffled_bytes")
    dataset = task.get_dataset(None, "train", shuffle=True, seed=1, num_epochs=2)
    orders = {}
    for example in dataset.as_numpy_iterator():
        text = bytes((example["targets"] - 3).astype(np.uint8)).decode()
        assert sorted(files_of(text)) == [f"{name}.py" for name in "abcdefgh"]
        orders.setdefault(example["document_id"], []).append(list(files_of(text)))
    assert all(len(own) == 2 for own in orders.values())
    assert any(own[0] != own[1] for own in orders.values())


@pytest.fixture
def own_tasks(tmp_path, monkeypatch):
    (tmp_path / "own_tasks.py").write_text(OWN_TASKS)
    monkeypatch.syspath_prepend(tmp_path)
    yield ("own_tasks",)
    for name in [*seqio.TaskRegistry.names()]:
        if name.startswith("own_"):
            seqio.TaskRegistry.remove(name)
    for name in ("own_mixture", "own_uneven"):
        if name in seqio.MixtureRegistry.names():
            seqio.MixtureRegistry.remove(name)
    sys.modules.pop("own_tasks", None)


def test_users_tasks_and_mixtures_can_be_prepared(own_tasks, tmp_path):
    said = []
    for name in ("own_bytes", "own_mixture"):
        manifest = run(name, tmp_path / name, task_modules=own_tasks, report=said.append)
        assert manifest["vocabulary"]["kind"] == "bytes" and manifest["vocabulary"]["size"] == 259 + 16
        for split in ("train", "validation"):
            assert texts(tmp_path / name, split) == [f"{split} number {n} " * (n + 2) for n in range(6)]
        tokens = PreparedTokens(tmp_path / name).split("train")
        assert tokens.read(0, 0, 10**9)[-1] == 1  # the task's own end
    assert any("left out: its split dev" in line for line in said)
    assert run("own_numbers", tmp_path / "numbers", task_modules=own_tasks)["vocabulary"]["kind"] == "ids"
    assert texts(tmp_path / "numbers", "train")[0] == "3 4 5"


def test_every_document_of_a_mixture_is_read_once(own_tasks, tmp_path):
    said = []
    manifest = run("own_uneven", tmp_path / "out", task_modules=own_tasks, report=said.append)
    assert manifest["splits"]["train"]["documents"] == manifest["splits"]["validation"]["documents"] == 47
    found = texts(tmp_path / "out", "train")
    assert sorted(found) == sorted([f"{n} 1" for n in range(40)] + [f"{50 + n} 1" for n in range(7)])
    names = PreparedTokens(tmp_path / "out").split("train").names()
    assert len(set(names)) == 47 and names[0].startswith("own_forty-train-")
    assert "  a mixture: reads every document of own_forty, own_seven once, whatever their rates" in said


def test_a_document_in_two_splits_of_a_task_is_put_in_one_and_noted(own_tasks, tmp_path):
    run("own_repeats", tmp_path / "out", task_modules=own_tasks)
    assert texts(tmp_path / "out", "train") == ["5", "6", "6", "6"]
    assert texts(tmp_path / "out", "validation") == ["7", "8 8"]
    notes = (tmp_path / "out" / "notes.txt").read_text()
    assert "train-0-1: the same text as train-0-2, validation-0-1: all are in train" in notes


def test_errors_of_a_task_are_named(own_tasks, tmp_path, monkeypatch):
    (tmp_path / "raising_module.py").write_text("1 / 0")
    for task, words, fields in (
        (
            "own_wrong",
            r"^the seqio task 'own_wrong' has an example \(train-0-1\) whose `targets` hold the id 70000, .* 0 to 99",
            {},
        ),
        ("own_float", "has the feature `targets` of rank 1 and type float32. A document is an array", {}),
        ("own_table", "has the feature `targets` of rank 2 and type int32. A document is an array", {}),
        ("own_broken", r"'own_broken' cannot be read \(ValueError: no such thing\)\. Check its source", {}),
        (
            "own_bytes",
            "names 'raising_module', which cannot be imported: ZeroDivisionError",
            {"task_modules": ("raising_module",)},
        ),
    ):
        with pytest.raises(InputError, match=words):
            run(task, tmp_path / "out", **{"task_modules": own_tasks, **fields})
    with pytest.raises(
        InputError, match=r"'c4_bytes' cannot be read .*Its dataset c4_documents:2.0.0 must be in --data_dir"
    ):
        run("c4_bytes", tmp_path / "out", tmp_path / "empty")


def test_unknown_tasks_are_refused(own_tasks, tmp_path):
    with pytest.raises(InputError, match=r"Prepare\.task = 'pg19_byte' is not registered .*pg19_bytes"):
        run("pg19_byte", tmp_path / "out")
    with pytest.raises(InputError, match=r"Prepare\.task_modules names 'no_such_module'"):
        run("own_bytes", tmp_path / "a", task_modules=("no_such_module",))
    with pytest.raises(InputError, match="has the splits dev, but no train split"):
        run("own_bytes_only", tmp_path / "b", task_modules=own_tasks)
    with pytest.raises(InputError, match="has the features inputs, but no `targets`"):
        run("own_inputs", tmp_path / "c", task_modules=own_tasks)
    with pytest.raises(InputError, match=r"Prepare\.source = 'pg19' with Prepare\.task = 'x'"):
        PrepareSettings(source="pg19", task="x")
