"""Gin text as plain bindings. Reading it runs nothing that it names: the only file that imports gin.

A statement sets a setting (`Section.name = value`) or a macro (`NAME = value`). A value is a Python literal, in which
`%NAME` stands for a macro. gin's references (`@name`) and imports could run code, so they are rejected. Files that a
user names may import modules that are loaded already; `import_modules` loads them if the user asks for it.
"""

import importlib
import io
import sys
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gin import config_parser

from memorizing.errors import InputError
from memorizing.files import AnyPath

LARGEST_TEXT = 1 << 20
"""Largest file of settings, in bytes."""

MOST_VALUES = 10_000
"""Largest number of values in one setting, with its macros replaced."""


class ConfigError(InputError):
    """A setting that cannot be used. The message names it, its value, the rule and a way out."""


class Macro(NamedTuple):
    """A macro inside a value."""

    name: str

    def __repr__(self) -> str:
        return f"%{self.name}"


class Reference(NamedTuple):
    """A gin reference inside a value; always rejected."""

    name: str


class Bound(NamedTuple):
    """A value as it was written, and where: a prefix for messages."""

    value: Any
    where: str


class Bindings:
    """The settings and macros of gin files and single bindings; later ones win.

    Attributes:
        settings: values by `Section.name`.
        macros: values of macros by name.
        mentioned: names of all macros that some value, even one that was overridden, refers to.
    """

    def __init__(self) -> None:
        self.settings: dict[str, Bound] = {}
        self.macros: dict[str, Bound] = {}
        self.mentioned: set[str] = set()

    def read(self, files: Sequence[str | AnyPath], texts: Sequence[str]) -> None:
        """Reads gin files that a user names, then single bindings, such as `MEMORY_SIZE = 8192`.

        Raises:
            ConfigError: names the file and the line, or quotes the binding.
        """
        for statement, where in _given_statements(files, texts):
            if isinstance(statement, config_parser.ImportStatement):
                if _module(statement) not in sys.modules:
                    raise ConfigError(
                        f"{where}imports {_module(statement)}, which would run its code. Remove the line, or allow it "
                        "with --allow_imports"
                    )
            else:
                self._take(statement, where)

    def read_saved(self, path: AnyPath) -> None:
        """Reads the settings that a run saved: bindings, and nothing else.

        Raises:
            ConfigError: names the file and the line.
        """
        for statement, where in _statements(_text(path), str(path)):
            if isinstance(statement, config_parser.IncludeStatement | config_parser.ImportStatement):
                raise ConfigError(
                    f"{where}the settings of a run include and import nothing. Remove the line if you trust the rest"
                )
            self._take(statement, where)

    def resolve(self, value: Any) -> Any:
        """Returns a value with its macros replaced.

        Raises:
            ConfigError: if a macro is not set, refers to itself, or grows beyond `MOST_VALUES`.
        """
        try:
            if self._size(value, (), {}) > MOST_VALUES:
                raise ConfigError(f"{_short(repr(value))} has more than {MOST_VALUES:,} values. Use fewer")
            return self._replaced(value)
        except RecursionError as error:
            raise ConfigError(f"{_short(repr(value))}: its macros use each other too deeply. Use values") from error

    def used_macros(self) -> dict[str, Any]:
        """Returns the macros that the settings use, directly or through other macros, sorted by name."""
        used: set[str] = set()
        pending = [name for bound in self.settings.values() for name in _macros_in(bound.value)]
        while pending:
            name = pending.pop()
            if name not in used:
                used.add(name)
                pending += _macros_in(self.macros[name].value)
        return {name: self.macros[name].value for name in sorted(used)}

    def _take(self, statement: Any, where: str) -> None:
        if not isinstance(statement, config_parser.BindingStatement):
            return  # the head of a block, whose bindings follow with their whole names
        scope, selector, argument, value, _ = statement
        name = f"{selector}.{argument}" if argument else selector
        if scope:
            raise ConfigError(f"{where}{scope}/{name}: settings have no scopes; write {name} = ...")
        for part in _parts(value):
            if isinstance(part, Reference):
                raise ConfigError(f"{where}@{part.name} refers to a function. Write a plain value")
        self.mentioned.update(_macros_in(value))
        (self.settings if argument else self.macros)[name] = Bound(value, where)

    def _macro(self, name: str, inside: tuple[str, ...]) -> Any:
        if name in inside:
            raise ConfigError(f"the macro %{name} refers to itself. Give it a plain value")
        if name not in self.macros:
            raise ConfigError(
                f"the macro %{name} is used but never set; add `{name} = VALUE`, or include configs/base.gin"
            )
        return self.macros[name].value

    def _size(self, value: Any, inside: tuple[str, ...], sizes: dict[str, int]) -> int:
        """Returns the number of values with macros replaced, without replacing them: they may double many times."""
        if not isinstance(value, Macro):
            return sum(self._size(part, inside, sizes) for part in _members(value)) or 1
        if value.name not in sizes:
            sizes[value.name] = self._size(self._macro(value.name, inside), (*inside, value.name), sizes)
        return sizes[value.name]

    def _replaced(self, value: Any) -> Any:
        if isinstance(value, Macro):
            return self._replaced(self.macros[value.name].value)
        if isinstance(value, tuple | list):
            return type(value)(self._replaced(part) for part in value)
        return value


