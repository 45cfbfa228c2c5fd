"""A train step of the PyTorch port memorizing-transformers-pytorch 0.4.1 with memories that are full; torch only.

    PYTHON tests/benchmarks/peer_step.py --settings='{"memory_sizes": [0, 8192]}' [--rounds=10]     by itself, to JSON
    PYTHON tests/benchmarks/peer_step.py --settings=... --turns      a step for each size on a line of its input

PYTHON is that of setup_peer.sh. First a model is trained for `train_steps` on text (the source code of the standard
library, byte by byte), so that its keys and queries are learned ones; then each memory is filled by reading on, without
gradient; then its search is compared with the exact one, by the queries of one more segment. What is timed is forward,
backward, clipping and AdamW, on segments of the same text.

Two ways of the port that this works around, so that its memory is full and stays so:
- when its memory would overflow, it empties the whole index. So it is given room for the steps that are timed.
- it keeps what falls out of the XL cache, nothing of the first segment. So one more segment is read.
"""

import argparse
import json
import statistics
import sys
import sysconfig
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from memorizing_transformers_pytorch import MemorizingTransformer

DEFAULTS = {
    "vocabulary": 256,
    "layers": 4,
    "embedding": 256,
    "heads": 4,
    "head_size": 64,
    "feed_forward_multiple": 4,
    "memory_layers": [3],
    "rows": 4,
    "segment": 256,
    "neighbors": 32,
    "memory_sizes": [0, 1024, 8192, 32768, 65536],
    "steps": 11,
    "train_steps": 100,
    "train_memory": 4096,
}


def text(rows: int, vocabulary: int) -> torch.Tensor:
    """Bytes `[rows, T]` of the standard library's source code, as tokens below `vocabulary`, without 0: the padding."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    read = np.frombuffer(b"".join(file.read_bytes() for file in files), np.uint8)
    tokens = torch.from_numpy(read[: len(read) // rows * rows].astype(np.int64)).reshape(rows, -1)
    return tokens % (vocabulary - 1) + 1


class Run:
    """A model with its memories, reading on through the text."""

    def __init__(self, settings: dict, memory_size: int, folder: str, weights: dict | None = None):
        self.rows, self.segment = settings["rows"], settings["segment"]
        self.neighbors, self.size = settings["neighbors"], memory_size
        room = (settings["steps"] + 4) * self.segment
        torch.manual_seed(0)
        self.model = MemorizingTransformer(
            num_tokens=settings["vocabulary"],
            dim=settings["embedding"],
            depth=settings["layers"],
            dim_head=settings["head_size"],
            heads=settings["heads"],
            ff_mult=settings["feed_forward_multiple"],
            memorizing_layers=tuple(settings["memory_layers"]) if memory_size else (),
            max_knn_memories=memory_size + room if memory_size else 1,
            num_retrieved_memories=self.neighbors,
            knn_memories_directory=folder,
            xl_memory_layers=tuple(range(1, settings["layers"] + 1)),
            xl_max_memories=self.segment,
        )
        if weights is not None:
            self.model.load_state_dict(weights)
        self.memories = self.model.create_knn_memories(batch_size=self.rows)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.xl, self.place = None, 0
        self.tokens = text(self.rows, settings["vocabulary"])

    def next(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and labels of the next segment; from the beginning again at the end of the text."""
        if self.place + self.segment + 1 > self.tokens.shape[1]:
            self.place = 0
        read = self.tokens[:, self.place : self.place + self.segment + 1]
        self.place += self.segment
        return read[:, :-1].contiguous(), read[:, 1:].contiguous()

    def step(self) -> float:
        """Seconds of forward, backward and update."""
        inputs, labels = self.next()
        start = time.perf_counter()
        loss, self.xl = self.model(inputs, self.memories, xl_memories=self.xl, labels=labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        loss.item()
        return time.perf_counter() - start

    @torch.no_grad()
    def fill(self) -> None:
        """Reads until the memory holds `size` tokens a row."""
        while self.memories and self.memories[0].knns[0].index.ntotal < self.size:
            inputs, _ = self.next()
            _, self.xl = self.model(inputs, self.memories, xl_memories=self.xl)

    @torch.no_grad()
    def recall(self) -> float:
        """Share of the exact neighbors that FAISS finds, for the queries of the next segment, in all memories."""
        shares: list[float] = []
        searches = [memory.search for memory in self.memories]

        def listening(memory, search):
            def both(queries, topk, *rest, **more):
                for row, asked in enumerate(queries.detach().numpy()):
                    asked = np.ascontiguousarray(asked.reshape(-1, asked.shape[-1]))
                    found = memory.knns[row].search(asked, topk)
                    keys = memory.db[row, : memory.knns[row].index.ntotal, 0]
                    exact = np.argpartition(-(asked @ keys.T), topk - 1, axis=1)[:, :topk]
                    same = (found[:, :, None] == exact[:, None, :]).any(-1)
                    shares.append(float(same.mean()))
                return search(queries, topk, *rest, **more)

            return both

        for memory, search in zip(self.memories, searches, strict=True):
            memory.search = listening(memory, search)
        inputs, _ = self.next()
        self.model(inputs, self.memories, xl_memories=self.xl, add_knn_memory=False)
        self.place -= self.segment
        for memory in self.memories:
            del memory.search
        return statistics.fmean(shares)


def prepare(settings: dict, folder: str) -> tuple[dict[int, Run], dict[int, float]]:
    """Runs with full memories by size, and the recall of each."""
    weights = None
    if any(settings["memory_sizes"]) and settings["train_steps"]:
        trained = Run(settings, settings["train_memory"], tempfile.mkdtemp(dir=folder))
        for _ in range(settings["train_steps"]):
            trained.step()
        weights = trained.model.state_dict()
    runs, recalls = {}, {}
    for size in settings["memory_sizes"]:
        runs[size] = Run(settings, size, tempfile.mkdtemp(dir=folder), weights if size else None)
        runs[size].fill()
        if size:
            recalls[size] = runs[size].recall()
        runs[size].step()
    return runs, recalls


def main() -> None:
    """Prepares, then steps when asked to or in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", type=json.loads, default={}, help="JSON; what is left out is the small model")
    parser.add_argument("--rounds", type=int, default=10, help="in which all sizes take turns; default: 10")
    parser.add_argument("--turns", action="store_true", help="steps when a line of input names a memory size")
    options = parser.parse_args()
    settings = {**DEFAULTS, **options.settings}
    if not options.turns:
        settings["steps"] = options.rounds + 1
    with tempfile.TemporaryDirectory(prefix="peer-") as folder:
        runs, recalls = prepare(settings, folder)
        packages = ("memorizing-transformers-pytorch", "torch", "faiss-cpu", "numpy")
        about = {
            "name": f"{packages[0]} {version(packages[0])}",
            "versions": {"python": sys.version.split()[0], **{name: version(name) for name in packages}},
            "threads": torch.get_num_threads(),
            "train_steps": settings["train_steps"],
            "recall": {str(size): share for size, share in recalls.items()},
        }
        if options.turns:
            print(json.dumps(about), flush=True)
            for line in sys.stdin:
                print(json.dumps({"seconds": runs[int(line)].step()}), flush=True)
            return
        seconds = {size: [] for size in runs}
        for number in range(options.rounds):
            for size in runs if number % 2 == 0 else reversed(list(runs)):
                seconds[size].append(runs[size].step())
        medians = {str(size): statistics.median(of_size) for size, of_size in seconds.items()}
        print(json.dumps({**about, "settings": settings, "seconds": medians}, indent=1))


if __name__ == "__main__":
    main()
