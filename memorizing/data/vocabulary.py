"""Vocabularies: text to tokens and back. Tokens are bytes, SentencePiece pieces, or listed words.

Ids 0, 1, 2 are pad, end and unknown, as in T5. Bytes and SentencePiece decode exactly what they encoded: SentencePiece
is trained without normalization and with a token per byte, so that it can encode every text. TensorFlow is not needed.
"""

import io
import itertools
import re
from collections.abc import Iterable
from typing import Protocol, runtime_checkable

import numpy as np
import sentencepiece
from jaxtyping import Int

from memorizing.data.pretrained_vocabulary import AWKWARD, PretrainedVocabulary
from memorizing.errors import InputError
from memorizing.files import AnyPath, atomic_write
from memorizing.shapes import BEGIN_TOKEN

MODEL_FILE = "vocabulary.model"
_SPECIAL = 3
_LINES = 1 << 14
"""Lines encoded at once. SentencePiece returns Python integers, which take ten times the memory of the text."""
_LONG = 1 << 14
"""Characters of a line used in training."""


@runtime_checkable
class Vocabulary(Protocol):
    """A reversible map between text and token ids below `size`.

    Attributes:
        begin: token from which the first token of a document is predicted.
        special: ids that never encode text and decode to nothing.
    """

    kind: str
    size: int
    begin: int
    special: frozenset[int]

    def encode(self, text: str) -> Int[np.ndarray, "T"]: ...

    def decode(self, tokens: Int[np.ndarray, "T"]) -> str: ...

    def pieces(self, tokens: Int[np.ndarray, "T"]) -> list[bytes]:
        """Returns the UTF-8 bytes of each token. Joined, they are the text."""
        ...


class ByteVocabulary:
    """Encodes each UTF-8 byte `b` as token `b + 3`."""

    kind, begin, special = "bytes", BEGIN_TOKEN, frozenset(range(_SPECIAL))

    def __init__(self, size: int = 0):
        """Makes a vocabulary of `size` tokens. A size above 259 leaves room for tokens that no text has."""
        self.size = max(size, 256 + _SPECIAL)

    def encode(self, text: str) -> Int[np.ndarray, "T"]:
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32) + _SPECIAL

    def decode(self, tokens: Int[np.ndarray, "T"]) -> str:
        """Returns the text. Special tokens are left out; bytes that are not UTF-8 become U+FFFD."""
        tokens = np.asarray(tokens)
        tokens = tokens[(tokens >= _SPECIAL) & (tokens < 256 + _SPECIAL)]
        return (tokens - _SPECIAL).astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def pieces(self, tokens: Int[np.ndarray, "T"]) -> list[bytes]:
        return [bytes([token - _SPECIAL]) if _SPECIAL <= token < 256 + _SPECIAL else b"" for token in tokens.tolist()]


