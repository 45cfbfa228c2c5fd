#!/usr/bin/env bash
# Measures what a memory is worth, on this machine, in about ten minutes. It trains the same model on the same tokens
# without and with a memory, evaluates held-out documents with several memory sizes, and draws the result.
#
#   bash launch/quickstart.sh             uses Python's own standard library; each package is a document
#   bash launch/quickstart.sh FOLDER      uses your text; each file or sub-folder is a document
#   bash launch/quickstart.sh [FOLDER] --gin_param 'VOCABULARY_SIZE = 1024'    with other settings
#
# Repeat the command to resume it. Everything is written to runs/quickstart, or runs/quickstart-NAME for a folder
# (RUN=DIR names another).

set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,11s/^# \{0,1\}//p' "$0" && exit ;; esac
folder=
case "${1:-}" in "" | -*) ;; *) folder=$(realpath "$1") && shift ;; esac
more=("$@")
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

run=${RUN:-runs/quickstart${folder:+-$(basename "$folder")}}
case "$run" in *\'*) fail "$run contains an apostrophe, which a setting cannot hold. Choose another folder with RUN=DIR" ;; esac
settings=(--gin_file=configs/quickstart.gin --gin_param "DATA = '$run/data'" ${more[@]+"${more[@]}"})
raw=${folder:-$(python -c 'import sysconfig; print(sysconfig.get_paths()["stdlib"])')}
step() { printf '\n== %s\n' "$*"; }

step "documents of $raw -> tokens in $run/data"
if [ ! -f "$run/data/manifest.json" ]; then
    mkdir -p "$run" && printf '%s\n' "$raw" >"$run/documents"
    memorizing prepare "${settings[@]}" --raw="$raw" --out="$run/data"
elif [ "$(cat "$run/documents")" != "$raw" ]; then
    fail "$run holds tokens of $(cat "$run/documents"), not of $raw. Remove it, or choose another folder with RUN=DIR"
fi

step "training without memory: $run/without"
memorizing train "${settings[@]}" --gin_param 'MEMORY_SIZE = 0' --workdir="$run/without"

step "training with memory, on the same tokens: $run/with"
memorizing train "${settings[@]}" --workdir="$run/with"

step "evaluating held-out documents"
memorizing evaluate --workdir="$run/without"
memorizing evaluate --workdir="$run/with" --memory_size=0,512,2048,8192

step "what the memory is worth"
memorizing compare --without="$run/without" --with="$run/with" --out="$run"
