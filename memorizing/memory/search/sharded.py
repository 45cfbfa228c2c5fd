"""Any search over slots that are split over devices: each searches its own, then only candidates travel.

    device 0   slots   0 .. 255    its K best  \
    device 1   slots 256 .. 511    its K best   > gathered: devices x K scores and slots, whatever M is; the K best
    device 2   slots 512 .. 767    its K best  /

The result is that of one search over all slots, ties included: candidates stand in the order of their slots.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float

from memorizing.memory.search.contract import Neighbours, Search


def sharded_search(search: Search, axis: str) -> Search:
    """`search` over the slots of all devices along a mesh axis; to be called within `jax.shard_map` over it.

    It is given the same queries on each device, and the device's own keys and validity; slots are numbered through.
    """

    def search_all(
        queries_BHND: Float[jax.Array, "B H N D"],
        keys_BHMD: Float[jax.Array, "B H M D"],
        valid_BM: Bool[jax.Array, "B M"],
        neighbours: int,
    ) -> Neighbours:
        slots = keys_BHMD.shape[2]
        own = search(queries_BHND, keys_BHMD, valid_BM, min(neighbours, slots))
        own = own._replace(slots_BHNK=own.slots_BHNK + lax.axis_index(axis) * slots)
        scores, slots = (lax.all_gather(part, axis, axis=3, tiled=True) for part in own)
        scores_BHNK, places_BHNK = lax.top_k(scores, neighbours)
        return Neighbours(scores_BHNK, jnp.take_along_axis(slots, places_BHNK, axis=-1))

    return search_all
