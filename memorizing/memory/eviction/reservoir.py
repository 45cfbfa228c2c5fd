"""Eviction rule `reservoir`: a uniform random sample of the document stays (algorithm R, Vitter 1985)."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Int

from memorizing.memory.eviction.contract import EvictionRule
from memorizing.memory.slot_table import SlotTable


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reservoir(EvictionRule):
    """Keeps every token of the document with the same probability.

    Token `t` takes slot `t` while there are free slots. Later it draws a number from 0 to `t` and takes the slot of
    that number; without such a slot the token is not written. The draw depends only on the row, the number of
    documents that the row has read, and `t`.
    """

    allows_maximum_age = False

    def choose_slots(self, slot_table: SlotTable, number_BN: Int[jax.Array, "B N"], sink: int) -> Int[jax.Array, "B N"]:
        rows, slots = slot_table.positions_BM.shape
        count_BN = slot_table.admitted_B[:, None] + jnp.maximum(number_BN, 0)

        def draw(row: jax.Array, document: jax.Array, count_N: jax.Array) -> jax.Array:
            of_document = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), row), document)
            rng_N = jax.vmap(jax.random.fold_in, (None, 0))(of_document, count_N)
            return jax.vmap(lambda rng, stop: jax.random.randint(rng, (), 0, stop))(
                rng_N, jnp.maximum(count_N - sink, 0) + 1
            )

        drawn_BN = jax.vmap(draw)(jnp.arange(rows), slot_table.documents_B, count_BN)
        replaced_BN = jnp.where(drawn_BN < slots - sink, sink + drawn_BN, slots)
        return jnp.where(count_BN < slots, count_BN, replaced_BN)