class SentencePieceVocabulary:
    """A trained SentencePiece model (arXiv 1808.06226)."""

    kind, begin, special = "sentencepiece", BEGIN_TOKEN, frozenset(range(_SPECIAL))

    def __init__(self, model: bytes, size: int = 0):
        """Loads a model. A `size` above that of the model leaves room for tokens that no text has (T5's sentinels)."""
        self.model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self._pieces = self._processor.get_piece_size()
        self.size = max(size, self._pieces)
        self._space_mark = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in "\u2581".encode()]

    def loses(self) -> list[str]:
        """Returns the kinds of text that `decode` does not give back exactly: none for a model trained here.

        SentencePiece's own defaults normalize text, have no byte tokens, and use ids 0, 1, 2 for pieces.
        """
        processor = self._processor
        lost = [name for name, text in AWKWARD.items() if self.decode(self.encode(text)) != text]
        for id in range(min(_SPECIAL, self._pieces)):
            if not (processor.is_control(id) or processor.is_unknown(id) or processor.is_unused(id)):
                lost.append(f"its piece {processor.id_to_piece(id)!r}, whose id {id} is one of pad, end and unknown")
        return lost

    def encode(self, text: str) -> Int[np.ndarray, "T"]:
        """Encodes a text on one thread. Other threads can encode at the same time, because SentencePiece releases
        Python's lock.
        """
        # Line by line: no piece spans a line end, and the cost stays linear in the length of the text. SentencePiece
        # writes spaces as U+2581 and would give that character back as a space, so it is encoded by its bytes instead.
        lines = text.splitlines(keepends=True)
        if "\u2581" in text:
            lines = [part for line in lines for part in re.split("(\u2581)", line) if part]
        encoded = [np.zeros(0, np.int32)]
        for first in range(0, len(lines), _LINES):
            group = lines[first : first + _LINES]
            tokens = self._processor.encode(group, num_threads=1)
            if "\u2581" in text:
                tokens = [
                    self._space_mark if line == "\u2581" else ids for line, ids in zip(group, tokens, strict=True)
                ]
            encoded.append(np.fromiter(itertools.chain.from_iterable(tokens), np.int32))
        return np.concatenate(encoded)

    def decode(self, tokens: Int[np.ndarray, "T"]) -> str:
        tokens = np.asarray(tokens)
        return self._processor.decode(tokens[(tokens >= _SPECIAL) & (tokens < self._pieces)].tolist())

    def pieces(self, tokens: Int[np.ndarray, "T"]) -> list[bytes]:
        return [self._piece(token) for token in tokens.tolist()]

    def _piece(self, token: int) -> bytes:
        if not _SPECIAL <= token < self._pieces:
            return b""
        piece = self._processor.id_to_piece(token)
        if self._processor.is_byte(token):
            return bytes([int(piece[3:5], 16)])  # <0x0A>
        return piece.replace("\u2581", " ").encode()


class IdVocabulary:
    """Plain token ids without a text, for a seqio task with such a vocabulary; `decode` writes the numbers."""

    kind, begin, special = "ids", BEGIN_TOKEN, frozenset()

    def __init__(self, size: int):
        self.size = size

    def encode(self, text: str) -> Int[np.ndarray, "T"]:
        return np.asarray([int(word) for word in text.split()], np.int32)

    def decode(self, tokens: Int[np.ndarray, "T"]) -> str:
        return " ".join(map(str, np.asarray(tokens).tolist()))

    def pieces(self, tokens: Int[np.ndarray, "T"]) -> list[bytes]:
        return [(" " * (place > 0) + str(token)).encode() for place, token in enumerate(tokens.tolist())]


class WordVocabulary:
    """A list of words, for generated text: words joined by single spaces."""

    kind, begin, special = "words", BEGIN_TOKEN, frozenset(range(_SPECIAL))

    def __init__(self, words: list[str]):
        self.words = words
        self.size = len(words) + _SPECIAL
        self._ids = {word: _SPECIAL + place for place, word in enumerate(words)}

    def encode(self, text: str) -> Int[np.ndarray, "T"]:
        return np.asarray([self._ids[word] for word in text.split(" ")], np.int32)

    def decode(self, tokens: Int[np.ndarray, "T"]) -> str:
        return " ".join(self.words[token - _SPECIAL] for token in np.asarray(tokens) if token >= _SPECIAL)

    def pieces(self, tokens: Int[np.ndarray, "T"]) -> list[bytes]:
        words = [self.words[token - _SPECIAL] if token >= _SPECIAL else "" for token in tokens.tolist()]
        return [(" " * (place > 0) + word).encode() for place, word in enumerate(words)]


def encoded_text(vocabulary: Vocabulary, text: str, name: str) -> Int[np.ndarray, "T"]:
    """Returns the tokens of a user's text, which errors call `name`.

    Raises:
        InputError: if the vocabulary, one of words or ids, has no token for a part of the text.
    """
    try:
        return vocabulary.encode(text)
    except (KeyError, ValueError) as error:
        raise InputError(
            f"{name} cannot be encoded: the vocabulary of this run has no token for {error}. Use text of its words"
        ) from error


