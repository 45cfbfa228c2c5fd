"""`memorizing import`: see `pretrained/importing.py`."""

import argparse
from pathlib import Path

from memorizing.commands.arguments import add_settings, whole_numbers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `memorizing import`."""
    parser.add_argument(
        "--from", type=Path, metavar="DIR", required=True, dest="from_",
        help="folder of a Hugging Face model: config.json, *.safetensors, tokenizer",
    )  # fmt: skip
    parser.add_argument("--workdir", metavar="DIR", required=True, help="folder to create for the run")
    parser.add_argument(
        "--memory_layers", type=whole_numbers, default=[], metavar="L[,L...]",
        help="layers that get a memory, counted from 1; default: none",
    )  # fmt: skip
    add_settings(parser)


def run(options: argparse.Namespace) -> None:
    """Imports a pretrained model (GPT-2, Llama, Mistral, Qwen2, Qwen3) as a run, to evaluate or fine-tune."""
    from memorizing.files import run_folder
    from memorizing.pretrained.importing import import_pretrained

    workdir = run_folder("--workdir", options.workdir)
    import_pretrained(options.from_, workdir, options.memory_layers, options.gin_file, options.gin_param)
