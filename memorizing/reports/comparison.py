"""`memorizing compare`: a run without memory against a run with memory, as a table, JSON and a picture."""

import json
import re
from collections.abc import Callable
from pathlib import Path

from memorizing.errors import InputError
from memorizing.evaluation.evaluate import FOLDER
from memorizing.files import AnyPath


def compare(
    without_memory: AnyPath, with_memory: AnyPath, split: str, out: Path, say: Callable[[str], None] = print
) -> dict:
    """Writes the evaluations of two runs on one split to `OUT/results.json` and `OUT/results.png`.

    The run without memory counts at memory size 0, the other at every size at which it was evaluated.

    Raises:
        InputError: if evaluations are missing (that at memory size 0 included), or read different text.
    """
    baseline = _evaluations(without_memory, split)[0]
    if baseline["memory_size"]:
        raise InputError(
            f"{without_memory} was evaluated with a memory of {baseline['memory_size']} only. The baseline needs "
            "memory size 0. Give a run without memory, or use `memorizing evaluate "
            f"--workdir={without_memory} --memory_size=0`"
        )
    results = {"without_memory": baseline, "with_memory": _evaluations(with_memory, split)}
    everything = [results["without_memory"], *results["with_memory"]]
    if len({(each["tokens"], each["bytes"], each["documents"]) for each in everything}) > 1:
        raise InputError(f"{without_memory} and {with_memory} were evaluated on different text. Evaluate both again")
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    _draw(results, out / "results.png")
    _say_table(results, say)
    say(f"results: {out / 'results.json'}\npicture: {out / 'results.png'}")
    return results


def _evaluations(workdir: AnyPath, split: str) -> list[dict]:
    plain = re.compile(rf"{re.escape(split)}-memory-\d+\.json")  # the default corpus, with the XL cache of training
    paths = [path for path in (workdir / FOLDER).glob(f"{split}-memory-*.json") if plain.fullmatch(path.name)]
    found = [json.loads(path.read_text()) for path in paths]
    if not found:
        raise InputError(f"{workdir} has no evaluations of the {split} split. `memorizing evaluate` makes them")
    steps = sorted({figures["checkpoint_step"] for figures in found})
    if len(steps) > 1:
        raise InputError(
            f"{workdir} was evaluated at several checkpoints, of steps {', '.join(map(str, steps))}. Evaluate it again "
            f"at every size, or remove the files of the older ones from {workdir / FOLDER}"
        )
    return sorted(found, key=lambda figures: figures["memory_size"])


def _say_table(results: dict, say: Callable[[str], None]) -> None:
    baseline = results["without_memory"]
    say(f"{'':24}{'memory':>9}{'perplexity':>12}{'bits per byte':>15}{'against without':>17}")
    rows = [("trained without memory", baseline)] + [("trained with memory", each) for each in results["with_memory"]]
    for name, figures in rows:
        change = figures["perplexity"] / baseline["perplexity"] - 1
        against = f"{change:+16.1%}" if figures is not baseline else ""
        say(
            f"{name:24}{figures['memory_size']:>9,}{figures['perplexity']:>12.3f}"
            f"{figures['bits_per_byte']:>15.4f} {against}"
        )


def _draw(results: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (by_size, by_position) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    baseline, largest = results["without_memory"], results["with_memory"][-1]
    sizes = [each["memory_size"] for each in results["with_memory"]]
    by_size.axhline(baseline["perplexity"], color="0.4", linestyle="--", label="trained without memory")
    by_size.plot(range(len(sizes)), [each["perplexity"] for each in results["with_memory"]], "o-", label="with memory")
    by_size.set_xticks(range(len(sizes)), [f"{size:,}" for size in sizes])
    by_size.set(xlabel="memory, tokens", ylabel="perplexity", title="Held-out perplexity by memory size")
    for figures, style, name in (
        (baseline, "s--", "trained without memory"),
        (largest, "o-", f"memory of {largest['memory_size']:,}"),
    ):
        perplexities = [each["perplexity"] for each in figures["perplexity_by_position"]]
        by_position.plot(perplexities, style, color="0.4" if figures is baseline else "C0", label=name)
    starts = [each["first_token"] for each in baseline["perplexity_by_position"]]
    by_position.set_xticks(range(len(starts)), [f"{start:,}" for start in starts], rotation=30)
    by_position.set(xlabel="position in the document, from token", ylabel="perplexity", title="By position")
    for axes in (by_size, by_position):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
