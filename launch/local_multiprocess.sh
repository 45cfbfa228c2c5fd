#!/usr/bin/env bash
# Trains with several processes on this machine, joined by jax.distributed, as the hosts of a pod are.
#
#   bash launch/local_multiprocess.sh --gin_file=configs/quickstart.gin --workdir=runs/two
#
# What it does not know goes to `memorizing train`. Its own options:
#   --processes=N      how many (2)
#   --cpu_devices=D    on CPU, each process with D devices that XLA makes up
#   --gpus             on GPUs, process I on GPU I
#   --wait=SECONDS     how long the others may go on once a process has failed (100), before they are killed
#   --dry_run          prints the commands, and runs none
#
# Each line of output is prefixed by its process, [0] or [1]. SIGTERM and SIGINT reach all processes as SIGTERM: they save a
# checkpoint and end with 75, "run the same command again". The exit status is 0 if all ended with 0, else that of the
# process that failed first. MEMORIZING=COMMAND names another command than `memorizing`.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/common.sh
source launch/common.sh

processes=2 cpu_devices='' gpus=false patience=100 training=()
for word in "$@"; do
    case "$word" in
    -h | --help) print_header "${BASH_SOURCE[0]}" && exit ;;
    --dry_run) dry_run=true ;;
    --processes=*) processes=${word#*=} ;;
    --cpu_devices=*) cpu_devices=${word#*=} ;;
    --gpus) gpus=true ;;
    --wait=*) patience=${word#*=} ;;
    --coordinator* | --process | --process=*) fail "$word: is set for each process by this script; leave it out" ;;
    *) training+=("$word") ;;
    esac
done
require_whole --processes "$processes" 1
require_whole --wait "$patience" 0
[ -z "$cpu_devices" ] || require_whole --cpu_devices "$cpu_devices" 1
[ -z "$cpu_devices" ] || ! $gpus || fail "--cpu_devices=$cpu_devices with --gpus: give one of the two"
has_option --workdir ${training[@]+"${training[@]}"} || fail "--workdir is missing: all processes need the same --workdir=DIR"

in_use() { (: <"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }
port=$((20000 + RANDOM % 10000)) # below the ports that systems hand out by themselves
while in_use "$port"; do port=$((20000 + RANDOM % 10000)); done

$dry_run || enter_environment
read -ra memorizing <<<"${MEMORIZING:-memorizing}"

command_of() { # process: sets `command`
    command=()
    if [ -n "$cpu_devices" ]; then
        flags="${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$cpu_devices"
        command=(env JAX_PLATFORMS=cpu "XLA_FLAGS=$flags")
    fi
    if $gpus; then command=(env "CUDA_VISIBLE_DEVICES=$1"); fi
    command+=("${memorizing[@]}" train "${training[@]}"
        "--coordinator=127.0.0.1:$port" "--processes=$processes" "--process=$1")
}

if $dry_run; then
    for ((i = 0; i < processes; i++)); do command_of "$i" && run "${command[@]}"; done
    exit
fi

pipes=$(mktemp -d)
pids=() printers=()
# Background processes of a script ignore SIGINT, so SIGTERM is what all of them understand.
# shellcheck disable=SC2329 # called by the traps
forward() {
    say "SIG$1: passed on to all processes as SIGTERM"
    kill -TERM "${pids[@]}" 2>/dev/null || true
}
trap 'rm -rf "$pipes"' EXIT
trap 'forward TERM' TERM
trap 'forward INT' INT

for ((i = 0; i < processes; i++)); do
    command_of "$i"
    mkfifo "$pipes/$i"
    sed -u -e "/\[Gloo\] Rank/d" -e "s/^/[$i] /" <"$pipes/$i" & # Gloo reports each connection
    printers+=($!)
    "${command[@]}" >"$pipes/$i" 2>&1 &
    pids+=($!)
done

running=$processes first='' deadline='' ended=()
while [ "$running" -gt 0 ]; do
    for ((i = 0; i < processes; i++)); do
        if [ -n "${ended[i]:-}" ] || kill -0 "${pids[i]}" 2>/dev/null; then continue; fi
        status=0
        wait "${pids[i]}" 2>/dev/null || status=$?
        ended[i]=$status running=$((running - 1))
        if [ "$status" != 0 ] && [ -z "$first" ]; then
            first=$status deadline=$((SECONDS + patience))
            [ "$running" = 0 ] || say "process $i ended with status $status; the others have $patience s to notice"
        fi
    done
    if [ -n "$deadline" ] && [ "$SECONDS" -ge "$deadline" ] && [ "$running" -gt 0 ]; then
        deadline=''
        for ((i = 0; i < processes; i++)); do
            [ -z "${ended[i]:-}" ] || continue
            say "process $i is killed"
            kill -KILL "${pids[i]}" 2>/dev/null || true
        done
    fi
    [ "$running" = 0 ] || sleep 0.1
done
# The end of the output: a child that outlived its process may hold its pipe open, so this is not waited for without end.
for _ in {1..20}; do
    kill -0 "${printers[@]}" 2>/dev/null || break
    sleep 0.1
done
kill "${printers[@]}" 2>/dev/null || true
say "processes ended with status ${ended[*]}"
exit "${first:-0}"
