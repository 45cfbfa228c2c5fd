"""Which memory layer reads and writes which bank, and when: each reads what was there before the segment.

Model.memory_layers = (6, 9, 12), Model.banks_of = (9, 9, 9)        one bank, of layer 9, that all three read

layer 6     reads
layer 9     reads; its keys and values wait
layer 12    reads; then they are written, in place: nobody needs what was there before
"""

from collections.abc import Sequence

import jax
from jax import lax

from memorizing.memory.bank import Bank, add
from memorizing.memory.search import Search
from memorizing.memory.settings import MemorySettings
from memorizing.memory.writing import Tokens, write
from memorizing.model.attention import LayerMemoryUpdate
from memorizing.model.settings import ModelSettings


class Banks:
    """The memories while a segment is read; without any for a model that has none at hand."""

    def __init__(self, settings: ModelSettings, memory: MemorySettings, banks: Sequence[Bank]):
        self._memory = memory
        self._read_from = settings.read_from
        self._banks = dict(zip(settings.bank_layers, banks, strict=True)) if banks else {}
        self._waiting: dict[int, tuple[Tokens, Tokens]] = {}

    def read_by(self, number: int) -> Bank | None:
        """The bank that a layer reads."""
        return self._banks.get(self._read_from.get(number, 0))

    def remember(self, number: int, remembered: LayerMemoryUpdate, x_BNE: jax.Array, search: Search) -> jax.Array:
        """Takes what a memory layer has read and what it leaves, and writes what nobody is still to read.

        Returns the stream `x_BNE`, on which all that is read later depends.
        """
        read = self._read_from[number]
        self._banks[read] = add(self._banks[read], remembered.read_stats)
        if number in self._banks:
            self._waiting[number] = Tokens(*remembered.segment[:2]), remembered.cached
        for owner, (segment, cached) in list(self._waiting.items()):
            if number < max(reader for reader, of in self._read_from.items() if of == owner):
                continue
            if owner < number:  # as within a layer, see `Attention`: written only when all is read
                x_BNE, segment = lax.optimization_barrier((x_BNE, segment))
            self._banks[owner] = write(self._banks[owner], segment, cached, self._memory, search)
            del self._waiting[owner]
        return x_BNE

    def all(self) -> tuple[Bank, ...]:
        """Lowest layer first."""
        return tuple(self._banks.values())
