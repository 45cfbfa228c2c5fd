"""Prebuilt memory: loads a snapshot's banks for any size and search, and copies them in when documents start."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp

from memorizing.errors import InputError
from memorizing.memory.bank import Bank, refill
from memorizing.memory.search_choice import make_search
from memorizing.memory.settings import MemorySettings
from memorizing.model.carry import Carry
from memorizing.parallel.mesh import RULES, MeshSettings, make_mesh, shardings
from memorizing.shapes import Batch
from memorizing.storage.snapshot_owner import SnapshotOwner
from memorizing.storage.snapshots import load_snapshot


def prebuilt_banks(
    folder: Path, owner: SnapshotOwner, memory: MemorySettings, mesh: jax.sharding.Mesh
) -> tuple[Bank, ...]:
    """Returns the banks of a snapshot for `begin_documents`, on every device that holds rows.

    The snapshot's XL caches and the tokens of its unfinished segment are not used.

    Raises:
        InputError: see `load_snapshot`; also if there is no memory, here or in the snapshot.
    """
    one_device = make_mesh(MeshSettings(1), jax.local_devices()[:1])
    banks = load_snapshot(folder, owner, dataclasses.replace(memory, report_recall=False), one_device).carry.banks
    if not banks or not int(banks[0].length_B[0]):
        raise InputError(
            f"{folder} has no tokens for a memory of {memory.size} tokens: it holds less than one full segment of "
            f"{owner.segment_length}, or one of the two memories has size 0. Make a snapshot of a longer text, or set "
            "Memory.size"
        )
    rules = {letter: axis for letter, axis in RULES.items() if letter != "B"}
    return jax.device_put(jax.device_get(banks), shardings(mesh, banks, rules))


def begin_documents(
    carry: Carry, batch: Batch, prebuilt: tuple[Bank, ...], memory: MemorySettings
) -> tuple[Carry, Batch]:
    """Starts documents with a prebuilt memory instead of an empty one.

    The returned batch has no document starts left, so the model does not empty the memory again.
    """
    starts_B, search, tokens = batch.starts_document_B, make_search(memory), batch.inputs_BN.shape[1]

    def refilled(bank: Bank, source: Bank) -> Bank:
        # A memory that is not cleared at documents is filled only once.
        rows_B = starts_B if memory.clear_at_documents else starts_B & (bank.length_B == 0)
        return refill(bank, rows_B, source, search, tokens)

    banks = tuple(map(refilled, carry.banks, prebuilt))
    carry = carry._replace(cached_B=carry.cached_B & ~starts_B, banks=banks)
    return carry, batch._replace(starts_document_B=jnp.zeros_like(starts_B))
