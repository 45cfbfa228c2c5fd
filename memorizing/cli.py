"""The one command, `memorizing`: each subcommand reads settings and calls one function.

Everything else is imported where it is used, so that `--help` answers at once.
"""

import argparse
import functools
import re
import sys
import traceback
from pathlib import Path

from memorizing.errors import InputError

DESCRIPTION = """\
Train and use Memorizing Transformers: language models that look up the exact keys and values of earlier tokens.

  memorizing prepare       text         -> tokens          once per corpus
  memorizing inspect-data  tokens       -> what they hold
  memorizing plan          settings     -> what a run would take, on TPUs that need not be here
  memorizing train         tokens       -> a run's workdir resumes where it stopped, when repeated
  memorizing evaluate      workdir      -> perplexity      of any corpora, at any memory sizes
  memorizing drift         workdir      -> table           how stale the keys in its memory are
  memorizing inspect       a document   -> page            what each token looked up, and what it gained
  memorizing compare       two workdirs -> table, picture  what the memory is worth
  memorizing generate      workdir      -> text            goes on from long documents that it has read
  memorizing memorize      documents    -> a snapshot      of what a workdir's model has read, to go on from
  memorizing import        a pretrained model of a Hugging Face folder -> a run's workdir
  memorizing export        workdir      -> such a folder
  memorizing sweep         a grid       -> table, plots    trains and evaluates each point; resumes, when repeated
  memorizing bench         this device  -> tables          what searches and train steps take
"""

SETTINGS = """\
Settings come from gin files (configs/), then from single bindings; later ones win:
  --gin_file=configs/quickstart.gin --gin_param 'MEMORY_SIZE = 8192' --gin_param 'Model.layers = 4'
"""


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit status, and prints errors that a user can mend without a traceback."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(arguments)
    options.arguments = arguments
    from memorizing.parallel import hosts
    from memorizing.training.signals import RUN_ME_AGAIN

    try:
        options.run(options)
        return 0
    except Exception as error:
        status, message = _explained(error)
        if not message:
            if not hosts.are_many():
                raise
            traceback.print_exc()
        else:
            which = f" (process {hosts.number()})" if hosts.are_many() else ""
            print(f"memorizing {options.command}{which}: {message}", file=sys.stderr)
    except KeyboardInterrupt:
        again = "; the same command goes on from there" if options.command == "prepare" else ""
        print(f"memorizing {options.command}: interrupted{again}", file=sys.stderr)
        status = 130
    hosts.leave(status, together=status == RUN_ME_AGAIN)
    return status


