#!/usr/bin/env bash
# Runs the tests in the environment of setup.sh; arguments go to pytest.
#
#   bash launch/test.sh                   what CI runs
#   bash launch/test.sh -m slow           the slow studies, which CI leaves out

set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
python -m pytest "$@"