def import_modules(files: Sequence[str | AnyPath], texts: Sequence[str]) -> None:
    """Imports the modules that gin files and bindings ask for, which runs their code.

    Raises:
        ConfigError: if a module cannot be imported.
    """
    for statement, where in _given_statements(files, texts):
        if isinstance(statement, config_parser.ImportStatement):
            try:
                importlib.import_module(_module(statement))
            except ImportError as error:
                raise ConfigError(f"{where}{error}. Install the module, or remove the line") from error


def _module(statement: config_parser.ImportStatement) -> str:
    """Returns the module that an import loads: `a` for `from a import b`."""
    return statement.module.rpartition(".")[0] if statement.is_from else statement.module


def _given_statements(files: Sequence[str | AnyPath], texts: Sequence[str]) -> Iterator[tuple[Any, str]]:
    """Yields the statements of files, of the files that they include, and of single bindings."""
    for file in files:
        path = Path(file) if isinstance(file, str) else file
        if not path.is_file():
            raise ConfigError(f"--gin_file={file}: no such file")
        yield from _with_includes(_statements(_text(path), str(path)), (path,))
    for text in texts:
        yield from _with_includes(_statements(text), ())


def _with_includes(statements: Iterator[tuple[Any, str]], including: tuple[AnyPath, ...]) -> Iterator[tuple[Any, str]]:
    """Yields statements, with those of included files in their place; `including` ends with the file they are from."""
    for statement, where in statements:
        if not isinstance(statement, config_parser.IncludeStatement):
            yield statement, where
            continue
        folder = including[-1].parent if including else Path()
        path = folder / statement.filename
        if path in including:
            circle = " -> ".join(map(str, (*including, path)))
            raise ConfigError(f"{path} includes itself, via {circle}. Remove one of these includes")
        if not path.is_file():
            raise ConfigError(f"{where}includes {statement.filename!r}, but {path} is not a file. Correct the path")
        yield from _with_includes(_statements(_text(path), str(path)), (*including, path))


def _text(path: AnyPath) -> str:
    """Returns the text of a file of settings, without a byte-order mark."""
    content = path.read_bytes()
    if len(content) > LARGEST_TEXT:
        raise ConfigError(f"{path} has {len(content):,} bytes, more than the {LARGEST_TEXT:,} of any file of settings")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}, line {line}: is not UTF-8. Save the file in UTF-8") from error


class _Parts(config_parser.ParserDelegate):
    """Tells gin's parser how to represent references and macros."""

    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> Any:
        return Reference(scoped_configurable_name)

    def macro(self, macro_name: str) -> Any:
        return Macro(macro_name)


def _statements(text: str, path: str | None = None) -> Iterator[tuple[Any, str]]:
    """Yields the statements of a file, or of a single binding, each with the prefix for messages about it."""
    quoted = f"{_short(text)!r}: "
    try:
        parser = config_parser.ConfigParser(io.StringIO(text), _Parts())
        for statement in parser:
            yield statement, quoted if path is None else f"{path}, line {statement.location.line_num}: "
    except (SyntaxError, tokenize.TokenError, ValueError, RecursionError, MemoryError, OverflowError) as error:
        line = getattr(error, "lineno", None)
        where = quoted if path is None else f"{path}, line {line}: " if line else f"{path}: "
        raise ConfigError(
            f"{where}{_problem(error)}. Write settings as 'Section.name = value' or 'MACRO = value', text in quotes"
        ) from error


def _problem(error: BaseException) -> str:
    if isinstance(error, RecursionError | MemoryError) or "too many nested" in str(error):
        return "brackets are nested too deeply"
    if isinstance(error, tokenize.TokenError):
        return "a bracket or a quote is not closed"
    message = error.msg if isinstance(error, SyntaxError) else str(error)
    return _short(message.splitlines()[0].rstrip(".")) if message else "it cannot be read"


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:150]} ... {text[-30:]}"


def _members(value: Any) -> Sequence[Any]:
    """Returns the parts of a tuple, list or dictionary; nothing for other values."""
    if isinstance(value, Macro | Reference):
        return ()
    if isinstance(value, dict):
        return [part for item in value.items() for part in item]
    return value if isinstance(value, tuple | list) else ()


def _parts(value: Any) -> Iterator[Any]:
    """Yields a value and everything inside it."""
    pending = [value]
    while pending:
        part = pending.pop()
        yield part
        pending.extend(_members(part))


def _macros_in(value: Any) -> list[str]:
    return [part.name for part in _parts(value) if isinstance(part, Macro)]
