"""Measures the rate of `memorizing prepare` on PG-19 texts, next to calling sentencepiece on the same texts.

    python tests/benchmarks/prepare_throughput.py RAW [--repeat 1,8] [--vocabulary MODEL]

RAW is a folder as configs/pg19.gin reads it. Each round runs both in turn, each in a process of its own with the same
cores: sentencepiece over all texts in memory, line by line, in lists of a document each; and `prepare` from the raw
files, with the vocabulary given. Prints medians of the rounds, and prepare's peak memory. Nothing else should run.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

DIRECT = """
import json, sys, time
from pathlib import Path
import sentencepiece
from memorizing.data.corpora.pg19 import Pg19
corpus = Pg19()
texts = [reading.document.text for item in corpus.list(Path(sys.argv[1])) for reading in corpus.read(item)]
processor = sentencepiece.SentencePieceProcessor(model_file=sys.argv[2])
started = time.perf_counter()
for text in texts:
    processor.encode(text.splitlines(keepends=True))
print(json.dumps([sum(len(text.encode()) for text in texts), time.perf_counter() - started]))
"""


def direct(raw: Path, vocabulary: Path) -> float:
    """MB/s of sentencepiece itself."""
    command = [sys.executable, "-c", DIRECT, str(raw), str(vocabulary)]
    size, seconds = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    return size / seconds / 1e6


def prepare(raw: Path, vocabulary: Path, out: Path) -> tuple[float, float, int]:
    """MB/s of the tokenizing stage, seconds of the whole command, its peak memory in MB."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "memorizing.cli", "prepare", "--gin_param", "Prepare.source = 'pg19'"]
    command += ["--gin_param", f"Prepare.vocabulary_from = '{vocabulary}'", f"--raw={raw}", f"--out={out}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    said = process.stdout.read() if process.stdout else ""
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, said
    tokenized = re.search(r"tokenized ([\d,]+) bytes in ([\d.]+) s \(([\d.]+) MB/s\), ([\d.]+) s in all", said)
    assert tokenized, said
    return float(tokenized[3]), float(tokenized[4]), usage.ru_maxrss // 1024


def main() -> None:
    """Runs and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("raw", type=Path)
    parser.add_argument("--repeat", default="1,8", help="of the corpus, by copies under other names")
    parser.add_argument("--vocabulary", type=Path, help="a SentencePiece model; default: 8,000 tokens, trained here")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print("corpus     sentencepiece        prepare: tokenizing   share   whole command   peak memory")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        vocabulary = options.vocabulary or trained(options.raw, folder)
        for repeat in map(int, options.repeat.split(",")):
            raw = folder / f"raw-{repeat}"
            for path in sorted(options.raw.glob("*/*.txt")):
                for copy in range(repeat):
                    target = raw / path.parent.name / f"{copy + 1}00{path.name}"
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, target)
            rounds = [
                (direct(raw, vocabulary), *prepare(raw, vocabulary, folder / "out")) for _ in range(options.rounds)
            ]
            alone, own, seconds, memory = (statistics.median(values) for values in zip(*rounds, strict=True))
            print(f"{repeat:>5}x {alone:>13.1f} MB/s {own:>20.1f} MB/s {own / alone:>9.0%}", end="")
            print(f"{seconds:>11.1f} s {memory:>13,} MB")


def trained(raw: Path, folder: Path) -> Path:
    """A vocabulary of the train split."""
    from memorizing.data.corpora.pg19 import Pg19
    from memorizing.data.vocabulary import save_vocabulary, train_sentencepiece

    corpus = Pg19()
    readings = (reading for item in corpus.list(raw) if item.split == "train" for reading in corpus.read(item))
    texts = (reading.document.text for reading in readings if reading.document)
    save_vocabulary(train_sentencepiece(texts, 8000, "unigram", 4_000_000), folder)
    return folder / "vocabulary.model"


if __name__ == "__main__":
    main()
