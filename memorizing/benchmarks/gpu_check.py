"""The checks of launch/gpu_check.sh that are not benchmarks: whether every search is correct here, and a summary.

    python -m memorizing.benchmarks.gpu_check searches --json=FILE     checks the result of each search
    python -m memorizing.benchmarks.gpu_check collect --out=DIR        collects the results of the script's parts

A result is correct if every slot is valid and appears once, its score is that of its key, scores descend, and scores
beyond the number of valid slots are -inf. Exact searches must find all neighbors; of the others the recall is reported.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from memorizing.benchmarks import report
from memorizing.benchmarks.choices import Shape, default_searches
from memorizing.benchmarks.report import number
from memorizing.benchmarks.vectors import plain_dtype, random_vectors, recall, stored
from memorizing.errors import InputError
from memorizing.files import atomic_write
from memorizing.memory.quantize import DTYPES
from memorizing.memory.search import Search
from memorizing.memory.search.pallas import PallasSettings
from memorizing.memory.search_choice import make_search
from memorizing.memory.settings import MemorySettings

_SMALL, _LARGE, _NARROW = Shape(2, 2, 128, 1024, 64, 32), Shape(2, 4, 256, 8192, 128, 32), Shape(1, 2, 64, 4096, 32, 16)
CASES = (
    (_SMALL, "float32", 1.0),
    (_SMALL, "bfloat16", 0.4),
    (_SMALL, "int8", 1.0),
    (_SMALL, "float32", 0.004),
    (_LARGE, "bfloat16", 1.0),
    (_LARGE, "float32", 0.4),
    (_NARROW, "float32", 1.0),
    (_NARROW, "bfloat16", 0.004),
)
"""Shape, dtype of keys, and share of valid slots; with 0.004, fewer slots are valid than neighbors requested."""
ALL = ("exact", "native", "blocked")
"""Searches that find all neighbors; nearly all in float32 on a GPU, which rounds products."""
LEAST = 0.98


def check_searches(json_file: Path | None) -> bool:
    """Prints a line for each search and writes all results. Returns True if all are correct."""
    rows, left_out = [], {}
    platform = jax.devices()[0].platform
    named: dict[str, dict[str, Any]] = {name: {"search": name} for name in default_searches(platform)}
    if platform == "gpu":
        named["pallas, mosaic"] = {
            "search": "pallas", "options": (PallasSettings(gpu_kernel="mosaic"),),
        }  # fmt: skip
    for name, settings in named.items():
        for shape, dtype, share in CASES:
            changes: dict[str, Any] = settings | {"size": shape.M, "neighbors": shape.K}
            changes |= {"dtype": plain_dtype(dtype), "key_dtype": dtype if dtype in DTYPES else None}
            try:
                search = make_search(dataclasses.replace(MemorySettings(), **changes))
            except InputError as error:
                left_out[f"{name}, {dtype}"] = str(error)
                continue
            rows.append(_checked(name, search, shape, dtype, share))
    for name in dict.fromkeys(row["search"] for row in rows):
        own = [row for row in rows if row["search"] == name]
        found = [row["recall"] for row in own if row["recall"] is not None]
        wrong = [row for row in own if row["problem"]]
        least = f", recall at least {min(found):.3f}" if found else ""
        print(f"{name}: {len(own) - len(wrong)} of {len(own)} right{least}")
        for row in wrong:
            print(f"  {row['shape']} {row['dtype']}, {row['valid']:.1%} valid: {row['problem']}")
    for name, why in left_out.items():
        print(f"{name}: not here: {why}")
    result = report.new_result("searches", sys.argv[1:]) | {"rows": rows, "not_made": left_out}
    report.write_result(result, json_file)
    return bool(rows) and not any(row["problem"] for row in rows)


def _checked(name: str, search: Search, shape: Shape, dtype: str, share: float) -> dict[str, Any]:
    """Checks one search at one shape, dtype and share of valid slots."""
    row: dict[str, Any] = {"search": name, "kind": type(search).__name__, "shape": str(shape), "dtype": dtype}
    row |= {"valid": share, "recall": None, "problem": None}
    try:
        vectors = random_vectors(shape, dtype)
        drawn = jax.random.uniform(jax.random.key(1), (shape.B, shape.M)) < share
        vectors = vectors._replace(valid_BM=drawn)
        keys = stored(search, vectors.keys_BHMD, shape.N, dtype)
        found = jax.device_get(jax.jit(search, static_argnums=3)(vectors.queries_BHND, keys, vectors.valid_BM, shape.K))
        row["problem"] = wrong_with(found, vectors, loose=dtype in DTYPES)
        fewest = int(vectors.valid_BM.sum(1).min())
        if fewest >= shape.K:
            row["recall"] = recall(found, vectors)
            if name in ALL and dtype not in DTYPES and row["recall"] < LEAST and not row["problem"]:
                row["problem"] = f"recall {row['recall']:.3f}: it promises all neighbors"
        elif name in ALL and (found.scores_BHNK > -np.inf).sum(-1).min() < fewest:
            row["problem"] = row["problem"] or f"of {fewest} valid slots not all are found"
    except Exception as error:  # the other searches are still worth checking
        row["problem"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return row


def wrong_with(found: Any, vectors: Any, loose: bool = False) -> str | None:
    """Returns what is wrong with neighbors, in a few words; None if nothing is. `loose` allows for 8-bit keys."""
    scores, slots = np.asarray(found.scores_BHNK, np.float64), np.asarray(found.slots_BHNK)
    there = scores > -np.inf
    if np.isnan(scores).any():
        return "scores that are not finite"
    if ((slots < 0) | (slots >= vectors.keys_BHMD.shape[2]))[there].any():
        return "slots that do not exist"
    if (np.diff(np.where(there, scores, -1e30)) > 1e-6).any():
        return "scores that are not best first"
    safe = np.where(there, slots, 0)
    valid = np.asarray(vectors.valid_BM)[np.arange(slots.shape[0])[:, None, None, None], safe]
    if (~valid & there).any():
        return "slots that are not valid"
    own = np.where(
        there, slots, -1 - np.arange(slots.shape[-1])
    )  # slots that were not found get different negative numbers
    if (np.diff(np.sort(own, axis=-1)) == 0).any():
        return "slots that are named twice"
    keys = np.take_along_axis(
        np.asarray(vectors.keys_BHMD, np.float64)[:, :, None], safe[..., None].reshape(*slots.shape[:2], 1, -1, 1), 3
    ).reshape(*slots.shape, -1)
    true = np.einsum("BHND,BHNKD->BHNK", np.asarray(vectors.queries_BHND, np.float64), keys)
    off = np.abs(np.where(there, scores - true, 0.0)).max()
    return f"scores that are {off:.2g} off" if off > (0.02 if loose else 0.003) else None


def collect(out: Path) -> bool:
    """Collects the results of the parts into `OUT/gpu_check.json` and prints a table. Returns True if all parts ended
    well."""
    parts = []
    for line in (out / "parts").read_text().splitlines():
        name, status, seconds, *words = line.split("\t")
        part: dict[str, Any] = {"part": name, "status": int(status), "seconds": int(seconds), "command": words[0]}
        result, log = out / f"{name}.json", out / f"{name}.log"
        part["result"] = json.loads(result.read_text()) if result.exists() else None
        said = log.read_text(errors="replace").splitlines() if log.exists() else []
        part["last_lines"] = said[-5 if part["status"] == 0 else -40 :]
        parts.append(part)
    evaluations = {path.stem: json.loads(path.read_text()) for path in sorted(out.glob("run/evaluations/*.json"))}
    figures = report.new_result("gpu_check", sys.argv[1:]) | {"parts": parts, "evaluations": evaluations}
    atomic_write(out / "gpu_check.json", json.dumps(figures, indent=1) + "\n")
    rows = [
        [part["part"], "ok" if part["status"] == 0 else f"FAILED ({part['status']})", number(part["seconds"], "d")]
        for part in parts
    ]
    print(report.aligned(["part", "", "s"], rows, left=2))
    for part in parts:
        if part["status"]:
            print(f"\n{part['part']} failed: {part['command']}")
            print("\n".join(f"  {line}" for line in part["last_lines"][-8:]))
    print(f"\nall figures: {out / 'gpu_check.json'}")
    return not any(part["status"] for part in parts)


def main() -> int:
    """Runs a check. Returns exit status 0 if all is well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("searches", "collect"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_check"))
    options = parser.parse_args()
    well = check_searches(options.json) if options.action == "searches" else collect(options.out)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
