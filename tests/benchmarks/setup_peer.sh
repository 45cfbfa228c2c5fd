#!/usr/bin/env bash
# Creates or reuses the environment of the PyTorch port memorizing-transformers-pytorch 0.4.1, and prints the command that
# `memorizing bench step` compares with:
#
#   memorizing bench step --against="$(bash tests/benchmarks/setup_peer.sh)"
#
# The environment is the folder .peer of this clone (PEER=DIR names another; 1 GB). It has Python 3.11 to 3.13
# (PYTHON=/path/to/python3 names one) and CPU versions of torch 2.13.0 and FAISS.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
case "${1:-}" in -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit ;; esac

say() { printf '[setup_peer] %s\n' "$*" >&2; }
fail() {
    say "error: $*"
    exit 1
}

# shellcheck source=tests/find_python.sh
source tests/find_python.sh

peer=${PEER:-.peer}
wanted=(torch==2.13.0 'faiss-cpu>=1.12' 'einops>=0.8' 'einops-exts==0.0.4' 'numpy>=2' filelock joblib)
if [ "$(cat "$peer/installed" 2>/dev/null || true)" != "${wanted[*]}" ] || ! "$peer/bin/python" -c '' 2>/dev/null; then
    python=$(find_python) || fail "needs Python 3.11 to 3.13: install one, or name it with PYTHON=/path/to/python3"
    say "creating $peer with $("$python" --version)"
    rm -rf "$peer"
    "$python" -m venv "$peer" || fail "$python could not make $peer; is the disk full or read-only?"
    "$peer/bin/python" -m pip install -q --disable-pip-version-check "${wanted[@]}" >&2 ||
        fail "could not install ${wanted[*]}: is a Python package index reachable, and 1 GB of disk free?"
    # --no-deps: the port asks for faiss-gpu, which has no wheels for these versions of Python.
    "$peer/bin/python" -m pip install -q --disable-pip-version-check --no-deps memorizing-transformers-pytorch==0.4.1 >&2 ||
        fail "could not install memorizing-transformers-pytorch 0.4.1"
    "$peer/bin/python" -c 'import memorizing_transformers_pytorch' || fail "the package in $peer cannot be imported"
    printf '%s' "${wanted[*]}" >"$peer/installed"
fi
printf '%q %q\n' "$(cd "$peer" && pwd)/bin/python" "$PWD/tests/benchmarks/peer_step.py"
