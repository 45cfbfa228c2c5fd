"""Approximate search on NVIDIA GPUs: `binned.py` in one Pallas kernel with the score matmul; no `[N, M]` is written.

    keys of a head, M = S strides of R bins              one program: 128 queries, 64 bins, all strides
                bins 0..63   64..127   ...  R-1                      scores        best
    stride 0   [ ######## | ........ | ........ ]        queries  x  stride 0  ->  max
    stride 1   [ ######## | ........ | ........ ]        queries  x  stride 1  ->  max   [128, 64] each, in registers
    ...        [ ######## | ........ | ........ ]

Score and stride share one 32-bit word (`words.py`), so that the best of a bin is one float maximum: per score an add, a
bitwise operation and a maximum. A second kernel extracts the top-K of the R winners.

Budget of a program of 4 warps at 128 features in 16 bits: 64 registers a thread for scores, 64 for the best, 254 in all
(none spilled), and 80 KiB of shared memory: two programs fit on an SM, and one multiplies while the other compares.
Keys are read `N / 128` times, from the L2 cache: fewer queries to a program would wait for it.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Bool, Float, Int

from memorizing.errors import InputError
from memorizing.memory.search.binned import bins_for
from memorizing.memory.search.contract import Keys, Neighbors, Search, pad
from memorizing.memory.search.pallas_hopper import hopper_winners
from memorizing.memory.search.words import LOWEST, ordered, pack, scores_of, stride_bits_for, strides_of

FLOAT32 = lax.DotAlgorithmPreset.BF16_BF16_F32_X6
"""How float32 is multiplied: on tensor cores, as the six larger products of three bfloat16 parts each, about as exact
as float32 (TF32 is not). Without tensor cores, a block of it does not fit in registers."""

QUERY_BYTES = 32 * 1024
"""Of a block of queries, at most: what 128 of 128 features in bfloat16 take."""

MOST_EXTRACTED, MOST_BINS = 64 * 1024, 2048
"""Up to this `K R`, and `R`, the top-K is extracted in registers, one at a time: beyond, sorting is less work."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PallasGPU(Search):
    """`Binned`, fused. Differs from it in what scores are and in ties, by the bits that the stride takes.

    With `S = ceil(M / R)` strides and `b = ceil(log2 S)`, scores are those of `Binned` rounded towards zero to `23 - b`
    bits behind the leading one (a relative error below `2^-16` for `S = 128`), and slots whose scores are equal by
    then are ties. The lower slot wins them, but for scores below zero within one bin: there the higher does. It is
    the rounded scores that are compared with `minimum_score`.

    Products are those of `Binned`: 8-bit keys are multiplied as numbers of the dtype of the queries, and float32 as
    `FLOAT32` says, six times the work: for speed, keep keys in bfloat16 or 8 bits.

    Nothing is copied where bins divide `M`, `block_queries` divides `N`, and `D` is a power of two of at least 16;
    otherwise what does not fit is padded, by a copy.

    Attributes:
        recall_target: the expected recall for which bins are chosen; what it is on real queries is to be measured.
        backend: what compiles the first kernel: Pallas Triton; or, for keys of 16 bits on Hopper, Mosaic GPU, see
            `pallas_hopper.py` (other keys then still take Triton).
        block_queries: queries of a program, a power of two, at least 16; fewer where they take more than `QUERY_BYTES`.
            With Mosaic twice as many.
        block_bins: bins of a program; a power of two from 16 to 128.
        warps: of a program, each of 32 threads; Mosaic always takes 12.
        stages: tiles of keys in shared memory, all but one of them loaded ahead.
        interpret: run on any device, slowly, as a test of the kernel.
    """

    recall_target: float = 0.95
    backend: Literal["triton", "mosaic"] = "triton"
    block_queries: int = 128
    block_bins: int = 64
    warps: int = 4
    stages: int = 3
    interpret: bool = False

    def __call__(self, queries_BHND, keys: Keys, valid_BM, neighbors: int) -> Neighbors:
        bins = bins_for(self.recall_target, neighbors)
        stride_bits = stride_bits_for(valid_BM.shape[1], bins)
        words_BHNR = self.winners(queries_BHND, keys, valid_BM, bins)
        words_BHNK, bins_BHNK = self.select(words_BHNR, stride_bits, neighbors)
        words_BHNK, bins_BHNK = (part[:, :, : queries_BHND.shape[2]] for part in (words_BHNK, bins_BHNK))
        scores_BHNK = scores_of(words_BHNK, stride_bits)
        if self.minimum_score is not None:
            # Winners with a lower score are the last: what they kept out has a lower score still.
            scores_BHNK = jnp.where(scores_BHNK >= self.minimum_score, scores_BHNK, -jnp.inf)
        slots_BHNK = strides_of(words_BHNK, stride_bits) * bins + bins_BHNK
        return Neighbors(scores_BHNK, jnp.where(scores_BHNK > -jnp.inf, slots_BHNK, 0))

    def winners(
        self, queries_BHND: jax.Array, keys: Keys, valid_BM: Bool[jax.Array, "B M"], bins: int
    ) -> Float[jax.Array, "B H N_padded R"]:
        """The best of each bin, as a word of score and stride; `N` is padded to whole blocks of queries."""
        rows, heads, tokens, _ = queries_BHND.shape
        strides = -(-valid_BM.shape[1] // bins)
        # Triton multiplies blocks whose sides are powers of two, 16 or more. Zeros change no product.
        head_size = max(16, pl.next_power_of_2(queries_BHND.shape[3]))
        vectors_BHMD, scales_BHM = keys.vectors_BHMD, keys.scales_BHM
        dtype = vectors_BHMD.dtype if scales_BHM is None else queries_BHND.dtype
        on_mosaic = self.backend == "mosaic" and scales_BHM is None and dtype.itemsize == 2
        warpgroups, least = (2, 128) if on_mosaic else (1, 16)
        fitting = warpgroups * min(self.block_queries, QUERY_BYTES // (head_size * dtype.itemsize))
        block_queries = max(least, min(fitting, pl.next_power_of_2(tokens)))
        padded = -(-tokens // block_queries) * block_queries
        queries_BHND = pad(queries_BHND.astype(dtype), {2: padded, 3: head_size})
        tiles = pad(vectors_BHMD, {2: strides * bins, 3: head_size}).reshape(-1, strides, bins, head_size)
        valid_BSR = pad(valid_BM, {1: strides * bins}).reshape(rows, strides, bins)
        if scales_BHM is not None:
            scales_BHM = pad(scales_BHM.astype(jnp.float32), {2: strides * bins}).reshape(-1, strides, bins)
        words = (
            hopper_winners if on_mosaic else functools.partial(triton_winners, scales=scales_BHM, warps=self.warps)
        )(
            queries_BHND.reshape(-1, padded, head_size),
            tiles,
            *itinerary(valid_BSR),
            jnp.where(valid_BSR, -LOWEST, LOWEST),
            block_queries=block_queries,
            block_bins=min(self.block_bins, bins),
            stages=self.stages,
            interpret=self.interpret,
        )
        return words.reshape(rows, heads, padded, bins)

    def select(
        self, words_BHNR: Float[jax.Array, "B H N R"], stride_bits: int, neighbors: int
    ) -> tuple[Int[jax.Array, "B H N K"], Int[jax.Array, "B H N K"]]:
        """The exact top-K of the winners: ordered words, best first, and their bins; equal words by lower bin first."""
        bins = words_BHNR.shape[3]
        if neighbors * bins > MOST_EXTRACTED or bins > MOST_BINS:
            return tuple(lax.top_k(ordered(words_BHNR, stride_bits), neighbors))
        words = words_BHNR.reshape(-1, bins)
        block_rows = 2 if bins <= MOST_BINS // 2 else 1  # one warp: its maxima then need no shared memory
        width = pl.next_power_of_2(neighbors)
        found = pl.pallas_call(
            functools.partial(select_kernel, stride_bits=stride_bits, neighbors=neighbors),
            grid=(words.shape[0] // block_rows,),
            in_specs=[pl.BlockSpec((block_rows, bins), lambda block: (block, 0))],
            out_specs=(pl.BlockSpec((block_rows, width), lambda block: (block, 0)),) * 2,
            out_shape=(jax.ShapeDtypeStruct((words.shape[0], width), jnp.int32),) * 2,
            compiler_params=pltriton.CompilerParams(num_warps=1, num_stages=1),
            interpret=self.interpret,
            name="memory_search_select",
        )(words)
        return tuple(part[:, :neighbors].reshape(*words_BHNR.shape[:3], neighbors) for part in found)


def triton_winners(
    queries: Float[jax.Array, "heads N D"],
    tiles: Float[jax.Array, "heads S R D"] | Int[jax.Array, "heads S R D"],
    run_B3: Int[jax.Array, "B 3"],
    others_BS: Int[jax.Array, "B S"],
    bounds_BSR: Float[jax.Array, "B S R"],
    *,
    scales: Float[jax.Array, "heads S R"] | None,
    block_queries: int,
    block_bins: int,
    warps: int,
    stages: int,
    interpret: bool,
) -> Float[jax.Array, "heads N R"]:
    """The best of each bin as a word, over a run of strides and others: words of these are at most their bound."""
    heads, tokens, head_size = queries.shape
    _, strides, bins, _ = tiles.shape
    heads_of_row = heads // len(run_B3)
    if scales is not None and tiles.size > 2**31:
        # Triton's offsets into an array of up to 4 GiB have 32 bits and a sign.
        raise InputError(
            f"Memory.search = 'pallas': a device holds {tiles.size:,} features of keys in 8 bits, of which this kernel "
            f"can search {2**31:,}: split slots over more devices (Mesh.memory) or rows (Mesh.data), set "
            "Memory.key_dtype = 'bfloat16', or choose another search ('binned')"
        )
    arguments = [
        (run_B3, pl.BlockSpec((None, 3), lambda _, group, head: (head // heads_of_row, 0))),
        (others_BS, pl.BlockSpec((None, strides), lambda _, group, head: (head // heads_of_row, 0))),
        (
            bounds_BSR,
            pl.BlockSpec((None, strides, block_bins), lambda _, group, head: (head // heads_of_row, 0, group)),
        ),
        (queries, pl.BlockSpec((None, block_queries, head_size), lambda block, group, head: (head, block, 0))),
        (tiles, pl.BlockSpec((None, strides, block_bins, head_size), lambda block, group, head: (head, 0, group, 0))),
    ]
    if scales is not None:
        arguments.append((scales, pl.BlockSpec((None, strides, block_bins), lambda _, group, head: (head, 0, group))))
    return pl.pallas_call(
        functools.partial(winners_kernel, stride_bits=stride_bits_for(strides * bins, bins)),
        # Programs that run at the same time differ first in their queries: they share keys, through the L2 cache.
        grid=(tokens // block_queries, bins // block_bins, heads),
        in_specs=[spec for _, spec in arguments],
        out_specs=pl.BlockSpec((None, block_queries, block_bins), lambda block, group, head: (head, block, group)),
        out_shape=jax.ShapeDtypeStruct((heads, tokens, bins), jnp.float32),
        compiler_params=pltriton.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=interpret,
        name="memory_search",
    )(*(argument for argument, _ in arguments))


def itinerary(valid_BSR: Bool[jax.Array, "B S R"]) -> tuple[Int[jax.Array, "B 3"], Int[jax.Array, "B S"]]:
    """Which strides are visited: a run of full ones, around the end if need be, and then others, which need a mask.

        valid      xxxx xx.. .... ..xx xxxx       a ring buffer: a run of two strides from 4 on, and the others 1, 3
        strides    0    1    2    3    4

    Returns the first of the run, its length and the number of others; and the others. Strides without a slot are none.
    """
    strides = valid_BSR.shape[1]
    is_full_BS = valid_BSR.all(-1)
    first_B = (is_full_BS & ~jnp.roll(is_full_BS, 1, axis=1)).argmax(1)
    place_BS = (jnp.arange(strides) - first_B[:, None]) % strides
    length_B = jnp.where(is_full_BS, strides, place_BS).min(1)  # up to the first that is not full
    is_other_BS = valid_BSR.any(-1) & (place_BS >= length_B[:, None])
    others_BS = jnp.argsort(~is_other_BS, axis=1)
    return jnp.stack([first_B, length_B, is_other_BS.sum(1)], 1).astype(jnp.int32), others_BS.astype(jnp.int32)


def winners_kernel(run_ref, others_ref, bounds_ref, queries_ref, keys_ref, *rest, stride_bits: int):
    """One program: the best of some bins for some queries, over all strides that hold a slot."""
    *scales, words_ref = rest
    queries_ND = queries_ref[...]
    strides = keys_ref.shape[0]

    def words_of(stride):
        scores_NR = lax.dot_general(
            queries_ND,
            keys_ref[stride].astype(queries_ND.dtype),
            (((1,), (1,)), ((), ())),
            precision=FLOAT32 if queries_ND.dtype == jnp.float32 else lax.Precision.DEFAULT,
            preferred_element_type=jnp.float32,
        )
        if scales:
            scores_NR = scores_NR * scales[0][stride][None, :]
        return pack(scores_NR, stride, stride_bits)

    def visit_full(at, best_NR):
        # Computed, not looked up: the compiler then loads the keys of strides to come while it multiplies.
        stride = first + at
        return jnp.maximum(best_NR, words_of(jnp.where(stride < strides, stride, stride - strides)))

    def visit_other(at, best_NR):
        stride = others_ref[at]
        return jnp.maximum(best_NR, jnp.minimum(words_of(stride), bounds_ref[stride][None, :]))

    first, length, others = run_ref[0], run_ref[1], run_ref[2]
    best_NR = jnp.full(words_ref.shape, LOWEST, jnp.float32)
    best_NR = lax.fori_loop(0, length, visit_full, best_NR)
    words_ref[...] = lax.fori_loop(0, others, visit_other, best_NR)


def select_kernel(words_ref, selected_ref, bins_ref, *, stride_bits: int, neighbors: int):
    """One program: of some rows of words the greatest, one after the other."""
    left_NR = ordered(words_ref[...], stride_bits)
    rows, bins = left_NR.shape
    bins_NR = lax.broadcasted_iota(jnp.int32, (rows, bins), 1)
    place_NK = lax.broadcasted_iota(jnp.int32, selected_ref.shape, 1)
    taken = jnp.iinfo(jnp.int32).min

    def extract(at, carry):
        left_NR, selected_NK, chosen_NK = carry
        best_N1 = left_NR.max(1)[:, None]
        bin_N1 = jnp.where(left_NR == best_N1, bins_NR, bins).min(1)[:, None]
        return (
            jnp.where(bins_NR == bin_N1, taken, left_NR),
            jnp.where(place_NK == at, best_N1, selected_NK),
            jnp.where(place_NK == at, bin_N1, chosen_NK),
        )

    nothing = jnp.zeros(selected_ref.shape, jnp.int32)
    _, selected_ref[...], bins_ref[...] = lax.fori_loop(0, neighbors, extract, (left_NR, nothing, nothing))
