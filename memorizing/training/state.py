"""A run's state, made where it belongs: at the start, for a checkpoint to be restored into, or as shapes for a plan.

Also what follows from the same settings: the call that trains it, and the index that the search keeps of the memory.
"""

import functools
import zlib

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from memorizing.data.batches import BatchSettings
from memorizing.memory.bank import Bank
from memorizing.memory.search import make_search
from memorizing.memory.settings import MemorySettings
from memorizing.model.settings import ModelSettings
from memorizing.model.transformer import abstract_model, create_model, empty_carry
from memorizing.parallel.mesh import made, placed, shardings
from memorizing.training.optimizer import OptimizerSettings, make_optimizer
from memorizing.training.saved_banks import indexed
from memorizing.training.settings import TrainingSettings
from memorizing.training.step import TrainCall, TrainState, make_train_call, state_shardings


class StateMaker:
    """Makes a run's state where it belongs (see `made`), or describes it without making it; and what trains it."""

    def __init__(
        self,
        model: ModelSettings,
        memory: MemorySettings,
        batch: BatchSettings,
        optimizer: OptimizerSettings,
        training: TrainingSettings,
        mesh: Mesh,
    ):
        self.mesh, self.memory_from_step = mesh, training.memory_from_step
        self.transformation = make_optimizer(optimizer)
        self.graph, _ = abstract_model(model, memory)
        self._parameters = lambda: create_model(model, memory, training.seed)[1]
        self._carry = lambda: empty_carry(model, memory, batch.rows, batch.segment_length)
        self._memory, self._segment_length = memory, batch.segment_length
        self._accumulates = training.update == "call"
        self._negative_rows = training.negative_rows
        self._dropout_seed = training.seed if model.dropout else None

    def state(self) -> TrainState:
        """At step 0."""
        return made(self.mesh, functools.partial(self._make, not self.memory_from_step), self._where)

    def like(self, step: int) -> TrainState:
        """Shapes, dtypes and places of the state at the end of `step`."""
        with jax.set_mesh(self.mesh):  # what an index is depends on the devices
            state = jax.eval_shape(functools.partial(self._make, step > self.memory_from_step))
        return placed(state, self._where(state))

    def train_call(self) -> TrainCall:
        """The function that the run calls, to be compiled."""
        return make_train_call(
            self.graph, self.transformation, self._accumulates, self._dropout_seed, self._negative_rows
        )

    def banks(self) -> tuple[Bank, ...]:
        """The memory, empty."""
        return made(self.mesh, lambda: self._carry().banks, functools.partial(shardings, self.mesh))

    def index_kind(self) -> int:
        """A number for the search and its settings, by which an index that another one made is told."""
        with jax.set_mesh(self.mesh):
            return zlib.crc32(repr(make_search(self._memory)).encode()) & 0x7FFFFFFF

    def indexed(self, state: TrainState) -> TrainState:
        """The state, its banks with the index that the search keeps: made anew of those that came without."""

        def with_index(bank: Bank, like: Bank) -> Bank:
            if jax.tree.structure(bank) == jax.tree.structure(like):
                return bank
            with jax.set_mesh(self.mesh):
                search = make_search(self._memory)
            return indexed(bank, search, self._segment_length, self.mesh)

        like = self.like(self.memory_from_step + 1).carry.banks
        return state._replace(carry=state.carry._replace(banks=tuple(map(with_index, state.carry.banks, like))))

    def _make(self, with_memory: bool) -> TrainState:
        parameters, carry = self._parameters(), self._carry()
        carry = carry if with_memory else carry._replace(banks=())
        return TrainState(parameters, self.transformation.init(parameters), jnp.zeros((), jnp.int32), carry)

    def _where(self, state: TrainState) -> TrainState:
        return state_shardings(self.mesh, state)
