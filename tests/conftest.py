"""Tests run on CPUs, with eight fake devices where sharding is the point; everything else runs on the first."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # of the processes that tests start, too

import jax

jax.config.update("jax_num_cpu_devices", 8)
