#!/usr/bin/env bash
# Runs the tests in the environment of setup.sh, and prints at the end which tests it left out and why.
#
#   bash launch/test.sh                    the core tier: no extras (1 GB), at most 8 minutes on two cores
#   bash launch/test.sh all                all tests that CI runs: extra `prepare` (3 GB), processes, browsers, pods
#   bash launch/test.sh -m slow            the slow studies, which CI leaves out
#   bash launch/test.sh tests/memory -k ivf
#
# Further arguments go to pytest. A TPU pod's settings are compiled only with ACCELERATOR=tpu, and pretrained models
# are compared with PyTorch's only with REFERENCE (tests/reference/setup.sh).

set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit ;; esac
tier="not slow and not pods and not gpu and not tpu and not integration and not browser and not large"
if [ "${1:-}" = all ]; then
    shift
    export EXTRA=${EXTRA-prepare}
    tier="not slow and not gpu and not tpu"
elif [[ " $* " == *" tests/"* || " $* " == *"::"* ]]; then # a file that is named runs whole
    tier="not slow and not pods and not gpu and not tpu"
fi
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
python -m pytest -m "$tier" "$@"
