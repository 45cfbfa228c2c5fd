"""Faiss on the host, behind a callback: graphs (HNSW) or inverted lists (IVF), without an index on the device.

    device    the bank holds a stamp per slot, a hash of its key      queries                  exact scores
    host      compares stamps with those of the keys it indexed;      searches valid,
              adds new keys, drops stale ones                         current keys

The host's indexes are only a cache of the bank. A bank is recognized by its stamps. If more slots differ from every
known bank than one segment writes (another process, a resumed run, an evaluation during training), its index is built
again. So nothing has to be saved or kept in step.
"""

import dataclasses
import importlib
import threading
import warnings
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Float, Int

from memorizing.errors import InputError
from memorizing.memory.search.buckets import best_candidates
from memorizing.memory.search.contract import Index, Keys, Neighbors, Search, SearchSettings


def load_faiss() -> Any:
    """Returns the module `faiss`.

    Raises:
        InputError: if it is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # SWIG warns on import
            return importlib.import_module("faiss")
    except ImportError as error:
        raise InputError(
            "Memory.search = 'faiss' needs Faiss, which is not installed. Run `pip install faiss-cpu`, or use another "
            "search (blocked, ivf)"
        ) from error


class HeadIndex:
    """The index of one row and head. Keys are numbered as they are added; a slot's latest number is its current key."""

    def __init__(self, settings: "Faiss", slots: int):
        self.settings = settings
        self.index: Any = None
        self.trained_on = 0
        self.stamp_M = np.zeros(slots, np.int32)
        self.number_M = np.full(slots, -1)
        self.slots = np.zeros(0, np.int64)  # the slot of each key number

    def update(self, stamp_M: np.ndarray, valid_M: np.ndarray, read: Any) -> None:
        """Adds the valid keys that the index lacks. `read` returns the keys in given slots."""
        missing = np.flatnonzero(valid_M & ((self.number_M < 0) | (self.stamp_M != stamp_M)))
        count = int(valid_M.sum())
        # Up to half of the index may be stale. Lists learned from few keys are learned again from more.
        if self.index is None or len(self.slots) + len(missing) > 2 * count or self.trained_on < count // 4:
            missing = np.flatnonzero(valid_M)
            self.index = self._new_index(read(missing))
            self.number_M[:] = -1
            self.slots = np.zeros(0, np.int64)
        if len(missing):
            self.index.add(read(missing))
            self.number_M[missing] = len(self.slots) + np.arange(len(missing))
            self.stamp_M[missing] = stamp_M[missing]
            self.slots = np.concatenate([self.slots, missing])

    def search(self, queries_ND: np.ndarray, valid_M: np.ndarray, neighbors: int) -> np.ndarray:
        """Returns the slots of the best keys, `[N, K]`; -1 where fewer are found."""
        faiss, settings = load_faiss(), self.settings
        in_use = np.zeros(len(self.slots), bool)
        in_use[self.number_M[valid_M]] = True
        bits = np.packbits(in_use, bitorder="little")
        selector = faiss.IDSelectorBitmap(bits)
        if settings.kind == "hnsw":
            # Stale keys take places in the queue, too, so the queue is longer.
            effort = max(settings.effort, neighbors) * len(in_use) // max(int(valid_M.sum()), 1)
            parameters = faiss.SearchParametersHNSW(sel=selector, efSearch=effort)
        else:
            parameters = faiss.SearchParametersIVF(sel=selector, nprobe=min(settings.probes, self.index.nlist))
        _, numbers = self.index.search(queries_ND, neighbors, params=parameters)
        return np.where(numbers >= 0, self.slots[numbers], -1)

    def _new_index(self, keys_XD: np.ndarray) -> Any:
        faiss, size = load_faiss(), keys_XD.shape[1]
        self.trained_on = len(keys_XD)
        if self.settings.kind == "hnsw":
            return faiss.IndexHNSWFlat(size, self.settings.links, faiss.METRIC_INNER_PRODUCT)
        lists = max(1, min(self.settings.lists, len(keys_XD) // 8))
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(size), size, lists, faiss.METRIC_INNER_PRODUCT)
        index.cp.min_points_per_centroid = 1  # silences warnings about few keys
        index.train(keys_XD)
        return index


class IndexedBank:
    """The stamps of a bank at its latest search, and the indexes of its rows and heads."""

    def __init__(self, settings: "Faiss", stamps_BHM: np.ndarray):
        rows, heads, slots = stamps_BHM.shape
        self.stamps_BHM = stamps_BHM
        self.indexes = [[HeadIndex(settings, slots) for _ in range(heads)] for _ in range(rows)]

    def differs(self, stamps_BHM: np.ndarray) -> int:
        """Returns the largest number of slots of a row and head whose stamps differ."""
        if self.stamps_BHM.shape != stamps_BHM.shape:
            return stamps_BHM.shape[2] + 1
        return int((self.stamps_BHM != stamps_BHM).sum(-1).max())


class Host:
    """The banks that this process searched last, most recent last. Several threads may call it.

    It holds one bank for each call in a compiled program (a memory layer) and each local device, because these take
    turns. With fewer, results would be the same, but indexes would be built again and again.
    """

    def __init__(self):
        self.banks: list[IndexedBank] = []
        self.calls = 0
        """Number of calls in compiled programs."""
        self._lock = threading.Lock()

    def search(self, settings: "Faiss", neighbors: int, queries, vectors, scales, stamps, valid) -> np.ndarray:
        """Returns the slots found, `[B, H, N, K]`; -1 where fewer are found."""
        queries_BHND, vectors_BHMD, valid_BM = np.asarray(queries, np.float32), np.asarray(vectors), np.asarray(valid)
        stamps_BHM = np.array(stamps)  # copies the buffer, because the device writes it again
        scales_BHM = None if scales is None else np.asarray(scales)
        rows, heads, tokens = queries_BHND.shape[:3]
        found = np.full((rows, heads, tokens, neighbors), -1, np.int32)
        if not valid_BM.any():
            return found
        with self._lock:
            bank = self._recognized(settings, stamps_BHM, tokens)
            for row in np.flatnonzero(valid_BM.any(1)):
                for head in range(heads):

                    def read(slots: np.ndarray, row=row, head=head) -> np.ndarray:
                        keys = vectors_BHMD[row, head, slots].astype(np.float32)
                        return keys if scales_BHM is None else keys * scales_BHM[row, head, slots][:, None]

                    index = bank.indexes[row][head]
                    index.update(stamps_BHM[row, head], valid_BM[row], read)
                    found[row, head] = index.search(
                        np.ascontiguousarray(queries_BHND[row, head]), valid_BM[row], neighbors
                    )
        return found

    def _recognized(self, settings: "Faiss", stamps_BHM: np.ndarray, tokens: int) -> IndexedBank:
        nearest = min(self.banks, key=lambda bank: bank.differs(stamps_BHM), default=None)
        if nearest is not None and nearest.differs(stamps_BHM) <= tokens:
            self.banks.remove(nearest)
            nearest.stamps_BHM = stamps_BHM
        else:
            nearest = IndexedBank(settings, stamps_BHM)
        self.banks = [*self.banks, nearest][-max(self.calls, 1) * jax.local_device_count() :]
        return nearest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Faiss(Search):
    """Finds neighbors with Faiss indexes in host memory.

    Results are valid neighbors at any time, but which neighbors are missed depends on earlier searches: a resumed run
    may differ from the uninterrupted one in the last digits. Each search copies all keys to the host, which is cheap
    only on CPUs.

    Attributes:
        kind: kind of index: a graph (`hnsw`) or inverted lists (`ivf`).
        links: number of links of a key in the graph.
        effort: smallest length of a query's queue of keys in the graph (`efSearch`).
        lists: number of inverted lists of each row and head.
        probes: number of lists that a query looks into.
        host: cache of the banks' indexes.
    """

    kind: Literal["hnsw", "ivf"] = "hnsw"
    links: int = 32
    effort: int = 128
    lists: int = 128
    probes: int = 16
    host: Host = dataclasses.field(default_factory=Host, compare=False, repr=False)

    def __post_init__(self):
        load_faiss()

    def empty_index(self, rows: int, heads: int, slots: int, head_size: int) -> Index:
        return Index({"stamps_BHM": jnp.zeros((rows, heads, slots), jnp.int32)}, {})

    def entries(self, keys_BHND, learned):
        return {"stamps_BHM": stamps(keys_BHND)}, learned

    def __call__(self, queries_BHND, keys: Keys, valid_BM, neighbors: int) -> Neighbors:
        queries_BHND, keys = lax.stop_gradient((queries_BHND, keys))
        self.host.calls += isinstance(queries_BHND, jax.core.Tracer)

        def search(queries, vectors, scales, stamps, valid) -> np.ndarray:
            return self.host.search(self, neighbors, queries, vectors, scales, stamps, valid)

        shape = jax.ShapeDtypeStruct((*queries_BHND.shape[:3], neighbors), jnp.int32)
        slots_BHNK = jax.pure_callback(
            search, shape, queries_BHND, keys.vectors_BHMD, keys.scales_BHM, keys.index.slots["stamps_BHM"], valid_BM
        )
        return best_candidates(queries_BHND, keys, slots_BHNK, slots_BHNK >= 0, neighbors, self.minimum_score)


def stamps(keys_BHND: Float[jax.Array, "B H N D"]) -> Int[jax.Array, "B H N"]:
    """Returns a hash of each key, in 32 bits."""
    bits = lax.bitcast_convert_type(keys_BHND.astype(jnp.float32), jnp.uint32)
    # Mixes each feature (as MurmurHash3 ends) before summing, because keys may consist of few small numbers.
    bits = bits + np.random.default_rng(0).integers(0, 2**32, bits.shape[-1], np.uint32)
    bits = (bits ^ (bits >> 16)) * np.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * np.uint32(0xC2B2AE35)
    return lax.bitcast_convert_type((bits ^ (bits >> 16)).sum(-1, dtype=jnp.uint32), jnp.int32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FaissSettings(SearchSettings):
    """Settings of the Faiss index.

    Attributes:
        index: kind of index: a graph (`hnsw`) or inverted lists (`ivf`).
        effort: smallest length of a query's queue of keys in the graph (`efSearch`).
        lists: number of inverted lists of each row and head.
        probes: number of lists that a query looks into.
    """

    index: Literal["hnsw", "ivf"] = "hnsw"
    effort: int = 128
    lists: int = 128
    probes: int = 32
    keeps_index = True
    platforms = ("cpu",)

    def __post_init__(self):
        self._check_positive()
        if self.probes > self.lists:
            raise InputError(
                f"Faiss.probes = {self.probes} is more than Faiss.lists = {self.lists}. Set Faiss.probes to at most "
                f"{self.lists}, or use more lists"
            )

    def make(self, minimum_score, platform):
        return Faiss(
            minimum_score=minimum_score, kind=self.index, effort=self.effort, lists=self.lists, probes=self.probes
        )
