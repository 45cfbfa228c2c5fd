"""`memorizing generate`: see `generation/reader.py`."""

import argparse
from pathlib import Path

from memorizing.commands.arguments import add_documents, add_settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `memorizing generate`."""
    add_documents(parser)
    parser.add_argument(
        "--clear_memory", action="store_true",
        help="empty the memory before the prompt; only the XL caches and the last partial segment remain",
    )  # fmt: skip
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", default="", metavar="TEXT", help="text to continue, after the documents")
    prompt.add_argument("--prompt_file", type=Path, metavar="FILE", help="file with the text to continue")
    parser.add_argument("--tokens", type=int, default=200, metavar="N", help="number of tokens to write; default: 200")
    parser.add_argument(
        "--temperature", type=float, default=1.0, metavar="T", help="divisor of the logits; 0 is greedy; default: 1"
    )
    parser.add_argument(
        "--top_k", type=int, default=0, metavar="K", help="sample from the K likeliest tokens; default: 0, all tokens"
    )
    parser.add_argument(
        "--top_p", type=float, default=1.0, metavar="P",
        help="sample from the smallest set of tokens whose probabilities add up to P (nucleus sampling); default: 1",
    )  # fmt: skip
    parser.add_argument(
        "--seed", type=int, default=0, help="random seed; the same seed gives the same text; default: 0"
    )
    add_settings(parser)


def run(options: argparse.Namespace) -> None:
    """Reads documents into memory, then continues a prompt."""
    from memorizing.commands.memorize import read_documents
    from memorizing.data.documents import read_text
    from memorizing.files import run_folder
    from memorizing.generation.reader import SamplingSettings, check_tokens
    from memorizing.runs import load_trained

    sampling = SamplingSettings(options.temperature, options.top_k, options.top_p, options.seed)
    check_tokens(options.tokens)  # before documents are read, which takes long
    prompt = options.prompt
    if options.prompt_file:
        config = load_trained(run_folder("--workdir", options.workdir), options.gin_file, options.gin_param)
        prompt = read_text(options.prompt_file, config.folder.encoding)
    reader = read_documents(options)
    if options.clear_memory:
        reader.clear_memory()
    print(prompt, end="", flush=True)
    for text in reader.stream(prompt, options.tokens, sampling):
        print(text, end="", flush=True)
    print(reader.rest())