def _explained(error: Exception) -> tuple[int, str]:
    """The exit status for an error, and what to say of it; nothing where only a traceback will do."""
    from jax.errors import JaxRuntimeError

    from memorizing.benchmarks.report import BenchFailed
    from memorizing.parallel import hosts
    from memorizing.sweep.run import PointsFailed
    from memorizing.training.checkpoints import SaveFailed, Unreadable
    from memorizing.training.loop import NonFiniteLoss
    from memorizing.training.plan import DoesNotFit
    from memorizing.training.signals import Interrupted

    if isinstance(error, Interrupted):
        return error.exit_status, f"interrupted: {error}"
    if isinstance(error, InputError | NonFiniteLoss | DoesNotFit):
        return 2, f"error: {error}"
    if isinstance(error, SaveFailed | Unreadable | OSError | BenchFailed | PointsFailed):
        return 1, f"error: {error}"
    if isinstance(error, JaxRuntimeError) and hosts.are_many():
        return 1, f"error: lost another process, or the way to it: {error}. Repeat the command in all of them"
    return 1, ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "memorizing", description=DESCRIPTION, epilog=SETTINGS, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run, summary: str, has_settings: bool = True, among=commands) -> argparse.ArgumentParser:
        sub = among.add_parser(
            name, help=summary, description=summary, epilog=SETTINGS if has_settings else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        sub.set_defaults(run=run)
        if not has_settings:
            return sub
        sub.add_argument("--gin_file", action="append", default=[], metavar="FILE", help="settings; repeatable")
        sub.add_argument(
            "--gin_param", action="append", default=[], metavar="'NAME = value'", help="one setting; repeatable"
        )
        return sub

    def many(sub: argparse.ArgumentParser) -> None:
        """Where the environment does not tell (TPU pods, SLURM, Open MPI and Kubernetes do)."""
        sub.add_argument("--coordinator", metavar="HOST:PORT", help="of many processes: where the first one listens")
        sub.add_argument("--processes", type=int, metavar="N", help="of many processes: how many there are")
        sub.add_argument("--process", type=int, metavar="I", help="of many processes: which one this is, from 0")

    prepare = command("prepare", _prepare, "Turn documents into tokens, split into train, validation and test.")
    prepare.add_argument("--raw", type=Path, metavar="DIR", help="folder of documents")
    prepare.add_argument("--out", type=Path, metavar="DIR", required=True, help="folder to make for the tokens")
    prepare.add_argument(
        "--data_dir",
        type=Path,
        metavar="DIR",
        help="where TFDS finds or keeps a corpus's documents, for other vocabularies",
    )

    data = command(
        "inspect-data", _inspect_data, "What prepared tokens hold: manifest, a document, its segments.", False
    )
    data.add_argument("data", type=Path, metavar="DIR", help="prepared tokens")
    data.add_argument("--split", default="train", help="of the document; default: train")
    data.add_argument("--document", metavar="NAME", help="to show; default: the first")
    data.add_argument("--segment_length", type=int, default=512, metavar="N", help="tokens of a segment; default: 512")

    train = command("train", _train, "Train a model, or go on with a run that was interrupted.")
    train.add_argument(
        "--workdir", metavar="DIR", required=True, help="the run: settings, checkpoints, metrics; or gs://BUCKET/RUN"
    )
    train.add_argument(
        "--drop_memory", action="store_true", help="go on with an empty memory instead of the one that was saved"
    )
    many(train)

    plan = command("plan", _plan, "What a run would take on devices that need not be here: memory, time, traffic.")
    plan.add_argument(
        "--topology", default="local", metavar="NAME", help="a TPU slice such as v5p:4x4x4; default: the devices here"
    )
    plan.add_argument("--json", type=Path, metavar="FILE", help="to write the figures to")

    evaluate = command("evaluate", _evaluate, "Perplexity of a run's newest checkpoint over whole held-out documents.")
    evaluate.add_argument("--workdir", metavar="DIR", required=True, help="of the run; or gs://BUCKET/RUN")
    evaluate.add_argument(
        "--memory_size", type=_sizes, metavar="M[,M...]", help="sizes to evaluate at; default: that of training"
    )
    evaluate.add_argument(
        "--data", action="append", default=[], metavar="[NAME=]DIR",
        help="prepared tokens, of the same vocabulary; repeatable; default: those of training",
    )  # fmt: skip
    evaluate.add_argument("--split", type=_names, metavar="NAME[,NAME...]", help="of them; default: Evaluation.split")
    evaluate.add_argument("--xl_cache", choices=("on", "off", "both"), help="default: as in training")
    evaluate.add_argument(
        "--memory", type=Path, metavar="DIR", help="a snapshot (memorizing memorize) that each document starts with"
    )
    evaluate.add_argument(
        "--per_token", action="store_true", help="also write the loss of every token, SPLIT-memory-M.npz"
    )
    evaluate.add_argument(
        "--name",
        type=_name,
        default="",
        help="to tell the files of other settings from those without: SPLIT-memory-M-NAME",
    )
    many(evaluate)

    inspect = command("inspect", _inspect, "A page of a document: what each token looked up in memory, and gained.")
    inspect.add_argument("--workdir", metavar="DIR", required=True, help="of the run; or gs://BUCKET/RUN")
    inspect.add_argument(
        "--document", metavar="NAME", required=True, help="of a document of the split; a file or folder"
    )
    inspect.add_argument("--split", metavar="NAME", help="default: Evaluation.split")
    inspect.add_argument("--memory_size", type=int, metavar="M", help="default: that of training")
    inspect.add_argument("--first", type=int, default=0, metavar="T", help="token from which on lookups are shown")
    inspect.add_argument("--tokens", type=int, default=10_000, metavar="N", help="for how many; default: 10000")
    inspect.add_argument(
        "--top", type=int, default=4, metavar="K", help="retrieved tokens to show of each head; default: 4"
    )
    inspect.add_argument("--out", type=Path, metavar="FILE", help="default: WORKDIR/inspect/NAME-memory-M.html")

    compare = command("compare", _compare, "Set a run without memory beside a run with memory: table, JSON, picture.")
    compare.add_argument("--without", metavar="WORKDIR", required=True, help="run trained without memory")
    compare.add_argument("--with", metavar="WORKDIR", required=True, dest="with_", help="run with memory")
    compare.add_argument("--out", type=Path, metavar="DIR", required=True, help="folder for results.json and .png")

    report = command("report", _report, "A run or a sweep as one HTML page, which opens without a network.", False)
    of = report.add_mutually_exclusive_group(required=True)
    of.add_argument("--workdir", metavar="DIR", help="a run; or gs://BUCKET/RUN")
    of.add_argument("--sweep", type=Path, metavar="DIR", help="what `memorizing sweep` made")
    report.add_argument("--out", type=Path, metavar="FILE", help="the page; default: report.html in that folder")

    drift = command("drift", _drift, "How stale a run's memory is: its keys beside those of its present parameters.")
    drift.add_argument("--workdir", metavar="DIR", required=True, help="of the run; or gs://BUCKET/RUN")
    drift.add_argument("--json", type=Path, metavar="FILE", help="to write the figures to")

    generate = command("generate", _generate, "Read documents into memory, then go on from a prompt.")
    _reads(generate)
    generate.add_argument("--memory", type=Path, metavar="DIR", help="a snapshot to begin from (memorizing memorize)")
    generate.add_argument(
        "--clear_memory", action="store_true", help="empty the memory before the prompt: only what was read last stays"
    )
    prompt = generate.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", default="", metavar="TEXT", help="to go on from, behind what was read")
    prompt.add_argument("--prompt_file", type=Path, metavar="FILE", help="the same, from a file")
    generate.add_argument("--tokens", type=int, default=200, metavar="N", help="to write; default: 200")
    generate.add_argument(
        "--temperature", type=float, default=1.0, metavar="T", help="0 for always the likeliest token; default: 1"
    )
    generate.add_argument("--top_k", type=int, default=0, metavar="K", help="draw among the K likeliest; default: all")
    generate.add_argument(
        "--top_p",
        type=float,
        default=1.0,
        metavar="P",
        help="draw among the likeliest that have P together; default: 1",
    )
    generate.add_argument("--seed", type=int, default=0, help="the same writes the same; default: 0")

    memorize = command("memorize", _memorize, "Read documents into memory, and keep that as a snapshot.")
    _reads(memorize)
    memorize.add_argument("--memory", type=Path, metavar="DIR", help="a snapshot to begin from")
    memorize.add_argument("--out", type=Path, metavar="DIR", required=True, help="folder to make for the snapshot")

    importing = command("import", _import, "Make a run of a pretrained model: GPT-2, Llama, Mistral, Qwen2, Qwen3.")
    importing.add_argument(
        "--from", type=Path, metavar="DIR", required=True, dest="from_",
        help="of Hugging Face: config.json, *.safetensors, tokenizer",
    )  # fmt: skip
    importing.add_argument("--workdir", metavar="DIR", required=True, help="the run to make")
    importing.add_argument(
        "--memory_layers", type=_sizes, default=[], metavar="L[,L...]",
        help="that get a memory, counted from 1; default: none",
    )  # fmt: skip

    export = command("export", _export, "Write a run as a folder of Hugging Face, as far as it fits.", False)
    export.add_argument("--workdir", metavar="DIR", required=True, help="of the run; or gs://BUCKET/RUN")
    export.add_argument("--out", type=Path, metavar="DIR", required=True, help="folder to make")
    export.add_argument(
        "--drop", type=_names, default=[], metavar="NAME[,NAME...]",
        help="to leave out of it what has no place there: gates, normalization, key_shift",
    )  # fmt: skip

    sweep = command("sweep", _sweep, "Train and evaluate a grid of settings, or only evaluate it: table and plots.")
    sweep.add_argument("--out", metavar="DIR", required=True, help="folder of the sweep; gs://BUCKET/SWEEP for xpk")
    sweep.add_argument(
        "--over", action="append", default=[], metavar="NAME=V1,V2...",
        help="a macro or setting, and its values; repeatable. For DATA they may be NAME=FOLDER",
    )  # fmt: skip
    sweep.add_argument(
        "--seeds", type=int, metavar="N", help="each point with so many seeds, from that of the settings"
    )
    sweep.add_argument("--workdir", metavar="RUN", help="of a trained run, which is only evaluated at each point")
    sweep.add_argument("--memory_size", type=_sizes, metavar="M[,M...]", help="to evaluate at; as of evaluate")
    sweep.add_argument(
        "--data", action="append", default=[], metavar="[NAME=]DIR", help="to evaluate on; as of evaluate"
    )
    sweep.add_argument("--split", type=_names, metavar="NAME[,NAME...]", help="as of evaluate")
    sweep.add_argument("--xl_cache", choices=("on", "off", "both"), help="as of evaluate")
    sweep.add_argument("--point", metavar="I|NAME", help="runs this one alone, counted from 0")
    sweep.add_argument("--launcher", default="", metavar="COMMAND", help="to put before each command, such as srun")
    sweep.add_argument("--collect", action="store_true", help="runs nothing: table and plots of what is there")
    sweep.add_argument("--write", choices=("slurm", "xpk"), help="runs nothing: writes jobs, a point each")
    sweep.add_argument("--dry-run", action="store_true", help="prints the commands, or the jobs")

    summary = "What searches and train steps take on this device, each beside what it is to be compared with."
    bench = commands.add_parser("bench", help=summary, description=summary)
    benches = bench.add_subparsers(dest="bench", required=True, metavar="search|step")
    search = command("search", _bench_search, "Time, recall and memory of each search.", among=benches)
    search.add_argument("--shapes", metavar="SHAPES", help="such as B8xH8xN512xM65536xD128xK32,M8192")
    search.add_argument("--searches", metavar="NAMES", help="such as exact,blocked; default: those for the device")
    search.add_argument("--dtype", metavar="NAMES", help="of keys: float32, bfloat16, int8, float8; with commas")
    search.add_argument(
        "--workdir", metavar="DIR", help="of a run, whose queries and keys are searched; default: random"
    )
    step = command("step", _bench_step, "Time of a train step by size of the memory.", among=benches)
    step.add_argument(
        "--memory_size", type=_sizes, metavar="M[,M...]", default=[0, 1024, 8192, 32768, 65536],
        help="default: 0,1024,8192,32768,65536",
    )  # fmt: skip
    step.add_argument(
        "--against", metavar="PYTHON", help="of tests/benchmarks/setup_peer.sh: times the PyTorch port in turn with it"
    )
    for sub in (search, step):
        sub.add_argument("--rounds", type=int, default=10, metavar="N", help="in which all take turns; default: 10")
        sub.add_argument("--json", type=Path, metavar="FILE", help="to write all figures to")
    return parser


def _reads(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--workdir", metavar="DIR", required=True, help="of the run; or gs://BUCKET/RUN")
    sub.add_argument(
        "--document", type=Path, action="append", default=[], metavar="FILE|DIR",
        help="to read; repeatable: all are read as one, in this order",
    )  # fmt: skip
    sub.add_argument("--memory_size", type=int, metavar="M", help="tokens; default: that of training")


def _prepare(options: argparse.Namespace) -> None:
    from memorizing.config import load
    from memorizing.data.prepare import prepare

    it, _ = load(options.gin_file, options.gin_param)
    prepare(it.prepare, it.sources, it.beam, options.raw, options.out, options.data_dir)


def _inspect_data(options: argparse.Namespace) -> None:
    from memorizing.data.inspect import inspect

    inspect(options.data, options.split, options.document, options.segment_length)


def _train(options: argparse.Namespace) -> None:
    from memorizing.training.signals import end_at_sigterm

    end_at_sigterm()
    from memorizing.config import open_workdir, write_config
    from memorizing.files import run_folder
    from memorizing.model.transformer import open_mesh
    from memorizing.parallel import hosts
    from memorizing.training.loop import train
    from memorizing.training.workdir import check_data, held_run, open_tokens

    workdir = run_folder("--workdir", options.workdir)
    hosts.start(options.coordinator, options.processes, options.process)
    if workdir.exists() and not workdir.is_dir():
        raise InputError(f"--workdir={workdir} is a file: name a folder")
    it, text = open_workdir(workdir, options.gin_file, options.gin_param, hosts.say)
    check_data(workdir, open_tokens(it.training.data, it.model), train=True)
    open_mesh(it.mesh, it.model, it.memory, it.batch.segment_length, it.batch.rows)
    with held_run(workdir):
        write_config(workdir, text)  # only now: settings that cannot be used replace none that can
        train(it.model, it.memory, it.batch, it.optimizer, it.training, it.mesh, workdir, options.drop_memory)


def _plan(options: argparse.Namespace) -> None:
    from memorizing.config import load
    from memorizing.training.plan import plan

    if not options.gin_file:
        raise InputError("--gin_file is missing: name what to plan, such as --gin_file=configs/base.gin")
    it, _ = load(options.gin_file, options.gin_param)
    plan(it.model, it.memory, it.batch, it.optimizer, it.training, it.mesh, options.topology, options.json)


def _evaluate(options: argparse.Namespace) -> None:
    from memorizing.config import load_trained
    from memorizing.evaluation.corpora import open_corpora
    from memorizing.evaluation.evaluate import Run, evaluate, readings, restore, xl_caches
    from memorizing.files import run_folder
    from memorizing.model.transformer import open_mesh
    from memorizing.parallel import hosts
    from memorizing.training.signals import die_at_sigterm
    from memorizing.training.snapshots import Source, parameters_digest, prebuilt_banks

    workdir = run_folder("--workdir", options.workdir)
    hosts.start(options.coordinator, options.processes, options.process)
    die_at_sigterm()
    it = load_trained(workdir, options.gin_file, options.gin_param)
    memories = [it.with_memory_size(size).memory for size in options.memory_size or [it.memory.size]]
    segment, rows = it.batch.segment_length, it.evaluation.rows
    meshes = [open_mesh(it.mesh, it.model, memory, segment, rows, "Evaluation.rows") for memory in memories]

    own, splits = it.evaluation.data or it.training.data, options.split or [it.evaluation.split]
    corpora = open_corpora(options.data, splits, own, workdir, it.model)
    parameters, step = restore(workdir, it.model, meshes[0])
    name, prebuilt = options.name, [()] * len(memories)
    if options.memory:
        vocabulary = corpora[0].tokens.digests()["vocabulary"]
        source = Source(it.model, segment, vocabulary, parameters_digest(parameters), step)
        prebuilt = [
            prebuilt_banks(options.memory, source, memory, mesh) if memory.size or len(memories) == 1 else ()
            for memory, mesh in zip(memories, meshes, strict=True)
        ]
        name = name or f"from-{options.memory.name}"
    planned = readings(
        corpora, zip(memories, meshes, prebuilt, strict=True), xl_caches(options.xl_cache, it.model.xl_cache), name
    )
    evaluate(Run(workdir, it.model, segment, parameters, step), planned, it.evaluation, options.per_token)


def _inspect(options: argparse.Namespace) -> None:
    import jax

    from memorizing.config import load_trained
    from memorizing.evaluation import inspect
    from memorizing.evaluation.evaluate import restore
    from memorizing.evaluation.perplexity import check_losses
    from memorizing.files import run_folder
    from memorizing.model.transformer import open_mesh
    from memorizing.parallel.mesh import MeshSettings
    from memorizing.training.workdir import readable_tokens

    workdir = run_folder("--workdir", options.workdir)
    it = load_trained(workdir, options.gin_file, options.gin_param)
    size = it.memory.size if options.memory_size is None else options.memory_size
    memory = it.with_memory_size(size).memory
    if not memory.size or not it.model.memory_layers:
        raise InputError(
            f"--workdir={workdir} has no memory to look into (Memory.size = {memory.size}, Model.memory_layers = "
            f"{it.model.memory_layers}): name a run that has, or --memory_size"
        )
    tokens = readable_tokens(workdir, it.evaluation.data or it.training.data, it.model)
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


def _drift(options: argparse.Namespace) -> None:
    from memorizing.config import load_trained
    from memorizing.evaluation.drift import drift
    from memorizing.files import run_folder
    from memorizing.model.transformer import open_mesh
    from memorizing.training.checkpoints import Checkpoints
    from memorizing.training.state import StateMaker
    from memorizing.training.workdir import check_data, open_tokens

    workdir = run_folder("--workdir", options.workdir)
    it = load_trained(workdir, options.gin_file, options.gin_param)
    tokens = open_tokens(it.training.data, it.model)
    check_data(workdir, tokens, train=True)
    mesh = open_mesh(it.mesh, it.model, it.memory, it.batch.segment_length, it.batch.rows)
    make = StateMaker(it.model, it.memory, it.batch, it.optimizer, it.training, mesh)
    with Checkpoints(workdir, index_kind=make.index_kind()) as checkpoints:
        drift(checkpoints, make, it.model, it.memory, it.batch, tokens.split("train"), options.json)


def _sizes(text: str) -> list[int]:
    try:
        return [int(size) for size in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not whole numbers with commas between: 0,512,2048") from None


def _names(text: str) -> list[str]:
    return text.split(",")


def _name(text: str) -> str:
    if not re.fullmatch(r"[\w.-]*", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} has to be letters, digits, '.', '-' and '_', as part of a file's name"
        )
    return text


def _compare(options: argparse.Namespace) -> None:
    from memorizing.config import load_trained
    from memorizing.evaluation.compare import compare
    from memorizing.files import run_folder

    without_memory, with_memory = run_folder("--without", options.without), run_folder("--with", options.with_)
    split = load_trained(with_memory, options.gin_file, options.gin_param).evaluation.split
    compare(without_memory, with_memory, split, options.out)


def _report(options: argparse.Namespace) -> None:
    from memorizing.evaluation.report import report_run, report_sweep
    from memorizing.files import run_folder

    if options.sweep:
        report_sweep(options.sweep, options.out)
    else:
        report_run(run_folder("--workdir", options.workdir), options.out)


def _generate(options: argparse.Namespace) -> None:
    from memorizing.data.documents import read_text
    from memorizing.evaluation.generate import SamplingSettings, check_tokens

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


def _memorize(options: argparse.Namespace) -> None:
    from memorizing.training.snapshots import check_folder

    if not options.document:
        raise InputError("--document is missing: name a file or folder to read")
    check_folder("--out", options.out)
    is_new = _reader(options, options.out).save(options.out)
    print(f"snapshot: {options.out}" if is_new else f"{options.out} holds just this already")


def _reader(options: argparse.Namespace, out: Path | None = None):
    """A reader that has read what the options name, to be saved in `out`; it tells of that on the standard error."""
    from memorizing.api import open_reader

    for path in options.document:
        if not path.exists():  # before a model is loaded for nothing
            raise InputError(f"--document={path}: no such file or folder")
    say = functools.partial(print, file=sys.stderr, flush=True)
    reader = open_reader(options.workdir, options.memory_size, options.gin_file, options.gin_param, say)
    if options.memory:
        reader.load(options.memory)
        say(f"{options.memory}: {reader.tokens:,} tokens were read")
    if out is not None and out.exists():
        reader.check_save(out, options.document)
    for path in options.document:
        reader.read_files(path)
    if reader.tokens and reader.memory.size:
        say(f"{reader.tokens:,} tokens read, of which {reader.remembered:,} are in a memory of {reader.memory.size:,}")
    return reader


def _import(options: argparse.Namespace) -> None:
    from memorizing.files import run_folder
    from memorizing.pretrained.importing import import_pretrained

    workdir = run_folder("--workdir", options.workdir)
    import_pretrained(options.from_, workdir, options.memory_layers, options.gin_file, options.gin_param)


def _export(options: argparse.Namespace) -> None:
    from memorizing.files import run_folder
    from memorizing.pretrained.exporting import DROPS, export

    if unknown := set(options.drop) - set(DROPS):
        raise InputError(f"--drop={','.join(sorted(unknown))}: what can be left out are {', '.join(DROPS)}")
    export(run_folder("--workdir", options.workdir), options.out, options.drop)


def _sweep(options: argparse.Namespace) -> None:
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


def _bench_search(options: argparse.Namespace) -> None:
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


def _bench_step(options: argparse.Namespace) -> None:
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


if __name__ == "__main__":
    sys.exit(main())
