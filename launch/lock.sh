#!/usr/bin/env bash
# Rewrites requirements.lock from pyproject.toml with the newest compatible versions and their hashes. Run the tests afterwards.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
{
    echo "# Exact versions with hashes, for Python 3.12 and later. Written by launch/lock.sh."
    # TensorFlow's CPU build where it exists (see the extra `prepare`): no model runs on TensorFlow, and it saves 0.8 GB.
    .venv/bin/uv pip compile --quiet pyproject.toml --group dev --extra prepare --extra gcs --extra pretrained --universal \
        --python-version 3.12 --override <(echo "tensorflow; sys_platform != 'linux' or platform_machine != 'x86_64'") \
        --generate-hashes --no-header --no-emit-index-url
} >requirements.lock.new
mv requirements.lock.new requirements.lock
