"""How much arithmetic a step is, and how much the hardware could do: model FLOPs utilization (MFU)."""

import time

import jax
import jax.numpy as jnp

from memorizing.memory.settings import MemorySettings
from memorizing.model.settings import ModelSettings
from memorizing.parallel.topology import chip_of


def training_flops_per_token(model: ModelSettings, memory: MemorySettings, segment_length: int) -> float:
    """Multiplications and additions of matrix products, forward and backward (twice the forward).

    The search of the memory is counted once, since it has no backward pass; so are scores that a mask then hides.
    """
    products = _layers_forward(model, memory, segment_length) + model.vocabulary_size * model.embedding_size
    search = len(model.memory_layers) * memory.size * model.heads * model.head_size * (memory.search != "dense")
    return 2.0 * (3 * products + search)


def executed_flops_per_token(model: ModelSettings, memory: MemorySettings, segment_length: int) -> float:
    """The same, and what `Model.remat` computes a second time.

    That is the forward pass of the layers but for the last product of each, which the backward pass does not need. The
    logits are not part of a layer, and what the search found is kept.
    """
    again = 0
    if model.remat:
        again = _layers_forward(model, memory, segment_length)
        again -= model.layers * model.embedding_size * model.feed_forward_size
    return training_flops_per_token(model, memory, segment_length) + 2.0 * again


def _layers_forward(model: ModelSettings, memory: MemorySettings, segment_length: int) -> int:
    """Multiplications of a token in all layers, without the search."""
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
    """FLOP/s of a device: by its data sheet, or by a matrix product where none is listed (CPUs: in float32)."""
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
