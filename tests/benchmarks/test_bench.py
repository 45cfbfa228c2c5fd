"""Runs both benchmarks at tiny sizes through the command. Checks output, files and errors, but no times."""

import json
import shlex
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memorizing.benchmarks import search
from memorizing.benchmarks.choices import Shape, search_names
from memorizing.benchmarks.gpu_check import wrong_with
from memorizing.benchmarks.timing import in_turn, timing
from memorizing.benchmarks.trained import trained_vectors
from memorizing.benchmarks.vectors import Vectors, random_vectors, recall, stored
from memorizing.cli import main
from memorizing.data.tokens import Tokenized, TokenSplit, write_split
from memorizing.errors import InputError
from memorizing.evaluation.perplexity import TrainedModel
from memorizing.memory.search import Index, Keys, Neighbors
from memorizing.memory.search.contract import Search
from memorizing.memory.search.exact import Exact
from memorizing.memory.settings import MemorySettings
from memorizing.model.settings import ModelSettings
from memorizing.model.transformer import create_model

TINY = "B2xH1xN8xM64xD16xK4"
SMALL_STEP = [
    "Model.layers = 1", "Model.embedding_size = 16", "Model.heads = 2", "Model.head_size = 8",
    "Model.memory_layers = (1,)", "Model.feed_forward_size = 32", "Model.vocabulary_size = 11", "Batch.size = 2",
    "Batch.segment_length = 8",
    "Batch.segments_per_call = 2", "Memory.neighbors = 4",
]  # fmt: skip
PEER = shlex.join([sys.executable, str(Path(__file__).with_name("peer_step.py"))])
STEP = ["bench", "step", *(word for binding in SMALL_STEP for word in ("--gin_param", binding)), "--rounds=2"]


@pytest.fixture(autouse=True)
def small_square(monkeypatch):
    monkeypatch.setattr(search, "_SQUARE_SIZE", {"cpu": 128})


def bench(arguments: list[str], tmp_path: Path, capsys) -> tuple[dict, str]:
    """Runs a benchmark; returns what it writes and prints."""
    file = tmp_path / "figures.json"
    assert main([*arguments, f"--json={file}"]) == 0
    return json.loads(file.read_text()), capsys.readouterr().out


def test_searches_side_by_side(tmp_path, capsys):
    command = ["bench", "search", f"--shapes={TINY}", "--rounds=3"]
    figures, printed = bench([*command, "--searches=exact,blocked", "--dtype=float32,int8"], tmp_path, capsys)
    assert figures["bench"] == "search" and figures["command"].startswith("memorizing bench search --shapes=")
    assert figures["environment"]["platform"] == "cpu" and "jax" in figures["environment"]["versions"]
    assert figures["settings"]["neighbors"] == 32
    names = ["square matmul", "score matmul", "einsum + top_k", "exact", "blocked"]
    assert [row["search"] for row in figures["rows"]] == 2 * names
    for row in figures["rows"]:
        assert row["shape"] == TINY and len(row["rounds"]) == 3 and row["problem"] is None
        assert row["seconds"] > 0 and row["spread"] >= 0 and row["program_bytes"] > 0 and row["of_peak"] > 0
        assert (row["over_score_matmul"] is None) == (row["search"] == "square matmul")
    for row in figures["rows"]:
        if row["search"] in names[2:] and row["dtype"] == "float32":
            assert row["recall"] == 1.0
        if row["search"] in names[3:] and row["dtype"] == "int8":
            assert 0.8 < row["recall"] <= 1.0
    lines = printed.splitlines()
    header = next(line for line in lines if line.startswith("search"))
    assert header.split() == ["search", "ms", "+-%", "x", "matmul", "of", "peak", "recall", "MiB"]
    tables: list[set[int]] = []  # of one dtype each, with columns of their own widths
    for line in lines:
        if line.startswith("search"):
            tables.append(set())
        if line.startswith(("search", "exact", "blocked")):
            tables[-1].add(len(line))
    assert [len(lengths) for lengths in tables] == [1, 1]


