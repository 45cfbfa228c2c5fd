"""Eight fake CPU devices, for the tests in which sharding is the point; everything else runs on the first."""

import jax

jax.config.update("jax_num_cpu_devices", 8)
