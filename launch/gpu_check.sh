#!/usr/bin/env bash
# Checks and times this machine's GPU: every kernel, both benchmarks, a short training. Under 8 minutes on an H100.
#
#   bash launch/gpu_check.sh              prints a table and writes runs/gpu_check/gpu_check.json (OUT=DIR for another folder)
#   bash launch/gpu_check.sh --cpu        does the same at tiny sizes, on a machine without a GPU
#   bash launch/gpu_check.sh --dry_run    prints the commands without running them
#
# It installs nothing and needs no network. It uses a Python of at least 3.12 that has jax, flax, optax, orbax and
# tensorstore (PYTHON=/path/to/python3; default: .venv, then python3). Packages that it lacks are unpacked below OUT from
# the wheels in WHEELS=DIR. Fill that folder on a machine with a package index:
#
#   pip download --no-deps -d DIR beartype gin-config jaxtyping wadler-lindig sentencepiece tensorboard protobuf tqdm
#
# It trains configs/recall.gin on generated text, or configs/base.gin on the prepared tokens in DATA=DIR. All parts run
# even if one fails; the exit status is then 1.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/common.sh
source launch/common.sh

small=false
for word in "$@"; do
    check_spelling "$word"
    case "$word" in
    -h | --help) print_header "${BASH_SOURCE[0]}" && exit ;;
    --dry_run) dry_run=true ;;
    --cpu) small=true ;;
    *) fail "$word: unknown option. Options are --cpu, --dry_run and --help" ;;
    esac
done
out=${OUT:-runs/gpu_check} data=${DATA:-}
case "$out$data" in *\'*) fail "$out$data contains an apostrophe, which a setting cannot hold. Choose another folder" ;; esac
[ -z "$data" ] || $dry_run || [ -f "$data/manifest.json" ] || fail "DATA=$data holds no prepared tokens (no manifest.json). Run memorizing prepare first"
[ -z "${WHEELS:-}" ] || [ -d "$WHEELS" ] || fail "WHEELS=$WHEELS is not a folder"

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" .venv/bin/python python3 python3.12 python3.13 python; do
        [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 &&
            "$candidate" -c 'import sys, jax; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1 && {
            command -v "$candidate"
            return
        }
    done
    return 1
}

unpack_missing() { # unpacks the wheels of packages that the interpreter lacks
    "$python" - "$WHEELS" "$1" <<'PYTHON'
import importlib.metadata, pathlib, sys, zipfile
for wheel in sorted(pathlib.Path(sys.argv[1]).glob("*.whl")):
    name = wheel.name.split("-")[0]
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        print(f"[gpu_check.sh] {name} from {wheel.name}", file=sys.stderr)
        zipfile.ZipFile(wheel).extractall(sys.argv[2])
PYTHON
}

if $dry_run; then
    python=${PYTHON:-python3}
else
    python=$(find_python) || fail "found no Python 3.12 or later with jax. Give one with PYTHON=/path/to/python3"
    mkdir -p "$out"
    rm -rf "$out"/{run,tokens,site,parts} "$out"/*.json "$out"/*.log
    export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
    if [ -n "${WHEELS:-}" ]; then
        unpack_missing "$out/site"
        PYTHONPATH="$PYTHONPATH:$(cd "$out" && pwd)/site"
    fi
fi
if $small; then export JAX_PLATFORMS=cpu; else export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda,cpu}; fi

part() { # name, time limit in seconds, command...
    local name=$1 limit=$2 status=0 started=$SECONDS
    shift 2
    if $dry_run; then
        run "$@"
        return
    fi
    say "$name: $(shell_quoted "$@")"
    timeout -k 10 "$limit" "$@" </dev/null 2>&1 | tee "$out/$name.log" || status=${PIPESTATUS[0]}
    printf '%s\t%s\t%s\t%s\n' "$name" "$status" "$((SECONDS - started))" "$(shell_quoted "$@")" >>"$out/parts"
}

memorizing=("$python" -m memorizing.cli)
shapes=M8192,M65536,M262144 # of B8xH8xN512xD128xK32, in bfloat16: the defaults
searching=() # all searches for this platform
stepping=(--gin_file=configs/base.gin --gin_param 'BATCH_SIZE = 8' --gin_param 'Batch.segments_per_call = 2')
sizes=0,8192,65536 rounds=10 steps=1600 documents=1000 collecting=()
if $small; then
    shapes=B1xH2xN32xM512xD32xK8 searching=('--searches=exact,blocked')
    stepping+=(--gin_file=configs/sizes/tiny.gin --gin_param 'SEGMENT_LENGTH = 64' --gin_param 'BATCH_SIZE = 2')
    stepping+=(--gin_param 'VOCABULARY_SIZE = 256')
    sizes=0,512 rounds=2 steps=64 documents=60 collecting=(--collect-only)
fi

part environment 60 "$python" -c 'import jax; print(jax.__version__, jax.devices())'
part searches 150 "$python" -m memorizing.benchmarks.gpu_check searches "--json=$out/searches.json"
# Only files with tests for GPUs: others need packages that a node may lack.
mapfile -t tests < <(grep -rlE --include='test_*.py' 'mark\.gpu' tests | sort)
if [ "${#tests[@]}" -gt 0 ] && { $dry_run || "$python" -c 'import pytest' 2>/dev/null; }; then
    part tests 150 "$python" -m pytest -q -o addopts= -p no:cacheprovider --import-mode=importlib -m gpu \
        ${collecting[@]+"${collecting[@]}"} "${tests[@]}"
fi
part bench_search 180 "${memorizing[@]}" bench search "--shapes=$shapes" --rounds=$rounds \
    ${searching[@]+"${searching[@]}"} "--json=$out/bench_search.json"
$small || part bench_mosaic 120 "${memorizing[@]}" bench search "--shapes=$shapes" --rounds=$rounds --searches=pallas \
    --gin_param "Pallas.gpu_kernel = 'mosaic'" "--json=$out/bench_mosaic.json"
part bench_step 180 "${memorizing[@]}" bench step "${stepping[@]}" "--memory_size=$sizes" --rounds=$rounds \
    "--json=$out/bench_step.json"
if [ -n "$data" ]; then
    training=(--gin_file=configs/base.gin --gin_param "DATA = '$data'" --gin_param 'BATCH_SIZE = 8')
    training+=(--gin_param 'NUM_STEPS = 160' --gin_param 'CHECKPOINT_EVERY = 80')
else
    training=(--gin_file=configs/recall.gin --gin_param "DATA = '$out/tokens'")
    training+=(--gin_param "NUM_STEPS = $steps" --gin_param "CHECKPOINT_EVERY = $((steps / 2))")
    part prepare 60 "${memorizing[@]}" prepare --gin_file=configs/recall.gin \
        --gin_param "Recall.documents = $documents" "--out=$out/tokens"
fi
part train 150 "${memorizing[@]}" train "${training[@]}" "--workdir=$out/run"
part evaluate 100 "${memorizing[@]}" evaluate "--workdir=$out/run" "--memory_size=0,$([ -n "$data" ] && echo 8192 || echo 2048)"

if $dry_run; then
    run "$python" -m memorizing.benchmarks.gpu_check collect "--out=$out"
else
    "$python" -m memorizing.benchmarks.gpu_check collect "--out=$out"
fi
