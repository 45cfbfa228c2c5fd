"""Data of chips, and descriptions of TPU slices, which let a machine without TPUs compile programs for them."""

import dataclasses
import functools
import os
import re
from collections.abc import Sequence

import jax
from jax.experimental import topologies

from memorizing.errors import InputError


@dataclasses.dataclass(frozen=True)
class Chip:
    """Properties of one kind of device, from its maker's data sheets.

    Attributes:
        kinds: full names that JAX has for it (`device_kind`); chips with other memories or speeds have similar names.
        flops: dense bfloat16 FLOPs per second.
        memory: bytes of high-bandwidth memory.
        memory_bandwidth: bytes per second from that memory.
        network_bandwidth: bytes per second that the device can send to its neighbors: half of the data sheet's figure,
            which counts both directions.
    """

    kinds: tuple[str, ...]
    flops: float
    memory: int
    memory_bandwidth: float
    network_bandwidth: float


CHIPS = {
    # https://cloud.google.com/tpu/docs: system architecture, a page for each version.
    "v4": Chip(("TPU v4",), 275e12, 32 * 2**30, 1228e9, 300e9 / 2),
    "v5e": Chip(("TPU v5 lite", "TPU v5e"), 197e12, 16 * 2**30, 819e9, 200e9 / 2),
    "v5p": Chip(("TPU v5", "TPU v5p"), 459e12, 95 * 2**30, 2765e9, 600e9 / 2),
    "v6e": Chip(("TPU v6 lite", "TPU v6e"), 918e12, 32 * 2**30, 1640e9, 448e9 / 2),
    # NVIDIA's data sheets of the SXM modules; NVLink.
    "A100-40GB": Chip(("NVIDIA A100-SXM4-40GB",), 312e12, 40 * 10**9, 1555e9, 600e9 / 2),
    "A100-80GB": Chip(("NVIDIA A100-SXM4-80GB",), 312e12, 80 * 10**9, 2039e9, 600e9 / 2),
    "H100": Chip(("NVIDIA H100 80GB HBM3",), 989e12, 80 * 10**9, 3350e9, 900e9 / 2),
    "H200": Chip(("NVIDIA H200",), 989e12, 141 * 10**9, 4800e9, 900e9 / 2),
}


def chip_of(device: jax.Device) -> Chip | None:
    """Returns the data of a device's chip; None for a CPU, or a chip that is not listed."""
    return next((chip for chip in CHIPS.values() if device.device_kind in chip.kinds), None)


def platform_compiled_for() -> str:
    """Returns the platform (`cpu`, `tpu`, `gpu`) of the surrounding `jax.set_mesh`, or of the local devices."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        return jax.default_backend()
    kind = device.device_kind.lower()
    return "tpu" if kind.startswith("tpu") else "cpu" if "cpu" in kind else "gpu"


def training_options() -> dict[str, bool] | None:
    """Returns compiler options for a train step on these devices; None for the defaults.

    Also returns None if JAX caches compiled programs (`JAX_COMPILATION_CACHE_DIR`), because the cache cannot store
    programs that use oneDNN.
    """
    is_kept = bool(jax.config.jax_compilation_cache_dir)
    return _onednn() if platform_compiled_for() == "cpu" and not is_kept else None


@functools.cache
def _onednn() -> dict[str, bool] | None:
    """Returns options that use oneDNN: XLA's product with a transposed matrix, as in the backward pass of attention, is
    four times slower.
    """
    options = {"xla_cpu_experimental_onednn_custom_call": True}
    try:
        jax.jit(lambda x: x, compiler_options=options).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:  # this jaxlib lacks the option
        return None
    return options


def has_ampere() -> bool:
    """True if all local GPUs are NVIDIA GPUs from Ampere (compute capability 8.0) on, or if there are none."""
    here = [device for device in jax.local_devices() if device.platform == "gpu"]
    # ROCm reports names such as gfx90a.
    versions = [re.fullmatch(r"(\d+)\.\d+", str(getattr(device, "compute_capability", ""))) for device in here]
    return all(version is not None and int(version[1]) >= 8 for version in versions)


def memory_of(device: jax.Device) -> int | None:
    """Returns the bytes of a device's memory that programs may use; None if unknown.

    A local device reports them itself (JAX takes three quarters of a GPU: XLA_PYTHON_CLIENT_MEM_FRACTION); for others
    the data sheet counts.
    """
    stats = device.memory_stats() if device in jax.local_devices() else None
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    chip = chip_of(device)
    return chip.memory if chip else None


def topology_devices(name: str) -> Sequence[jax.Device]:
    """Returns the devices of a TPU slice (`v5p:4x4x4`, `v5e:8x8`) to compile for, which need not exist; or `local`
    devices.

    Raises:
        InputError: if there is no such slice, or the compiler for it is not installed.
    """
    if name == "local":
        return jax.devices()
    version, _, shape = name.partition(":")
    known = [each for each in CHIPS if CHIPS[each].kinds[0].startswith("TPU")]
    if version not in known or not re.fullmatch(r"\d+(x\d+){1,2}", shape):
        raise InputError(
            f"--topology={name}: must be VERSION:SHAPE, such as v4:2x2x4, v5e:8x8, v5p:4x4x4 or v6e:8x8 (versions: "
            f"{', '.join(known)}), or `local`"
        )
    # Without this, libtpu would look for the TPU machine that it runs on, and for its neighbors.
    quiet = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    for variable, value in quiet.items():
        os.environ.setdefault(variable, value)
    jax.config.update("jax_platforms", "cpu")
    how = {"chip_config_name": "megacore"} if version == "v4" else {}  # else JAX counts a v4 chip as two devices
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **how).devices
    except Exception as error:
        if "libtpu" in str(error) or isinstance(error, ModuleNotFoundError):
            raise InputError(
                f"--topology={name}: compiling for TPUs needs libtpu (ACCELERATOR=tpu bash launch/setup.sh, or pip "
                f"install 'jax[tpu]'): {error}"
            ) from error
        raise InputError(f"--topology={name}: {error}") from error
