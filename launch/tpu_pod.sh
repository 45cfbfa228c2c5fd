#!/usr/bin/env bash
# Trains on a Cloud TPU slice. It creates or reuses the slice, sends this tree at its commit, installs, trains on all
# workers and follows the log. After a preemption it resumes, on a new slice if necessary, until the training is done.
#
#   bash launch/tpu_pod.sh run NAME --zone=ZONE --type=v5p-128 -- --gin_file=... --workdir=gs://BUCKET/RUN
#   bash launch/tpu_pod.sh logs NAME --zone=ZONE       follows the log of worker 0 (--worker=N or all)
#   bash launch/tpu_pod.sh status NAME --zone=ZONE     prints the state of the slice and of each worker's training
#   bash launch/tpu_pod.sh stop NAME --zone=ZONE       saves a checkpoint and ends; interrupt `run` first, or it restarts
#   bash launch/tpu_pod.sh delete NAME --zone=ZONE     deletes the slice; with --queued also its request
#
#   --type=TYPE        accelerator type as listed by `gcloud compute tpus accelerator-types list`: v4-32, v5litepod-64, v6e-64, ...
#   --image=IMAGE      runtime image of the workers; default: the usual one for the type
#   --queued           requests a queued resource, which waits for capacity
#   --spot, --reserved, --project=ID     passed on to gcloud
#   --dry_run          prints the commands for a new slice, in order and without errors or waiting, and runs none
#
# The training runs detached on the workers: interrupting this script stops neither it nor the slice, and the same command
# finds it again. Its exit status 75 means "run the same command again". It resumes from --workdir, which is in a bucket.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/common.sh
source launch/common.sh

action=${1:-} name=${2:-} zone='' type='' image='' queued=false worker=0 project=() capacity=() training=()
case "$action" in
-h | --help) print_header "${BASH_SOURCE[0]}" && exit ;;
run | logs | status | stop | delete) ;;
*) fail "${action:-nothing}: must be run, logs, status, stop or delete (see --help)" ;;
esac
[[ "$name" =~ ^[a-z][a-z0-9-]*$ ]] || fail "$action ${name:-without a name}: the second argument must be the slice's name: letters a-z, digits and hyphens"
shift 2
while [ $# -gt 0 ]; do
    check_spelling "$1"
    case "$1" in
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --image=*) image=${1#*=} ;;
    --project=*) project=("$1") ;;
    --worker=*) worker=${1#*=} ;;
    --spot | --reserved) capacity+=("$1") ;;
    --queued) queued=true ;;
    --dry_run) dry_run=true ;;
    --) training=("${@:2}") && break ;;
    *) fail "$1: unknown option. Options of \`memorizing train\` come after --" ;;
    esac
    shift
done
[ -n "$zone" ] || fail "--zone is missing. Give the slice's zone, such as --zone=us-east5-a"
where=("--zone=$zone" ${project[@]+"${project[@]}"})

if [ "$action" = run ]; then
    [ -n "$type" ] || fail "--type is missing. Give the accelerator type, such as --type=v5p-128"
    workdir=$(printf '%s\n' "${training[@]+"${training[@]}"}" | sed -n 's/^--workdir=//p')
    case "$workdir" in gs://?*) ;; *) fail "--workdir=$workdir: must be gs://..., since a preemption loses the workers' disks. Add it after --" ;; esac
    case "${image:=auto},$type" in
    auto,v6e-*) image=v2-alpha-tpuv6e ;;
    auto,v5p-*) image=v2-alpha-tpuv5 ;;
    auto,v5litepod-*) image=v2-alpha-tpuv5-lite ;;
    auto,v[234]-*) image=tpu-ubuntu2204-base ;;
    auto,*) fail "--type=$type: its runtime image is not known. Add --image=IMAGE" ;;
    esac
fi

