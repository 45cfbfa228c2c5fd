"""Attention over an external memory, for all devices and rows.

    idx     = top-K over valid slots of  stop_gradient(q) . memory_k      # per row, head and token
    remote  = softmax(q . memory_k[idx]) memory_v[idx]                    # gradient flows to q alone

There is no position bias: a memory is found by its content. `retrieval.py` reads on one device, `gates/` combines
`remote` with local attention.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float

from memorizing.memory.bank import Bank, ReadStats, valid
from memorizing.memory.eviction import EvictionRule
from memorizing.memory.eviction.fifo import Fifo
from memorizing.memory.search import Search
from memorizing.model.attention_output import AttentionOutput, ScoreSummary, merge_outputs
from memorizing.model.groups import by_key_head, by_query_head
from memorizing.model.learned_index import LearnedIndex, sampled, taught
from memorizing.model.read_tracking import ReadTracking, read_tracking
from memorizing.model.retrieval import BankView, MemoryRead, ReadPlan, read_bank
from memorizing.parallel.mesh import current_mesh, spec, specs
from memorizing.shapes import Array


@dataclasses.dataclass(frozen=True)
class ReadOptions:
    """Options of a read.

    Attributes:
        write_every: the memory holds every n-th token (`Memory.write_every`).
        eviction: rule of the memory; it counts retrievals if it tracks usage.
        negative_rows: number of other rows whose memories each row's queries also retrieve from.
        lookups: whether to return the neighbors.
    """

    write_every: int = 1
    eviction: EvictionRule = dataclasses.field(default_factory=Fifo)
    negative_rows: int = 0
    lookups: bool = False


def attend_to_memory(
    query_BHND: Float[jax.Array, "B H N D"],
    bank: Bank,
    search: Search,
    neighbors: int,
    *,
    index: LearnedIndex | None = None,
    mask_BN: Bool[Array, "B N"] | None = None,
    options: ReadOptions = ReadOptions(),
) -> MemoryRead:
    """Reads a memory of `M` slots with the queries of a segment.

    Statistics are those of the row's own memory and leave out queries of padding, see `memory.bank.masked`.

    With `options.negative_rows = n`, each row's queries also retrieve from the memories of the next `n` rows, in one
    softmax with its own: contrastive training (arXiv 2307.03170). Queries thus learn to tell documents apart; keys in
    a memory have no gradient. A query that finds nothing in its own memory finds nothing.

    The search may use the layer's learned `index`. The index learns from this read if `mask_BN` is given, which marks
    the real tokens.
    """
    bank = lax.stop_gradient(bank)
    group, keys = query_BHND.shape[1] // bank.keys_BHMD.shape[1], bank.keys
    if index is not None:
        learned = keys.index.learned | lax.stop_gradient(index)._asdict()
        keys = keys._replace(index=keys.index._replace(learned=learned))
    view = BankView(keys, bank.values_BHMD, valid(bank), read_tracking(bank, options.write_every, options.eviction))
    plan = ReadPlan(search, neighbors, group, options.eviction, options.lookups)
    read = _read(query_BHND, view, plan)
    if index is not None and mask_BN is not None:
        out_BHND = _teach(read.output.out_BHND, index, query_BHND, bank, mask_BN)
        read = read._replace(output=read.output._replace(out_BHND=out_BHND))
    if options.negative_rows:
        view, plan = view._replace(tracking=ReadTracking()), dataclasses.replace(plan, lookups=False)
        # Queries travel to the memories, not memories to the queries; the results come back.
        others = [
            jax.tree.map(
                lambda part, shift=shift: jnp.roll(part, -shift, axis=0),
                _read(jnp.roll(query_BHND, shift, axis=0), view, plan),
            )
            for shift in range(1, options.negative_rows + 1)
        ]
        reads = [read, *others]
        output = merge_outputs([each.output for each in reads], [each.found_BHN for each in reads])
        read = read._replace(output=output)
    return read


def _read(query_BHND: Float[jax.Array, "B H N D"], view: BankView, plan: ReadPlan) -> MemoryRead:
    """Reads on all devices of the current mesh; queries and results are by query head."""
    call: Any = functools.partial(read_bank, plan=plan)
    if (mesh := current_mesh()) is not None:
        table = view.tracking.slot_table
        stats = ReadStats(view.tracking.recall, None if table is None else table.usage_BM)
        queries: Any = spec("BHN")
        found: Any = specs(stats), spec("BH_K") if plan.lookups else None
        output: Any = AttentionOutput(spec("BHND"), ScoreSummary(queries, queries))  # pyrefly: ignore
        call = jax.shard_map(
            functools.partial(read_bank, plan=dataclasses.replace(plan, axis="memory")),
            mesh=mesh,
            # Every device along the memory axis reads the queries of the whole segment, and returns its share of them.
            in_specs=(spec("BH_D"), specs(view)),
            out_specs=MemoryRead(output, queries, *found),
            check_vma=False,  # searches start their scans from constants, which are the same on all devices
        )
    read: MemoryRead = call(by_key_head(query_BHND, plan.group), view)
    output, found_BHN, neighbors = jax.tree.map(
        lambda part: by_query_head(part, plan.group), (read.output, read.found_BHN, read.neighbors)
    )
    return MemoryRead(output, found_BHN, read.stats, neighbors)


def _teach(out_BHND, index: LearnedIndex, query_BHND, bank: Bank, mask_BN) -> Float[jax.Array, "B H N D"]:
    """Returns `out_BHND`, through which the index gets its gradient from some of the queries."""
    group = query_BHND.shape[1] // bank.keys_BHMD.shape[1]
    places = sampled(query_BHND.shape[2])
    asked_BHND = lax.stop_gradient(by_key_head(query_BHND[:, :, places], group))
    asks_BN = jnp.repeat(mask_BN[:, places], group, axis=1)
    weight = jnp.sum(mask_BN, dtype=jnp.float32)  # as much as all tokens: the gradient is divided by their number
    return taught(out_BHND, index, asked_BHND, bank.keys, valid(bank), asks_BN, weight)
