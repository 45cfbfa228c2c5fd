#!/usr/bin/env bash
# Writes requirements.lock anew from pyproject.toml: the newest versions that fit, with hashes. Then run the tests.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
{
    echo "# Exact versions with hashes, for Python 3.12 and later. Written by launch/lock.sh."
    # TensorFlow's CPU build (see the extra `prepare`) where there is one: no model runs on it, and it takes 0.8 GB less.
    .venv/bin/uv pip compile --quiet pyproject.toml --group dev --extra prepare --extra gcs --extra pretrained --universal \
        --python-version 3.12 --override <(echo "tensorflow; sys_platform != 'linux' or platform_machine != 'x86_64'") \
        --generate-hashes --no-header --no-emit-index-url
} >requirements.lock.new
mv requirements.lock.new requirements.lock
