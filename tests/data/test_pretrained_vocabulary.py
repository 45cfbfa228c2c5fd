"""Vocabularies of pretrained models: their own ids, exact text, and what is not exact is said."""

import io
import json

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers

from memorizing.data.pretrained_vocabulary import PretrainedVocabulary
from memorizing.data.tokens import PreparedTokens, fingerprint, write_vocabulary
from memorizing.data.vocabulary import ByteVocabulary, TextStream
from memorizing.errors import InputError
from tests.pretrained_folder import TEXT, tokenizer

BYTE_LEVEL = tokenizer()
VOCABULARY = PretrainedVocabulary(BYTE_LEVEL.to_str().encode(), 290)


def like_llama2(adds_space: bool) -> Tokenizer:
    """BPE over text with `▁` for spaces, and a token for each byte."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abct", "▁a", "at", "▁at"]
    made = Tokenizer(models.BPE({piece: id for id, piece in enumerate(pieces)}, [("▁", "a"), ("a", "t"), ("▁", "at")],
                                unk_token="<unk>", byte_fallback=True, fuse_unk=True))  # fmt: skip
    parts = [normalizers.Prepend("▁")] * adds_space + [normalizers.Replace(" ", "▁")]
    made.normalizer = normalizers.Sequence(parts)
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return made


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_byte_level_bpe_decodes_every_text_exactly(text):
    tokens = VOCABULARY.encode(text)
    assert VOCABULARY.decode(tokens) == text
    assert b"".join(VOCABULARY.pieces(tokens)) == text.encode()
    assert tokens.tolist() == BYTE_LEVEL.encode(text, add_special_tokens=False).ids or "<|" in text


def test_ids_equal_the_library_and_special_names_are_text():
    assert VOCABULARY.encode(TEXT).tolist() == BYTE_LEVEL.encode(TEXT).ids
    assert VOCABULARY.size == 292 and VOCABULARY.begin == 290 and VOCABULARY.special == {290, 291}
    assert BYTE_LEVEL.encode("a<|end|>b").ids.count(291) == 1
    tokens = VOCABULARY.encode("a<|end|>b")
    assert 291 not in tokens and VOCABULARY.decode(tokens) == "a<|end|>b"
    assert VOCABULARY.decode(np.array([290, *tokens, 291])) == "a<|end|>b"
    assert VOCABULARY.loses() == []


def test_text_streams_yield_whole_characters():
    text = "aé日本\U0001f71b b"
    stream = TextStream(VOCABULARY, np.array([290]))
    pieces = [stream.push(int(token)) for token in VOCABULARY.encode(text)] + [stream.rest()]
    assert "".join(pieces) == text and "\ufffd" not in "".join(pieces)


def test_byte_fallback_tokens_decode_exactly():
    vocabulary = PretrainedVocabulary(like_llama2(False).to_str().encode(), 1)
    for text in ("at a cat", "tab\n日", "  a"):
        assert vocabulary.decode(vocabulary.encode(text)) == text
    assert vocabulary.special == {0, 1, 2} and vocabulary.loses() == ["the letter ▁"]
    adding = PretrainedVocabulary(like_llama2(True).to_str().encode(), 1)
    assert adding.decode(adding.encode("at")) == " at"
    assert adding.loses()[0] == "texts without a leading space (it adds one)"


def test_normalization_is_reported():
    made = Tokenizer.from_str(BYTE_LEVEL.to_str())
    made.normalizer = normalizers.NFC()
    assert PretrainedVocabulary(made.to_str().encode(), 0).loses() == ["accents as characters of their own"]


def test_a_sentencepiece_model_without_tokenizer_json_works():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT]), model_writer=model, vocab_size=300, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2, hard_vocab_limit=False,
        bos_id=1, eos_id=2, unk_id=0, character_coverage=1.0, max_sentence_length=1 << 16,
    )  # fmt: skip
    vocabulary = PretrainedVocabulary(model.getvalue(), 1)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    text = "the cat\nsat 日 there"
    assert vocabulary.encode(text).tolist() == processor.encode(text)
    assert vocabulary.decode(vocabulary.encode(text)) == " " + text
    assert vocabulary.special == {0, 1, 2} and "adds one" in vocabulary.loses()[0]


def test_other_tokenizers_are_refused():
    made = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    made.decoder = decoders.WordPiece()
    with pytest.raises(InputError, match="decodes by WordPiece"):
        PretrainedVocabulary(made.to_str().encode(), 0)
    with pytest.raises(InputError, match="the begin token 292 is not one of the 292 ids"):
        PretrainedVocabulary(BYTE_LEVEL.to_str().encode(), 292)


def test_a_folder_with_only_a_vocabulary_keeps_the_begin_token(tmp_path):
    write_vocabulary(tmp_path / "vocabulary", VOCABULARY)
    tokens = PreparedTokens(tmp_path / "vocabulary")
    assert (
        tokens.vocabulary.begin == 290 and tokens.vocabulary.encode(TEXT).tolist() == VOCABULARY.encode(TEXT).tolist()
    )
    assert tokens.digests() == {"vocabulary": fingerprint(VOCABULARY)}
    with pytest.raises(InputError, match="no split 'test', but only a vocabulary"):
        tokens.split("test")
    other = PretrainedVocabulary(VOCABULARY.model, 291)
    assert fingerprint(other) != fingerprint(VOCABULARY) and ByteVocabulary().begin == 0
    manifest = json.loads((tmp_path / "vocabulary/manifest.json").read_text())
    manifest["vocabulary"]["begin"] = 291
    (tmp_path / "vocabulary/manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="its vocabulary is"):
        PreparedTokens(tmp_path / "vocabulary")
