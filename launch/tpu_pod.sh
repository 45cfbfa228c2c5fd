#!/usr/bin/env bash
# Trains on a Cloud TPU slice: creates it or reuses it, sends this tree at its commit, installs, runs the command on all
# workers, follows the log, and goes on after preemption, on a new slice if need be, until the training is done.
#
#   bash launch/tpu_pod.sh run NAME --zone=ZONE --type=v5p-128 -- --gin_file=... --workdir=gs://BUCKET/RUN
#   bash launch/tpu_pod.sh logs NAME --zone=ZONE       the log of worker 0 as it grows (--worker=N or all)
#   bash launch/tpu_pod.sh status NAME --zone=ZONE     of the slice, and of the training on each worker
#   bash launch/tpu_pod.sh stop NAME --zone=ZONE       the training saves a checkpoint and ends; first stop a `run`, or it goes on
#   bash launch/tpu_pod.sh delete NAME --zone=ZONE     deletes the slice; with --queued its request too
#
#   --type=TYPE        accelerator type, as in `gcloud compute tpus accelerator-types list`: v4-32, v5litepod-64, v6e-64, ...
#   --image=IMAGE      image of the workers, if not the usual one for the type
#   --queued           asks by a queued resource, which waits until there is capacity
#   --spot, --reserved, --project=ID     as of gcloud
#   --dry_run          prints the commands as they follow each other for a slice not there yet, if nothing goes wrong and
#                      nothing has to be waited for, and runs none
#
# The training runs detached on the workers: interrupting this script ends neither it nor the slice, and the same command
# finds it again. 75 as its exit status means "run me again". What goes on after preemption lies in --workdir, in a bucket.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/common.sh
source launch/common.sh

action=${1:-} name=${2:-} zone='' type='' image='' queued=false worker=0 project=() capacity=() training=()
case "$action" in
-h | --help) print_header "${BASH_SOURCE[0]}" && exit ;;
run | logs | status | stop | delete) ;;
*) fail "${action:-nothing}: must be run, logs, status, stop or delete (--help tells more)" ;;
esac
[[ "$name" =~ ^[a-z][a-z0-9-]*$ ]] || fail "$action ${name:-without a name}: second comes the slice's name, of a-z, 0-9 and -"
shift 2
while [ $# -gt 0 ]; do
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
    *) fail "$1: is not known here; what \`memorizing train\` is to get comes after --" ;;
    esac
    shift
done
[ -n "$zone" ] || fail "--zone is missing: where is the slice, or where is it to be? (--zone=us-east5-a)"
where=("--zone=$zone" ${project[@]+"${project[@]}"})

if [ "$action" = run ]; then
    [ -n "$type" ] || fail "--type is missing: which slice? (--type=v5p-128)"
    workdir=$(printf '%s\n' "${training[@]+"${training[@]}"}" | sed -n 's/^--workdir=//p')
    case "$workdir" in gs://?*) ;; *) fail "--workdir=$workdir: must be gs://..., or preemption loses it; it comes after --" ;; esac
    case "${image:=auto},$type" in
    auto,v6e-*) image=v2-alpha-tpuv6e ;;
    auto,v5p-*) image=v2-alpha-tpuv5 ;;
    auto,v5litepod-*) image=v2-alpha-tpuv5-lite ;;
    auto,v[234]-*) image=tpu-ubuntu2204-base ;;
    auto,*) fail "--type=$type: which image its workers need is not known here; add --image=IMAGE" ;;
    esac
fi

failures=0 started=false # whether what the workers tell is of this command, and not of one before
tpu() { run gcloud compute tpus "$@" "${where[@]}"; }
on_workers() { tpu tpu-vm ssh "$name" "--worker=${2:-all}" "--command=$1"; }
ask="if [ -d memorizing ]; then bash memorizing/launch/tpu_worker.sh status; else echo none; fi"
ask_state() { tpu "$1" describe "$name" "--format=value($2)"; }
slice=(tpu-vm state) request=(queued-resources state.state)
describe() { # MISSING where there is none; a state that nobody knows where gcloud cannot tell
    local told
    if told=$(ask_state "$@" 2>&1); then
        tail -n 1 <<<"$told"
    else
        case "$told" in *NOT_FOUND* | *"not found"*) echo MISSING ;; *) say "$told" && echo UNKNOWN ;; esac
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
make_ready() { # returns once the slice is there
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
unpack='mkdir -p memorizing && cd memorizing && rm -rf ./* && tar -xzf ../memorizing.tar.gz' # but keeps .venv
start() { # sends the tree, installs, and starts the training on all workers
    local archive
    archive=${TMPDIR:-/tmp}/memorizing-$(git rev-parse --short HEAD).tar.gz
    [ -z "$(git status --porcelain)" ] || say "what is not committed is not sent"
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
    told=$(on_workers "$ask" | sort -u | tr '\n' ' ') || told=unreachable
    case " $told" in
    *unreachable*) sleep 30 && continue ;; # or just gone, which make_ready sees
    *' running '*)
        started=true
        follow || true
        continue
        ;;
    *' 75 '* | *' lost '* | *' none '*) ;; # again
    *)
        if $started && [ "$told" = "0 " ]; then
            say "$name: done; delete the slice with: bash launch/tpu_pod.sh delete $name ${where[*]}"
            exit
        elif $started; then
            sleep 60 # a preempted host takes the others with it, and the slice's state may tell so only later
            [ "$(describe "${slice[@]}")" = READY ] || continue
            say "$name: the workers ended with status $told(bash launch/tpu_pod.sh logs $name ${where[*]})"
            told=${told% } && exit "${told##* }"
        fi
        ;;
    esac
    if start; then
        started=true failures=0
        follow || true # how it ended is asked next: a broken connection looks like a failure
    else # a slice may be preempted while it installs, but an error that stays is for a person
        failures=$((failures + 1))
        [ "$failures" -lt 5 ] || fail "$name: the training could not be started, five times in a row"
        sleep 30
    fi
done
