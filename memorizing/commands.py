"""What each subcommand does: from its options to one call.

Everything is imported where it is used, so that one command does not wait for what another needs.
"""

import argparse
import functools
import sys
from pathlib import Path

from memorizing.errors import InputError


def prepare(options: argparse.Namespace) -> None:
    """Turn documents into tokens, split into train, validation and test."""
    from memorizing.config import load
    from memorizing.data.prepare import prepare

    it, _ = load(options.gin_file, options.gin_param)
    prepare(it.prepare, it.sources, it.beam, options.raw, options.out, options.data_dir)


def inspect_data(options: argparse.Namespace) -> None:
    """What prepared tokens hold: manifest, a document, its segments."""
    from memorizing.data.summary import inspect

    inspect(options.data, options.split, options.document, options.segment_length)


def train(options: argparse.Namespace) -> None:
    """Train a model, or go on with a run that was interrupted."""
    from memorizing.training.signals import end_at_sigterm

    end_at_sigterm()
    from memorizing.config import open_workdir, written_config
    from memorizing.files import run_folder
    from memorizing.model.transformer import open_mesh
    from memorizing.parallel import hosts
    from memorizing.storage.workdir import check_data, held_run, open_tokens
    from memorizing.training.loop import train

    workdir = run_folder("--workdir", options.workdir)
    hosts.start(options.coordinator, options.processes, options.process)
    if workdir.exists() and not workdir.is_dir():
        raise InputError(f"--workdir={workdir} is a file: name a folder")
    it, text = open_workdir(workdir, options.gin_file, options.gin_param, hosts.say)
    check_data(workdir, open_tokens(it.training.data, it.model), train=True)
    open_mesh(it.mesh, it.model, it.memory, it.batch.segment_length, it.batch.size)
    with held_run(workdir), written_config(workdir, text):
        train(it.model, it.memory, it.batch, it.optimizer, it.training, it.mesh, workdir, options.reset_memory)


def plan(options: argparse.Namespace) -> None:
    """What a run would take on devices that need not be here: memory, time, traffic."""
    from memorizing.config import load
    from memorizing.planning.plan import plan

    if not options.gin_file:
        raise InputError("--gin_file is missing: name what to plan, such as --gin_file=configs/base.gin")
    it, _ = load(options.gin_file, options.gin_param)
    plan(it.model, it.memory, it.batch, it.optimizer, it.training, it.mesh, options.topology, options.json)


def evaluate(options: argparse.Namespace) -> None:
    """Perplexity of a run's newest checkpoint over whole held-out documents."""
    from memorizing.config import load_trained
    from memorizing.evaluation.corpora import open_corpora
    from memorizing.evaluation.evaluate import Run, evaluate, readings, restore, xl_caches
    from memorizing.files import run_folder
    from memorizing.model.transformer import open_mesh
    from memorizing.parallel import hosts
    from memorizing.storage.init_from import source_of
    from memorizing.storage.snapshots import check_not_empty, prebuilt_banks
    from memorizing.training.signals import die_at_sigterm

    workdir = run_folder("--workdir", options.workdir)
    hosts.start(options.coordinator, options.processes, options.process)
    die_at_sigterm()
    it = load_trained(workdir, options.gin_file, options.gin_param)
    memories = [it.with_memory_size(size).memory for size in options.memory_size or [it.memory.size]]
    if not options.memory:
        for memory in memories:
            check_not_empty(memory, f"name it with --memory={it.training.prebuilt_memory or 'DIR'}")
        if it.training.prebuilt_memory and hosts.is_first():
            print(
                f"documents begin with an empty memory; in training with {it.training.prebuilt_memory} (--memory=DIR)"
            )
    if it.memory.size and not it.memory.clear_at_documents and hosts.is_first():
        print("each document begins with a memory of its own; in training it outlasts them (Memory.clear_at_documents)")
    segment, rows = it.batch.segment_length, it.evaluation.batch_size
    meshes = [open_mesh(it.mesh, it.model, memory, segment, rows, "Evaluation.batch_size") for memory in memories]

    own, splits = it.evaluation.data or it.training.data, options.split or [it.evaluation.split]
    corpora = open_corpora(options.data, splits, own, workdir, it.model)
    parameters, step = restore(workdir, it.model, meshes[0])
    name, prebuilt = options.name, [()] * len(memories)
    if options.memory:
        source = source_of(workdir, it.model, segment, corpora[0].tokens, parameters, step)
        prebuilt = [
            prebuilt_banks(options.memory, source, memory, mesh) if memory.size or len(memories) == 1 else ()
            for memory, mesh in zip(memories, meshes, strict=True)
        ]
        name = name or f"from-{options.memory.name}"
    planned = readings(
        corpora, zip(memories, meshes, prebuilt, strict=True), xl_caches(options.xl_cache, it.model.xl_cache), name
    )
    evaluate(Run(workdir, it.model, segment, parameters, step), planned, it.evaluation, options.per_token)


