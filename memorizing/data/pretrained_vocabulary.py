"""The vocabulary of a pretrained model: its tokenizer file unchanged, with the model's own ids.

    tokenizer.json     byte-level BPE (GPT-2, Llama 3, Qwen) and BPE with a token for each byte (Llama 2, Mistral),
                       read by Hugging Face's `tokenizers`
    tokenizer.model    SentencePiece, if there is no tokenizer.json

Each token decodes by itself, so tokens can be shown and written one at a time. Some of these vocabularies do not decode
every text exactly; `loses` lists what they change. The library is imported only when such a vocabulary is used.
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
"""Kinds of text that some vocabularies do not decode exactly: a name and an example of each."""
_MORE = {"a space at the start of a text": " a", "accents as characters of their own": "e\u0301", "the letter ▁": "a▁b"}


LARGEST_GAP = 100_000
"""Ids that a tokenizer may leave without a token."""


class PretrainedVocabulary:
    """The tokenizer of a pretrained model."""

    kind = "pretrained"

    def __init__(self, model: bytes, begin: int, size: int = 0, rows: int | None = None):
        """Loads the bytes of tokenizer.json or tokenizer.model.

        Args:
            size: size that was recorded when the vocabulary was saved; 0 for that of the tokenizer.
            rows: number of embeddings of the model, if known. Special tokens beyond them, such as a padding token
                that was added later, are left out, since no text becomes one.

        Raises:
            InputError: if the tokenizer is of another kind, or its ids do not fit.
        """
        self.model, self.begin = model, begin
        self._tokenizer = _tokenizer(model)
        self._pieces: list[bytes] = self._tokenizer.pieces
        self.special: frozenset[int] = self._tokenizer.special
        limit = len(self._pieces) if rows is None and not size else min(len(self._pieces), rows or size)
        beyond = range(limit, len(self._pieces))
        if needed := [id for id in beyond if id not in self.special]:
            raise InputError(
                f"the tokenizer has {len(self._pieces)} tokens, but the model only {limit}, and text becomes "
                f"{self._tokenizer.name(needed[0])!r}. Fetch both again, or give the model a row for each token with "
                "transformers' resize_token_embeddings"
            )
        self.unused: list[str] = [self._tokenizer.name(id) for id in beyond]
        self._pieces = self._pieces[:limit]
        self.special = frozenset(id for id in self.special if id < limit)
        self.size = max(size, limit)
        if not 0 <= begin < self.size:
            raise InputError(
                f"the begin token {begin} is not one of the {self.size} ids of the tokenizer. Use a smaller id"
            )

    def loses(self) -> list[str]:
        """Returns the kinds of text that `decode` does not give back exactly."""
        added = " " if self.decode(self.encode("a")) == " a" else ""
        texts = AWKWARD | _MORE | self._tokenizer.stripping()
        lost = [name for name, text in texts.items() if self.decode(self.encode(text)) != added + text]
        return (["texts without a leading space (it adds one)"] if added else []) + lost

    def encode(self, text: str) -> Int[np.ndarray, "T"]:
        """Encodes a text without tokens before or after it. Names of special tokens in the text are ordinary text."""
        return np.asarray(self._tokenizer.encode(text), np.int32)

    def decode(self, tokens: Int[np.ndarray, "T"]) -> str:
        """Returns the text. Special tokens are left out; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self.pieces(np.asarray(tokens))).decode("utf-8", errors="replace")

    def pieces(self, tokens: Int[np.ndarray, "T"]) -> list[bytes]:
        return [self._pieces[token] if token < len(self._pieces) else b"" for token in tokens.tolist()]


def token_id(model: bytes, name: str) -> int | None:
    """Returns the id of a token by its name in a tokenizer file; None if it has none."""
    return _tokenizer(model).id(name)


def _tokenizer(model: bytes) -> "_Tokenizer | _SentencePiece":
    return (_Tokenizer if model[:1] == b"{" else _SentencePiece)(model)


