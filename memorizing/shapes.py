"""The shape letters, and the batch that all parts of the program share.

    B rows (documents read side by side)      N tokens of a segment        W XL cache length
    M memory slots    H heads    D head size  E embedding size             K retrieved neighbors
    S segments scanned in one call            V vocabulary                 L layers
    P parts of the rows, each on its own devices
    G query heads that share a key head: queries are `[B, H, G, N, D]`, where `H` counts
      key heads, as it does for all keys and values

A tensor's name ends in its letters (`keys_BHMD`); einsum strings and annotations use the same ones.
"""

from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Int

Array = jax.Array | np.ndarray

BEGIN_TOKEN = 0
"""The input that predicts a document's first token, in vocabularies made here (id 0, as in T5 and seqio). Pretrained
vocabularies have their own (`Vocabulary.begin`)."""


class Batch(NamedTuple):
    """One segment for each row; with a leading `S` axis, the segments of one call.

    Inputs are the document shifted right by one behind a begin token, so every token of a document, the first
    included, is a target once. Padding behind a document's end has `mask` False.

        document     t0 t1 t2 t3 t4            N = 3
        segment 0    inputs begin t0 t1        targets t0 t1 t2       mask 1 1 1    starts_document
        segment 1    inputs t2 t3 0            targets t3 t4 0        mask 1 1 0
    """

    inputs_BN: Int[Array, "*S B N"]
    targets_BN: Int[Array, "*S B N"]
    mask_BN: Bool[Array, "*S B N"]
    starts_document_B: Bool[Array, "*S B"]
