"""`binned` as one TPU kernel: the scores are made, binned and selected from on the chip, and never leave it.

    grid (B, H, N blocks, M blocks)       of a block of slots, for each 128 bins and each stride s over all bins:
    keys in, block by block            scores = queries . keys^T (matrix unit)  ->  better than the bin's best?  (vector unit)
    best_NR, stride_NR in VMEM         carried over the blocks of M
    after the last                     transposed, so that 128 queries lie side by side: a bitonic top-K of the R bins

A tile of scores takes the matrix unit 2 cycles (D up to 128), in which the vector unit could do 8 operations and here
does 4 (mask, compare, two selects); so the product sets the pace. Blocks of 512 queries use a tile of keys often enough
to hide its loading, and 4,096 slots make steps long enough to hide what begins and ends them, within 16 MiB of VMEM.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from memorizing.memory.search.binned import LANES, bins_for, top_winners
from memorizing.memory.search.contract import Keys, Neighbours, Search

SUBLANES = 8
"""Rows of a vector register, of `LANES` numbers each."""

MOST_SELECTED = 64
"""More neighbours than these are selected outside: within, the unrolled network would take minutes to compile."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PallasTPU(Search):
    """The best of each of many bins, fused with the scores; the slots are those of `Binned`.

    Float32 keys are multiplied in full precision, at several times the cost of bfloat16. Keys in 8 bits become of the
    queries' dtype on the chip.

    Attributes:
        recall_target: the expected recall for which bins are chosen; what it is on real queries is to be measured.
        query_block: queries that are scored at a time, at most; a multiple of 128.
        slot_block: slots that they are scored with at a time, at most; at least one for each bin are.
        interpret: runs the kernel's steps on any device, slowly: for tests.
    """

    recall_target: float = 0.95
    query_block: int = 512
    slot_block: int = 4096
    interpret: bool = False

    def __call__(self, queries_BHND, keys: Keys, valid_BM, neighbours: int) -> Neighbours:
        queries_BHND, keys = lax.stop_gradient((queries_BHND, keys))
        rows, heads, tokens, features = queries_BHND.shape
        slots = valid_BM.shape[1]
        bins = bins_for(self.recall_target, neighbours)
        strides = strides_of_block(slots, bins, self.slot_block)
        slot_block = strides * bins
        # Both accumulators, 8 bytes for each query and bin, are to take 4 MiB at most.
        query_block = max(LANES, min(self.query_block, 2**19 // bins // LANES * LANES, -(-tokens // LANES) * LANES))
        query_blocks, slot_blocks = -(-tokens // query_block), -(-slots // slot_block)

        vectors_BHMD, scales_BHM = keys.vectors_BHMD, keys.scales_BHM
        dtype = vectors_BHMD.dtype if scales_BHM is None else queries_BHND.dtype
        queries_BHND = pad(queries_BHND.astype(dtype), 2, query_blocks * query_block)
        # A last block that reaches beyond the keys reads anything there: `offsets` see to it that it does not count.
        offsets_B1M = pad(jnp.where(valid_BM, 0.0, -jnp.inf)[:, None], 2, slot_blocks * slot_block, -jnp.inf)
        if slots < slot_block:
            vectors_BHMD = pad(vectors_BHMD, 2, slot_block)
            scales_BHM = None if scales_BHM is None else pad(scales_BHM, 2, slot_block)
        operands = [queries_BHND, vectors_BHMD, offsets_B1M]
        in_specs = [
            pl.BlockSpec((None, None, query_block, features), lambda b, h, n, m: (b, h, n, 0)),
            pl.BlockSpec((None, None, slot_block, features), lambda b, h, n, m: (b, h, m, 0)),
            pl.BlockSpec((None, 1, slot_block), lambda b, h, n, m: (b, 0, m)),
        ]
        if scales_BHM is not None:
            operands.append(scales_BHM[:, :, None].astype(jnp.float32))
            in_specs.append(pl.BlockSpec((None, None, 1, slot_block), lambda b, h, n, m: (b, h, 0, m)))
        selects = selects_inside(bins, neighbours)
        found = power_of_two(neighbours) if selects else bins
        winners = pl.pallas_call(
            functools.partial(
                search_block,
                strides=strides,
                selects=selects,
                floor=just_below(self.minimum_score),
                scaled=scales_BHM is not None,
            ),
            grid=(rows, heads, query_blocks, slot_blocks),
            in_specs=in_specs,
            out_specs=[pl.BlockSpec((None, None, found, query_block), lambda b, h, n, m: (b, h, 0, n))] * 2,
            out_shape=[
                jax.ShapeDtypeStruct((rows, heads, found, query_blocks * query_block), dtype)
                for dtype in (jnp.float32, jnp.int32)
            ],
            scratch_shapes=[pltpu.VMEM((query_block, bins), dtype) for dtype in (jnp.float32, jnp.int32)],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
            ),
            interpret=self.interpret,
            name="binned_search",
        )(*operands)
        scores_BHNK, slots_BHNK = (part[..., :tokens].swapaxes(2, 3) for part in winners)
        if not selects:
            return top_winners(Neighbours(scores_BHNK, slots_BHNK), neighbours)
        return Neighbours(scores_BHNK[..., :neighbours], slots_BHNK[..., :neighbours])


VMEM_LIMIT = 32 * 2**20


def strides_of_block(slots: int, bins: int, slot_block: int) -> int:
    """How many times a block of slots goes over all bins: as often as `slot_block` has room, dividing `slots` if it can."""
    most = max(1, min(slot_block, slots) // bins)
    if slots % bins:
        return most
    return next(strides for strides in range(most, 0, -1) if slots // bins % strides == 0)


def selects_inside(bins: int, neighbours: int) -> bool:
    """Whether the kernel selects from the winners; else it gives all of them."""
    return power_of_two(neighbours) <= min(MOST_SELECTED, bins // SUBLANES)


def power_of_two(number: int) -> int:
    """The least that is not smaller."""
    return 1 << (number - 1).bit_length()


def just_below(minimum_score: float | None) -> float:
    """What the bins start with: only what is larger can replace it, so that a minimum costs nothing more."""
    if minimum_score is None:
        return -np.inf
    return float(np.nextafter(np.float32(minimum_score), np.float32(-np.inf)))


def pad(part: jax.Array, axis: int, size: int, value: float = 0.0) -> jax.Array:
    """`part` made `size` long along the axis."""
    padding = [(0, size - part.shape[axis] if at == axis else 0) for at in range(part.ndim)]
    return jnp.pad(part, padding, constant_values=value) if size > part.shape[axis] else part


def search_block(queries_ND, keys_MD, offsets_1M, *refs, strides: int, selects: bool, floor: float, scaled: bool):
    """One step of the grid: the bins' best so far, and with the last block of slots, what is returned."""
    *scales_1M, scores_KN, slots_KN, best_NR, stride_NR = refs
    block, blocks = pl.program_id(3), pl.num_programs(3)

    @pl.when(block == 0)
    def start():
        best_NR[...] = jnp.full(best_NR.shape, floor, jnp.float32)
        stride_NR[...] = jnp.zeros(stride_NR.shape, jnp.int32)

    bins = best_NR.shape[1]
    # In full, and not in the one pass of bfloat16 that is the default: who keeps keys in float32 has a reason.
    precision = lax.Precision.HIGHEST if queries_ND.dtype == jnp.float32 else None
    for first in range(0, bins, LANES):
        lanes = slice(first, first + LANES)
        best, stride = best_NR[:, lanes], stride_NR[:, lanes]
        for step in range(strides):
            slots = slice(step * bins + first, step * bins + first + LANES)
            scores = lax.dot_general(
                queries_ND[...],
                keys_MD[slots, :].astype(queries_ND.dtype),
                (((1,), (1,)), ((), ())),
                precision=precision,
                preferred_element_type=jnp.float32,
            )
            if scaled:
                scores = scores * scales_1M[0][:, slots]
            scores = scores + offsets_1M[:, slots]
            is_better = scores > best  # not where equal: the lower slot stays; nor where one is NaN
            best = jnp.where(is_better, scores, best)
            stride = jnp.where(is_better, block * strides + step, stride)
        best_NR[:, lanes], stride_NR[:, lanes] = best, stride

    @pl.when(block == blocks - 1)
    def finish():
        @pl.loop(0, best_NR.shape[0], step=LANES)
        def of_queries(first):
            queries = pl.ds(pl.multiple_of(first, LANES), LANES)
            scores, strides = best_NR[queries, :].T, stride_NR[queries, :].T
            slots = strides * bins + lax.broadcasted_iota(jnp.int32, strides.shape, 0)
            scores = jnp.where(scores > floor, scores, -jnp.inf)
            if selects:
                scores, slots = top(scores, slots, scores_KN.shape[0])
            scores_KN[:, queries], slots_KN[:, queries] = scores, slots


Pair = tuple[jax.Array, jax.Array]
"""Scores and slots, of the same shape."""


def top(scores_RN: jax.Array, slots_RN: jax.Array, neighbours: int) -> Pair:
    """The best of each column, best first: `neighbours`, a power of two, from at least eight times as many.

    Each of the eight sublanes at first has lists of its own, which lie along registers: so almost all comparisons are
    of one register with another, and nothing moves within them until the eight lists that are left are merged.
    """
    # [R, N] -> [R / 8, 8, N]: bin r in sublane r mod 8.
    pair = tuple(part.reshape(-1, SUBLANES, part.shape[-1]) for part in (scores_RN, slots_RN))
    size = 2
    while size <= neighbours:  # lists of 1, 2, 4 .. sorted up and down by turns, and merged
        pair = sort_bitonic(pair, size)
        size *= 2
    while pair[0].shape[0] > neighbours:  # of two lists, down and up, the better half is bitonic again
        lists = tuple(part.reshape(-1, 2, neighbours, *part.shape[1:]) for part in pair)
        better, _ = exchange(*(tuple(part[:, which] for part in lists) for which in (0, 1)))
        pair = sort_bitonic(tuple(part.reshape(-1, *part.shape[2:]) for part in better), neighbours)
    for shift in (4, 2, 1):
        other = tuple(backwards(pltpu.roll(part, shift, 1)) for part in pair)
        pair = sort_bitonic(exchange(pair, other)[0], neighbours)
    return tuple(part[:, 0] for part in pair)


def exchange(first: Pair, second: Pair) -> tuple[Pair, Pair]:
    """The better and the worse, elementwise: the higher score, or of equal ones the lower slot."""
    is_first = (first[0] > second[0]) | ((first[0] == second[0]) & (first[1] < second[1]))
    better = tuple(jnp.where(is_first, one, other) for one, other in zip(first, second, strict=True))
    worse = tuple(jnp.where(is_first, other, one) for one, other in zip(first, second, strict=True))
    return better, worse


def sort_bitonic(pair: Pair, size: int) -> Pair:
    """Sorts bitonic lists of `size` along the first axis: the first best first, the second best last, and so on."""
    distance = size // 2
    while distance:
        pair = compare(pair, size, distance)
        distance //= 2
    return pair


def compare(pair: Pair, size: int, distance: int) -> Pair:
    """Each with the one `distance` on; lists of `size` go down and up by turns."""
    length, rest = pair[0].shape[0], pair[0].shape[1:]
    turns = 2 if length > size else 1
    shape = (length // size // turns, turns, size // distance // 2, 2, distance, *rest)
    split = tuple(part.reshape(shape) for part in pair)
    sorted_ = []
    for turn in range(turns):
        halves = exchange(*(tuple(part[:, turn, :, which] for part in split) for which in (0, 1)))
        sorted_.append(halves if turn == 0 else halves[::-1])
    return tuple(
        jnp.stack([jnp.stack([half[which] for half in halves], 2) for halves in sorted_], 1).reshape(length, *rest)
        for which in (0, 1)
    )


def backwards(part: jax.Array) -> jax.Array:
    """From the last to the first, along the first axis."""
    return jnp.concatenate([part[at : at + 1] for at in reversed(range(part.shape[0]))])
