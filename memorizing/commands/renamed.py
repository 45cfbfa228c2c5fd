"""Old names of subcommands and flags; each is refused with its new name."""

from collections.abc import Sequence

SUBCOMMANDS = {"inspect-data": "show_data"}
FLAGS = {"--drop": "--omit", "--drop_memory": "--reset_memory", "--dry-run": "--dry_run"}


def renamed(arguments: Sequence[str]) -> str:
    """Returns a message that gives the new name of the first old one in `arguments`; empty if there is none."""
    if arguments and arguments[0] in SUBCOMMANDS:
        return f"{arguments[0]} is now {SUBCOMMANDS[arguments[0]]}"
    flags = [argument.partition("=")[0] for argument in arguments]
    return next((f"{flag} is now {FLAGS[flag]}" for flag in flags if flag in FLAGS), "")
