#!/usr/bin/env bash
# Trains on Google Kubernetes Engine, on TPUs or GPUs. It fills in launch/jobset.yaml and passes it to kubectl.
#
#   bash launch/gke.sh apply NAME --image=IMAGE --tpu=tpu-v5p-slice --topology=4x4x4 -- --gin_file=... --workdir=gs://...
#   bash launch/gke.sh apply NAME --image=IMAGE --gpu=nvidia-h100-80gb --pods=4 --chips=8 -- --gin_file=... --workdir=gs://...
#   bash launch/gke.sh print ...    prints the manifest
#   bash launch/gke.sh xpk ...      prints an equivalent command of xpk
#   bash launch/gke.sh logs NAME    follows the log of the first process
#   bash launch/gke.sh status NAME, bash launch/gke.sh delete NAME
#
#   --tpu=LABEL --topology=AxBxC    values of GKE's node labels gke-tpu-accelerator and gke-tpu-topology
#   --gpu=LABEL --pods=N            value of the node label gke-accelerator, and number of hosts
#   --chips=N            TPU chips or GPUs per pod, which has a host to itself; default: 4 TPU chips, 8 GPUs
#   --slices=N           number of TPU slices (Multislice training); default: 1
#   --bucket=B           short for --workdir=gs://B/NAME
#   --spot               uses spot nodes
#   --max_restarts=N     number of restarts after failures; a preemption does not count; default: 10
#   --service_account=S  Kubernetes service account with access to the bucket; default: default
#   --dry_run            prints the commands without running them
#
# The image: git archive HEAD | docker build -f launch/Dockerfile --build-arg ACCELERATOR=tpu -t IMAGE -

set -euo pipefail
words=("$@")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/common.sh
source launch/common.sh

action=${1:-} name=${2:-} image='' tpu='' topology='' gpu='' pods='' chips='' slices=1 bucket='' spot=false
max_restarts=10 service_account=default training=()
case "$action" in
-h | --help) print_header "${BASH_SOURCE[0]}" && exit ;;
apply | print | xpk | logs | status | delete) ;;
*) fail "${action:-nothing}: must be apply, print, xpk, logs, status or delete (see --help)" ;;
esac
# Pods are called NAME-workers-0-0-xxxxx, of at most 63 characters.
[[ "$name" =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] || fail "$action ${name:-without a name}: the second argument must be a name of at most 40 letters a-z, digits and hyphens"
shift 2
while [ $# -gt 0 ]; do
    check_spelling "$1"
    case "$1" in
    --image=* | --tpu=* | --topology=* | --gpu=* | --pods=* | --chips=* | --slices=* | --bucket=* | --max_restarts=* | --service_account=*)
        option=${1%%=*} && printf -v "${option#--}" '%s' "${1#*=}"
        ;;
    --spot) spot=true ;;
    --dry_run) dry_run=true ;;
    --) training=("${@:2}") && break ;;
    *) fail "$1: unknown option. Options of \`memorizing train\` come after --" ;;
    esac
    shift
done

case "$action" in
logs) run kubectl logs --follow --selector="jobset.sigs.k8s.io/jobset-name=$name,batch.kubernetes.io/job-completion-index=0" && exit ;;
status) run kubectl get jobset "$name" && run kubectl get pods --selector="jobset.sigs.k8s.io/jobset-name=$name" && exit ;;
delete) run kubectl delete jobset "$name" && exit ;;
esac

