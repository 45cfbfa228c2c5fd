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

    from memorizing.evaluation.evaluate import restore
    from memorizing.evaluation.perplexity import TrainedModel, check_losses
    from memorizing.files import run_folder
    from memorizing.model.settings import split_sizes
    from memorizing.parallel.mesh import MeshSettings, open_mesh
    from memorizing.reports.inspection import ShownRange, inspect_document
    from memorizing.reports.inspection_page import check_out, choose_document, page_name, write_inspection
    from memorizing.runs import load_trained
    from memorizing.storage.snapshots import check_not_empty
    from memorizing.storage.workdir import open_document_tokens

    workdir = run_folder("--workdir", options.workdir)
    config = load_trained(workdir, options.gin_file, options.gin_param)
    size = config.memory.size if options.memory_size is None else options.memory_size
    memory, segment = config.with_memory_size(size).memory, config.batch.segment_length
    if not memory.size or not config.model.memory_layers:
        raise InputError(
            f"--workdir={workdir} has no memory to inspect: Memory.size = {memory.size}, Model.memory_layers = "
            f"{config.model.memory_layers}. Give a run that has one, or use --memory_size"
        )
    check_not_empty(memory, "inspect another run")
    data = config.evaluation.data or config.training.data
    tokens = open_document_tokens(workdir, data, config.model, options.document)
    split = options.split or config.evaluation.split
    name, document = choose_document(tokens, split, options.document, config.folder)
    shown = ShownRange(options.first, options.tokens, options.top)
    shown.check(len(document))
    out = options.out or workdir / "inspect" / page_name(options.document, name, document, memory.size)
    check_out(out)
    mesh = open_mesh(MeshSettings(), split_sizes(config.model, memory, segment, 1), devices=jax.devices()[:1])
    parameters, step = restore(workdir, config.model, mesh)
    trained = TrainedModel(config.model, memory, segment, parameters)
    inspection = inspect_document(trained, name, document, tokens.vocabulary, shown)
    for nats_T in (inspection.nats_T, inspection.without_T):
        check_losses(nats_T, name, step)
    recall_segment = segment if tokens.manifest["source"] == "recall" else None
    write_inspection(inspection, out, {"run": str(workdir), "step": step, "memory_size": memory.size}, recall_segment)
