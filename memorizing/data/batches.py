"""Batches of training: a pure function of (tokens, seed, step, row), so there is no reader state to save or restore.

Documents form an endless stream: all of them shuffled, then all of them shuffled again, epoch after epoch. Each row
reads a document segment by segment. When its document ends, a row takes the next one from the stream; if several rows
end at once, the lowest row goes first. Every token of every document is read exactly once per epoch, no document is
cut, and no row waits. The schedule depends only on the documents' lengths, and any step can be computed directly.

    stream  d3 d0 d2 d1 | d1 d3 ...          row 0   d3 d3 d3 d2 d2 d1 ...
                                             row 1   d0 d0 d0 d0 d1 d3 ...
"""

import bisect
import dataclasses
import heapq
import queue
import threading
from collections.abc import Iterator, Sequence

import numpy as np

from memorizing.data.tokens import TokenSplit
from memorizing.errors import InputError
from memorizing.sections import LARGEST_SEED, check_range
from memorizing.shapes import Batch


@dataclasses.dataclass(frozen=True)
class BatchSettings:
    """Settings of the layout of documents for training.

    Attributes:
        size: batch size: documents read side by side, over all devices (`B`).
        segment_length: tokens in a segment (`N`).
        segments_per_call: segments that one compiled call scans over (`S`).
        seed: random seed of the order of documents.
    """

    size: int = 32
    segment_length: int = 512
    segments_per_call: int = 8
    seed: int = 0

    def __post_init__(self):
        check_range(self, 1, 2**24, "size", "segment_length", "segments_per_call")
        check_range(self, 0, LARGEST_SEED, "seed")


class Schedule:
    """The document and segment that each row reads at each step."""

    def __init__(self, lengths: np.ndarray, rows: int, segment_length: int, seed: int):
        self._segments = -(-np.asarray(lengths) // segment_length)
        if not self._segments.sum():
            raise InputError("there are no tokens to read, because every document is empty. Prepare other documents")
        self.rows, self._seed = rows, seed
        self._begins: list[list[int]] = [[] for _ in range(rows)]
        self._documents: list[list[int]] = [[] for _ in range(rows)]
        self._free = [(0, row) for row in range(rows)]
        self._stream = self._shuffled_epochs()
        self._lock = threading.Lock()

    def at(self, step: int) -> list[tuple[int, int]]:
        """Returns the document of each row and its segment at `step`."""
        with self._lock:
            while self._free[0][0] <= step:
                begin, row = self._free[0]
                document = next(self._stream)
                self._begins[row].append(begin)
                self._documents[row].append(document)
                heapq.heapreplace(self._free, (begin + int(self._segments[document]), row))
        places = []
        for row in range(self.rows):
            turn = bisect.bisect_right(self._begins[row], step) - 1
            places.append((self._documents[row][turn], step - self._begins[row][turn]))
        return places

    def _shuffled_epochs(self) -> Iterator[int]:
        epoch = 0
        while True:
            for document in np.random.default_rng((self._seed, epoch)).permutation(len(self._segments)):
                if self._segments[document]:
                    yield int(document)
            epoch += 1


def read_segment(
    split: TokenSplit, document: int, segment: int, segment_length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns inputs, targets and mask of a segment of a document, as drawn in `Batch`."""
    first = segment * segment_length
    tokens = split.read(document, max(first - 1, 0), first + segment_length)
    if first == 0:
        tokens = np.concatenate([[split.begin], tokens])
    count = len(tokens) - 1
    padding = (0, segment_length - count)
    inputs, targets = (np.pad(part, padding).astype(np.int32) for part in (tokens[:-1], tokens[1:]))
    return inputs, targets, np.arange(segment_length) < count


def read_batch(split: TokenSplit, places: Sequence[tuple[int, int] | None], segment_length: int) -> Batch:
    """Returns the batch in which each row reads its (document, segment), or padding for None."""
    rows, starts = [], []
    zeros = np.zeros(segment_length, np.int32)
    padding = (zeros, zeros, zeros.astype(bool))
    for place in places:
        rows.append(padding if place is None else read_segment(split, *place, segment_length))
        starts.append(place is None or place[1] == 0)
    inputs, targets, mask = (np.stack(part) for part in zip(*rows, strict=True))
    return Batch(inputs, targets, mask, np.asarray(starts))


def batches(
    split: TokenSplit, settings: BatchSettings, first_step: int, rows: Sequence[int] | None = None
) -> Iterator[Batch]:
    """Yields batches of `segments_per_call` steps `[S, B, N]` from `first_step` on without end; `rows` selects rows."""
    schedule = Schedule(split.lengths, settings.size, settings.segment_length, settings.seed)
    rows = range(settings.size) if rows is None else rows
    step = first_step
    while True:
        parts = []
        for each in range(step, step + settings.segments_per_call):
            places = schedule.at(each)
            parts.append(read_batch(split, [places[row] for row in rows], settings.segment_length))
        yield Batch(*(np.stack(part) for part in zip(*parts, strict=True)))
        step += settings.segments_per_call


class Prefetcher[T]:
    """An iterator that a background thread keeps up to `depth` items ahead.

    Errors in the thread are raised in the reader.
    """

    def __init__(self, items: Iterator[T], depth: int = 2):
        self._queue: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(items,), daemon=True, name="batches")
        self._thread.start()

    def _run(self, items: Iterator[T]) -> None:
        try:
            for item in items:
                if not self._put((item, None)):
                    return
            self._put((None, StopIteration()))
        except Exception as error:
            self._put((None, error))

    def _put(self, entry: tuple[T | None, BaseException | None]) -> bool:
        while not self._stopped.is_set():
            try:
                self._queue.put(entry, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        item, error = self._queue.get()
        if error is not None:
            self._queue.put((None, error))
            raise error
        return item  # type: ignore[return-value]

    def close(self) -> None:
        """Stops the thread and waits for it."""
        self._stopped.set()
        self._thread.join()
