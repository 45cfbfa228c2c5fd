"""FLOPs of a training step and peak FLOP/s of devices, for model FLOPs utilization (MFU)."""

import time

import jax
import jax.numpy as jnp

from memorizing.memory.settings import MemorySettings
from memorizing.model.settings import ModelSettings
from memorizing.parallel.topology import chip_of


def training_flops_per_token(model: ModelSettings, memory: MemorySettings, segment_length: int) -> float:
    """Returns the FLOPs of matrix products per token, forward and backward (twice the forward).

    The search of the memory counts once, since it has no backward pass. Scores that a mask hides count too.
    """
    products = _layers_forward(model, memory, segment_length) + model.vocabulary_size * model.embedding_size
    search = len(model.memory_layers) * memory.size * model.heads * model.head_size * (memory.selects)
    return 2.0 * (3 * products + search)


def executed_flops_per_token(model: ModelSettings, memory: MemorySettings, segment_length: int) -> float:
    """Returns the same with what `Model.remat` computes a second time.

    It recomputes the forward pass of the layers without the last product of each, which the backward pass does not
    need. The logits are not part of a layer, and the search's result is kept.
    """
    again = 0
    if model.remat:
        again = _layers_forward(model, memory, segment_length)
        again -= model.layers * model.embedding_size * model.feed_forward_size
    return training_flops_per_token(model, memory, segment_length) + 2.0 * again


def _layers_forward(model: ModelSettings, memory: MemorySettings, segment_length: int) -> int:
    """Returns the multiplications per token in all layers, without the search."""
    attention_size, key_size = model.heads * model.head_size, model.kv_head_count * model.head_size
    matrices = 3 if model.feed_forward == "swiglu" else 2
    per_layer = 2 * model.embedding_size * (attention_size + key_size)
    per_layer += matrices * model.embedding_size * model.feed_forward_size
    window = segment_length * (2 if model.xl_cache else 1)
    products = model.layers * (per_layer + 2 * window * attention_size)
    if memory.size:
        products += len(model.memory_layers) * 2 * memory.retrieved * attention_size
    return products


def device_peak_flops(device: jax.Device) -> float:
    """Returns the peak FLOP/s of a device by its data sheet, or measured by a matrix product (CPUs: float32)."""
    if chip := chip_of(device):
        return chip.flops
    # Large enough to fill an accelerator, and in the dtype that data sheets give; a CPU is slow in bfloat16.
    size, dtype = (1024, jnp.float32) if device.platform == "cpu" else (8192, jnp.bfloat16)
    matrix = jax.device_put(jnp.ones((size, size), dtype), device)
    product = jax.jit(jnp.matmul)
    product(matrix, matrix).block_until_ready()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        product(matrix, matrix).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)
