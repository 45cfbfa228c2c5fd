"""What every search takes and returns."""

from typing import NamedTuple, Protocol, runtime_checkable

import jax
from jaxtyping import Bool, Float, Int


class Neighbours(NamedTuple):
    """The `K` best slots of each query, best first, equal scores by lower slot first.

    Where fewer than `K` slots are valid the rest have score `-inf`, and their slot means nothing.
    """

    scores_BHNK: Float[jax.Array, "B H N K"]
    slots_BHNK: Int[jax.Array, "B H N K"]


@runtime_checkable
class Search(Protocol):
    """Finds, for each query, the `neighbours` valid slots of the same row and head with the largest inner product.

    Scores are float32 whatever the dtype of the keys. No gradient flows through a search.
    """

    def __call__(
        self,
        queries_BHND: Float[jax.Array, "B H N D"],
        keys_BHMD: Float[jax.Array, "B H M D"],
        valid_BM: Bool[jax.Array, "B M"],
        neighbours: int,
    ) -> Neighbours: ...
