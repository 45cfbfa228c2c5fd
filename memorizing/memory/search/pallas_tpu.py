"""The binned search as one TPU kernel: scores are computed, binned and selected on the chip and never leave it.

    grid (B, H, N blocks, M blocks)    M innermost; for each block, per 128 bins and pass over all bins:
    keys stream in                     scores = queries . keys     on the matrix unit
    best_NR, stride_NR stay            better than the bin's?      on the vector unit, at the same time
    at the last block                  transposed, so that 128 queries lie side by side; bitonic top-K of the R bins

A register of scores takes the matrix units 2 cycles (D up to 128). In that time the vector units could do 8 operations
and do 4 (mask, compare, two selects), so the product sets the pace. Blocks of 512 queries reuse loaded keys often
enough to hide the loading; blocks of 4,096 slots make the overhead of a step negligible. See
tests/memory/search/test_compiled_for_tpu.py for the compiler's figures.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from memorizing.memory.search.binned import LANES, bins_for, top_winners
from memorizing.memory.search.contract import Keys, Neighbors, Search, just_below, pad

SUBLANES = 8
"""Number of rows of a vector register, of `LANES` numbers each."""

MOST_SELECTED = 64
"""Largest number of neighbors that the kernel selects itself; beyond, its network of comparisons is too long."""

ACCUMULATED = 2**19
"""Largest number of bins of all queries of a block: 8 bytes each, 4 MiB."""

VMEM_LIMIT = 32 * 2**20
"""Largest VMEM use in bytes; these chips have 64 MiB or more."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PallasTPU(Search):
    """Finds the same neighbors as `Binned`, fused with the scores.

    Float32 keys are multiplied in full precision, at six times the cost of bfloat16. 8-bit keys are converted to
    the dtype of the queries on the chip.

    Attributes:
        recall_target: expected recall, which sets the number of bins. Measure the recall of real queries.
        query_block: largest number of queries scored at a time; a multiple of 128.
        slot_block: largest number of slots scored at a time; at least one per bin.
        interpret: whether to run the kernel on any device, slowly, for tests.
    """

    recall_target: float = 0.95
    query_block: int = 512
    slot_block: int = 4096
    interpret: bool = False

    def __call__(self, queries_BHND, keys: Keys, valid_BM, neighbors: int) -> Neighbors:
        queries_BHND, keys = lax.stop_gradient((queries_BHND, keys))
        rows, heads, tokens, features = queries_BHND.shape
        slots, bins = valid_BM.shape[1], bins_for(self.recall_target, neighbors)
        strides = strides_of_block(slots, bins, self.slot_block)
        query_block = max(LANES, min(self.query_block, ACCUMULATED // bins // LANES * LANES, round_up(tokens, LANES)))
        slot_block, padded = strides * bins, round_up(tokens, query_block)
        grid = (rows, heads, padded // query_block, pl.cdiv(slots, slot_block))

        dtype = keys.vectors_BHMD.dtype if keys.scales_BHM is None else queries_BHND.dtype
        # A last block reads undefined values beyond the keys; the mask excludes them.
        offsets_B1M = pad(jnp.where(valid_BM, 0.0, -jnp.inf)[:, None], {2: grid[3] * slot_block}, -jnp.inf)
        # The layout that XLA gives heads narrower than a register; any other would copy the memory.
        is_turned = features % LANES != 0
        vectors = pad(keys.vectors_BHMD, {2: slot_block})
        operands = [
            pad(queries_BHND.astype(dtype), {2: padded}),
            vectors.swapaxes(2, 3) if is_turned else vectors,
            offsets_B1M,
        ]
        in_specs = [
            pl.BlockSpec((None, None, query_block, features), lambda b, h, n, m: (b, h, n, 0)),
            pl.BlockSpec((None, None, features, slot_block), lambda b, h, n, m: (b, h, 0, m))
            if is_turned
            else pl.BlockSpec((None, None, slot_block, features), lambda b, h, n, m: (b, h, m, 0)),
            pl.BlockSpec((None, 1, slot_block), lambda b, h, n, m: (b, 0, m)),
        ]
        if keys.scales_BHM is not None:
            # Scales of all heads, because the rows of one head are not contiguous.
            operands.append(pad(keys.scales_BHM.astype(jnp.float32), {2: slot_block}))
            in_specs.append(pl.BlockSpec((None, heads, slot_block), lambda b, h, n, m: (b, 0, m)))
        selects = selects_inside(bins, neighbors)
        found = power_of_two(neighbors) if selects else bins
        kernel = functools.partial(
            search_block,
            strides=strides,
            is_turned=is_turned,
            is_scaled=keys.scales_BHM is not None,
            selects=selects,
            floor=just_below(self.minimum_score),
        )
        winners = pl.pallas_call(
            kernel,
            grid=grid,
            in_specs=in_specs,
            out_specs=[pl.BlockSpec((None, None, found, query_block), lambda b, h, n, m: (b, h, 0, n))] * 2,
            out_shape=[jax.ShapeDtypeStruct((rows, heads, found, padded), kind) for kind in (jnp.float32, jnp.int32)],
            scratch_shapes=[pltpu.VMEM((query_block, bins), kind) for kind in (jnp.float32, jnp.int32)],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
            ),
            cost_estimate=cost(operands, grid[2], bins, found if selects else 0),
            interpret=self.interpret,
            name="binned_search",
        )(*operands)
        scores_BHNK, slots_BHNK = (part[..., :tokens].swapaxes(2, 3) for part in winners)
        if not selects:
            return top_winners(Neighbors(scores_BHNK, slots_BHNK), neighbors)
        return Neighbors(scores_BHNK[..., :neighbors], slots_BHNK[..., :neighbors])


def strides_of_block(slots: int, bins: int, slot_block: int) -> int:
    """Returns the number of passes over all bins in a block of slots: as many as fit, dividing `slots` if possible."""
    most = max(1, min(slot_block, slots) // bins)
    if slots % bins:
        return most
    return next(strides for strides in range(most, 0, -1) if slots // bins % strides == 0)


def selects_inside(bins: int, neighbors: int) -> bool:
    """True if the kernel selects from the winners; otherwise it returns all of them."""
    return power_of_two(neighbors) <= min(MOST_SELECTED, bins // SUBLANES)


def power_of_two(number: int) -> int:
    """Returns the smallest power of two that is not smaller."""
    return 1 << (number - 1).bit_length()


def round_up(number: int, multiple: int) -> int:
    """Returns the smallest multiple that is not smaller."""
    return -(-number // multiple) * multiple


def cost(operands: list[jax.Array], query_blocks: int, bins: int, selected: int) -> pl.CostEstimate:
    """Returns the cost of the kernel for XLA's scheduler: the product, and the selection as a product of equal time.

    A vector unit's operation on one number takes as long as 32 FLOPs of the matrix units: per cycle, 4 x 1,024 of the
    one and 4 x 128 x 128 x 2 of the other. A comparison takes 12 such operations, as scheduled. Comparing scores with
    their bins runs at the same time as the product.
    """
    queries, vectors, offsets, *scales = operands
    rows, heads, tokens, features = queries.shape
    passes = 6 if queries.dtype == jnp.float32 else 1
    comparisons = 0
    if selected:
        steps = int(math.log2(selected))
        comparisons = steps * (steps + 1) // 2 * bins // 2
        left = bins
        while left > SUBLANES * selected:
            left //= 2
            comparisons += left + steps * left // 2
        comparisons += 3 * (left + steps * left // 2)
    searches = rows * heads * tokens
    read = query_blocks * (vectors.nbytes + heads * (offsets.nbytes + sum(part.nbytes for part in scales)))
    return pl.CostEstimate(
        flops=searches * (2 * passes * offsets.shape[2] * round_up(features, LANES) + 32 * 12 * comparisons),
        bytes_accessed=queries.nbytes + read + 8 * searches * (selected or bins),
        transcendentals=0,
    )


def search_block(queries_ND, keys, offsets_1M, *refs, strides, is_turned, is_scaled, selects, floor):
    """One step of the grid: updates the best slot of each bin, and selects the result in the last block of slots."""
    *scales_HM, scores_KN, slots_KN, best_NR, stride_NR = refs
    block, head, bins = pl.program_id(3), pl.program_id(1), best_NR.shape[1]

    @pl.when(block == 0)
    def start():
        best_NR[...] = jnp.full(best_NR.shape, floor, jnp.float32)
        stride_NR[...] = jnp.zeros(stride_NR.shape, jnp.int32)

    for first in range(0, bins, LANES):
        lanes = slice(first, first + LANES)
        best, stride = best_NR[:, lanes], stride_NR[:, lanes]
        for step in range(strides):
            slots = slice(step * bins + first, step * bins + first + LANES)
            scores = products(queries_ND[...], keys[:, slots] if is_turned else keys[slots, :], is_turned)
            if is_scaled:
                scores = scores * row_of(scales_HM[0][:, slots], head)
            scores = scores + offsets_1M[:, slots]
            is_better = scores > best  # strictly better, so that equal scores keep the lower slot and NaN never wins
            best = jnp.where(is_better, scores, best)
            stride = jnp.where(is_better, block * strides + step, stride)
        best_NR[:, lanes], stride_NR[:, lanes] = best, stride

    @pl.when(block == pl.num_programs(3) - 1)
    def finish():
        @pl.loop(0, best_NR.shape[0], step=LANES)
        def of_queries(first):
            queries = pl.ds(pl.multiple_of(first, LANES), LANES)
            scores_RN, strides_RN = best_NR[queries, :].T, stride_NR[queries, :].T
            slots_RN = strides_RN * bins + lax.broadcasted_iota(jnp.int32, strides_RN.shape, 0)
            scores_RN = jnp.where(scores_RN > floor, scores_RN, -jnp.inf)
            found = top(scores_RN, slots_RN, scores_KN.shape[0]) if selects else (scores_RN, slots_RN)
            scores_KN[:, queries], slots_KN[:, queries] = found


def row_of(part_HM: jax.Array, head: jax.Array) -> jax.Array:
    """Returns one row `[1, M]`, by a masked sum, because a kernel cannot index rows by a run-time value."""
    heads = lax.broadcasted_iota(jnp.int32, part_HM.shape, 0)
    return jnp.where(heads == head, part_HM, 0.0).sum(0, keepdims=True)


def products(queries_ND: jax.Array, keys: jax.Array, is_turned: bool) -> jax.Array:
    """Returns scores `[N, M]` for keys `[M, D]`, or for transposed keys `[D, M]`."""
    return lax.dot_general(
        queries_ND,
        keys.astype(queries_ND.dtype),
        (((1,), (0 if is_turned else 1,)), ((), ())),
        # Full precision instead of the default single bfloat16 pass, because float32 keys were chosen on purpose.
        precision=lax.Precision.HIGHEST if queries_ND.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


Pair = tuple[jax.Array, jax.Array]
"""Scores and slots of the same shape."""


def top(scores_RN: jax.Array, slots_RN: jax.Array, neighbors: int) -> Pair:
    """Returns the best of each column, best first. `neighbors` is a power of two; there are at least eight times as
    many rows.

    Each of the eight sublanes has its own lists, which lie along registers. So almost all comparisons are between
    registers, and nothing moves within a register until the last eight lists are merged.
    """
    # [R, N] -> [R / 8, 8, N]: bin r in sublane r mod 8.
    shape = (-1, SUBLANES, scores_RN.shape[1])
    pair = scores_RN.reshape(shape), slots_RN.reshape(shape)
    size = 2
    while size <= neighbors:  # merges pairs of lists of 1, 2, 4, ... that alternate between descending and ascending
        pair = merge(pair, size)
        size *= 2
    while (
        pair[0].shape[0] > neighbors
    ):  # the elementwise better ones of a descending and an ascending list are bitonic again
        scores, slots = (part.reshape(-1, 2, neighbors, *shape[1:]) for part in pair)
        (scores, slots), _ = exchange((scores[:, 0], slots[:, 0]), (scores[:, 1], slots[:, 1]))
        pair = merge((scores.reshape(shape), slots.reshape(shape)), neighbors)
    for shift in (4, 2, 1):
        scores, slots = (backwards(pltpu.roll(part, shift, 1)) for part in pair)
        better, _ = exchange(pair, (scores, slots))
        pair = merge(better, neighbors)
    return pair[0][:, 0], pair[1][:, 0]


def merge(pair: Pair, size: int) -> Pair:
    """Sorts bitonic lists of `size` along the first axis, alternating between best first and best last."""
    length, rest = pair[0].shape[0], pair[0].shape[1:]
    turns = 2 if length > size else 1
    distance = size // 2
    while distance:
        shape = (length // size // turns, turns, size // distance // 2, 2, distance, *rest)
        scores, slots = (part.reshape(shape) for part in pair)
        done = []
        for turn in range(turns):
            first, second = ((scores[:, turn, :, one], slots[:, turn, :, one]) for one in (0, 1))
            better, worse = exchange(first, second)
            above, below = (better, worse) if turn == 0 else (worse, better)
            done.append([jnp.stack(parts, 2) for parts in zip(above, below, strict=True)])
        scores, slots = (jnp.stack(parts, 1).reshape(length, *rest) for parts in zip(*done, strict=True))
        pair = scores, slots
        distance //= 2
    return pair


def exchange(first: Pair, second: Pair) -> tuple[Pair, Pair]:
    """Returns the better and the worse of each pair: higher score first, equal scores by lower slot."""
    is_first = (first[0] > second[0]) | ((first[0] == second[0]) & (first[1] < second[1]))
    better = jnp.where(is_first, first[0], second[0]), jnp.where(is_first, first[1], second[1])
    worse = jnp.where(is_first, second[0], first[0]), jnp.where(is_first, second[1], first[1])
    return better, worse


def backwards(part: jax.Array) -> jax.Array:
    """Reverses the order along the first axis."""
    return jnp.concatenate([part[at : at + 1] for at in reversed(range(part.shape[0]))])