def test_searches_of_the_platform_are_the_default(tmp_path, capsys):
    figures, _ = bench(["bench", "search", f"--shapes={TINY}", "--rounds=1", "--dtype=float32"], tmp_path, capsys)
    measured = {row["search"] for row in figures["rows"]} | set(figures["not_made"])
    assert {"exact", "blocked"} <= measured <= {"square matmul", "score matmul", "einsum + top_k", *search_names()}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["search", "--shapes=B2xQ3"], ["--shapes=B2xQ3", "'B2xQ3' is not a shape", "B8xH8xN512"]),
        (["search", "--shapes=M64,"], ["'' is not a shape"]),
        (["search", "--shapes=M8xM9"], ["'M8xM9' is not a shape"]),
        (["search", "--shapes=M8xK9"], ["K9", "more than M8", "at most 8"]),
        (["search", "--shapes=B0xM64"], ["B0", "at least 1"]),
        (["search", "--searches=exact,fastest"], ["'fastest' is not a search", "blocked"]),
        (["search", "--dtype=float16"], ["'float16' is not a dtype", "bfloat16"]),
        (["search", "--rounds=0"], ["--rounds=0", "at least 1"]),
        (["search", "--workdir=nowhere"], ["--workdir=nowhere", "memorizing train"]),
        (["search", "--gin_param", "Blocked.block_sise = 3"], ["did you mean 'block_size'"]),
        (["step", "--memory_size=100"], ["Memory.size = 100", "Use 256"]),
        (["step", "--memory_size=0,256,256"], ["--memory_size=0,256,256", "once"]),
        (["step", "--rounds=-1"], ["--rounds=-1"]),
        (["step", "--memory_size=0", "--against=/none/python"], ["--against=/none/python", "setup_peer.sh"]),
        (["step", "--memory_size=0", "--against="], ["--against= cannot be run", "setup_peer.sh"]),
        (["step", "--memory_size=0", f"--against={PEER}"], ["No module named", "setup_peer.sh"]),
        (["step", "--memory_size=0", f"--against={PEER}", "--gin_param", "Model.xl_cache = False"], ["Model.xl_cache"]),
    ],
)
def test_invalid_benchmarks_are_refused(arguments, words, capsys):
    assert main(["bench", *arguments]) == 2
    message = capsys.readouterr().err
    assert message.startswith("memorizing bench: error: ") and "Traceback" not in message
    for word in words:
        assert word in message


STAND_IN = """
import json, sys
settings = json.loads(sys.stdin.readline())
print("a line of another library")
recall = {str(size): 0.25 for size in settings["memory_sizes"] if size}
print(json.dumps({"name": "stand-in", "recall": recall, "layers": settings["layers"]}), flush=True)
for line in sys.stdin:
    print(json.dumps({"seconds": 1.0 + json.loads(line)["memory_size"]}), flush=True)
"""


def test_bench_step_times_memory_sizes_and_another_implementation_in_turn(tmp_path, capsys):
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    figures, printed = bench(
        [*STEP, "--memory_size=0,16", f"--against={shlex.join([sys.executable, str(script)])}"], tmp_path, capsys
    )
    assert figures["settings"]["model"]["layers"] == 1 and figures["peak_flops_per_second"] > 0
    rows = figures["rows"]
    assert [(row["implementation"], row["memory_size"]) for row in rows[:2]] == [("memorizing", 0), ("memorizing", 16)]
    for row in rows[:2]:
        assert row["tokens_per_second"] == pytest.approx(16 / row["seconds"]) and len(row["rounds"]) == 2
        assert row["program_bytes"] > 0 and row["model_flops_utilization"] > 0 and row["over_no_memory"] > 0
    assert rows[0]["over_no_memory"] == 1.0
    assert (rows[1]["recall"], rows[1]["search"], rows[1]["kind"]) == (1.0, "native", "Native")
    none, full = rows[2:]
    assert (none["implementation"], none["seconds"], none["recall"]) == ("stand-in", 1.0, None)
    assert (full["seconds"], full["over_no_memory"], full["recall"], full["rounds"]) == (17.0, 17.0, 0.25, [17.0, 17.0])
    assert figures["against"]["layers"] == 1 and figures["against"]["settings"]["feed_forward_size"] == 32
    header = next(line for line in printed.splitlines() if "tokens/s" in line)
    assert header.split() == ["search", "memory", "ms", "+-%", "x", "no", "memory", "tokens/s", "MFU", "recall", "MiB"]
    assert sum(line.startswith("stand-in") for line in printed.splitlines()) == 2


