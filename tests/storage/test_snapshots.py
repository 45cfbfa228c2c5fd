"""Snapshots: what comes back is what was kept, in memories of other sizes too; and what is refused."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from memorizing.data.batches import read_batch
from memorizing.data.tokens import Tokenized, TokenSplit, write_split
from memorizing.errors import InputError
from memorizing.evaluation.perplexity import EvaluationSettings, TrainedModel, score_documents
from memorizing.generation.reader import Reader
from memorizing.memory.bank import valid
from memorizing.memory.search.ivf import IvfSettings
from memorizing.memory.search.lsh import LshSettings
from memorizing.model.transformer import apply_model, create_model
from memorizing.parallel.mesh import MeshSettings, make_mesh
from memorizing.storage.prebuilt import prebuilt_banks
from memorizing.storage.snapshots import MANIFEST
from memorizing.training.loss import score
from tests.generation.test_reader import MEMORY, MODEL, TEXT, VOCABULARY, N, likeliest, parameters, reader

pytestmark = pytest.mark.large

LONG = TEXT * 4
OPTIONS = (IvfSettings(lists=2, probes=2, candidates=MEMORY.size), LshSettings(candidates=MEMORY.size))


def read(text: str = LONG, **settings) -> Reader:
    one = reader(dataclasses.replace(MEMORY, **settings))
    one.read(text, "a name")
    return one


@pytest.mark.parametrize("length", [0, 1, N - 1, N, 3 * N + 2, len(LONG)])
def test_a_loaded_snapshot_continues_like_the_saved_reader(length, tmp_path):
    kept, loaded = read(LONG[:length]), reader()
    assert kept.save(tmp_path / "memory")
    loaded.load(tmp_path / "memory")
    jax.tree.map(np.testing.assert_array_equal, kept._carry, loaded._carry)
    assert kept.write(tokens=20, seed=1) == loaded.write(tokens=20, seed=1)
    assert loaded.tokens == len(LONG[:length].encode()) + 20
    assert [path.name for path in tmp_path.iterdir()] == ["memory"]


def test_a_snapshot_holds_generated_tokens(tmp_path):
    kept, loaded = read(), reader()
    own = kept.write(tokens=N + 3, temperature=0)
    kept.save(tmp_path / "memory")
    loaded.load(tmp_path / "memory")
    assert loaded.write(tokens=N, temperature=0) == likeliest(LONG + own, N)


@pytest.mark.parametrize("search", ["ivf", "lsh", "faiss", "blocked"])
@pytest.mark.parametrize("key_dtype", [None, "int8"])
def test_the_index_of_a_search_is_rebuilt(search, key_dtype, tmp_path):
    if search == "faiss":
        pytest.importorskip("faiss")
    how = {"search": search, "key_dtype": key_dtype, "options": OPTIONS}
    kept, loaded = read(**how), reader(dataclasses.replace(MEMORY, **how))
    kept.save(tmp_path / "memory")
    loaded.load(tmp_path / "memory")
    assert kept.write(tokens=20, seed=1) == loaded.write(tokens=20, seed=1)


@pytest.mark.parametrize("size", [2 * N, 8 * N])
def test_another_memory_size_keeps_the_newest_tokens(size, tmp_path):
    read().save(tmp_path / "memory")
    loaded = reader(dataclasses.replace(MEMORY, size=size))
    loaded.load(tmp_path / "memory")
    assert loaded.tokens_in_memory == min(size, MEMORY.size)
    newest = (read()._carry.banks[0], loaded._carry.banks[0])
    keys = [_in_order(bank)[-loaded.tokens_in_memory :] for bank in newest]
    np.testing.assert_array_equal(*keys)
    # It is what a reader with the smaller memory has, but for keys that were computed with the larger one in reach.
    assert loaded.write(tokens=5) and loaded.tokens_in_memory == min(size, MEMORY.size + N)


KEPT = [
    {"eviction": "reservoir", "sink": 3},
    {"eviction": "least_recently_used", "maximum_age": 20},
    {"writes": "beyond_cache"},
    {"maximum_age": 20, "write_every": 2},
]


@pytest.mark.parametrize("kept", KEPT, ids=repr)
def test_a_snapshot_of_every_kind_of_memory_continues_exactly(kept, tmp_path):
    one, loaded = read(**kept), reader(dataclasses.replace(MEMORY, **kept))
    one.save(tmp_path / "memory")
    loaded.load(tmp_path / "memory")
    jax.tree.map(np.testing.assert_array_equal, one._carry, loaded._carry)
    assert one.write(tokens=20, seed=1) == loaded.write(tokens=20, seed=1)
    with pytest.raises(InputError, match=r"Memory.eviction = .*here 'none'"):
        reader(dataclasses.replace(MEMORY, eviction="none")).load(tmp_path / "memory")
    if loaded.memory.uses_slot_table:
        with pytest.raises(InputError, match=r"Memory.size = 64, but a memory of 32 was saved"):
            reader(dataclasses.replace(MEMORY, size=8 * N, **kept)).load(tmp_path / "memory")


@pytest.mark.parametrize("size", [MEMORY.size, 8 * N])
@pytest.mark.parametrize("kept", KEPT, ids=repr)
def test_a_memory_of_any_kind_can_be_read_without_being_written(kept, size, tmp_path):
    one, frozen = read(**kept), reader(dataclasses.replace(MEMORY, size=size, writes="never"))
    one.save(tmp_path / "memory")
    frozen.load(tmp_path / "memory")
    assert frozen.tokens_in_memory == one.tokens_in_memory
    left = N - len(one._inputs)
    if "writes" not in kept:  # else local attention differs
        assert frozen.write(tokens=left, temperature=0) == one.write(tokens=left, temperature=0)
    held = [
        sorted(np.asarray(bank.values_BHMD)[0, 0][np.asarray(valid(bank))[0]].tolist())
        for bank in (one._carry.banks[0], frozen._carry.banks[0])
    ]
    assert held[0] == held[1]
    frozen.write(tokens=2 * N)
    assert frozen.tokens_in_memory == len(held[0])


def _in_order(bank) -> np.ndarray:
    """Valid keys, oldest first."""
    order = (int(bank.cursor) + np.arange(bank.keys_BHMD.shape[2])) % bank.keys_BHMD.shape[2]
    return np.moveaxis(np.asarray(bank.keys_BHMD)[0], 1, 0)[order][np.asarray(valid(bank))[0, order]]


def test_snapshots_load_from_and_to_a_reader_without_memory(tmp_path):
    read().save(tmp_path / "some")
    none = reader(dataclasses.replace(MEMORY, size=0))
    none.load(tmp_path / "some")
    assert none.tokens_in_memory == 0 and none.write(tokens=3)
    read(size=0).save(tmp_path / "none")
    some = reader()
    some.load(tmp_path / "none")
    assert some.tokens_in_memory == 0 and some.write(tokens=3)


def test_snapshots_say_what_is_in_them(tmp_path):
    read().save(tmp_path / "memory")
    manifest = json.loads((tmp_path / "memory" / MANIFEST).read_text())
    assert manifest["tokens"] == len(LONG.encode()) and manifest["texts"][0]["name"] == "a name"
    assert manifest["made_by"]["step"] == 7 and manifest["memory"]["size"] == MEMORY.size


def test_saving_the_same_snapshot_again_changes_nothing(tmp_path):
    assert read().save(tmp_path / "memory")
    before = (tmp_path / "memory" / MANIFEST).read_bytes()
    assert not read().save(tmp_path / "memory")
    with pytest.raises(InputError, match=r"holds another snapshot .*texts"):
        read("another text, as long as it may be").save(tmp_path / "memory")
    assert (tmp_path / "memory" / MANIFEST).read_bytes() == before
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="is not a snapshot"):
        read().save(tmp_path / "folder")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": dataclasses.replace(MODEL, gate_bias=0.0)}, r"Model.gate_bias = 1.0 \(here 0.0\)"),
        ({"segment_length": 2 * N}, r"Batch.segment_length = 8 \(here 16\)"),
        ({"vocabulary": "other"}, r"a vocabulary of digest bytes \(here other\)"),
        ({"parameters": "other", "step": 9}, r"other parameters, of step 7, .*here step 9, other"),
    ],
)
def test_a_snapshot_of_another_model_is_refused_by_the_difference(change, words, tmp_path):
    read().save(tmp_path / "memory")
    other = reader()
    other._source = other._source._replace(**change)
    with pytest.raises(InputError, match=words):
        other.load(tmp_path / "memory")


def test_snapshots_without_newer_settings_load_with_their_defaults(tmp_path):
    read().save(tmp_path / "memory")
    path = tmp_path / "memory" / MANIFEST
    manifest = json.loads(path.read_text())
    for name in ("gate", "kv_heads", "banks_of", "normalize_memory_layers"):
        del manifest["made_by"]["model"][name]
    path.write_text(json.dumps(manifest))
    reader().load(tmp_path / "memory")
    other = reader()
    other._source = other._source._replace(model=dataclasses.replace(MODEL, gate="joint"))
    with pytest.raises(InputError, match=r"Model.gate = 'head' \(here 'joint'\)"):
        other.load(tmp_path / "memory")


def test_other_numbers_in_the_parameters_are_another_model(tmp_path, monkeypatch):
    read().save(tmp_path / "memory")
    changed = jax.tree.map(lambda leaf: leaf, dict(reader()._parameters))
    changed["final_norm"] = {"scale_E": changed["final_norm"]["scale_E"].at[3].add(1e-6)}
    monkeypatch.setattr("tests.generation.test_reader.parameters", lambda: changed)
    with pytest.raises(InputError, match="other parameters"):
        reader().load(tmp_path / "memory")


def test_other_kinds_of_numbers_are_refused(tmp_path):
    read().save(tmp_path / "memory")
    with pytest.raises(InputError, match=r"Memory.dtype = 'float32' \(here 'bfloat16'\)"):
        reader(dataclasses.replace(MEMORY, dtype="bfloat16")).load(tmp_path / "memory")


def test_a_damaged_snapshot_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no memory snapshot"):
        reader().load(tmp_path)
    read().save(tmp_path / "memory")
    manifest = tmp_path / "memory" / MANIFEST
    text = manifest.read_text()
    manifest.write_text(text.replace('"fingerprints": {', '"fingerprints": {"x": 1,'))
    with pytest.raises(InputError, match="is damaged: its fingerprints differ"):
        reader().load(tmp_path / "memory")
    manifest.write_text(text.replace('"made_by"', '"made"'))
    with pytest.raises(InputError, match=r"is damaged .*made_by"):
        reader().load(tmp_path / "memory")
    manifest.write_text(text[:-9])
    with pytest.raises(InputError, match="is damaged"):
        reader().load(tmp_path / "memory")
    manifest.write_text(text)
    for path in (tmp_path / "memory" / "arrays").rglob("*"):
        if path.is_file() and path.stat().st_size > 1000:
            path.write_bytes(b"\0" * path.stat().st_size)
    with pytest.raises(InputError, match=r"cannot be read|fingerprints differ"):
        reader().load(tmp_path / "memory")


@pytest.fixture(scope="module")
def split(tmp_path_factory) -> TokenSplit:
    folder = tmp_path_factory.mktemp("tokens") / "test"
    texts = ["one " * 20, "a second text, of some length", "three", "and the fourth " * 9]
    encoded = [Tokenized(str(n), "", "", VOCABULARY.encode(text), len(text)) for n, text in enumerate(texts)]
    write_split(folder, encoded, np.uint16)
    return TokenSplit(folder)


@pytest.mark.parametrize(
    ("search", "devices", "kept"),
    [("exact", 1, {}), ("exact", 2, {}), ("lsh", 1, {}), ("exact", 2, KEPT[1]), ("exact", 1, KEPT[2])],
)
def test_every_document_is_evaluated_from_the_prebuilt_memory(search, devices, kept, split, tmp_path):
    """Whatever rows have read before, and wherever the cursor stands: as each alone with that memory."""
    memory = dataclasses.replace(MEMORY, search=search, options=OPTIONS, **kept)
    made = reader(memory)
    made.read(LONG + "to end elsewhere")
    made.save(tmp_path / "memory")
    mesh = make_mesh(MeshSettings(), jax.devices()[:devices])
    banks = prebuilt_banks(tmp_path / "memory", made._source, memory, mesh)
    read_by = (
        TrainedModel(MODEL, memory, N, parameters()),
        split,
        EvaluationSettings(batch_size=2, segments_per_call=3),
        mesh,
    )
    scores = {each.document: each.nats_T for each in score_documents(*read_by, banks)}
    graph, _ = create_model(MODEL, memory, seed=0)
    run = jax.jit(functools.partial(apply_model, graph, parameters()))
    begun = made._carry._replace(cached_B=np.zeros(1, bool))
    if (slot_table := begun.banks[0].slot_table) is not None:
        uncached = slot_table._replace(cached_B=np.zeros(1, np.int32))
        begun = begun._replace(banks=(begun.banks[0]._replace(slot_table=uncached),))
    for document, length in enumerate(split.lengths):
        carry, nats = begun, []
        for segment in range(-(-length // N)):
            batch = read_batch(split, [(document, segment)], N)
            logits_BNV, carry = run(batch._replace(starts_document_B=np.zeros(1, bool)), carry)
            nats.append(score(logits_BNV, batch).nats_BN[0])
        np.testing.assert_allclose(scores[document], np.concatenate(nats)[:length], atol=1e-4)
    without = {each.document: each.nats_T for each in score_documents(*read_by)}
    assert all(np.abs(without[document] - scores[document])[:N].max() > 1e-3 for document in scores)


def test_an_empty_snapshot_is_refused(tmp_path):
    kept = read("short")
    kept.save(tmp_path / "memory")
    mesh = make_mesh(MeshSettings(1), jax.devices()[:1])
    with pytest.raises(InputError, match="has no tokens for a memory of 32 tokens"):
        prebuilt_banks(tmp_path / "memory", kept._source, MEMORY, mesh)
