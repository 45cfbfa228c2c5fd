"""Vocabularies give back exactly the text that they were given."""

import functools
import json.decoder
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memorizing.data.vocabulary import (
    ByteVocabulary,
    IdVocabulary,
    SentencePieceVocabulary,
    WordVocabulary,
    encoded_text,
    load_vocabulary,
    save_vocabulary,
    train_sentencepiece,
)
from memorizing.errors import InputError

TEXT = Path(json.decoder.__file__).read_text() + "naïve ▁ text\n"


@functools.cache
def trained(model_type: str = "bpe") -> SentencePieceVocabulary:
    return train_sentencepiece([TEXT], 400, model_type, sample_bytes=1_000_000)


def kinds():
    return [ByteVocabulary(), trained("bpe"), trained("unigram")]


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))


@settings(deadline=None, max_examples=150)
@given(st.one_of(texts, st.text("def x(): \n\t\r\f\v  é\u2028\u0085▁", max_size=60)))
def test_decoding_returns_the_encoded_text(text):
    for vocabulary in kinds():
        tokens = vocabulary.encode(text)
        assert vocabulary.decode(tokens) == text, vocabulary.kind
        assert all(3 <= token < vocabulary.size for token in tokens)
        pieces = vocabulary.pieces(tokens)
        assert len(pieces) == len(tokens) and b"".join(pieces).decode() == text, vocabulary.kind


def test_bytes_have_the_ids_of_t5():
    assert ByteVocabulary().encode("a\xff").tolist() == [97 + 3, 0xC3 + 3, 0xBF + 3]


def test_sub_words_are_shorter_than_bytes():
    assert len(trained().encode(TEXT)) < 0.6 * len(TEXT.encode())


def test_training_is_deterministic():
    again = train_sentencepiece([TEXT], 400, "bpe", sample_bytes=1_000_000)
    assert again.model == trained().model


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_a_vocabulary_that_the_text_cannot_fill_is_refused(model_type):
    with pytest.raises(InputError, match=r"of 30000 could not be trained .* smaller Prepare.vocabulary_size"):
        train_sentencepiece(["too little text"], 30_000, model_type, sample_bytes=1000)


def test_training_reads_about_the_sample():
    many = (TEXT for _ in range(40))
    assert train_sentencepiece(many, 400, "bpe", sample_bytes=50_000).size == 400


def test_words_joined_piece_by_piece_are_the_text():
    vocabulary = WordVocabulary(["one", "two"])
    assert vocabulary.pieces(vocabulary.encode("two one two")) == [b"two", b" one", b" two"]


def test_words_are_encoded_and_decoded():
    vocabulary = WordVocabulary(["k0", "k1", "v0"])
    assert vocabulary.encode("k1 v0 k1").tolist() == [4, 5, 4]
    assert vocabulary.decode(vocabulary.encode("k1 v0 k1")) == "k1 v0 k1"


def test_saved_vocabularies_load_unchanged(tmp_path):
    for vocabulary in [*kinds(), WordVocabulary(["a", "b"])]:
        save_vocabulary(vocabulary, tmp_path)
        again = load_vocabulary(vocabulary.kind, tmp_path)
        assert (again.kind, again.size) == (vocabulary.kind, vocabulary.size)
        text = "a b a" if vocabulary.kind == "words" else TEXT[:500]
        assert again.encode(text).tolist() == vocabulary.encode(text).tolist()


def test_one_long_line_is_enough_to_train_on():
    line = " ".join(f"word{number % 26 * chr(97 + number % 26)}" for number in range(20_000))
    assert len(line) > 200_000
    vocabulary = train_sentencepiece([line], 300, "bpe", 1_000_000)
    assert vocabulary.decode(vocabulary.encode(line)) == line and len(vocabulary.encode(line)) < 0.8 * len(line)


def test_text_without_tokens_in_the_vocabulary_is_refused():
    for vocabulary in (WordVocabulary(["k1", "v1"]), IdVocabulary(9)):
        with pytest.raises(InputError, match=r"notes.txt cannot be encoded.*no token for.*other"):
            encoded_text(vocabulary, "other", "notes.txt")
