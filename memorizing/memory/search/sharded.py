"""Runs any search over slots that are sharded over devices: each searches its local slots and sends only its best.

    device 0   slots   0 .. 255    its K best  \
    device 1   slots 256 .. 511    its K best   > gathered: devices x K scores and slots for any M; then the K best
    device 2   slots 512 .. 767    its K best  /

The result equals one search over all slots, ties included, because candidates stay in the order of their slots.
"""

import dataclasses

import jax.numpy as jnp
from jax import lax

from memorizing.memory.search.contract import Keys, Neighbors, Search


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sharded(Search):
    """Runs `inner` over the slots of all devices along a mesh axis, inside `jax.shard_map`.

    Each device gets the same queries, and its own keys and valid slots. Slots are numbered over all devices.
    """

    inner: Search
    axis: str = "memory"

    def __call__(self, queries_BHND, keys: Keys, valid_BM, neighbors: int) -> Neighbors:
        slots = valid_BM.shape[1]
        local = self.inner(queries_BHND, keys, valid_BM, min(neighbors, slots))
        local = local._replace(slots_BHNK=local.slots_BHNK + lax.axis_index(self.axis) * slots)
        scores, slots = (lax.all_gather(part, self.axis, axis=3, tiled=True) for part in local)
        scores_BHNK, places_BHNK = lax.top_k(scores, neighbors)
        return Neighbors(scores_BHNK, jnp.take_along_axis(slots, places_BHNK, axis=-1))
