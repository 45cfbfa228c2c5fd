"""Collectives read off compiled programs: kinds, counts with loops, bytes."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from memorizing.parallel.mesh import MeshSettings, make_mesh
from memorizing.planning.collectives import Collective, collectives


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshSettings(data=4, memory=2))


def compiled_text(mesh, inside, in_specs, out_specs, *shapes) -> str:
    program = jax.jit(jax.shard_map(inside, mesh=mesh, in_specs=in_specs, out_specs=out_specs))
    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in zip(shapes, in_specs, strict=True)
    ]
    return program.lower(*arguments).compile().as_text()


def test_a_sum_in_a_loop_counts_as_often_as_it_runs(mesh):
    def inside(x_AC):
        def add(total_AC, _):
            return jax.lax.pcast(jax.lax.psum(total_AC * 0.5, "data"), "data", to="varying"), None

        return jax.lax.scan(add, x_AC, None, length=7)[0]

    spec = PartitionSpec("data")
    [found] = collectives(compiled_text(mesh, inside, (spec,), spec, (8, 64)))
    # A ring sends 2 (n - 1) / n of the 2 x 64 floats that each of n = 4 devices holds.
    assert found == Collective("all-reduce", (("f32", (2, 64)),), 4, 7, int(2 * 3 / 4 * 2 * 64 * 4))
    assert found.total == 7 * found.sent


def test_gathers_and_reduce_scatters_are_counted(mesh):
    def gather(x_AC):
        return jax.lax.all_gather(x_AC, "memory", tiled=True)

    varying = jax.jit(
        jax.shard_map(gather, mesh=mesh, in_specs=PartitionSpec("memory"), out_specs=PartitionSpec("memory"))
    )
    where = NamedSharding(mesh, PartitionSpec("memory"))
    text = varying.lower(jax.ShapeDtypeStruct((6, 32), jnp.float32, sharding=where)).compile().as_text()
    [found] = collectives(text)
    assert (found.kind, found.devices, found.times) == ("all-gather", 2, 1)
    assert found.sent == 3 * 32 * 4  # what each device has goes to the other one

    def scatter(x_AC):
        return jax.lax.psum_scatter(x_AC, "data", tiled=True)

    text = compiled_text(mesh, scatter, (PartitionSpec(None, "memory"),), PartitionSpec("data", "memory"), (8, 64))
    [found] = collectives(text)
    assert (found.kind, found.devices) == ("reduce-scatter", 4)
    assert found.sent == 3 * 2 * 32 * 4  # each of the other 3 devices gets a quarter of 8 x 32


def test_collectives_are_read_from_the_formats_of_the_tpu_compiler():
    text = """\
HloModule jit_f
%body.1 (param: (s32[], bf16[16,8])) -> (s32[], bf16[16,8]) {
  %start = (bf16[8,8]{1,0}, bf16[16,8]{1,0}) all-gather-start(%x), replica_groups=mesh['data'=2,'model'=4] {'data'}
  ROOT %t = (s32[], bf16[16,8]{1,0}) tuple(%i, %y)
}
%condition.1 (param: (s32[], bf16[16,8])) -> pred[] {
  %limit = s32[] constant(11)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}
%starts (p: bf16[4,8]) -> (bf16[4,8], bf16[8,8]) {
  %g = bf16[8,8]{1,0} all-gather(%p), channel_id=3, replica_groups=[4,2]<=[8]
  ROOT %c = (bf16[4,8]{1,0}, bf16[8,8]{1,0}) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}
%ends (p: (bf16[4,8], bf16[8,8])) -> bf16[8,8] {
  %g2 = bf16[8,8]{1,0} all-gather(%p), channel_id=3, replica_groups=[4,2]<=[8]
  ROOT %c2 = bf16[8,8]{1,0} custom-call(%g2), custom_call_target="AsyncCollectiveDone"
}
%all-reduce-scatter.1.clone.1 (a: f32[16,8], b: f32[4,32]) -> (f32[2,8], f32[4,4]) {
  %sum = (f32[16,8]{1,0}, f32[4,32]{1,0}) all-reduce(%a, %b), channel_id=3, replica_groups={{0,1,2,3,4,5,6,7}}
  %whole.0 = f32[16,8]{1,0} get-tuple-element(%sum), index=0
  %own.0 = f32[2,8]{1,0:T(8,128)S(1)} dynamic-slice(%whole.0, %at, %zero), dynamic_slice_sizes={2,8}
  %whole.1 = f32[4,32]{1,0} get-tuple-element(%sum), index=1
  %own.1 = f32[4,4]{1,0:T(8,128)S(1)} dynamic-slice(%whole.1, %zero, %at), dynamic_slice_sizes={4,4}
  ROOT %owns = (f32[2,8]{1,0:T(8,128)S(1)}, /*index=1*/f32[4,4]{1,0:T(8,128)S(1)}) tuple(%own.0, %own.1)
}
ENTRY %main (x: bf16[16,8]) -> bf16[16,8] {
  %loop = (s32[], bf16[16,8]{1,0}) while(%t), condition=%condition.1, body=%body.1
  %s = (bf16[4,8]{1,0}, bf16[8,8]{1,0}) fusion(%a), kind=kCustom, calls=%starts
  %b = bf16[8,8]{1,0} fusion(%s), kind=kCustom, calls=%ends
  %r = (f32[2,8]{1,0}, f32[4,4]{1,0}) fusion(%u, %v), kind=kCustom, calls=%all-reduce-scatter.1.clone.1
  %move = f32[4,2]{1,0} collective-permute(%z), source_target_pairs={{0,1},{1,0}}
}
"""
    gathered, beside, scattered, moved = collectives(text)
    assert gathered == Collective("all-gather", (("bf16", (16, 8)),), 2, 11, 16 * 8 * 2 // 2)
    assert beside == Collective("all-gather", (("bf16", (8, 8)),), 2, 1, 8 * 8 * 2 // 2)  # once, though written twice
    # Written as a sum of the whole and slices of it, of which each device keeps its eighth.
    assert scattered == Collective("reduce-scatter", (("f32", (2, 8)), ("f32", (4, 4))), 8, 1, 7 * (2 * 8 + 4 * 4) * 4)
    assert (moved.kind, moved.times, moved.sent) == ("collective-permute", 1, 4 * 2 * 4)
