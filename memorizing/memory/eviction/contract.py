"""The contract of all eviction rules, and how a segment's tokens take their slots by any of them.

All tokens of a segment are placed at once: a rule compares the tokens that were in memory before the segment.
The first `Memory.sink` slots hold the first tokens of the document and never leave; rules are for the other slots.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float, Int, Num

from memorizing.memory.slot_table import SlotTable
from memorizing.sections import Section


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvictionRule(Section):
    """A rule that chooses the slot of each new token, and so the token that leaves a full memory.

    By default free slots are taken first, then those of the tokens of lowest `rank`. The fields of a subclass are the
    settings of a gin section of its name. The table `EVICTION_RULES` names the subclasses.

    Attributes:
        fits_ring: whether a ring buffer follows the rule without a slot table.
        is_full_final: whether a full memory takes no more tokens.
        allows_maximum_age: whether the rule makes sense together with `Memory.maximum_age`.
        usage_dtype: dtype of the number that the rule tracks for each slot, `SlotTable.usage_BM`; None for no number.
    """

    fits_ring: ClassVar[bool] = False
    is_full_final: ClassVar[bool] = False
    allows_maximum_age: ClassVar[bool] = True
    usage_dtype: ClassVar[Any] = None

    def rank(self, slot_table: SlotTable) -> Num[jax.Array, "B M"]:
        """Returns the order in which tokens leave, lowest rank first, equal ranks by age, oldest first.

        The smallest and the largest number of the dtype are for free slots and for tokens that stay.
        """
        return jnp.zeros(slot_table.positions_BM.shape)

    def retrieval_units(self, shares: Float[jax.Array, "*shape"]) -> Int[jax.Array, "*shape"]:
        """Returns how much one retrieval counts for the slot, given its share of the query's attention (0 to 1).

        Units are whole numbers, so their sum over queries, heads and devices does not depend on the order.
        """
        raise NotImplementedError

    def usage_after_read(self, slot_table: SlotTable, units_BM: Int[jax.Array, "B M"]) -> Num[jax.Array, "B M"]:
        """Returns the slots' usage after a read; `units_BM` sums the units of its retrievals."""
        raise NotImplementedError

    def new_usage(self, slot_table: SlotTable) -> Num[jax.Array, "B"]:
        """Returns the usage with which the tokens of a segment enter the memory."""
        raise NotImplementedError

    def choose_slots(self, slot_table: SlotTable, number_BN: Int[jax.Array, "B N"], sink: int) -> Int[jax.Array, "B N"]:
        """Returns the slot of each token, `M` for none, given its number among the tokens to write.

        If several tokens choose the same slot, the last one gets it.
        """
        slots = slot_table.positions_BM.shape[1]
        order_BM, count_B = self._leaving_order(slot_table, sink)
        slots_BN = jnp.take_along_axis(order_BM, jnp.clip(number_BN, 0, slots - 1), axis=1)
        return jnp.where(number_BN < count_B[:, None], slots_BN, slots)

    def _leaving_order(self, slot_table: SlotTable, sink: int) -> tuple[Int[jax.Array, "B M"], Int[jax.Array, "B"]]:
        """Returns the slots in the order in which they are taken, free ones first, and how many may be taken."""
        held_BM, positions_BM = slot_table.held_BM, slot_table.positions_BM
        slot_BM = lax.broadcasted_iota(jnp.int32, positions_BM.shape, 1)
        stays_BM = held_BM & ((slot_BM < sink) | self.is_full_final)
        rank_BM = self.rank(slot_table)
        limits = (jnp.finfo if jnp.issubdtype(rank_BM.dtype, jnp.floating) else jnp.iinfo)(rank_BM.dtype)
        rank_BM = jnp.where(stays_BM, limits.max, jnp.where(held_BM, rank_BM, limits.min))
        *_, order_BM = lax.sort((rank_BM, positions_BM, slot_BM), num_keys=3)
        return order_BM, (~stays_BM).sum(1, dtype=jnp.int32)


def assign_slots(
    rule: EvictionRule, slot_table: SlotTable, admitted_BN: Bool[jax.Array, "B N"], sink: int
) -> Int[jax.Array, "B N"]:
    """Returns the slot of each token of a segment, all different; `M` for a token that is not written."""
    slots = slot_table.positions_BM.shape[1]
    number_BN = jnp.cumsum(admitted_BN, axis=1, dtype=jnp.int32) - 1
    slots_BN = jnp.where(admitted_BN, rule.choose_slots(slot_table, number_BN, sink), slots)
    tokens = slots_BN.shape[1]
    is_later_NN = jnp.arange(tokens)[:, None] < jnp.arange(tokens)
    is_replaced_BN = ((slots_BN[:, :, None] == slots_BN[:, None, :]) & is_later_NN).any(2)
    return jnp.where(is_replaced_BN, slots, slots_BN)
