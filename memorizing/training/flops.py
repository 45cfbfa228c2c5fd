"""How much arithmetic a step is, and how much the hardware could do: model FLOPs utilization (MFU)."""

import time

import jax
import jax.numpy as jnp

from memorizing.memory.settings import MemorySettings
from memorizing.model.settings import ModelSettings

PEAK_FLOPS = {
    # Dense bfloat16 FLOP/s of one JAX device, from the makers' data sheets, by a part of `device_kind`.
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}


def training_flops_per_token(model: ModelSettings, memory: MemorySettings, segment_length: int) -> float:
    """Multiplications and additions of matrix products, forward and backward (twice the forward).

    The search of the memory is counted once, since it has no backward pass; so are scores that a mask then hides.
    """
    attention_size = model.heads * model.head_size
    per_layer = 4 * model.embedding_size * attention_size + 2 * model.embedding_size * model.feed_forward_size
    window = segment_length * (2 if model.xl_cache else 1)
    products = model.layers * (per_layer + 2 * window * attention_size)
    products += model.vocabulary_size * model.embedding_size
    search = 0
    if memory.size:
        products += len(model.memory_layers) * 2 * memory.neighbours * attention_size
        search = len(model.memory_layers) * memory.size * attention_size
    return 2.0 * (3 * products + search)


def device_peak_flops(device: jax.Device) -> float:
    """FLOP/s of a device: from the table, or measured by a float32 matrix product where it is not in it (CPUs)."""
    for name, peak in PEAK_FLOPS.items():
        if name in device.device_kind:
            return peak
    size = 1024
    matrix = jax.device_put(jnp.ones((size, size)), device)
    product = jax.jit(jnp.matmul)
    product(matrix, matrix).block_until_ready()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        product(matrix, matrix).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)
