"""What kind of text a token is part of, told by the shape of the word around it: what does a memory help with?"""

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


def texts_of(pieces: Sequence[bytes]) -> list[str]:
    """The text of each token; a character of several tokens is with the last of them. U+FFFD for what is none."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    texts = [decoder.decode(piece) for piece in pieces]
    if texts:
        texts[-1] += decoder.decode(b"", final=True)
    return texts


def kinds_of(texts: Sequence[str]) -> list[str]:
    """For each token the kind of the word in which its first character lies that is no space."""
    text = "".join(texts)
    of_character: list[str] = []
    for word in _WORD.finditer(text):
        kind = word.lastgroup or "punctuation"
        if kind == "name" and _STARTS_SENTENCE.search(text, max(0, word.start() - 8), word.start()):
            kind = "word"
        of_character += [kind] * len(word[0])
    kinds, place = [], 0
    for part in texts:
        first = place + len(part) - len(part.lstrip())
        at = first if first < place + len(part) else place
        kinds.append(of_character[min(at, len(of_character) - 1)] if of_character else "space")
        place += len(part)
    return kinds
