"""Tests run on CPUs, with eight fake devices where sharding is the point; everything else runs on the first."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # of the processes that tests start, too
# Programs of tests are compiled more often than they run: at XLA's own level, 3, that takes three times as long.
os.environ["XLA_FLAGS"] = " ".join(
    ["--xla_backend_optimization_level=1"] * (os.environ["JAX_PLATFORMS"] == "cpu")
    + os.environ.get("XLA_FLAGS", "").split()
)

import jax

jax.config.update("jax_num_cpu_devices", 8)
