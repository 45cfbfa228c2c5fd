#!/usr/bin/env bash
# Makes .venv in the clone, or reuses it: a Python of at least 3.12, and the exact versions of requirements.lock.
# Sourced by the other scripts, which then find `memorizing` and `python` of the environment on PATH.
#
#   bash launch/setup.sh                  what training and evaluation need (1 GB)
#   EXTRA=prepare bash launch/setup.sh    and what preparing the corpora needs: TensorFlow, TFDS, Beam, seqio (3 GB)
#   ACCELERATOR=tpu bash launch/setup.sh  and JAX for this machine's accelerator: tpu, cuda12, or cuda (CUDA 13; 5 GB)
#
# PYTHON=/path/to/python3 names the interpreter to use.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '[setup] %s\n' "$*" >&2; }
fail() {
    printf '[setup] error: %s\n' "$*" >&2
    exit 1
}

suitable() { # a working interpreter, not just a name: version managers leave shims that fail
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1
}

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.12 python3.13 python3.14 python3 python \
        "${PYENV_ROOT:-$HOME/.pyenv}"/versions/*/bin/python3 /usr/local/bin/python3.1[2-9] /usr/bin/python3.1[2-9] \
        /opt/*/bin/python3 /opt/homebrew/bin/python3.1[2-9] "$HOME"/.local/share/uv/python/*/bin/python3 \
        "$HOME"/{miniconda3,miniforge3,anaconda3}/bin/python3; do
        [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 && suitable "$candidate" && {
            command -v "$candidate"
            return
        }
    done
    return 1
}

fetch_python() { # the last resort: uv downloads an interpreter, where the network serves them
    say "no Python of at least 3.12 found (3.12 to 3.14 on PATH, pyenv, /opt, conda); asking uv to fetch one"
    local uv=uv
    if ! command -v uv >/dev/null 2>&1; then
        { python3 -m venv .venv && .venv/bin/python -m pip install -q "$uv_version"; } >/dev/null 2>&1 ||
            fail "needs Python 3.12 or later: install one, or name it with PYTHON=/path/to/python3"
        uv=.venv/bin/uv
        cp "$uv" .venv-uv && uv=./.venv-uv
    fi
    rm -rf .venv
    "$uv" venv -q --seed --python 3.12 .venv >/dev/null 2>&1 || {
        rm -rf .venv .venv-uv
        fail "needs Python 3.12 or later, and none could be fetched: install one, or name it with PYTHON=/path/to/python3"
    }
    rm -f .venv-uv
}

uv_version=$(grep -o '^uv==[0-9.]*' requirements.lock)
wanted="$PWD $(cat requirements.lock pyproject.toml | cksum)"
installed=$(cat .venv/installed 2>/dev/null || true)
size=1
had=$(cat .venv/accelerator 2>/dev/null || true)
ACCELERATOR=${ACCELERATOR:-$had} # once there, it stays
case "$ACCELERATOR" in "") ;; tpu) size=2 ;; cuda | cuda12) size=5 ;; *) fail "ACCELERATOR=$ACCELERATOR: must be tpu, cuda12 or cuda" ;; esac
[ -z "$had" ] || [ "$ACCELERATOR" = "$had" ] || fail "ACCELERATOR=$ACCELERATOR: .venv has that for $had; remove .venv first"
wanted="$wanted${ACCELERATOR:+ $ACCELERATOR}"
[ "$installed" = "$wanted prepare" ] && EXTRA=prepare # once there, it stays
[ "${EXTRA:-}" = prepare ] && wanted="$wanted prepare" && size=$((size + 2))
if ! suitable .venv/bin/python || [ "$installed" != "$wanted" ]; then
    started=$SECONDS
    if ! { [ -x .venv/bin/python ] && suitable .venv/bin/python; }; then
        rm -rf .venv
        if python=$(find_python); then
            say "making .venv with $("$python" --version) ($python)"
            "$python" -m venv .venv || fail "$python could not make .venv in $PWD; is the disk full or read-only?"
        else
            fetch_python
        fi
    fi
    say "installing the versions of requirements.lock (about $size GB on disk)"
    .venv/bin/python -m pip --version >/dev/null 2>&1 || .venv/bin/python -m ensurepip >/dev/null 2>&1 || true
    .venv/bin/python -m pip install -q --disable-pip-version-check "$uv_version" ||
        fail "could not install $uv_version: is a Python package index reachable?"
    .venv/bin/uv pip install -q --python .venv/bin/python --compile-bytecode -r pyproject.toml --group dev \
        --extra gcs --extra pretrained ${EXTRA:+--extra "$EXTRA"} ${ACCELERATOR:+--extra "$ACCELERATOR"} --constraint requirements.lock --override <(grep '^tensorflow==' requirements.lock | sed 's, .$,,') ||
        fail "could not install requirements.lock: is a Python package index reachable, and $size GB of disk free?"
    .venv/bin/uv pip install -q --python .venv/bin/python --no-deps --no-build-isolation -e . ||
        fail "could not install this package itself into .venv"
    [ -z "$ACCELERATOR" ] || printf '%s' "$ACCELERATOR" >.venv/accelerator
    printf '%s' "$wanted" >.venv/installed
    say "done in $((SECONDS - started)) s"
fi
export PATH="$PWD/.venv/bin:$PATH"
