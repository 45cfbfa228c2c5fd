#!/usr/bin/env bash
# Trains with several processes on this machine. jax.distributed joins them, as it joins the hosts of a pod.
#
#   bash launch/local_multiprocess.sh --gin_file=configs/quickstart.gin --workdir=runs/two
#
# Options (all others go to `memorizing train`):
#   --processes=N      number of processes; default: 2
#   --cpu_devices=D    runs on the CPU, with D simulated devices per process
#   --gpus             runs on GPUs, process I on GPU I
#   --wait=SECONDS     time after a failure until the other processes are killed; default: 100
#   --dry_run          prints the commands without running them
#
# Each line of output starts with its process, [0] or [1]. SIGTERM and SIGINT reach all processes as SIGTERM: they save a
# checkpoint and end with status 75, "run the same command again". The exit status is 0 if all processes ended with 0;
# otherwise it is that of the process that failed first. MEMORIZING=COMMAND replaces the command `memorizing`.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/common.sh
source launch/common.sh

processes=2 cpu_devices='' gpus=false patience=100 training=()
for word in "$@"; do
    check_spelling "$word"
    case "$word" in
    -h | --help) print_header "${BASH_SOURCE[0]}" && exit ;;
    --dry_run) dry_run=true ;;
    --processes=*) processes=${word#*=} ;;
    --cpu_devices=*) cpu_devices=${word#*=} ;;
    --gpus) gpus=true ;;
    --wait=*) patience=${word#*=} ;;
    --coordinator* | --process | --process=*) fail "$word: this script sets it for each process. Leave it out" ;;
    *) training+=("$word") ;;
    esac
done
require_whole --processes "$processes" 1
require_whole --wait "$patience" 0
[ -z "$cpu_devices" ] || require_whole --cpu_devices "$cpu_devices" 1
[ -z "$cpu_devices" ] || ! $gpus || fail "--cpu_devices=$cpu_devices with --gpus: devices are either. Give one of the two"
has_option --workdir ${training[@]+"${training[@]}"} || fail "--workdir is missing. All processes share one: add --workdir=DIR"

in_use() { (: <"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }
port=$((20000 + RANDOM % 10000)) # below the range of ephemeral ports
while in_use "$port"; do port=$((20000 + RANDOM % 10000)); done

$dry_run || enter_environment
read -ra memorizing <<<"${MEMORIZING:-memorizing}"

set_command() { # process: sets the array `command`
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
    for ((i = 0; i < processes; i++)); do set_command "$i" && run "${command[@]}"; done
    exit
fi

pipes=$(mktemp -d)
pids=() printers=()
# Background processes of a script ignore SIGINT, so both signals are passed on as SIGTERM.
# shellcheck disable=SC2329 # called by the traps
forward() {
    say "SIG$1: passed on to all processes as SIGTERM"
    kill -TERM "${pids[@]}" 2>/dev/null || true
}
trap 'rm -rf "$pipes"' EXIT
trap 'forward TERM' TERM
trap 'forward INT' INT

for ((i = 0; i < processes; i++)); do
    set_command "$i"
    mkfifo "$pipes/$i"
    sed -u -e "/\[Gloo\] Rank/d" -e "s/^/[$i] /" <"$pipes/$i" & # Gloo logs each connection
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
            [ "$running" = 0 ] || say "process $i ended with status $status; the others have $patience s to end"
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
# Wait for the end of the output, but not forever: a grandchild that outlived its process may hold the pipe open.
for _ in {1..20}; do
    kill -0 "${printers[@]}" 2>/dev/null || break
    sleep 0.1
done
kill "${printers[@]}" 2>/dev/null || true
say "processes ended with status ${ended[*]}"
exit "${first:-0}"
