"""Text to tokens and back: bytes, SentencePiece, or listed words. Ids 0, 1, 2 are pad, end and unknown, as in T5.

Both decode exactly what they encoded: SentencePiece is trained without normalization and with a token per byte, so
that no text is unencodable. No TensorFlow here: a machine that trains, evaluates or generates needs none.
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
"""Encoded at once: SentencePiece gives lists of Python's numbers, which take ten times the room of the text."""
_LONG = 1 << 14
"""Characters of a line to train on."""


@runtime_checkable
class Vocabulary(Protocol):
    """A reversible map between text and token ids below `size`.

    Attributes:
        begin: the token from which a document's first one is predicted.
        special: ids that stand for no text: no text has them, and none is written with them.
    """

    kind: str
    size: int
    begin: int
    special: frozenset[int]

    def encode(self, text: str) -> Int[np.ndarray, "T"]: ...

    def decode(self, tokens: Int[np.ndarray, "T"]) -> str: ...

    def pieces(self, tokens: Int[np.ndarray, "T"]) -> list[bytes]:
        """The UTF-8 of each token: joined, it is that of the text."""
        ...


class ByteVocabulary:
    """Each UTF-8 byte `b` is token `b + 3`."""

    kind, begin, special = "bytes", BEGIN_TOKEN, frozenset(range(_SPECIAL))

    def __init__(self, size: int = 0):
        """`size` may be above 259, which leaves room for tokens that no text has."""
        self.size = max(size, 256 + _SPECIAL)

    def encode(self, text: str) -> Int[np.ndarray, "T"]:
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32) + _SPECIAL

    def decode(self, tokens: Int[np.ndarray, "T"]) -> str:
        """Special tokens are left out; bytes that do not form UTF-8 become U+FFFD."""
        tokens = np.asarray(tokens)
        tokens = tokens[(tokens >= _SPECIAL) & (tokens < 256 + _SPECIAL)]
        return (tokens - _SPECIAL).astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def pieces(self, tokens: Int[np.ndarray, "T"]) -> list[bytes]:
        return [bytes([token - _SPECIAL]) if _SPECIAL <= token < 256 + _SPECIAL else b"" for token in tokens.tolist()]


class SentencePieceVocabulary:
    """A trained SentencePiece model (arXiv 1808.06226)."""

    kind, begin, special = "sentencepiece", BEGIN_TOKEN, frozenset(range(_SPECIAL))

    def __init__(self, model: bytes, size: int = 0):
        """`size` may be above that of the model, which leaves room for tokens that no text has (T5's sentinels)."""
        self.model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self._pieces = self._processor.get_piece_size()
        self.size = max(size, self._pieces)
        self._space_mark = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in "\u2581".encode()]

    def loses(self) -> list[str]:
        """Of what texts have, what `decode` would not give back as it was: empty for a model trained here.

        SentencePiece's own defaults normalize, know no bytes, and put pieces where Ids 0, 1, 2 are here.
        """
        processor = self._processor
        lost = [name for name, text in AWKWARD.items() if self.decode(self.encode(text)) != text]
        for id in range(min(_SPECIAL, self._pieces)):
            if not (processor.is_control(id) or processor.is_unknown(id) or processor.is_unused(id)):
                lost.append(f"its piece {processor.id_to_piece(id)!r}, whose id {id} is one of pad, end and unknown")
        return lost

    def encode(self, text: str) -> Int[np.ndarray, "T"]:
        """On one thread; others can encode other texts at the same time, since Python's lock is free meanwhile."""
        # Line by line: no piece spans a line end, and the cost stays linear in the length of the text. SentencePiece
        # writes spaces as U+2581 and would give that character back as a space, so it is told by its bytes instead.
        lines = text.splitlines(keepends=True)
        if "\u2581" in text:
            lines = [part for line in lines for part in re.split("(\u2581)", line) if part]
        encoded = [np.zeros(0, np.int32)]
        for first in range(0, len(lines), _LINES):
            some = lines[first : first + _LINES]
            tokens = self._processor.encode(some, num_threads=1)
            if "\u2581" in text:
                tokens = [self._space_mark if line == "\u2581" else own for line, own in zip(some, tokens, strict=True)]
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
    """Numbers without a text, as a task of one's own may have them; `decode` writes them out."""

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
    """The tokens of a text that somebody gave, under a name that they know.

    Raises:
        InputError: when the vocabulary, one of words or ids, has none for a part of it.
    """
    try:
        return vocabulary.encode(text)
    except (KeyError, ValueError) as error:
        raise InputError(f"{name} cannot be read: the vocabulary of this run has no token for {error}") from error