def inspect(options: argparse.Namespace) -> None:
    """A page of a document: what each token looked up in memory, and gained."""
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
        it.model,
        memory,
        parameters,
        segment,
        name,
        encoded,
        tokens.vocabulary,
        options.first,
        options.tokens,
        options.top,
    )
    for nats_T in (read.nats_T, read.without_T):
        check_losses(nats_T, name, step)
    of_recall = segment if tokens.manifest["source"] == "recall" else None
    inspect.write(read, out, {"run": str(workdir), "step": step, "memory_size": memory.size}, of_recall)


def drift(options: argparse.Namespace) -> None:
    """How stale a run's memory is: its keys beside those of its present parameters."""
    from memorizing.config import load_trained
    from memorizing.evaluation.drift import drift
    from memorizing.files import run_folder
    from memorizing.model.transformer import open_mesh
    from memorizing.storage.checkpoints import Checkpoints
    from memorizing.storage.workdir import check_data, open_tokens
    from memorizing.training.state import StateFactory

    workdir = run_folder("--workdir", options.workdir)
    it = load_trained(workdir, options.gin_file, options.gin_param)
    tokens = open_tokens(it.training.data, it.model)
    check_data(workdir, tokens, train=True)
    mesh = open_mesh(it.mesh, it.model, it.memory, it.batch.segment_length, it.batch.size)
    make = StateFactory(it.model, it.memory, it.batch, it.optimizer, it.training, mesh)
    with Checkpoints(workdir, index_kind=make.index_kind()) as checkpoints:
        drift(checkpoints, make, it.model, it.memory, it.batch, it.training, tokens.split("train"), options.json)


def compare(options: argparse.Namespace) -> None:
    """Set a run without memory beside a run with memory: table, JSON, picture."""
    from memorizing.config import load_trained
    from memorizing.files import run_folder
    from memorizing.reports.comparison import compare

    without_memory, with_memory = run_folder("--without", options.without), run_folder("--with", options.with_)
    split = load_trained(with_memory, options.gin_file, options.gin_param).evaluation.split
    compare(without_memory, with_memory, split, options.out)


def report(options: argparse.Namespace) -> None:
    """A run or a sweep as one HTML page, which opens without a network."""
    from memorizing.files import run_folder
    from memorizing.reports.report import report_run, report_sweep

    if options.sweep:
        report_sweep(options.sweep, options.out)
    else:
        report_run(run_folder("--workdir", options.workdir), options.out)


def generate(options: argparse.Namespace) -> None:
    """Read documents into memory, then go on from a prompt."""
    from memorizing.data.documents import read_text
    from memorizing.generation.reader import SamplingSettings, check_tokens

    sampling = SamplingSettings(options.temperature, options.top_k, options.top_p, options.seed)
    check_tokens(options.tokens)  # before much is read for nothing
    prompt = read_text(options.prompt_file, "utf-8") if options.prompt_file else options.prompt
    reader = _reader(options)
    if options.clear_memory:
        reader.clear_memory()
    print(prompt, end="", flush=True)
    for piece in reader.stream(prompt, options.tokens, sampling):
        print(piece, end="", flush=True)
    print()


def memorize(options: argparse.Namespace) -> None:
    """Read documents into memory, and keep that as a snapshot."""
    from memorizing.storage.snapshots import check_folder

    if not options.document:
        raise InputError("--document is missing: name a file or folder to read")
    check_folder("--out", options.out)
    if options.memory_size == 0:
        raise InputError("--memory_size=0: nothing would be remembered; name a size")
    is_new = _reader(options, options.out).save(options.out)
    print(f"snapshot: {options.out}" if is_new else f"{options.out} holds just this already")


