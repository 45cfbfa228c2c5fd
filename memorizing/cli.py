"""The command `memorizing`: builds its parser from `commands/`, runs a subcommand and reports its errors.

Everything slow to load is imported where it is used, so that `--help` answers at once.
"""

import argparse
import functools
import io
import os
import signal
import sys
import traceback

from memorizing.commands import COMMANDS
from memorizing.commands.arguments import SETTINGS
from memorizing.commands.renamed import renamed
from memorizing.errors import InputError

DESCRIPTION = """\
Train and use Memorizing Transformers: language models that look up the exact keys and values of earlier tokens.
`memorizing COMMAND --help` explains a command.
"""


def main(arguments: list[str] | None = None) -> int:
    """Runs a subcommand and returns its exit status; errors that a user can fix are printed without a traceback."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = make_parser()
    if message := renamed(arguments) or _not_utf8(arguments):
        parser.error(message)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows `?`
    options = parser.parse_args(arguments)
    options.arguments = arguments
    from memorizing.parallel import hosts
    from memorizing.training.signals import RUN_ME_AGAIN

    try:
        if getattr(options, "allow_imports", False):
            from memorizing.bindings import import_modules

            import_modules(options.gin_file, options.gin_param)
        options.run(options)
        sys.stdout.flush()
        return 0
    except BrokenPipeError:  # the reader of the output ended, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        status = 128 + signal.SIGPIPE
    except Exception as error:
        status, message = _status_and_message(error)
        if not message:
            if not hosts.is_distributed():
                raise
            traceback.print_exc()
        else:
            process = f" (process {hosts.number()})" if hosts.is_distributed() else ""
            print(f"memorizing {options.command}{process}: {message}", file=sys.stderr)
    except KeyboardInterrupt:
        hint = "; repeat the command to resume" if options.command == "prepare" else ""
        print(f"memorizing {options.command}: interrupted{hint}", file=sys.stderr)
        status = 130
    hosts.shutdown(status, together=status == RUN_ME_AGAIN)
    return status


def _not_utf8(arguments: list[str]) -> str:
    """Returns a message if an argument is not UTF-8; empty if all are."""
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            return f"{argument!r} is not UTF-8. Give texts and paths in UTF-8, or put a text into a file"
    return ""


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line, with a subparser for each of `COMMANDS`."""
    style = functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=32)
    parser = argparse.ArgumentParser("memorizing", description=DESCRIPTION, epilog=SETTINGS, formatter_class=style)
    subparsers = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        summary = command.run.__doc__
        subparser = subparsers.add_parser(name, help=summary, description=summary, formatter_class=style)
        subparser.set_defaults(run=command.run)
        command.add_arguments(subparser)
    return parser


def _status_and_message(error: Exception) -> tuple[int, str]:
    """Returns the exit status of an error and its message; an empty message asks for a traceback."""
    from jax.errors import JaxRuntimeError

    from memorizing.benchmarks.report import BenchFailed
    from memorizing.parallel import hosts
    from memorizing.planning.plan import DoesNotFit
    from memorizing.storage.checkpoints import CorruptCheckpoint, SaveFailed
    from memorizing.sweep.run import PointsFailed
    from memorizing.training.reporter import NonFiniteLoss
    from memorizing.training.signals import Interrupted

    if isinstance(error, Interrupted):
        return error.exit_status, f"interrupted: {error}"
    if isinstance(error, InputError | NonFiniteLoss | DoesNotFit):
        return 2, f"error: {error}"
    if isinstance(error, SaveFailed | CorruptCheckpoint | OSError | BenchFailed | PointsFailed):
        return 1, f"error: {error}"
    if isinstance(error, JaxRuntimeError) and hosts.is_distributed():
        return 1, f"error: lost the connection to another process: {error}. Repeat the command in all processes"
    return 1, ""


if __name__ == "__main__":
    sys.exit(main())
