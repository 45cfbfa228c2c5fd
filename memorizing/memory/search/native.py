"""Exact search on CPUs, with a C++ kernel that keeps its scores in registers.

XLA writes all scores to memory and selects from them on a single core; `native.cc` does neither. The machine's C++
compiler compiles it for this processor on first use. That takes some seconds; the result is stored in
`~/.cache/memorizing`. If there is no compiler, `why_unavailable()` says so, and `auto` takes another search.
"""

import ctypes
import dataclasses
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from memorizing.errors import InputError
from memorizing.memory.search.contract import Keys, Neighbors, Search, SearchSettings, just_below

SOURCE = Path(__file__).with_name("native.cc")
FLAGS = ("-O3", "-march=native", "-std=gnu++17", "-shared", "-fPIC")
TIMEOUT = 120  # seconds; compiling takes three to ten


@dataclasses.dataclass(frozen=True, kw_only=True)
class Native(Search):
    """Finds the exact neighbors without storing scores. Keys may be float32, bfloat16, int8 and float8."""

    def __call__(self, queries_BHND, keys: Keys, valid_BM, neighbors: int) -> Neighbors:
        dtype = keys.vectors_BHMD.dtype if keys.scales_BHM is None else queries_BHND.dtype
        queries_BHND = queries_BHND.astype(dtype).astype(jnp.float32)  # with the precision of `inner_products`
        scales_BHM = jnp.zeros((0, 0, 0), jnp.float32) if keys.scales_BHM is None else keys.scales_BHM
        shape = (*queries_BHND.shape[:3], neighbors)
        results = (jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct(shape, jnp.int32))
        search = jax.ffi.ffi_call("memorizing_search", results)
        return Neighbors(
            *search(
                queries_BHND, keys.vectors_BHMD, scales_BHM, valid_BM, above=np.float32(just_below(self.minimum_score))
            )
        )


@functools.cache
def why_unavailable() -> str:
    """Compiles the kernels if necessary and registers them with XLA. Returns why they cannot be used, or an empty
    string."""
    try:
        path = _compiled()
        try:
            library = ctypes.CDLL(str(path))
        except OSError:  # a file truncated by a full disk
            path.unlink(missing_ok=True)
            library = ctypes.CDLL(str(_compiled()))
        for name in ("memorizing_search", "memorizing_gather"):
            jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    except subprocess.CalledProcessError as error:
        return f"{error.cmd[0]} could not compile {SOURCE.name}: {error.stderr.strip()[-500:]}"
    except (OSError, subprocess.TimeoutExpired, AttributeError) as error:
        return f"{SOURCE.name} could not be compiled and loaded ({error}). Install g++ or clang++, or set CXX"
    return ""


def _compiled() -> Path:
    """Returns the compiled library for this processor, compiler, source and version of XLA; compiles it only once."""
    compiler = shlex.split(os.environ.get("CXX") or "c++")
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=True, text=True, timeout=TIMEOUT)
    cpu_info = Path("/proc/cpuinfo")
    processor = cpu_info.read_text().partition("\n\n")[0] if cpu_info.exists() else platform.processor()
    features = "".join(line for line in processor.splitlines() if line.startswith(("model name", "flags", "Features")))
    parts = (
        SOURCE.read_bytes(),
        version.stdout.encode(),
        " ".join(FLAGS).encode(),
        jax.lib.__version__.encode(),
        features.encode(),
    )
    name = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "memorizing"
        library = folder / f"native-{name}.so"
        if library.exists():
            return library
        folder.mkdir(parents=True, exist_ok=True)
        making = Path(tempfile.mkdtemp(dir=folder))
    except (OSError, RuntimeError):  # no writable home folder
        making = Path(tempfile.mkdtemp())
        library = making / "native.so"
    # Compiles under a temporary name and renames it, because other processes may do the same.
    out = making / "unfinished.so"
    command = [*compiler, *FLAGS, "-isystem", jax.ffi.include_dir(), str(SOURCE), "-o", str(out)]
    try:
        subprocess.run(command, capture_output=True, check=True, text=True, timeout=TIMEOUT)
        out.replace(library)
    finally:
        if making != library.parent:
            shutil.rmtree(making)
    return library


@dataclasses.dataclass(frozen=True, kw_only=True)
class NativeSettings(SearchSettings):
    """The native search has no settings."""

    is_exact = True
    writes_scores = False
    platforms = ("cpu",)

    def make(self, minimum_score, platform):
        problem = why_unavailable() if platform == "cpu" else f"runs on CPUs, not on a {platform.upper()}"
        if problem:
            raise InputError(f"Memory.search = 'native': {problem}. Or use 'blocked', which is exact as well")
        return Native(minimum_score=minimum_score)

    @classmethod
    def auto_rank(cls, platform, slots, neighbors):
        return 2 if platform == "cpu" and not why_unavailable() else 0

    @classmethod
    def missing_requirement(cls):
        return why_unavailable()
