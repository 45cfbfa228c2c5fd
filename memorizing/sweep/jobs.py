"""Writes jobs for clusters, one for each point: a SLURM array, or workloads of xpk.

The array's script only names the sweep; launch/slurm.sbatch does the work. Workloads train and evaluate directly, so
that a point may have many hosts; `--collect` finds their results.
"""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from memorizing.errors import InputError
from memorizing.files import AnyPath
from memorizing.sweep.points import Plan

SLURM = """\
#!/usr/bin/env bash
# The {points} points of a sweep as an array of SLURM, each requeued until it is done. Options of the command line win:
#
#   sbatch [--array=0,3] [--nodes=1 --ntasks-per-node=4 --gpus-per-node=4] {path}
#   {collect}

#SBATCH --job-name={name}
#SBATCH --array=0-{last}
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.log

set -euo pipefail
export SLURM_SUBMIT_DIR={tree}
exec bash {tree}/launch/slurm.sbatch sweep {arguments} "$@"
"""

XPK = """\
#!/usr/bin/env bash
# The {points} points of a sweep as workloads of xpk: trained, then evaluated; started again after 75 ("run me again").
#
#   TPU_TYPE=v5p-128 IMAGE=IMAGE bash xpk.sh [--cluster=C --zone=Z, or other options of `xpk workload create`]
#   {collect}

set -euo pipefail
: "${{TPU_TYPE:?is not set: as xpk calls it, such as v5p-128}}"
: "${{IMAGE:?is not set: it holds this tree and its environment (launch/Dockerfile)}}"
create() {{ # workload command
    xpk workload create "--workload=$1" "--tpu-type=$TPU_TYPE" "--docker-image=$IMAGE" --restart-on-exit-codes=75 \\
        "--max-restarts=${{MAX_RESTARTS:-10}}" --termination-grace-period-seconds=120 "--command=$2" "${{@:3}}"
}}

"""


def write_slurm(plans: Sequence[Plan], out: AnyPath, arguments: Sequence[str]) -> tuple[Path, str]:
    """Returns the path and text of the array's script.

    Raises:
        InputError: if the current folder has no launch/.
    """
    tree = Path.cwd()
    if not (tree / "launch" / "slurm.sbatch").is_file():
        raise InputError(f"--write=slurm: needs launch/slurm.sbatch, but {tree} has none. Run it in a clone")
    assert isinstance(out, Path)
    path = out / "slurm.sbatch"
    return path, SLURM.format(
        points=len(plans), last=len(plans) - 1, path=shlex.quote(str(path)), collect=_collect(out),
        name=re.sub(r"[^\w-]+", "-", out.name) or "sweep", tree=shlex.quote(str(tree)), arguments=shlex.join(arguments),
    )  # fmt: skip


def write_xpk(plans: Sequence[Plan], out: AnyPath) -> tuple[AnyPath, str]:
    """Returns the path and text of a script that creates a workload for each point; `out` is in a bucket."""
    name = re.sub(r"[^a-z0-9]+", "-", out.name.lower()).strip("-")[:24] or "sweep"
    name = name if name[0].isalpha() else f"s-{name}"
    text = XPK.format(points=len(plans), collect=_collect(out))
    for number, plan in enumerate(plans):
        commands = [shlex.join(["memorizing", *words]) for words in (plan.train, plan.evaluate) if words]
        text += f'create {name}-{number} {shlex.quote(" && ".join(commands))} "$@" # {plan.point.name}\n'
    return out / "xpk.sh", text


def _collect(out: AnyPath) -> str:
    return f"memorizing sweep --out={shlex.quote(str(out))} --collect"
