#!/usr/bin/env bash
# Makes the environment of what imported models are compared with, PyTorch and transformers (the group `reference` of
# pyproject.toml), or reuses it, and prints the path of its interpreter:
#
#   REFERENCE="$(bash tests/reference/setup.sh)" bash launch/test.sh tests/pretrained/test_importing.py
#
# It lies in .reference of this clone and has Python 3.11 to 3.13 (PYTHON=/path/to/python3 names one). With torch's CPU
# wheels it takes 1 GB; where pip knows of none, its CUDA ones, several more.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
case "${1:-}" in -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit ;; esac

fail() {
    printf '[setup reference] error: %s\n' "$*" >&2
    exit 1
}

# shellcheck source=tests/find_python.sh
source tests/find_python.sh

group='import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["dependency-groups"]["reference"], sep="\n")'
python=$(find_python) || fail "needs Python 3.11 to 3.13: install one, or name it with PYTHON=/path/to/python3"
mapfile -t wanted < <("$python" -c "$group")
if [ "$(cat .reference/installed 2>/dev/null || true)" != "${wanted[*]}" ] || ! .reference/bin/python -c '' 2>/dev/null; then
    rm -rf .reference
    "$python" -m venv .reference || fail "$python could not make .reference in $PWD; is the disk full or read-only?"
    .reference/bin/python -m pip install -q --disable-pip-version-check "${wanted[@]}" >&2 ||
        fail "could not install ${wanted[*]}: is a Python package index reachable, and is there room?"
    printf '%s' "${wanted[*]}" >.reference/installed
fi
printf '%s\n' "$PWD/.reference/bin/python"