class TextStream:
    """Tokens to text as they come, in whole characters: bytes of one that is not complete yet are held back."""

    _LONGEST = 3
    """Bytes of UTF-8 that can wait for others; each may decode to a U+FFFD of its own."""

    def __init__(self, vocabulary: Vocabulary, before: Int[np.ndarray, "T"]):
        """`before` are the tokens that those to come follow: what separates two tokens is text of the second."""
        self._vocabulary = vocabulary
        self._tokens, self._told = list(before[-1:]), len(vocabulary.decode(before[-1:]))

    def push(self, token: int) -> str:
        """The text that is certain with this token and was not before."""
        self._tokens.append(token)
        text = self._vocabulary.decode(np.asarray(self._tokens, np.int32))
        waiting = 0
        while waiting < self._LONGEST and text.endswith("\ufffd", 0, len(text) - waiting):
            waiting += 1
        new = text[self._told : len(text) - waiting]
        self._told = max(self._told, len(text) - waiting)
        if not waiting:  # all told: no token before this one matters any more
            self._tokens, self._told = [token], len(self._vocabulary.decode(np.asarray([token], np.int32)))
        return new

    def rest(self) -> str:
        """What was held back until now; U+FFFD for what is no text."""
        text = self._vocabulary.decode(np.asarray(self._tokens, np.int32))
        new, self._told = text[self._told :], max(self._told, len(text))
        return new


def train_sentencepiece(texts: Iterable[str], size: int, model_type: str, sample_bytes: int) -> SentencePieceVocabulary:
    """Trains on lines spread evenly over `texts`, about `sample_bytes` of them.

    Raises:
        InputError: when the text is too small for a vocabulary of this size.
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
            num_threads=1,  # the sum over threads depends on their number, and the vocabulary should not
            minloglevel=2,
        )
    except RuntimeError as error:
        raise InputError(
            f"a SentencePiece vocabulary of {size} could not be trained on {len(lines)} lines of text: {error}; "
            "choose a smaller Prepare.vocabulary_size, give more text, or use Prepare.vocabulary = 'bytes'"
        ) from error
    return SentencePieceVocabulary(model.getvalue())


def _sample_lines(texts: Iterable[str], sample_bytes: int) -> list[str]:
    """Every n-th line, n such that about `sample_bytes` are kept however much text there is."""
    kept: list[str] = []
    kept_bytes, every, number = 0, 1, 0
    for text in texts:
        for line in text.splitlines():
            for first in range(0, max(len(line), 1), _LONG):  # SentencePiece leaves out longer lines without a word
                number += 1
                if number % every == 0 and line:
                    kept.append(line[first : first + _LONG])
                    kept_bytes += len(kept[-1])
        if kept_bytes > 2 * sample_bytes:
            kept, every = kept[::2], every * 2
            kept_bytes = sum(map(len, kept))
    return kept


def save_vocabulary(vocabulary: Vocabulary, folder: AnyPath) -> None:
    """Writes the file that `load_vocabulary` reads; byte and id vocabularies have none."""
    if isinstance(vocabulary, SentencePieceVocabulary | PretrainedVocabulary):
        atomic_write(folder / MODEL_FILE, vocabulary.model)
    elif isinstance(vocabulary, WordVocabulary):
        atomic_write(folder / MODEL_FILE, "\n".join(vocabulary.words))


def load_vocabulary(kind: str, folder: AnyPath, size: int = 0, begin: int = BEGIN_TOKEN) -> Vocabulary:
    """The vocabulary of a prepared folder.

    Raises:
        InputError: when its file is missing or damaged.
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
            f"{folder / MODEL_FILE} cannot be read: {error}; prepare {folder} again, or copy it whole"
        ) from error
