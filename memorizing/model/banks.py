"""The banks while a segment is read: each layer reads the state before the segment; writes follow the last reader.

Model.memory_layers = (6, 9, 12), Model.banks_of = (9, 9, 9)        one bank, of layer 9, that all three read

layer 6     reads
layer 9     reads; its keys and values wait
layer 12    reads; then the bank is written in place: no layer needs its old state
"""

from collections.abc import Sequence

import jax
from jax import lax

from memorizing.memory.bank import Bank, add
from memorizing.memory.search import Search
from memorizing.memory.settings import MemorySettings
from memorizing.memory.writing import Tokens, write_segment
from memorizing.model.attention import LayerMemoryUpdate
from memorizing.model.settings import ModelSettings


class Banks:
    """The banks of a model while it reads a segment. Empty if the model has no memory."""

    def __init__(self, settings: ModelSettings, memory: MemorySettings, banks: Sequence[Bank]):
        self._memory = memory
        self._read_from = settings.read_from
        self._banks = dict(zip(settings.bank_layers, banks, strict=True)) if banks else {}
        self._waiting: dict[int, tuple[Tokens, Tokens]] = {}

    def read_by(self, number: int) -> Bank | None:
        """Returns the bank that a layer reads, or None."""
        return self._banks.get(self._read_from.get(number, 0))

    def update(self, number: int, update: LayerMemoryUpdate, x_BNE: jax.Array, search: Search) -> jax.Array:
        """Takes the update of a memory layer, and writes each bank whose last reader this layer is.

        Returns:
            The stream `x_BNE`, on which all later reads depend.
        """
        read = self._read_from[number]
        self._banks[read] = add(self._banks[read], update.read_stats, self._memory.eviction_rule)
        if number in self._banks:
            self._waiting[number] = Tokens(*update.segment[:2]), update.cached
        for owner, (segment, cached) in list(self._waiting.items()):
            if number < max(reader for reader, of in self._read_from.items() if of == owner):
                continue
            if owner < number:  # write only after this layer's read, as within a layer (see `Attention`)
                x_BNE, segment = lax.optimization_barrier((x_BNE, segment))
            self._banks[owner] = write_segment(self._banks[owner], segment, self._memory, search, cached)
            del self._waiting[owner]
        return x_BNE

    def all(self) -> tuple[Bank, ...]:
        """Returns all banks, lowest layer first."""
        return tuple(self._banks.values())
