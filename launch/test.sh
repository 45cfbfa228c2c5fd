#!/usr/bin/env bash
# Runs the tests in the environment of setup.sh; arguments go to pytest.
#
#   bash launch/test.sh                   what CI runs
#   bash launch/test.sh -m pods           compiles the settings that name a TPU slice for it (needs ACCELERATOR=tpu)
#   bash launch/test.sh -m slow           the slow studies, which CI leaves out
#   EXTRA= bash launch/test.sh            without TensorFlow, TFDS, Beam and seqio (2 GB), and so without their tests

set -euo pipefail
export EXTRA=${EXTRA-prepare}
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
python -m pytest "$@"