def test_a_step_with_a_learned_index_reports_its_recall(tmp_path, capsys):
    bindings = ("Model.index_size = 2", "Memory.proposer = 'learned'", "Memory.proposals = 4")
    given = [f"--gin_param={binding}" for binding in bindings]
    figures, _ = bench([*STEP, *given, "--memory_size=64"], tmp_path, capsys)
    assert figures["rows"][0]["kind"] == "Proposed" and 0.05 < figures["rows"][0]["recall"] < 0.9


def test_programs_take_turns_in_rotating_order():
    order = []
    taken = in_turn({name: lambda name=name: float(order.append(name) or len(order)) for name in "ab"}, rounds=3)
    assert "".join(order) == "abbaab"
    assert taken["a"].seconds == [1.0, 4.0, 5.0] and taken["a"].median == 4.0
    assert timing([1.0, 2.0, 3.0, 4.0, 5.0]).spread == pytest.approx(1 / 3)


def test_recall_is_the_share_of_exact_neighbors():
    vectors = random_vectors(Shape(2, 2, 16, 64, 8, 4), "float32")
    exact = Exact()(vectors.queries_BHND, Keys(vectors.keys_BHMD), vectors.valid_BM, 4)
    assert recall(exact, vectors) == 1.0
    best_twice = exact._replace(slots_BHNK=exact.slots_BHNK.at[..., 1:].set(exact.slots_BHNK[..., :1]))
    assert recall(best_twice, vectors) == 0.25
    none = Neighbors(jnp.full_like(exact.scores_BHNK, -jnp.inf), exact.slots_BHNK)
    assert recall(none, vectors) == 0.0
    same = Vectors(vectors.queries_BHND, jnp.ones_like(vectors.keys_BHMD), vectors.valid_BM, "all alike")
    assert recall(exact, same) == 1.0


