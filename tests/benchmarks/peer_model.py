"""The PyTorch port memorizing-transformers-pytorch 0.4.1, set up so that a train step with full memories can be timed.

First a model is trained for `train_steps` on text (the bytes of the standard library's source code), so that its keys
and queries are learned ones. Then each memory is filled by reading on without gradients, and its search is compared
with the exact one on the queries of one more segment. A step is forward, backward, clipping and AdamW on segments of
the same text.

Two properties of the port need a workaround, so that its memory fills and stays full:
- When its memory would overflow, it clears the whole index. So it gets room for the steps that are timed.
- It stores the tokens that leave the XL cache, so none of the first segment. So one more segment is read.
"""

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

PACKAGES = ("memorizing-transformers-pytorch", "torch", "faiss-cpu", "numpy")


def text(rows: int, vocabulary: int) -> torch.Tensor:
    """Returns the bytes of the standard library's source code as tokens `[rows, T]`, from 1 to `vocabulary` - 1."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    read = np.frombuffer(b"".join(file.read_bytes() for file in files), np.uint8)
    tokens = torch.from_numpy(read[: len(read) // rows * rows].astype(np.int64)).reshape(rows, -1)
    return tokens % (vocabulary - 1) + 1


class Run:
    """A model, its memories and its place in the text."""

    def __init__(self, settings: dict, memory_size: int, folder: str, weights: dict | None = None):
        self.rows, self.segment = settings["batch_size"], settings["segment_length"]
        self.neighbors, self.size = settings["neighbors"], memory_size
        room = (settings["rounds"] + 5) * self.segment
        torch.manual_seed(0)
        self.model = MemorizingTransformer(
            num_tokens=settings["vocabulary_size"],
            dim=settings["embedding_size"],
            depth=settings["layers"],
            dim_head=settings["head_size"],
            heads=settings["heads"],
            ff_mult=settings["feed_forward_size"] // settings["embedding_size"],
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
        self.tokens = text(self.rows, settings["vocabulary_size"])

    def next(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns inputs and labels of the next segment; starts over at the end of the text."""
        if self.place + self.segment + 1 > self.tokens.shape[1]:
            self.place = 0
        read = self.tokens[:, self.place : self.place + self.segment + 1]
        self.place += self.segment
        return read[:, :-1].contiguous(), read[:, 1:].contiguous()

    def step(self) -> float:
        """Returns the seconds of forward, backward and update."""
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
        """Reads until the memory holds `size` tokens per row."""
        while self.memories and self.memories[0].knns[0].index.ntotal < self.size:
            inputs, _ = self.next()
            _, self.xl = self.model(inputs, self.memories, xl_memories=self.xl)

    @torch.no_grad()
    def recall(self) -> float:
        """Returns the share of exact neighbors that FAISS finds for the queries of the next segment."""
        shares: list[float] = []
        searches = [memory.search for memory in self.memories]

        def recording(memory, search):
            def search_and_compare(queries, topk, *rest, **more):
                for row, asked in enumerate(queries.detach().numpy()):
                    asked = np.ascontiguousarray(asked.reshape(-1, asked.shape[-1]))
                    found = memory.knns[row].search(asked, topk)
                    keys = memory.db[row, : memory.knns[row].index.ntotal, 0]
                    exact = np.argpartition(-(asked @ keys.T), topk - 1, axis=1)[:, :topk]
                    same = (found[:, :, None] == exact[:, None, :]).any(-1)
                    shares.append(float(same.mean()))
                return search(queries, topk, *rest, **more)

            return search_and_compare

        for memory, search in zip(self.memories, searches, strict=True):
            memory.search = recording(memory, search)
        inputs, _ = self.next()
        self.model(inputs, self.memories, xl_memories=self.xl, add_knn_memory=False)
        self.place -= self.segment
        for memory in self.memories:
            del memory.search
        return statistics.fmean(shares)


def prepare(settings: dict, folder: str) -> tuple[dict[int, Run], dict[int, float]]:
    """Returns runs with full memories by size, and the recall of each."""
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


def description(settings: dict, recalls: dict[int, float]) -> dict:
    """Returns the first answer to `--against`: name, versions and recall."""
    return {
        "name": f"{PACKAGES[0]} {version(PACKAGES[0])}",
        "versions": {"python": sys.version.split()[0], **{name: version(name) for name in PACKAGES}},
        "threads": torch.get_num_threads(),
        "train_steps": settings["train_steps"],
        "recall": {str(size): share for size, share in recalls.items()},
    }
