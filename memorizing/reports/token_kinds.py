"""The kind of text that each token is part of, by the shape of the word around it."""

import codecs
import re
from collections.abc import Sequence

KINDS = ("identifier", "name", "number", "word", "punctuation", "space")
_WORD = re.compile(
    r"(?P<number>\d+(?:[.,_]\d+)*)"
    r"|(?P<identifier>\\[A-Za-z]+|(?=\w*(?:_|[a-z0-9][A-Z]|[^\W\d]\d))[^\W\d]\w*)"  # \cite, snake_case, camelCase, x1
    r"|(?P<name>[A-Z]\w*)"
    r"|(?P<word>\w+)"
    r"|(?P<space>\s+)"
    r"|(?P<punctuation>.)",
    re.DOTALL,
)
_STARTS_SENTENCE = re.compile(r"(?:^|[.!?:][\"')\]]*\s+|\n\s*)\Z")


def texts_of(token_bytes: Sequence[bytes]) -> list[str]:
    """Returns the text of each token. A character of several tokens goes to the last one; invalid bytes are U+FFFD."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    texts = [decoder.decode(encoded) for encoded in token_bytes]
    if texts:
        texts[-1] += decoder.decode(b"", final=True)
    return texts


def kinds_of(texts: Sequence[str]) -> list[str]:
    """Returns the kind of each token: that of the word at its first character that is not white space."""
    text = "".join(texts)
    kind_of_character: list[str] = []
    for word in _WORD.finditer(text):
        kind = word.lastgroup or "punctuation"
        if kind == "name" and _STARTS_SENTENCE.search(text, max(0, word.start() - 8), word.start()):
            kind = "word"
        kind_of_character += [kind] * len(word[0])
    kinds, place = [], 0
    for token in texts:
        first = place + len(token) - len(token.lstrip())
        character = first if first < place + len(token) else place
        kinds.append(kind_of_character[min(character, len(kind_of_character) - 1)] if kind_of_character else "space")
        place += len(token)
    return kinds
