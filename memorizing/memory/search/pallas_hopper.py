"""The first kernel of `pallas_gpu.py` in Mosaic GPU, for the matrix units of Hopper and 16-bit keys.

    warpgroup 0    queries   0..127     waits for a tile of 64 keys, multiplies, compares
    warpgroup 1    queries 128..255     the same; one compares while the other multiplies
    warpgroup 2    a ring of tiles      loads the tiles ahead, in the order of their strides

Budget of a program, one per SM, for 128 features: 64 registers per thread for scores and 64 for the best, of 232; in
shared memory 64 KiB of queries, 64 KiB of results and 16 KiB per tile. Keys are read `N / 256` times from the L2 cache,
half as often as by the Triton kernel. Per tile the matrix units take 1024 cycles, the comparisons 600 at the same time,
and shared memory, from which both operands come at 128 bytes per cycle, 1150.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Float, Int

from memorizing.memory.search.words import LOWEST, pack, stride_bits_for

WARPGROUPS = 2
"""Number of warpgroups that multiply; one more loads tiles."""


def hopper_winners(
    queries: Float[jax.Array, "heads N D"],
    tiles: Float[jax.Array, "heads S R D"],
    run_B3: Int[jax.Array, "B 3"],
    others_BS: Int[jax.Array, "B S"],
    bounds_BSR: Float[jax.Array, "B S R"],
    *,
    block_queries: int,
    block_bins: int,
    stages: int,
    interpret: bool,
) -> Float[jax.Array, "heads N R"]:
    """Returns the best slot of each bin as a word, over a run of full strides and over partial strides with a mask.

    `block_queries` divides `N` and is 128 or 256. `block_bins` divides `R` and is a multiple of 8. `stages` is the
    number of tiles of keys in shared memory; all but one are loaded ahead.
    """
    heads, tokens, head_size = queries.shape
    _, strides, bins, _ = tiles.shape
    heads_of_row = heads // len(run_B3)
    stride_bits = stride_bits_for(strides * bins, bins)
    rows = block_queries // WARPGROUPS
    swizzle = plgpu.find_swizzle(head_size * queries.dtype.itemsize * 8)
    swizzled = (plgpu.TilingTransform((8, swizzle // queries.dtype.itemsize)), plgpu.SwizzleTransform(swizzle))

    def kernel(
        run_ref,
        others_ref,
        bounds_ref,
        queries_ref,
        tiles_ref,
        words_ref,
        own_queries,
        ring,
        own_words,
        queries_loaded,
        tile_loaded,
        tile_used,
    ):
        head, warpgroup = lax.axis_index("heads"), lax.axis_index("warpgroup")
        row = lax.div(head, jnp.int32(heads_of_row))
        of_bins = pl.ds(lax.axis_index("bins") * block_bins, block_bins)
        first, length, others = run_ref[row, 0], run_ref[row, 1], run_ref[row, 2]

        def full_stride(at):
            return jnp.where(first + at < strides, first + at, first + at - strides)

        @pl.when(warpgroup == WARPGROUPS)
        def _load():
            plgpu.set_max_registers(40, action="decrease")

            def load(at, stride):
                place = lax.rem(at, jnp.int32(stages))

                @pl.when(at >= stages)
                def _():
                    plgpu.barrier_wait(tile_used.at[place])

                plgpu.copy_gmem_to_smem(tiles_ref.at[head, stride, of_bins], ring.at[place], tile_loaded.at[place])

            pl.loop(0, length)(lambda at: load(at, full_stride(at)))
            pl.loop(0, others)(lambda at: load(length + at, others_ref[row, at]))
            # Waits until all tiles are used, because a barrier must outlive its arrivals.
            total = length + others
            pl.loop(lax.max(total - stages, jnp.int32(0)), total)(
                lambda at: plgpu.barrier_wait(tile_used.at[lax.rem(at, jnp.int32(stages))])
            )

        @pl.when(warpgroup < WARPGROUPS)
        def _compare():
            plgpu.set_max_registers(232, action="increase")
            of_queries = pl.ds(lax.axis_index("blocks") * block_queries + warpgroup * rows, rows)
            queries_ND = own_queries.at[warpgroup]
            plgpu.copy_gmem_to_smem(queries_ref.at[head, of_queries], queries_ND, queries_loaded.at[warpgroup])
            plgpu.barrier_wait(queries_loaded.at[warpgroup])

            def words_of(at, stride):
                place = lax.rem(at, jnp.int32(stages))
                plgpu.barrier_wait(tile_loaded.at[place])

                def multiply(scores_ref):
                    plgpu.wgmma(scores_ref, queries_ND, ring.at[place].transpose((1, 0)))
                    return scores_ref[...]

                scores_NR = pl.run_scoped(multiply, plgpu.ACC((rows, block_bins), jnp.float32))
                plgpu.barrier_arrive(tile_used.at[place])
                return pack(scores_NR, stride, stride_bits)

            def visit_full(at, best_NR):
                return jnp.maximum(best_NR, words_of(at, full_stride(at)))

            def visit_other(at, best_NR):
                stride = others_ref[row, at]
                bounds_R = plgpu.load(
                    bounds_ref.at[row, stride, of_bins], layout=plgpu.Layout.WGMMA.reduce(0), optimized=False
                )
                words_NR = words_of(length + at, stride)
                return jnp.maximum(best_NR, jnp.minimum(words_NR, lax.broadcast_in_dim(bounds_R, words_NR.shape, [1])))

            best_NR = plgpu.layout_cast(jnp.full((rows, block_bins), LOWEST, jnp.float32), plgpu.Layout.WGMMA)
            best_NR = lax.fori_loop(0, length, visit_full, best_NR)
            own_words[warpgroup] = lax.fori_loop(0, others, visit_other, best_NR)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(own_words.at[warpgroup], words_ref.at[head, of_queries, of_bins])
            plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((heads, tokens, bins), jnp.float32),
        # Programs that run at the same time differ in their queries first, so they share keys in the L2 cache.
        grid=(tokens // block_queries, bins // block_bins, heads),
        grid_names=("blocks", "bins", "heads"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=[
            plgpu.SMEM((WARPGROUPS, rows, head_size), queries.dtype, transforms=swizzled),
            plgpu.SMEM((stages, block_bins, head_size), queries.dtype, transforms=swizzled),
            plgpu.SMEM((WARPGROUPS, rows, block_bins), jnp.float32),
            plgpu.Barrier(num_barriers=WARPGROUPS),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_barriers=stages, num_arrivals=WARPGROUPS),
        ],
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )(run_B3, others_BS, bounds_BSR, queries, tiles)
