"""The subcommands of `memorizing`, a file each.

A file has `add_arguments(parser)` and `run(options)`, whose docstring is the summary in `--help`. It imports what is
slow to load inside `run`, so that `--help` answers at once. To add a subcommand, add its file and a line here.
"""

from types import ModuleType

from memorizing.commands import (
    bench,
    compare,
    drift,
    evaluate,
    export,
    generate,
    import_pretrained,
    inspect,
    memorize,
    plan,
    prepare,
    report,
    settings,
    show_data,
    sweep,
    train,
)

COMMANDS: dict[str, ModuleType] = {
    "prepare": prepare,
    "show_data": show_data,
    "plan": plan,
    "train": train,
    "evaluate": evaluate,
    "compare": compare,
    "report": report,
    "inspect": inspect,
    "drift": drift,
    "generate": generate,
    "memorize": memorize,
    "import": import_pretrained,
    "export": export,
    "sweep": sweep,
    "bench": bench,
    "settings": settings,
}
"""Subcommands by name, in the order of the overview."""
