#!/usr/bin/env bash
# Runs on each worker of a slice, started by launch/tpu_pod.sh. The training survives a lost connection.
#
#   bash launch/tpu_worker.sh install     installs the environment with JAX for TPUs
#   bash launch/tpu_worker.sh start --gin_file=... --workdir=gs://...    trains in the background, unless it already runs
#   bash launch/tpu_worker.sh follow      follows the log until the training ends, and exits with its status
#   bash launch/tpu_worker.sh status      prints running, the exit status, lost (ended without a status, such as by a reboot) or none
#   bash launch/tpu_worker.sh stop        asks it to save a checkpoint and end (SIGTERM)
#
# Log, process id and exit status are in ~/memorizing-run (RUN=DIR). MEMORIZING=COMMAND replaces the command `memorizing`.

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
    elif grep -qs train "/proc/$(cat "$state/pid")/cmdline"; then # not another process with this id after a reboot
        echo running
    else
        echo lost
    fi
}

case "${1:-}" in
-h | --help) print_header "${BASH_SOURCE[0]}" ;;
install)
    # The workers' own Python may be too old and may lack venv: uv installs another.
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
    # The shell that waits for the exit status must survive SIGHUP. It renames the status file into place, so that no
    # reader sees half of it.
    # shellcheck disable=SC2016 # expanded by the inner shell
    nohup setsid bash -c 'state=$1; shift; "$@" & echo $! >"$state/pid"; wait $! && s=0 || s=$?
        echo $s >"$state/status.new"; mv "$state/status.new" "$state/status"' \
        - "$state" "${memorizing[@]}" train "${@:2}" >"$state/log" 2>&1 </dev/null &
    until [ -s "$state/pid" ]; do sleep 0.1; done
    ;;
follow)
    [ "$(status)" != none ] || fail "nothing was started here. Use bash launch/tpu_worker.sh start ..."
    tail -n +1 -F "$state/log" --pid="$(cat "$state/pid")" 2>/dev/null
    # the status is written shortly after the process ends
    for _ in {1..50}; do [ -f "$state/status" ] || sleep 0.1; done
    result=$(status)
    [[ "$result" =~ ^[0-9]+$ ]] && exit "$result"
    fail "the training ended without a status ($result)"
    ;;
status) status ;;
stop) [ "$(status)" != running ] || kill -TERM "$(cat "$state/pid")" ;;
*) fail "${1:-nothing}: must be install, start, follow, status or stop" ;;
esac
