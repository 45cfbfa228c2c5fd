"""The one command, `memorizing`: its options, and how its errors are told. What each subcommand does: `commands.py`.

Everything else is imported where it is used, so that `--help` answers at once.
"""

import argparse
import re
import sys
import traceback
from pathlib import Path

from memorizing import commands
from memorizing.errors import InputError

DESCRIPTION = """\
Train and use Memorizing Transformers: language models that look up the exact keys and values of earlier tokens.

  memorizing prepare       text         -> tokens          once per corpus
  memorizing show_data  tokens       -> what they hold
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
            if not hosts.is_distributed():
                raise
            traceback.print_exc()
        else:
            which = f" (process {hosts.number()})" if hosts.is_distributed() else ""
            print(f"memorizing {options.command}{which}: {message}", file=sys.stderr)
    except KeyboardInterrupt:
        again = "; the same command goes on from there" if options.command == "prepare" else ""
        print(f"memorizing {options.command}: interrupted{again}", file=sys.stderr)
        status = 130
    hosts.shutdown(status, together=status == RUN_ME_AGAIN)
    return status


def _explained(error: Exception) -> tuple[int, str]:
    """The exit status for an error, and what to say of it; nothing where only a traceback will do."""
    from jax.errors import JaxRuntimeError

    from memorizing.benchmarks.report import BenchFailed
    from memorizing.parallel import hosts
    from memorizing.planning.plan import DoesNotFit
    from memorizing.storage.checkpoints import CorruptCheckpoint, SaveFailed
    from memorizing.sweep.run import PointsFailed
    from memorizing.training.loop import NonFiniteLoss
    from memorizing.training.signals import Interrupted

    if isinstance(error, Interrupted):
        return error.exit_status, f"interrupted: {error}"
    if isinstance(error, InputError | NonFiniteLoss | DoesNotFit):
        return 2, f"error: {error}"
    if isinstance(error, SaveFailed | CorruptCheckpoint | OSError | BenchFailed | PointsFailed):
        return 1, f"error: {error}"
    if isinstance(error, JaxRuntimeError) and hosts.is_distributed():
        return 1, f"error: lost another process, or the way to it: {error}. Repeat the command in all of them"
    return 1, ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "memorizing", description=DESCRIPTION, epilog=SETTINGS, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    subcommands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run, has_settings: bool = True, among=subcommands) -> argparse.ArgumentParser:
        """A subcommand, whose summary is the docstring of what it runs."""
        sub = among.add_parser(
            name, help=run.__doc__, description=run.__doc__, epilog=SETTINGS if has_settings else None,
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

    prepare = command("prepare", commands.prepare)
    prepare.add_argument("--raw", type=Path, metavar="DIR", help="folder of documents")
    prepare.add_argument("--out", type=Path, metavar="DIR", required=True, help="folder to make for the tokens")
    prepare.add_argument(
        "--data_dir",
        type=Path,
        metavar="DIR",
        help="where TFDS finds or keeps a corpus's documents, for other vocabularies",
    )

    data = command("show_data", commands.inspect_data, has_settings=False)
    data.add_argument("data", type=Path, metavar="DIR", help="prepared tokens")
    data.add_argument("--split", default="train", help="of the document; default: train")
    data.add_argument("--document", metavar="NAME", help="to show; default: the first")
    data.add_argument("--segment_length", type=int, default=512, metavar="N", help="tokens of a segment; default: 512")

    train = command("train", commands.train)
    train.add_argument(
        "--workdir", metavar="DIR", required=True, help="the run: settings, checkpoints, metrics; or gs://BUCKET/RUN"
    )
    train.add_argument(
        "--reset_memory", action="store_true", help="go on with an empty memory instead of the one that was saved"
    )
    many(train)

    plan = command("plan", commands.plan)
    plan.add_argument(
        "--topology", default="local", metavar="NAME", help="a TPU slice such as v5p:4x4x4; default: the devices here"
    )
    plan.add_argument("--json", type=Path, metavar="FILE", help="to write the figures to")

    evaluate = command("evaluate", commands.evaluate)
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

    inspect = command("inspect", commands.inspect)
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

    compare = command("compare", commands.compare)
    compare.add_argument("--without", metavar="WORKDIR", required=True, help="run trained without memory")
    compare.add_argument("--with", metavar="WORKDIR", required=True, dest="with_", help="run with memory")
    compare.add_argument("--out", type=Path, metavar="DIR", required=True, help="folder for results.json and .png")

    report = command("report", commands.report, has_settings=False)
    of = report.add_mutually_exclusive_group(required=True)
    of.add_argument("--workdir", metavar="DIR", help="a run; or gs://BUCKET/RUN")
    of.add_argument("--sweep", type=Path, metavar="DIR", help="what `memorizing sweep` made")
    report.add_argument("--out", type=Path, metavar="FILE", help="the page; default: report.html in that folder")

    drift = command("drift", commands.drift)
    drift.add_argument("--workdir", metavar="DIR", required=True, help="of the run; or gs://BUCKET/RUN")
    drift.add_argument("--json", type=Path, metavar="FILE", help="to write the figures to")

    generate = command("generate", commands.generate)
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

    memorize = command("memorize", commands.memorize)
    _reads(memorize)
    memorize.add_argument("--memory", type=Path, metavar="DIR", help="a snapshot to begin from")
    memorize.add_argument("--out", type=Path, metavar="DIR", required=True, help="folder to make for the snapshot")

    importing = command("import", commands.import_pretrained)
    importing.add_argument(
        "--from", type=Path, metavar="DIR", required=True, dest="from_",
        help="of Hugging Face: config.json, *.safetensors, tokenizer",
    )  # fmt: skip
    importing.add_argument("--workdir", metavar="DIR", required=True, help="the run to make")
    importing.add_argument(
        "--memory_layers", type=_sizes, default=[], metavar="L[,L...]",
        help="that get a memory, counted from 1; default: none",
    )  # fmt: skip

    export = command("export", commands.export, has_settings=False)
    export.add_argument("--workdir", metavar="DIR", required=True, help="of the run; or gs://BUCKET/RUN")
    export.add_argument("--out", type=Path, metavar="DIR", required=True, help="folder to make")
    export.add_argument(
        "--omit", type=_names, default=[], metavar="NAME[,NAME...]",
        help="to leave out of it what has no place there: gates, normalization, key_shift",
    )  # fmt: skip

    sweep = command("sweep", commands.sweep)
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
    sweep.add_argument("--dry_run", action="store_true", help="prints the commands, or the jobs")

    summary = "What searches and train steps take on this device, each beside what it is to be compared with."
    bench = subcommands.add_parser("bench", help=summary, description=summary)
    benches = bench.add_subparsers(dest="bench", required=True, metavar="search|step")
    search = command("search", commands.bench_search, among=benches)
    search.add_argument("--shapes", metavar="SHAPES", help="such as B8xH8xN512xM65536xD128xK32,M8192")
    search.add_argument("--searches", metavar="NAMES", help="such as exact,blocked; default: those for the device")
    search.add_argument("--dtype", metavar="NAMES", help="of keys: float32, bfloat16, int8, float8; with commas")
    search.add_argument(
        "--workdir", metavar="DIR", help="of a run, whose queries and keys are searched; default: random"
    )
    step = command("step", commands.bench_step, among=benches)
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


if __name__ == "__main__":
    sys.exit(main())
