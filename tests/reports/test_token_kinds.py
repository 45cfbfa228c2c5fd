"""Kinds of tokens against examples by hand; texts of tokens against the whole text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memorizing.data.vocabulary import ByteVocabulary
from memorizing.reports.token_kinds import kinds_of, texts_of


@pytest.mark.parametrize(
    ("texts", "kinds"),
    [
        (["by", " Zorn", ",", " 1932", ".", "\n"], "word name punctuation number punctuation space"),
        (["See", " it", ".", " The", " end", "."], "word word punctuation word word punctuation"),
        (["read", "_batch", "(", "rows", ")"], "identifier identifier punctuation word punctuation"),
        ([" get", "Value", " x1", " \\alpha"], "identifier identifier identifier identifier"),
        (["3.14", " ", "+", " 10_000"], "number space punctuation number"),
        ([], ""),
        (["", "a", ""], "word word word"),
    ],
)  # fmt: skip
def test_a_token_has_the_kind_of_the_word_around_it(texts, kinds):
    assert kinds_of(texts) == kinds.split()


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_texts_of_tokens_join_to_the_text(text):
    vocabulary = ByteVocabulary()
    texts = texts_of(vocabulary.pieces(vocabulary.encode(text)))
    assert "".join(texts) == text and len(kinds_of(texts)) == len(texts)


def test_invalid_bytes_become_replacement_characters():
    assert "".join(texts_of([b"a", b"\xc3", b"b", b"\xe2"])) == "a\ufffdb\ufffd"