def _reader(options: argparse.Namespace, out: Path | None = None):
    """A reader that has read what the options name, to be saved in `out`; it tells of that on the standard error."""
    from memorizing.api import open_reader
    from memorizing.storage.snapshots import check_not_empty

    for path in options.document:
        if not path.exists():  # before a model is loaded for nothing
            raise InputError(f"--document={path}: no such file or folder")
    say = functools.partial(print, file=sys.stderr, flush=True)
    reader = open_reader(options.workdir, options.memory_size, options.gin_file, options.gin_param, say)
    if not options.memory:
        check_not_empty(reader.memory, "" if out else "name the snapshot to begin from with --memory=DIR")
    else:
        reader.load(options.memory)
        say(f"{options.memory}: {reader.tokens:,} tokens were read")
    if out is not None:
        reader.check_save(out, options.document)
    for path in options.document:
        reader.read_files(path)
    if reader.tokens and reader.memory.size:
        say(f"{reader.tokens:,} tokens read, of which {reader.remembered:,} are in a memory of {reader.memory.size:,}")
    return reader


def import_pretrained(options: argparse.Namespace) -> None:
    """Make a run of a pretrained model: GPT-2, Llama, Mistral, Qwen2, Qwen3."""
    from memorizing.files import run_folder
    from memorizing.pretrained.importing import import_pretrained

    workdir = run_folder("--workdir", options.workdir)
    import_pretrained(options.from_, workdir, options.memory_layers, options.gin_file, options.gin_param)


def export(options: argparse.Namespace) -> None:
    """Write a run as a folder of Hugging Face, as far as it fits."""
    from memorizing.files import run_folder
    from memorizing.pretrained.exporting import DROPS, export

    if unknown := set(options.drop) - set(DROPS):
        raise InputError(f"--omit={','.join(sorted(unknown))}: what can be left out are {', '.join(DROPS)}")
    export(run_folder("--workdir", options.workdir), options.out, options.drop)


def sweep(options: argparse.Namespace) -> None:
    """Train and evaluate a grid of settings, or only evaluate it: table and plots."""
    from memorizing.training.signals import end_at_sigterm

    end_at_sigterm()
    from memorizing.files import run_folder
    from memorizing.sweep.command import collect, sweep
    from memorizing.sweep.points import Asked

    out = run_folder("--out", options.out)
    if options.collect:
        collect(out)
        return
    asked = Asked(
        out, tuple(options.gin_file), tuple(options.gin_param), options.workdir, tuple(options.data),
        tuple(options.split or ()), tuple(options.memory_size or ()), options.xl_cache,
    )  # fmt: skip
    sweep(asked, options.over, options.seeds, options.launcher, options.point, options.write, options.dry_run)


def bench_search(options: argparse.Namespace) -> None:
    """Time, recall and memory of each search."""
    import jax

    from memorizing.benchmarks.choices import check_rounds, choose, run_sizes
    from memorizing.benchmarks.search import bench_search
    from memorizing.benchmarks.trained import run_vectors
    from memorizing.benchmarks.vectors import random_vectors
    from memorizing.config import load, load_trained
    from memorizing.files import run_folder

    check_rounds(options.rounds)
    draw, sizes, platform = random_vectors, None, jax.devices()[0].platform
    if options.workdir:
        workdir = run_folder("--workdir", options.workdir)
        it = load_trained(workdir, options.gin_file, options.gin_param)
        segment = it.batch.segment_length
        sizes = run_sizes(it.model, it.memory, segment)
        draw = run_vectors(workdir, it.model, it.memory, segment, it.evaluation, it.training.data)
    else:
        it, _ = load(options.gin_file, options.gin_param)
    choices = choose(platform, options.shapes, options.dtype, options.searches, sizes)
    bench_search(it.memory, choices, options.rounds, draw, options.arguments, options.json)


def bench_step(options: argparse.Namespace) -> None:
    """Time of a train step by size of the memory."""
    from memorizing.benchmarks.choices import check_rounds
    from memorizing.benchmarks.step import SMALL_MODEL, bench_step
    from memorizing.config import load

    check_rounds(options.rounds)
    it, _ = load(options.gin_file, [*(() if options.gin_file else SMALL_MODEL), *options.gin_param])
    memories = [it.with_memory_size(size).memory for size in options.memory_size]
    bench_step(
        it.model, memories, it.batch, it.optimizer, it.training, options.rounds, options.arguments, options.against,
        options.json,
    )  # fmt: skip