class TextStream:
    """Turns tokens into text as they come, in whole characters: bytes of an incomplete character wait for the next
    token.
    """

    _LONGEST = 3
    """Bytes of UTF-8 that can wait for others; each may decode to a U+FFFD of its own."""

    def __init__(self, vocabulary: Vocabulary, before: Int[np.ndarray, "T"]):
        """Starts a stream after the tokens `before`. The space between two tokens belongs to the second one."""
        self._vocabulary = vocabulary
        self._tokens, self._shown = list(before[-1:]), len(vocabulary.decode(before[-1:]))

    def push(self, token: int) -> str:
        """Returns the text that this token completes."""
        self._tokens.append(token)
        text = self._vocabulary.decode(np.asarray(self._tokens, np.int32))
        waiting = 0
        while waiting < self._LONGEST and text.endswith("\ufffd", 0, len(text) - waiting):
            waiting += 1
        new = text[self._shown : len(text) - waiting]
        self._shown = max(self._shown, len(text) - waiting)
        if not waiting:  # all text is returned: earlier tokens no longer matter
            self._tokens, self._shown = [token], len(self._vocabulary.decode(np.asarray([token], np.int32)))
        return new

    def rest(self) -> str:
        """Returns the text that still waits; U+FFFD for bytes that are not UTF-8."""
        text = self._vocabulary.decode(np.asarray(self._tokens, np.int32))
        new, self._shown = text[self._shown :], max(self._shown, len(text))
        return new


def train_sentencepiece(texts: Iterable[str], size: int, model_type: str, sample_bytes: int) -> SentencePieceVocabulary:
    """Trains a vocabulary on lines spread evenly over `texts`, about `sample_bytes` in total.

    Raises:
        InputError: if the text is too small for a vocabulary of this size.
    """
    lines = _sample_lines(texts, sample_bytes)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=size,
            model_type=model_type,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            user_defined_symbols=["\n", "\t"],
            character_coverage=0.9995,
            max_sentence_length=4 * _LONG,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            num_threads=1,  # with more threads, the vocabulary would depend on their number
            minloglevel=2,
        )
    except RuntimeError as error:
        if needed := re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error)):
            raise InputError(
                f"Prepare.vocabulary_size = {size} is too small: the letters of this text (all but the rarest 0.05%, "
                f"which are spelled in bytes) need {needed[1]}. Set it to at least {needed[1]}, or use "
                "Prepare.vocabulary = 'bytes'"
            ) from error
        raise InputError(
            f"a SentencePiece vocabulary of {size} could not be trained on {len(lines)} lines of text: {error}. "
            "Choose a smaller Prepare.vocabulary_size, give more text, or use Prepare.vocabulary = 'bytes'"
        ) from error
    return SentencePieceVocabulary(model.getvalue())


def _sample_lines(texts: Iterable[str], sample_bytes: int) -> list[str]:
    """Returns every n-th line. It chooses n so that about `sample_bytes` remain, however long the text is."""
    sample: list[str] = []
    sample_size, every, number = 0, 1, 0
    for text in texts:
        for line in text.splitlines():
            for first in range(0, max(len(line), 1), _LONG):  # SentencePiece silently skips longer lines
                number += 1
                if number % every == 0 and line:
                    sample.append(line[first : first + _LONG])
                    sample_size += len(sample[-1])
        if sample_size > 2 * sample_bytes:
            sample, every = sample[::2], every * 2
            sample_size = sum(map(len, sample))
    return sample


def save_vocabulary(vocabulary: Vocabulary, folder: AnyPath) -> None:
    """Writes the file that `load_vocabulary` reads. Byte and id vocabularies have no file."""
    if isinstance(vocabulary, SentencePieceVocabulary | PretrainedVocabulary):
        atomic_write(folder / MODEL_FILE, vocabulary.model)
    elif isinstance(vocabulary, WordVocabulary):
        atomic_write(folder / MODEL_FILE, "\n".join(vocabulary.words))


def load_vocabulary(kind: str, folder: AnyPath, size: int = 0, begin: int = BEGIN_TOKEN) -> Vocabulary:
    """Returns the vocabulary of a prepared folder.

    Raises:
        InputError: if its file is missing or damaged.
    """
    if kind == "bytes":
        return ByteVocabulary(size)
    if kind == "ids":
        return IdVocabulary(size)
    try:
        if kind == "words":
            return WordVocabulary((folder / MODEL_FILE).read_text().split("\n"))
        if kind == "pretrained":
            return PretrainedVocabulary((folder / MODEL_FILE).read_bytes(), begin, size)
        return SentencePieceVocabulary((folder / MODEL_FILE).read_bytes(), size)
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"{folder / MODEL_FILE} cannot be read: {error}. Prepare {folder} again, or copy all of it again"
        ) from error
