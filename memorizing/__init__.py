"""Memorizing Transformers (arXiv 2203.08913): train them, measure them, use them. The command is in `cli.py`.

    from memorizing import load_settings, train, evaluate, open_reader      # runs, as the command makes them
    from memorizing import create_model, empty_carry, apply_model, Batch    # the model, for a loop of your own
    from memorizing import empty_bank, write_segment, make_search           # the memory, for a model of your own

memorizing/README.md has an example of each. Names load on first use, so `import memorizing` itself imports nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memorizing.api import EvaluationRequest as EvaluationRequest
    from memorizing.api import evaluate as evaluate
    from memorizing.api import load_settings as load_settings
    from memorizing.api import open_reader as open_reader
    from memorizing.api import train as train
    from memorizing.memory.bank import Bank as Bank
    from memorizing.memory.bank import clear as clear
    from memorizing.memory.bank import empty_bank as empty_bank
    from memorizing.memory.bank import valid as valid
    from memorizing.memory.search_choice import make_search as make_search
    from memorizing.memory.settings import MemorySettings as MemorySettings
    from memorizing.memory.writing import Tokens as Tokens
    from memorizing.memory.writing import write_segment as write_segment
    from memorizing.model.carry import Carry as Carry
    from memorizing.model.carry import empty_carry as empty_carry
    from memorizing.model.memory_attention import attend_to_memory as attend_to_memory
    from memorizing.model.settings import ModelSettings as ModelSettings
    from memorizing.model.transformer import apply_model as apply_model
    from memorizing.model.transformer import create_model as create_model
    from memorizing.shapes import Batch as Batch

_NAMES_BY_MODULE = {
    "api": ("EvaluationRequest", "evaluate", "load_settings", "open_reader", "train"),
    "memory.bank": ("Bank", "clear", "empty_bank", "valid"),
    "memory.search_choice": ("make_search",),
    "memory.settings": ("MemorySettings",),
    "memory.writing": ("Tokens", "write_segment"),
    "model.carry": ("Carry", "empty_carry"),
    "model.memory_attention": ("attend_to_memory",),
    "model.settings": ("ModelSettings",),
    "model.transformer": ("apply_model", "create_model"),
    "shapes": ("Batch",),
}
_MODULE_OF = {name: module for module, names in _NAMES_BY_MODULE.items() for name in names}


def __getattr__(name: str) -> Any:
    """Loads a public name on first use."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'memorizing' has no attribute {name!r}. It has {', '.join(sorted(_MODULE_OF))}")
    return getattr(importlib.import_module(f"memorizing.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULE_OF])