[ -n "$image" ] || fail "--image is missing. Build an image of this tree with launch/Dockerfile"
if [ -n "$tpu" ] && [ -z "$gpu" ]; then
    [[ "$topology" =~ ^[0-9]+x[0-9]+(x[0-9]+)?$ ]] || fail "--topology=$topology: must be the topology of the node pool, such as 4x4x4 or 8x8"
    require_whole --chips "${chips:=4}" 1
    total=$((${topology//x/*}))
    [ $((total % chips)) = 0 ] || fail "--chips=$chips: --topology=$topology has $total chips, which is not a multiple of $chips"
    [ -z "$pods" ] || [ "$pods" = $((total / chips)) ] || fail "--pods=$pods: --topology=$topology is $((total / chips)) hosts of $chips"
    pods=$((total / chips))
elif [ -n "$gpu" ] && [ -z "$tpu" ]; then
    require_whole --pods "${pods:=1}" 1
    require_whole --chips "${chips:=8}" 1
    [ "$slices" = 1 ] || fail "--slices=$slices: slices are for TPUs. For GPUs use --pods"
else
    fail "--tpu=$tpu --gpu=$gpu: name exactly one of the two"
fi
require_whole --slices "$slices" 1
require_whole --max_restarts "$max_restarts" 0
[ -z "$bucket" ] || training+=("--workdir=gs://${bucket#gs://}/$name")
has_option --workdir ${training[@]+"${training[@]}"} || fail "--workdir is missing. Add --workdir=gs://... after --, or --bucket=B"
case " ${training[*]}" in *" --workdir=gs://"?*) ;; *) fail "--workdir: must be gs://..., because a pod's own disk is lost with it" ;; esac

quoted() { # prints a JSON string, which is also YAML
    local text=${1//\\/\\\\}
    text=${text//\"/\\\"}
    text=${text//$'\n'/\\n}
    printf '"%s"' "${text//$'\t'/\\t}"
}
selector() { # key value ...: prints a JSON mapping
    local comma=''
    printf '{'
    while [ $# -gt 0 ]; do printf '%s%s: %s' "$comma" "$(quoted "$1")" "$(quoted "$2")" && comma=', ' && shift 2; done
    printf '}'
}

nodes=() annotations=() processes=()
if [ -n "$tpu" ]; then # GKE tells each pod its place in the slice
    resource=google.com/tpu
    nodes=(cloud.google.com/gke-tpu-accelerator "$tpu" cloud.google.com/gke-tpu-topology "$topology")
    annotations=(alpha.jobset.sigs.k8s.io/exclusive-topology cloud.google.com/gke-nodepool)
else # with flags: JAX's own detection needs the Kubernetes API, which pods may not use
    resource=nvidia.com/gpu
    nodes=(cloud.google.com/gke-accelerator "$gpu")
    processes=("--coordinator=$name-workers-0-0.$name:8482" "--processes=$pods" "--process=\$(JOB_COMPLETION_INDEX)")
fi
if $spot; then nodes+=(cloud.google.com/gke-spot true); fi

manifest() {
    local text arguments='' word
    for word in train "${training[@]}"; do
        word=${word//"\$("/"\$\$("} # Kubernetes would expand $(X)
        arguments+=", $(quoted "$word")"
    done
    for word in ${processes[@]+"${processes[@]}"}; do arguments+=", $(quoted "$word")"; done
    text=$(cat launch/jobset.yaml)
    fill() { text=${text//"\${$1}"/"$2"}; }
    fill NAME "$name"
    fill IMAGE "$(quoted "$image")"
    fill ANNOTATIONS "$(selector ${annotations[@]+"${annotations[@]}"})"
    fill MAX_RESTARTS "$max_restarts"
    fill SLICES "$slices"
    fill PODS "$pods"
    fill SERVICE_ACCOUNT "$(quoted "$service_account")"
    fill NODE_SELECTOR "$(selector "${nodes[@]}")"
    fill RESOURCES "$(selector "$resource" "$chips")"
    fill ARGUMENTS "[${arguments#, }]" # last, since it may contain any text
    printf '%s\n' "$text"
}

case "$action" in
print) manifest ;;
apply)
    if $dry_run; then
        here=()
        for word in "${words[@]:1}"; do [ "$word" = --dry_run ] || here+=("$word"); done
        printf '%s | kubectl apply -f -\n' "$(shell_quoted bash launch/gke.sh print "${here[@]}")"
    else
        manifest | kubectl apply -f -
    fi
    ;;
xpk)
    case "$tpu" in # xpk counts cores, two per chip, up to v5p; then chips
    tpu-v4-podslice) type=v4-$((2 * total)) ;;
    tpu-v5p-slice) type=v5p-$((2 * total)) ;;
    tpu-v5-lite-podslice) type=v5litepod-$total ;;
    tpu-v6e-slice) type=v6e-$total ;;
    *) fail "--tpu=$tpu: xpk has no known name for it. Use apply instead" ;;
    esac
    if $spot; then xpk=(--spot); else xpk=(); fi
    dry_run=true # only printed; with xpk all restarts count towards --max-restarts
    run xpk workload create "--workload=$name" "--tpu-type=$type" "--num-slices=$slices" "--docker-image=$image" \
        --restart-on-exit-codes=75 "--max-restarts=$max_restarts" --termination-grace-period-seconds=120 \
        ${xpk[@]+"${xpk[@]}"} "--command=$(shell_quoted memorizing train "${training[@]}")"
    ;;
esac