class Halves(Search):
    """Keeps half of each key, and how many keys it was given."""

    def empty_index(self, rows, heads, slots, head_size):
        shape = (rows, heads, slots, head_size // 2)
        return Index({"half_BHMD": jnp.zeros(shape, jnp.bfloat16)}, {"count": jnp.zeros((), jnp.int32)})

    def entries(self, keys_BHND, learned):
        count = learned["count"] + keys_BHND.shape[2]
        return {"half_BHMD": keys_BHND[..., : keys_BHND.shape[-1] // 2] * count}, {"count": count}


def test_an_index_is_built_segment_by_segment():
    keys_BHMD = jnp.asarray(np.random.default_rng(0).integers(-3, 4, (2, 3, 12, 4)), jnp.float32)
    index = stored(Halves(), keys_BHMD, 4, "float32").index
    times_M = np.repeat([4, 8, 12], 4)
    np.testing.assert_array_equal(index.slots["half_BHMD"], keys_BHMD[..., :2] * times_M[None, None, :, None])
    assert index.slots["half_BHMD"].dtype == jnp.bfloat16 and int(index.learned["count"]) == 12


MODEL = ModelSettings(
    vocabulary_size=11, layers=1, embedding_size=16, heads=2, head_size=8, feed_forward_size=32, memory_layers=(1,),
    dtype="float32",
)  # fmt: skip


@pytest.fixture(scope="module")
def split(tmp_path_factory) -> TokenSplit:
    """Documents in which three tokens repeat, of 7, 30 and 26 tokens."""
    folder = tmp_path_factory.mktemp("bench") / "test"
    texts = [np.resize(np.arange(first, first + 3), length) for first, length in ((2, 7), (5, 30), (8, 26))]
    documents = [Tokenized(str(number), "", "", text.astype(np.int32), len(text)) for number, text in enumerate(texts)]
    write_split(folder, documents, np.uint16)
    return TokenSplit(folder)


def test_trained_keys_are_those_of_the_longest_documents(split):
    memory = MemorySettings(neighbors=4)
    parameters = create_model(MODEL, memory, seed=0)[1]
    shape = Shape(2, 2, 8, 16, 8, 4)
    vectors = trained_vectors(TrainedModel(MODEL, memory, 8, parameters), split, shape, "float32", "run")
    assert vectors.origin == "run" and bool(vectors.valid_BM.all())
    queries, keys = np.asarray(vectors.queries_BHND), np.asarray(vectors.keys_BHMD)
    assert queries.shape == (2, 2, 8, 8) and keys.shape == (2, 2, 16, 8)
    np.testing.assert_allclose(np.linalg.norm(keys, axis=-1), 1, rtol=1e-4)
    # In the first layer a key depends on its token alone: behind the begin token they repeat as the tokens do.
    np.testing.assert_allclose(keys[:, :, 1:-3], keys[:, :, 4:], atol=1e-5)
    assert (np.abs(keys[:, :, 1:-1] - keys[:, :, 2:]).max((0, 1, 3)) > 0.1).all()
    np.testing.assert_allclose(queries[:, :, :5], queries[:, :, 3:], atol=1e-4)
    assert np.abs(keys[0] - keys[1]).max() > 0.1
    exact = Exact()(vectors.queries_BHND, Keys(vectors.keys_BHMD), vectors.valid_BM, 4)
    assert recall(exact, vectors) == 1.0


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"M": 24}, "needs 2 documents of 32 tokens, but one of the longest .* Use M16"),
        ({"M": 20}, "M20 .* is not a multiple of the segment length 8. Use M16"),
        ({"B": 4}, "needs 4 documents"),
        ({"H": 3}, "H3 .* but the run has H2"),
    ],
)
def test_vectors_that_a_run_does_not_have_are_refused(sizes, words, split):
    shape = Shape(**{"B": 2, "H": 2, "N": 8, "M": 16, "D": 8, "K": 4, **sizes})
    with pytest.raises(InputError, match=words):
        trained_vectors(TrainedModel(MODEL, MemorySettings(neighbors=4), 8, {}), split, shape, "float32", "run")


def test_wrong_neighbors_are_detected():
    vectors = random_vectors(Shape(1, 2, 4, 32, 8, 4), "float32")
    vectors = vectors._replace(valid_BM=vectors.valid_BM.at[0, 7].set(False))
    exact = Exact()(vectors.queries_BHND, Keys(vectors.keys_BHMD), vectors.valid_BM, 4)
    scores, slots = exact
    for found, words in [
        (exact, None),
        (Neighbors(scores, slots.at[0, 0, 0, 0].set(7)), "not valid"),
        (Neighbors(scores, slots.at[0, 0, 0, 0].set(slots[0, 0, 0, 1])), "named twice"),
        (Neighbors(scores, slots.at[0, 0, 0, 0].set(32)), "do not exist"),
        (Neighbors(scores[..., ::-1], slots[..., ::-1]), "not best first"),
        (Neighbors(scores + 0.1, slots), "off"),
        (Neighbors(scores.at[0, 0, 0, 0].set(jnp.nan), slots), "not finite"),
    ]:
        problem = wrong_with(jax.device_get(found), vectors)
        assert problem is None if words is None else words in problem
