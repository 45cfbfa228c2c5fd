"""The vocabulary of a pretrained model: its tokenizer file as it is, and its own ids.

    tokenizer.json     byte-level BPE (GPT-2, Llama 3, Qwen) and BPE with a token for each byte (Llama 2, Mistral),
                       read by Hugging Face's `tokenizers`
    tokenizer.model    SentencePiece, where there is nothing else

Text goes back piece by piece, so that tokens can be shown and written one at a time. Not all of these give back every
text as it was: `loses` says what they change. The library is only loaded where such a vocabulary is used.
"""

import json
from typing import Any

import numpy as np
import sentencepiece
from jaxtyping import Int

from memorizing.errors import InputError

AWKWARD = {
    "line ends": "a\nb",
    "empty lines": "a\n\nb",
    "carriage returns": "a\r\nb",
    "tabs": "a\tb",
    "spaces": "a b",
    "double spaces": "a  b",
    "spaces at the start of a line": "a\n    b",
    "accented letters": "aÉb",
    "ligatures": "aﬁb",
    "wide letters": "aＡb",
    "Chinese characters": "a日本b",
    "rare characters": "a\U0001f71bb",
}
"""Of what texts have an example each, by its name; not all vocabularies give all of them back."""
_MORE = {"a space at the start of a text": " a", "accents as characters of their own": "e\u0301", "the letter ▁": "a▁b"}


class PretrainedVocabulary:
    """The tokenizer of a pretrained model."""

    kind = "pretrained"

    def __init__(self, model: bytes, begin: int, size: int = 0):
        """From the bytes of tokenizer.json or tokenizer.model.

        Raises:
            InputError: when the tokenizer is of another kind, or its ids do not fit.
        """
        self.model, self.begin = model, begin
        self._tokenizer = (_Tokenizer if model[:1] == b"{" else _SentencePiece)(model)
        self._pieces: list[bytes] = self._tokenizer.pieces
        self.special: frozenset[int] = self._tokenizer.special
        self.size = max(size, len(self._pieces))
        if not 0 <= begin < self.size:
            raise InputError(f"the begin token {begin} is not one of the {self.size} ids of the tokenizer")

    def loses(self) -> list[str]:
        """Of what texts have, what `decode` does not give back as it was."""
        added = " " if self.decode(self.encode("a")) == " a" else ""
        lost = [name for name, text in (AWKWARD | _MORE).items() if self.decode(self.encode(text)) != added + text]
        return (["that no space stands before a text (it adds one)"] if added else []) + lost

    def encode(self, text: str) -> Int[np.ndarray, "T"]:
        """Without tokens before or behind; names of special tokens in a text are text."""
        return np.asarray(self._tokenizer.encode(text), np.int32)

    def decode(self, tokens: Int[np.ndarray, "T"]) -> str:
        """Special tokens are left out; bytes that do not form UTF-8 become U+FFFD."""
        return b"".join(self.pieces(np.asarray(tokens))).decode("utf-8", errors="replace")

    def pieces(self, tokens: Int[np.ndarray, "T"]) -> list[bytes]:
        return [self._pieces[token] if token < len(self._pieces) else b"" for token in tokens.tolist()]


class _SentencePiece:
    """tokenizer.model: encodes a text as a whole, with the space before it that the model asks for."""

    def __init__(self, model: bytes):
        self._processor = processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        ids = range(processor.get_piece_size())
        self.special = frozenset(id for id in ids if processor.is_control(id) or processor.is_unknown(id))
        self.pieces = [
            b"" if id in self.special else _piece_bytes(processor.id_to_piece(id), processor.is_byte(id)) for id in ids
        ]

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)


class _Tokenizer:
    """tokenizer.json."""

    def __init__(self, model: bytes):
        try:
            import tokenizers
        except ModuleNotFoundError as error:
            raise InputError(
                "the vocabulary of a pretrained model (tokenizer.json) needs the extra `pretrained`, which is not "
                "installed: bash launch/setup.sh, or pip install tokenizers safetensors"
            ) from error
        described = json.loads(model)
        self._tokenizer = tokenizers.Tokenizer.from_str(model.decode())
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        is_bytes = _is_byte_level(described)
        added = {token["id"]: token for token in described.get("added_tokens", [])}
        self.special = frozenset(id for id, token in added.items() if token["special"])
        named = {id: name for name, id in self._tokenizer.get_vocab(with_added_tokens=True).items()}
        missing = [id for id in range(max(named) + 1) if id not in named]
        self.special |= frozenset(missing)
        self.pieces = [self._bytes(id, named, added, is_bytes) for id in range(max(named) + 1)]

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def _bytes(self, id: int, named: dict[int, str], added: dict[int, Any], is_bytes: bool) -> bytes:
        if id in self.special:
            return b""
        if id in added:
            return added[id]["content"].encode()
        if is_bytes:
            return bytes(_BYTES[letter] for letter in named[id])
        piece = named[id]
        return _piece_bytes(piece, len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"))


def _piece_bytes(piece: str, is_byte: bool) -> bytes:
    """Of SentencePiece: `▁` is a space, `<0x0A>` a byte."""
    return bytes([int(piece[3:5], 16)]) if is_byte else piece.replace("\u2581", " ").encode()


def _is_byte_level(described: dict[str, Any]) -> bool:
    """Whether letters of pieces stand for bytes, or pieces are text with `▁` for spaces.

    Raises:
        InputError: when neither is so.
    """
    decoder = described.get("decoder") or {}
    parts = {part.get("type") for part in decoder.get("decoders", [decoder])}
    if "ByteLevel" in parts and parts <= {"ByteLevel", "Fuse"}:
        return True
    if parts & {"Metaspace", "Replace"} and parts <= {"Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}:
        return False
    raise InputError(
        f"the tokenizer decodes by {', '.join(map(str, sorted(map(str, parts))))}, which is not supported: byte-level "
        "BPE (GPT-2, Llama 3, Qwen) and BPE with a token for each byte (Llama 2, Mistral) are"
    )


def _byte_letters() -> dict[str, int]:
    """GPT-2's: bytes that can be printed are themselves, the others letters from U+0100 on, in order."""
    printed = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(0x100 + place): byte for place, byte in enumerate(others)}


_BYTES = _byte_letters()
