"""Approximate search on NVIDIA GPUs: `binned.py` as one Pallas kernel with the score matmul. No `[N, M]` is written.

    keys of a head, M = S strides of R bins              one program: 128 queries, 64 bins, all strides
                bins 0..63   64..127   ...  R-1                      scores        best
    stride 0   [ ######## | ........ | ........ ]        queries  x  stride 0  ->  max
    stride 1   [ ######## | ........ | ........ ]        queries  x  stride 1  ->  max   [128, 64] each, in registers
    ...        [ ######## | ........ | ........ ]

Score and stride share one 32-bit word (`words.py`), so that the best slot of a bin is one float maximum. Each score
takes an addition, a bitwise operation and a maximum. A second kernel extracts the top-k of the R winners.

Budget of a program of 4 warps at 128 features in 16 bits: 64 registers per thread for scores, 64 for the best, 254 in
all (none spilled), and 80 KiB of shared memory. Two programs fit on an SM: one multiplies while the other compares.
Keys are read `N / 128` times from the L2 cache; with fewer queries per program, the program would wait for it.
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
"""Algorithm of float32 products on tensor cores: the six larger products of three bfloat16 parts each, about as exact
as float32 (TF32 is not). Without tensor cores, a block does not fit in registers.
"""

QUERY_BYTES = 32 * 1024
"""Largest size of a block of queries in bytes: 128 queries of 128 features in bfloat16."""

MOST_EXTRACTED, MOST_BINS = 64 * 1024, 2048
"""Largest `K R` and `R` for which the top-k is extracted in registers, one at a time. Beyond, sorting is less work."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PallasGPU(Search):
    """The binned search as fused kernels. It differs from `Binned` in ties and rounding, by the bits of the stride.

    With `S = ceil(M / R)` strides and `b = ceil(log2 S)`, scores are those of `Binned` rounded toward zero to `23 - b`
    bits after the leading one (a relative error below `2^-16` for `S = 128`). Slots with equal rounded scores are ties;
    the lower slot wins, except for negative scores within a bin, where the higher slot wins. `minimum_score` is
    compared with rounded scores.

    8-bit keys are multiplied in the dtype of the queries. Float32 takes six times the work (see `FLOAT32`); for speed,
    store keys in bfloat16 or 8 bits. Nothing is copied if bins divide `M`, `block_queries` divides `N`, and `D` is a
    power of two of at least 16; otherwise arrays are padded, which copies them.

    Attributes:
        recall_target: expected recall, which sets the number of bins. Measure the recall of real queries.
        backend: compiler of the first kernel: Pallas Triton; or, for 16-bit keys on Hopper, Mosaic GPU
            (`pallas_hopper.py`; other keys still take Triton).
        block_queries: queries of a program, a power of two of at least 16; fewer if they exceed `QUERY_BYTES`.
            Mosaic takes twice as many.
        block_bins: number of bins of a program; a power of two from 16 to 128.
        warps: number of warps of a program, 32 threads each; Mosaic always takes 12.
        stages: number of tiles of keys in shared memory; all but one are loaded ahead.
        interpret: whether to run on any device, slowly, to test the kernel.
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
            # Winners below the minimum come last, and the slots that lost to them score even lower.
            scores_BHNK = jnp.where(scores_BHNK >= self.minimum_score, scores_BHNK, -jnp.inf)
        slots_BHNK = strides_of(words_BHNK, stride_bits) * bins + bins_BHNK
        return Neighbors(scores_BHNK, jnp.where(scores_BHNK > -jnp.inf, slots_BHNK, 0))

    def winners(
        self, queries_BHND: jax.Array, keys: Keys, valid_BM: Bool[jax.Array, "B M"], bins: int
    ) -> Float[jax.Array, "B H N_padded R"]:
        """Returns the best slot of each bin as a word of score and stride. `N` is padded to whole blocks of queries."""
        rows, heads, tokens, _ = queries_BHND.shape
        strides = -(-valid_BM.shape[1] // bins)
        # Triton multiplies blocks whose sides are powers of two of at least 16. Padding with zeros changes no product.
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
        """Returns the exact top-k of the winners: ordered words, best first, and their bins; equal words by lower bin
        first."""
        bins = words_BHNR.shape[3]
        if neighbors * bins > MOST_EXTRACTED or bins > MOST_BINS:
            return tuple(lax.top_k(ordered(words_BHNR, stride_bits), neighbors))
        words = words_BHNR.reshape(-1, bins)
        block_rows = 2 if bins <= MOST_BINS // 2 else 1  # with one warp, maxima need no shared memory
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
    """Returns the best slot of each bin as a word, over a run of full strides and over partial strides with a mask."""
    heads, tokens, head_size = queries.shape
    _, strides, bins, _ = tiles.shape
    heads_of_row = heads // len(run_B3)
    if scales is not None and tiles.size > 2**31:
        # Triton's offsets are signed 32-bit numbers.
        raise InputError(
            f"Memory.search = 'pallas': a device holds {tiles.size:,} features of 8-bit keys, more than the "
            f"{2**31:,} that this kernel can search. Split slots over more devices (Mesh.memory) or rows (Mesh.data), "
            "set Memory.key_dtype = 'bfloat16', or use another search ('binned')"
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
        # Programs that run at the same time differ in their queries first, so they share keys in the L2 cache.
        grid=(tokens // block_queries, bins // block_bins, heads),
        in_specs=[spec for _, spec in arguments],
        out_specs=pl.BlockSpec((None, block_queries, block_bins), lambda block, group, head: (head, block, group)),
        out_shape=jax.ShapeDtypeStruct((heads, tokens, bins), jnp.float32),
        compiler_params=pltriton.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=interpret,
        name="memory_search",
    )(*(argument for argument, _ in arguments))


def itinerary(valid_BSR: Bool[jax.Array, "B S R"]) -> tuple[Int[jax.Array, "B 3"], Int[jax.Array, "B S"]]:
    """Returns the strides to visit: a run of full ones, which may wrap around, and partial ones, which need a mask.

        valid      xxxx xx.. .... ..xx xxxx       a ring buffer: a run of two strides from 4 on, and partial 1, 3
        strides    0    1    2    3    4

    Returns the first stride of the run with its length and the number of partial strides; and the partial strides.
    Strides without a valid slot are skipped.
    """
    strides = valid_BSR.shape[1]
    is_full_BS = valid_BSR.all(-1)
    first_B = (is_full_BS & ~jnp.roll(is_full_BS, 1, axis=1)).argmax(1)
    place_BS = (jnp.arange(strides) - first_B[:, None]) % strides
    length_B = jnp.where(is_full_BS, strides, place_BS).min(1)  # up to the first partial stride
    is_other_BS = valid_BSR.any(-1) & (place_BS >= length_B[:, None])
    others_BS = jnp.argsort(~is_other_BS, axis=1)
    return jnp.stack([first_B, length_B, is_other_BS.sum(1)], 1).astype(jnp.int32), others_BS.astype(jnp.int32)


def winners_kernel(run_ref, others_ref, bounds_ref, queries_ref, keys_ref, *rest, stride_bits: int):
    """One program: finds the best slots of some bins for some queries, over all strides with a valid slot."""
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
        # Computed instead of looked up, so that the compiler loads keys of later strides while it multiplies.
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
    """One program: extracts the largest words of some rows, one after the other."""
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