class _SentencePiece:
    """Reads tokenizer.model. Encodes a text as a whole, with the leading space that the model asks for."""

    def __init__(self, model: bytes):
        self._processor = processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        ids = range(processor.get_piece_size())
        self.special = frozenset(id for id in ids if processor.is_control(id) or processor.is_unknown(id))
        self.pieces = [
            b"" if id in self.special else _piece_bytes(processor.id_to_piece(id), processor.is_byte(id)) for id in ids
        ]

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def name(self, id: int) -> str:
        return self._processor.id_to_piece(id)

    def id(self, name: str) -> int | None:
        id = self._processor.piece_to_id(name)
        return id if self._processor.id_to_piece(id) == name else None

    def stripping(self) -> dict[str, str]:
        return {}


class _Tokenizer:
    """Reads tokenizer.json."""

    def __init__(self, model: bytes):
        try:
            import tokenizers
        except ModuleNotFoundError as error:
            raise InputError(
                "the vocabulary of a pretrained model (tokenizer.json) needs the extra `pretrained`, which is not "
                "installed. Run bash launch/setup.sh, or pip install tokenizers safetensors"
            ) from error
        settings = json.loads(model)
        self._tokenizer = tokenizers.Tokenizer.from_str(model.decode())
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        is_bytes = _is_byte_level(settings)
        added = {token["id"]: token for token in settings.get("added_tokens", [])}
        for id, token in added.items():
            if (actual := self._tokenizer.token_to_id(token["content"])) != id:
                raise InputError(
                    f"the added token {token['content']!r} has the id {id} in the file, but {actual} when loaded: ids "
                    "of added tokens must follow each other. Fetch the file again"
                )
        self.special = frozenset(id for id, token in added.items() if token["special"])
        self._ids = self._tokenizer.get_vocab(with_added_tokens=True)
        named = {id: name for name, id in self._ids.items()}
        if max(named) > 2 * len(named) + LARGEST_GAP:
            raise InputError(
                f"the token {named[max(named)]!r} has the id {max(named)}, but there are only {len(named)} tokens. "
                "Fetch the file again"
            )
        self._named = named
        self._stripped = {token["content"]: token for token in added.values() if not token["special"]}
        missing = [id for id in range(max(named) + 1) if id not in named]
        self.special |= frozenset(missing)
        self.pieces = [self._bytes(id, named, added, is_bytes) for id in range(max(named) + 1)]

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def name(self, id: int) -> str:
        return self._named.get(id, f"id {id}")

    def id(self, name: str) -> int | None:
        return self._ids.get(name)

    def stripping(self) -> dict[str, str]:
        """Returns texts in which an added token takes the spaces next to it."""
        return {
            f"spaces next to {name}": f"a {name} b"
            for name, token in self._stripped.items()
            if token.get("lstrip") or token.get("rstrip")
        }

    def _bytes(self, id: int, named: dict[int, str], added: dict[int, Any], is_bytes: bool) -> bytes:
        if id in self.special:
            return b""
        if id in added:
            return added[id]["content"].encode()
        if is_bytes:
            return b"".join(bytes([_BYTES[letter]]) if letter in _BYTES else letter.encode() for letter in named[id])
        piece = named[id]
        return _piece_bytes(piece, len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"))


def _piece_bytes(piece: str, is_byte: bool) -> bytes:
    """Returns the bytes of a SentencePiece piece: `▁` is a space, `<0x0A>` a byte."""
    return bytes([int(piece[3:5], 16)]) if is_byte else piece.replace("\u2581", " ").encode()


def _is_byte_level(settings: dict[str, Any]) -> bool:
    """Returns True if the letters of pieces stand for bytes, False if pieces are text with `▁` for spaces.

    Raises:
        InputError: if the tokenizer is of neither kind.
    """
    decoder = settings.get("decoder") or {}
    parts = {part.get("type") for part in decoder.get("decoders", [decoder])}
    if "ByteLevel" in parts and parts <= {"ByteLevel", "Fuse"}:
        return True
    if parts & {"Metaspace", "Replace"} and parts <= {"Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}:
        return False
    raise InputError(
        f"the tokenizer decodes by {', '.join(map(str, sorted(map(str, parts))))}, which is not supported. Use "
        "byte-level BPE (GPT-2, Llama 3, Qwen) or BPE with a token for each byte (Llama 2, Mistral)"
    )


def _byte_letters() -> dict[str, int]:
    """Returns GPT-2's letters for bytes: printable bytes are themselves, others letters from U+0100 on."""
    printed = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(0x100 + place): byte for place, byte in enumerate(others)}


_BYTES = _byte_letters()
