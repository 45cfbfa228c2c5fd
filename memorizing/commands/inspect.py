"""`memorizing inspect`: see `reports/inspection.py`."""

import argparse
from pathlib import Path

from memorizing.commands.arguments import add_settings, add_workdir
from memorizing.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `memorizing inspect`."""
    add_workdir(parser)
    parser.add_argument(
        "--document", metavar="NAME", required=True, help="name of a document of the split; or a file or folder"
    )
    parser.add_argument("--split", metavar="NAME", help="split of the document; default: Evaluation.split")
    parser.add_argument(
        "--memory_size", type=int, metavar="M", help="size of the memory, in tokens; default: as in training"
    )
    parser.add_argument(
        "--first", type=int, default=0, metavar="T", help="first token whose lookups are shown, from 0; default: 0"
    )
    parser.add_argument(
        "--tokens", type=int, default=10_000, metavar="N", help="number of tokens to show; default: 10000"
    )
    parser.add_argument(
        "--top", type=int, default=4, metavar="K", help="number of retrieved tokens to show per head; default: 4"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="page to write; default: WORKDIR/inspect/NAME-memory-M.html"
    )
    add_settings(parser)


def run(options: argparse.Namespace) -> None:
    """Writes an HTML page about a document: what each token looked up in memory, and what it gained."""
    import jax

    from memorizing.config import load_trained
    from memorizing.evaluation.evaluate import restore
    from memorizing.evaluation.perplexity import check_losses
    from memorizing.files import run_folder
    from memorizing.model.transformer import open_mesh
    from memorizing.parallel.mesh import MeshSettings
    from memorizing.reports import inspection as inspect
    from memorizing.storage.snapshots import check_not_empty
    from memorizing.storage.workdir import open_document_tokens

    workdir = run_folder("--workdir", options.workdir)
    it = load_trained(workdir, options.gin_file, options.gin_param)
    size = it.memory.size if options.memory_size is None else options.memory_size
    memory = it.with_memory_size(size).memory
    if not memory.size or not it.model.memory_layers:
        raise InputError(
            f"--workdir={workdir} has no memory to look into (Memory.size = {memory.size}, Model.memory_layers = "
            f"{it.model.memory_layers}): name a run that has, or --memory_size"
        )
    check_not_empty(memory, "this page is about what a document finds of itself, so name another run")
    tokens = open_document_tokens(workdir, it.evaluation.data or it.training.data, it.model, options.document)
    name, encoded = inspect.chosen_document(tokens, options.split or it.evaluation.split, options.document, it.folder)
    inspect.check_range(options.first, options.tokens, options.top, len(encoded))
    out = options.out or workdir / "inspect" / inspect.page_name(options.document, name, encoded, memory.size)
    inspect.check_out(out)
    segment = it.batch.segment_length
    mesh = open_mesh(MeshSettings(), it.model, memory, segment, 1, devices=jax.devices()[:1])
    parameters, step = restore(workdir, it.model, mesh)
    read = inspect.inspect(
        it.model, memory, parameters, segment, name, encoded, tokens.vocabulary, options.first, options.tokens,
        options.top,
    )  # fmt: skip
    for nats_T in (read.nats_T, read.without_T):
        check_losses(nats_T, name, step)
    of_recall = segment if tokens.manifest["source"] == "recall" else None
    inspect.write(read, out, {"run": str(workdir), "step": step, "memory_size": memory.size}, of_recall)
