#!/usr/bin/env bash
# What launch/tpu_pod.sh runs on each worker of a slice: training that goes on when the connection does not.
#
#   bash launch/tpu_worker.sh install     the environment, with JAX for TPUs
#   bash launch/tpu_worker.sh start --gin_file=... --workdir=gs://...    trains in the background, unless it already does
#   bash launch/tpu_worker.sh follow      prints the log as it grows, until the training ends, and exits as it did
#   bash launch/tpu_worker.sh status      "running", the exit status, "lost" (ended without one, as by a reboot) or "none"
#   bash launch/tpu_worker.sh stop        asks it to save and end (SIGTERM)
#
# Log, process id and exit status lie in ~/memorizing-run (RUN=DIR). MEMORIZING=COMMAND names another command.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/common.sh
source launch/common.sh

state=${RUN:-$HOME/memorizing-run}
status() {
    if [ -f "$state/status" ]; then
        cat "$state/status"
    elif [ ! -f "$state/pid" ]; then
        echo none
    elif grep -qs train "/proc/$(cat "$state/pid")/cmdline"; then # and not another process with this id, after a reboot
        echo running
    else
        echo lost
    fi
}

case "${1:-}" in
-h | --help) print_header "${BASH_SOURCE[0]}" ;;
install)
    # The workers' own Python may be too old, and may lack venv: uv brings another.
    PATH="$PATH:$HOME/.local/bin"
    [ -n "${MEMORIZING:-}" ] || command -v uv >/dev/null || python3 -m pip install -q --user uv || true
    ACCELERATOR=tpu enter_environment
    ;;
start)
    [ "$(status)" != running ] || exit 0
    PATH="$PWD/.venv/bin:$PATH"
    mkdir -p "$state"
    rm -f "$state/status" "$state/pid"
    [ ! -f "$state/log" ] || mv "$state/log" "$state/log.previous"
    read -ra memorizing <<<"${MEMORIZING:-memorizing}"
    # The child that waits for the exit status must outlive SIGHUP; the status is written under another name first, so
    # that it is never read half.
    # shellcheck disable=SC2016 # expanded by the inner shell
    nohup setsid bash -c 'state=$1; shift; "$@" & echo $! >"$state/pid"; wait $! && s=0 || s=$?
        echo $s >"$state/status.new"; mv "$state/status.new" "$state/status"' \
        - "$state" "${memorizing[@]}" train "${@:2}" >"$state/log" 2>&1 </dev/null &
    until [ -s "$state/pid" ]; do sleep 0.1; done
    ;;
follow)
    [ "$(status)" != none ] || fail "nothing was started here: bash launch/tpu_worker.sh start ..."
    tail -n +1 -F "$state/log" --pid="$(cat "$state/pid")" 2>/dev/null
    # between the end of the process and its status
    for _ in {1..50}; do [ -f "$state/status" ] || sleep 0.1; done
    told=$(status)
    [[ "$told" =~ ^[0-9]+$ ]] && exit "$told"
    fail "the training ended without a status ($told)"
    ;;
status) status ;;
stop) [ "$(status)" != running ] || kill -TERM "$(cat "$state/pid")" ;;
*) fail "${1:-nothing}: must be install, start, follow, status or stop" ;;
esac
