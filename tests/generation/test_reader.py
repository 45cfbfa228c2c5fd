"""Readers against reading the whole text at once; sampling against its probabilities; streams of whole characters."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memorizing.data.documents import FolderSettings
from memorizing.data.vocabulary import ByteVocabulary, TextStream, Vocabulary, WordVocabulary, train_sentencepiece
from memorizing.errors import InputError
from memorizing.generation.reader import Reader, SamplingSettings, sample
from memorizing.memory.settings import MemorySettings
from memorizing.model.carry import empty_carry
from memorizing.model.settings import ModelSettings
from memorizing.model.transformer import apply_model, create_model
from memorizing.parallel.mesh import PARAMETER_RULES, MeshSettings, make_mesh, shardings
from memorizing.shapes import BEGIN_TOKEN, Batch
from memorizing.storage.snapshot_owner import SnapshotOwner, parameters_digest

N = 8
MODEL = ModelSettings(
    vocabulary_size=300, layers=2, embedding_size=16, heads=2, head_size=8, feed_forward_size=32, memory_layers=(2,),
    gate_bias=1.0, dtype="float32", position_max_distance=20, key_shift=True,
)  # fmt: skip
MEMORY = MemorySettings(size=4 * N, neighbors=4, dtype="float32", search="exact")
VOCABULARY = ByteVocabulary()
VOCABULARY.size = STOP = 3 + 128  # only ASCII is written, so that what is written can be read again as text
TEXT = "a text to be read, with ünïcode"


@functools.cache
def parameters():
    """Scales random parameters so that predictions depend on much of the text, not only on the last token."""
    drawn = create_model(MODEL, MEMORY, seed=0)[1]
    for layer in drawn["layers"].values():
        layer["attention"]["out_HDE"] *= 8
        layer["feed_forward"]["out_FE"] *= 4
    drawn["biases"][0]["table_UH"] = jax.random.normal(jax.random.key(0), drawn["biases"][0]["table_UH"].shape)
    return drawn


def reader(
    memory: MemorySettings = MEMORY, model: ModelSettings = MODEL, devices: int = 1, vocabulary: Vocabulary = VOCABULARY
) -> Reader:
    mesh = make_mesh(MeshSettings(1, devices), jax.devices()[:devices])
    own = jax.device_put(parameters(), shardings(mesh, parameters(), PARAMETER_RULES))
    source = SnapshotOwner(model, N, "bytes", parameters_digest(own), 7)
    return Reader(source, memory, own, vocabulary, FolderSettings(), mesh)


@functools.cache
def whole(memory: MemorySettings):
    graph, _ = create_model(MODEL, memory, seed=0)
    return jax.jit(functools.partial(apply_model, graph, parameters()))


def likeliest(text: str, tokens: int, memory: MemorySettings = MEMORY) -> str:
    """Returns the greedy continuation; for each token the whole text is read again, as training and evaluation do."""
    known = [BEGIN_TOKEN, *VOCABULARY.encode(text).tolist()]
    for _ in range(tokens):
        carry = empty_carry(MODEL, memory, 1, N)
        for first in range(0, len(known), N):
            inputs = np.asarray(known[first : first + N] + [0] * N, np.int32)[None, :N]
            batch = Batch(inputs, inputs, np.ones((1, N), bool), np.array([first == 0]))
            logits_BNV, carry = whole(memory)(batch, carry)
        known.append(3 + int(np.argmax(logits_BNV[0, (len(known) - 1) % N, 3:STOP])))
    return VOCABULARY.decode(np.asarray(known[-tokens:]))


@pytest.mark.parametrize("length", [0, 1, N - 2, N - 1, N, N + 1, 3 * N - 1, 3 * N, 30])
def test_greedy_generation_equals_reading_the_whole_text_for_each_token(length):
    text = TEXT.encode()[:length].decode()
    assert reader().write(text, tokens=2 * N + 3, temperature=0) == likeliest(text, 2 * N + 3)


def test_a_cleared_memory_writes_as_no_memory_until_it_fills_again():
    """The last layer alone has a memory, so caches do not depend on it."""
    none, one = reader(dataclasses.replace(MEMORY, size=0)), reader()
    for each in (none, one):
        each.read(TEXT)
    assert one.tokens_in_memory
    one.write(tokens=1, temperature=0)  # starts a partial segment, which has to be read again
    none.write(tokens=1, temperature=0)
    one._inputs = list(none._inputs)
    one.clear_memory()
    assert one.tokens_in_memory == 0
    left = N - len(one._inputs)
    assert one.write(tokens=left, temperature=0) == none.write(tokens=left, temperature=0)
    one.read(TEXT)
    assert one.tokens_in_memory


def test_memory_changes_what_is_written():
    none = dataclasses.replace(MEMORY, size=0)
    expected = likeliest(TEXT, 2 * N, none)
    assert reader(none).write(TEXT, tokens=2 * N, temperature=0) == expected != likeliest(TEXT, 2 * N)


def test_alternating_reading_and_writing_equals_reading_all():
    by_turns = reader()
    by_turns.read(TEXT[:3])
    by_turns.read(TEXT[3:])
    own = by_turns.write(tokens=5, temperature=0)
    more = by_turns.write(tokens=N, temperature=0)  # continues its own text
    assert own + more == likeliest(TEXT, 5 + N)
    assert by_turns.write("and this", tokens=N, temperature=0) == likeliest(TEXT + own + more + "and this", N)
    assert by_turns.tokens == len(TEXT.encode()) + 5 + N + len("and this") + N


def test_heads_split_over_two_devices_write_the_same():
    assert reader(devices=2).write(TEXT, tokens=N, temperature=0) == likeliest(TEXT, N)


def test_memory_is_filled_by_full_segments_and_keeps_the_newest():
    one = reader()
    for text, held in (("x" * (N - 1), 0), ("x", N), ("x" * (N - 1), N), ("x" * 100, 4 * N)):
        one.read(text)
        assert one.tokens_in_memory == held


def test_the_seed_decides_the_text_except_at_temperature_0():
    draw = functools.partial(reader().write, TEXT, 20)
    assert reader().write(TEXT, 20, seed=1) == reader().write(TEXT, 20, seed=1) != reader().write(TEXT, 20, seed=2)
    assert reader().write(TEXT, 20, top_k=1, seed=3) == reader().write(TEXT, 20, temperature=0) == draw(temperature=0)


def test_only_tokens_of_the_vocabulary_are_written():
    """The model has 300 tokens, more than the vocabulary."""
    one = reader()
    one.write(TEXT, tokens=100, temperature=50.0)
    assert min(one._inputs) >= 3 and max(one._inputs) < STOP
    assert sum(text.tokens for text in one._texts if text.name == "written") == 100


LOGITS = np.log(np.asarray([0.1, 0.4, 0.2, 0.25, 0.05], np.float32))


def drawn(count: int = 4000, **settings) -> np.ndarray:
    """Returns the relative frequency of each of the five tokens."""
    how = dataclasses.asdict(SamplingSettings(**settings))
    how.pop("seed")
    draw = jax.vmap(lambda rng: sample(jnp.asarray(LOGITS)[None], rng, **how)[0])
    return np.bincount(draw(jax.random.split(jax.random.key(0), count)), minlength=5) / count


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.1, 0.4, 0.2, 0.25, 0.05]),
        ({"temperature": 0.5}, np.square([0.1, 0.4, 0.2, 0.25, 0.05]) / 0.275),
        ({"temperature": 0.0}, [0, 1, 0, 0, 0]),
        ({"top_k": 1}, [0, 1, 0, 0, 0]),
        ({"top_k": 2}, [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),
        ({"top_k": 100}, [0.1, 0.4, 0.2, 0.25, 0.05]),
        ({"top_p": 0.01}, [0, 1, 0, 0, 0]),
        ({"top_p": 0.6}, [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),
        ({"top_p": 0.7}, [0, 0.4 / 0.85, 0.2 / 0.85, 0.25 / 0.85, 0]),
        ({"top_k": 2, "top_p": 0.6}, [0, 1, 0, 0, 0]),  # the first of the two has 0.62
    ],
)
def test_tokens_are_sampled_by_their_probabilities(settings, expected):
    np.testing.assert_allclose(drawn(**settings), expected, atol=0.03)
    assert ((drawn(**settings) > 0) == (np.asarray(expected) > 0)).all()


def test_top_k_keeps_exactly_k_of_equal_logits():
    draw = jax.vmap(lambda rng: sample(jnp.zeros((1, 6)), rng, 1.0, 2, 1.0)[0])
    assert set(np.unique(draw(jax.random.split(jax.random.key(0), 200)))) == {0, 1}


@pytest.mark.parametrize(
    "settings",
    [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}, {"seed": -1}],
)
def test_invalid_sampling_settings_are_rejected(settings):
    name = next(iter(settings))
    with pytest.raises(InputError, match=name):
        SamplingSettings(**settings)
    with pytest.raises(InputError, match="tokens = 0"):
        reader().write(tokens=0)


def streamed(vocabulary, tokens) -> list[str]:
    stream = TextStream(vocabulary, np.zeros(0, np.int32))
    return [*(stream.push(int(token)) for token in tokens), stream.rest()]


def test_streams_yield_whole_characters_and_invalid_bytes_at_the_end():
    vocabulary = ByteVocabulary()
    text = "aé€😀\n b"
    parts = streamed(vocabulary, vocabulary.encode(text))
    assert parts == ["a", "", "é", "", "", "€", "", "", "", "😀", "\n", " ", "b", ""]
    broken = [3 + byte for byte in b"\xe2\x82a\xff\xff\xff\xff\xffb\xf0\x9f"]
    parts = streamed(vocabulary, broken)
    assert "".join(parts) == vocabulary.decode(np.asarray(broken))
    assert parts[2] == "\ufffda" and parts[-1] == "\ufffd"


def test_streams_give_back_any_text():
    text = "def  f(x):\n\treturn  'é😀日本'  # ▁ \n\n    done " * 5
    lines = [f"def f{n}(x): return 'é' + x  # some words of {n}\n" for n in range(200)]
    for vocabulary in (ByteVocabulary(), train_sentencepiece(lines, 320, "bpe", 10_000)):
        assert "".join(streamed(vocabulary, vocabulary.encode(text))) == text
    rng = np.random.default_rng(0)
    for tokens in rng.integers(3, 320, (20, 50)):
        assert "".join(streamed(vocabulary, tokens)) == vocabulary.decode(tokens)


def test_streams_yield_words_with_the_space_before_them():
    vocabulary = WordVocabulary(["one", "two", "three"])
    stream = TextStream(vocabulary, vocabulary.encode("one"))
    assert [stream.push(int(token)) for token in vocabulary.encode("two three")] == [" two", " three"]


def test_files_and_folders_are_read_in_order(tmp_path):
    for name, text in (("b.txt", "second"), ("a.txt", "first"), ("c.bin", "no text")):
        (tmp_path / name).write_text(text)
    files, folder = reader(), reader()
    for name in ("a.txt", "b.txt"):
        files.read_files(tmp_path / name)
    folder.read_files(tmp_path)
    assert files._texts == folder._texts and [text.name for text in files._texts] == ["a.txt", "b.txt"]
    for path, words in ((tmp_path / "none", "does not exist"), (tmp_path / "c", "does not exist")):
        with pytest.raises(InputError, match=words):
            files.read_files(path)
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    with pytest.raises(InputError, match="is not utf-8"):
        files.read_files(tmp_path / "bad.txt")


@pytest.mark.parametrize("temperature", [0, 3.0])
@pytest.mark.parametrize("parts", [[1] * 60, [7, 1, 2, 50], [60]])
def test_several_calls_write_the_same_text_as_one(parts, temperature):
    """Also where the bytes of a character, or bytes that are no text, are written by different calls."""
    one, several = (reader(vocabulary=ByteVocabulary()) for _ in range(2))
    expected = one.write(TEXT, tokens=60, temperature=temperature, seed=1) + one.rest()
    several.read(TEXT, "prompt")
    texts = [several.write(tokens=tokens, temperature=temperature, seed=1) for tokens in parts]
    assert "".join(texts) + several.rest() == expected
    if temperature:
        assert not expected.isascii()