failures=0 started=false # whether the workers' status is of this command, not of an earlier one
tpu() { run gcloud compute tpus "$@" "${where[@]}"; }
on_workers() { tpu tpu-vm ssh "$name" "--worker=${2:-all}" "--command=$1"; }
ask="if [ -d memorizing ]; then bash memorizing/launch/tpu_worker.sh status; else echo none; fi"
ask_state() { tpu "$1" describe "$name" "--format=value($2)"; }
slice=(tpu-vm state) request=(queued-resources state.state)
describe() { # prints the state, MISSING if there is no slice, UNKNOWN if gcloud failed
    local answer
    if answer=$(ask_state "$@" 2>&1); then
        tail -n 1 <<<"$answer"
    else
        case "$answer" in *NOT_FOUND* | *"not found"*) echo MISSING ;; *) say "$answer" && echo UNKNOWN ;; esac
    fi
}
create() {
    if $queued; then
        tpu queued-resources create "$name" "--node-id=$name" "--accelerator-type=$type" "--runtime-version=$image" \
            ${capacity[@]+"${capacity[@]}"}
    else
        tpu tpu-vm create "$name" "--accelerator-type=$type" "--version=$image" ${capacity[@]+"${capacity[@]}"}
    fi
}
delete() { if $queued; then tpu queued-resources delete "$name" --force --quiet; else tpu tpu-vm delete "$name" --quiet; fi; }
make_ready() { # returns when the slice is ready
    local state
    while state=$(describe "${slice[@]}") && [ "$state" != READY ]; do
        [ "$state" != MISSING ] || ! $queued || state=$(describe "${request[@]}")
        say "$name: $state"
        case "$state" in
        MISSING) create || { $started || fail "$name could not be created; --queued waits for capacity" && sleep 60; } ;;
        PREEMPTED | TERMINATED | SUSPENDED | FAILED) delete || sleep 30 ;;
        *) sleep 30 ;;
        esac
    done
}
unpack='mkdir -p memorizing && cd memorizing && rm -rf ./* && tar -xzf ../memorizing.tar.gz' # keeps .venv
start() { # sends the tree, installs, and starts the training on all workers
    local archive
    archive=${TMPDIR:-/tmp}/memorizing-$(git rev-parse --short HEAD).tar.gz
    [ -z "$(git status --porcelain)" ] || say "uncommitted changes are not sent"
    run git archive --format=tar.gz "--output=$archive" HEAD &&
        tpu tpu-vm scp "$archive" "$name:memorizing.tar.gz" --worker=all &&
        on_workers "$unpack && bash launch/tpu_worker.sh install" &&
        on_workers "bash memorizing/launch/tpu_worker.sh start $(shell_quoted "${training[@]}")"
}
follow() { on_workers "bash memorizing/launch/tpu_worker.sh follow"; }

case "$action" in
logs) on_workers 'tail -n 100 -F memorizing-run/log' "$worker" && exit ;;
status) ask_state "${slice[@]}" && on_workers "$ask" && exit ;;
stop) on_workers 'bash memorizing/launch/tpu_worker.sh stop' && exit ;;
delete) delete && exit ;;
esac

if $dry_run; then
    ask_state "${slice[@]}"
    if $queued; then ask_state "${request[@]}"; fi
    create && ask_state "${slice[@]}" && on_workers "$ask"
    start && follow
    ask_state "${slice[@]}" && on_workers "$ask"
    exit
fi

while :; do
    make_ready
    statuses=$(on_workers "$ask" | sort -u | tr '\n' ' ') || statuses=unreachable
    case " $statuses" in
    *unreachable*) sleep 30 && continue ;; # or deleted, which make_ready detects
    *' running '*)
        started=true
        follow || true
        continue
        ;;
    *' 75 '* | *' lost '* | *' none '*) ;; # again
    *)
        if $started && [ "$statuses" = "0 " ]; then
            say "$name: done; delete the slice with: bash launch/tpu_pod.sh delete $name ${where[*]}"
            exit
        elif $started; then
            sleep 60 # a preempted host stops the others, and the slice's state may show it only later
            [ "$(describe "${slice[@]}")" = READY ] || continue
            say "$name: the workers ended with status $statuses(bash launch/tpu_pod.sh logs $name ${where[*]})"
            statuses=${statuses% } && exit "${statuses##* }"
        fi
        ;;
    esac
    if start; then
        started=true failures=0
        follow || true # a broken connection looks like a failure, so the status is asked next
    else # a slice may be preempted during installation; a lasting error needs a person
        failures=$((failures + 1))
        [ "$failures" -lt 5 ] || fail "$name: the training could not be started, five times in a row"
        sleep 30
    fi
done
