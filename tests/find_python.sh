# shellcheck shell=bash
# Sourced by the scripts here that make environments with PyTorch: find_python prints a Python of 3.11 to 3.13.
# PYTHON=/path/to/python3 names one.

suitable() { # a working interpreter, not just a name: version managers leave shims that fail
    "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' >/dev/null 2>&1
}

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.11 python3.12 python3.13 python3 \
        "${PYENV_ROOT:-$HOME/.pyenv}"/versions/*/bin/python3 /usr/local/bin/python3.1[1-3] /usr/bin/python3.1[1-3] \
        /opt/*/bin/python3 "$HOME"/.local/share/uv/python/*/bin/python3 "$HOME"/{miniconda3,miniforge3,anaconda3}/bin/python3; do
        [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 && suitable "$candidate" && {
            command -v "$candidate"
            return
        }
    done
    return 1
}
