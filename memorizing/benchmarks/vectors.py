"""The vectors of a search benchmark: random unit vectors, the index of a search over them, and its recall.

Random unit vectors are the hard case for indexes and the easy one to check: no two keys are alike. `trained.py` has
vectors of a trained run, whose queries are distributed unlike its keys.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from memorizing.benchmarks.choices import Shape
from memorizing.memory.bank import Bank, reindexed
from memorizing.memory.quantize import DTYPES, quantize
from memorizing.memory.search import Keys, Neighbors, Search
from memorizing.memory.search.exact import Exact
from memorizing.memory.search.gather import gather
from memorizing.model.attention import l2_normalize

SAMPLE = 16
"""Number of tokens of each row and head whose neighbors are compared with the exact ones."""


class Vectors(NamedTuple):
    """Queries, keys and valid slots of one search.

    Attributes:
        origin: source of the vectors, for people.
    """

    queries_BHND: Float[jax.Array, "B H N D"]
    keys_BHMD: Float[jax.Array, "B H M D"]
    valid_BM: Bool[jax.Array, "B M"]
    origin: str


def plain_dtype(dtype: str) -> str:
    """Returns the dtype of vectors before they are stored in `dtype`: bfloat16 for 8 bits."""
    return "bfloat16" if dtype in DTYPES else dtype


def random_vectors(shape: Shape, dtype: str, seed: int = 0) -> Vectors:
    """Returns random queries and keys of length 1, with every slot valid; in bfloat16 for 8-bit dtypes."""
    dtype = plain_dtype(dtype)

    def draw(rng: jax.Array, slots: int) -> jax.Array:
        vectors = jax.random.normal(rng, (shape.B, shape.H, slots, shape.D), jnp.float32)
        return l2_normalize(vectors).astype(dtype)

    for_queries, for_keys = jax.random.split(jax.random.key(seed))
    drawn = jax.jit(draw, static_argnums=1)
    valid_BM = jnp.ones((shape.B, shape.M), bool)
    return Vectors(drawn(for_queries, shape.N), drawn(for_keys, shape.M), valid_BM, "random")


def stored(search: Search, keys_BHMD: Float[jax.Array, "B H M D"], tokens: int, dtype: str) -> Keys:
    """Returns the keys as in a memory written `tokens` at a time: in `dtype`, with the search's index."""
    slots = keys_BHMD.shape[2]
    tokens = tokens if slots % tokens == 0 else slots
    full = Bank(keys_BHMD, keys_BHMD, jnp.zeros((), jnp.int32), jnp.full(keys_BHMD.shape[0], slots, jnp.int32))
    index = jax.jit(lambda bank: reindexed(bank, search, tokens).index)(full)
    if dtype in DTYPES:
        vectors_BHMD, scales_BHM = jax.jit(quantize, static_argnums=1)(keys_BHMD, jnp.dtype(DTYPES[dtype]))
        return Keys(vectors_BHMD, scales_BHM, index)
    return Keys(keys_BHMD, None, index)


def sample(tokens: int) -> np.ndarray:
    """Returns the positions of the compared tokens, spread over the segment."""
    return np.unique(np.linspace(0, tokens - 1, min(tokens, SAMPLE)).astype(int))


def recall(found: Neighbors, vectors: Vectors) -> float:
    """Returns the share of the `K` exact neighbors that were found, for a `sample` of the queries.

    A slot with the same score as the last exact neighbor counts as a neighbor. A slot that appears twice counts once.
    """
    place = sample(vectors.queries_BHND.shape[2])
    neighbors = found.slots_BHNK.shape[-1]

    @jax.jit
    def judge(queries_BHND, keys_BHMD, valid_BM, found_BHNK):
        exact = Exact()(queries_BHND, Keys(keys_BHMD), valid_BM, neighbors)
        keys_BHNKD = gather(keys_BHMD, jnp.clip(found_BHNK, 0, keys_BHMD.shape[2] - 1))
        scores = jnp.einsum("BHND,BHNKD->BHNK", queries_BHND, keys_BHNKD, preferred_element_type=jnp.float32)
        last = exact.scores_BHNK[..., -1:]
        is_among = (found_BHNK[..., :, None] == exact.slots_BHNK[..., None, :]).any(-1)
        again = jnp.tril(found_BHNK[..., :, None] == found_BHNK[..., None, :], -1).any(-1)
        counts = jax.vmap(lambda valid_M, slots: valid_M[slots])(valid_BM, found_BHNK) & (found_BHNK >= 0)
        size = jnp.linalg.norm(queries_BHND, axis=-1)[..., None] * jnp.linalg.norm(keys_BHNKD, axis=-1)
        return ((is_among | (scores >= last - 1e-6 * size)) & counts & ~again).mean()

    slots = jnp.where(found.scores_BHNK > -jnp.inf, found.slots_BHNK, -1)[:, :, place]
    with jax.default_matmul_precision("highest"):  # otherwise GPUs round float32 to 19 bits in products
        return float(judge(vectors.queries_BHND[:, :, place], vectors.keys_BHMD, vectors.valid_BM, slots))
