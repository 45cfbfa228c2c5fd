"""A run's state, made where it belongs: at the start, for a checkpoint to be restored into, or as shapes for a plan.

Also what follows from the same settings: the call that trains it, and the index that the search keeps of the memory.
"""

import dataclasses
import functools
import zlib

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from memorizing.data.batches import BatchSettings
from memorizing.memory.bank import Bank
from memorizing.memory.search import make_search
from memorizing.memory.settings import MemorySettings
from memorizing.model.carry import Carry, empty_carry
from memorizing.model.settings import ModelSettings
from memorizing.model.transformer import abstract_model, create_model
from memorizing.parallel.mesh import SplitSize, check_sizes, init_sharded, placed, shardings
from memorizing.parallel.topology import training_options
from memorizing.shapes import Batch
from memorizing.storage.saved_banks import indexed, resized
from memorizing.storage.snapshots import begin_documents
from memorizing.storage.train_state import TrainState
from memorizing.training.memory_dropout import limit_memory
from memorizing.training.optimizer import OptimizerSettings, learning_rate_multipliers, make_optimizer, trainable_mask
from memorizing.training.schedule import memory_schedule
from memorizing.training.settings import TrainingSettings
from memorizing.training.step import TrainCall, make_train_call, state_shardings


class StateFactory:
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
        self.mesh, self.schedule = mesh, memory_schedule(memory, training)
        for _, slots in self.schedule.sizes:
            check_sizes(mesh, [SplitSize("M", "a size of the memory, by Training.memory_growth or Memory.size", slots)])
        self.graph, parameters = abstract_model(model, memory)
        self.only = trainable_mask(optimizer, parameters, model.memory_layers)
        factors = learning_rate_multipliers(optimizer, parameters, model.memory_layers, self.only)
        self.transformation = make_optimizer(optimizer, self.only, factors)
        self._parameters = lambda: create_model(model, memory, training.seed)[1]
        self._carry = lambda slots: empty_carry(
            model, dataclasses.replace(memory, size=slots), batch.size, batch.segment_length
        )
        self._memory, self._segment_length = memory, batch.segment_length
        self._memory_dropout, self._seed = training.memory_dropout, training.seed
        self._accumulates = training.update == "call"
        self._negative_rows = training.negative_rows
        self._dropout_seed = training.seed if model.dropout else None

    def state(self) -> TrainState:
        """At step 0."""
        return init_sharded(self.mesh, functools.partial(self._make, self.schedule.at(0)), self._where)

    def abstract_state(self, step: int) -> TrainState:
        """Shapes, dtypes and places of the state at the end of `step`."""
        with jax.set_mesh(self.mesh):  # what an index is depends on the devices
            state = jax.eval_shape(functools.partial(self._make, self.schedule.after(step)))
        return placed(state, self._where(state))

    def train_call(self) -> TrainCall:
        """The function that the run calls, to be compiled."""
        with jax.set_mesh(self.mesh):
            options = training_options()
        return make_train_call(
            self.graph,
            self.transformation,
            self._accumulates,
            self._dropout_seed,
            self._negative_rows,
            self.only,
            self._begin,
            options,
        )

    def grown(self, state: TrainState, slots: int) -> TrainState:
        """The state with a memory of so many slots: what it held is in there, as after a restart (`resized`)."""
        empty = lambda: self._carry(slots).banks  # noqa: E731
        if not state.carry.banks:
            banks = init_sharded(self.mesh, empty, functools.partial(shardings, self.mesh))
            return state._replace(carry=state.carry._replace(banks=banks))
        with jax.set_mesh(self.mesh):
            like = jax.eval_shape(empty)
        both = zip(state.carry.banks, like, strict=True)
        banks = tuple(resized(bank, each, self.mesh) for bank, each in both)
        return state._replace(carry=state.carry._replace(banks=banks))

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

        if not state.carry.banks:
            return state
        with jax.set_mesh(self.mesh):
            like = jax.eval_shape(functools.partial(self._carry, self._memory.size)).banks
        return state._replace(carry=state.carry._replace(banks=tuple(map(with_index, state.carry.banks, like))))

    def _begin(self, carry: Carry, batch: Batch, step: jax.Array, prebuilt: tuple[Bank, ...]) -> tuple[Carry, Batch]:
        """What a segment reads: with a prebuilt memory where a document starts, and not always all of the memory."""
        if prebuilt:
            carry, batch = begin_documents(carry, batch, prebuilt, self._memory)
        if self._memory_dropout:
            carry = limit_memory(carry, self._memory_dropout, self._seed, step)
        return carry, batch

    def _make(self, slots: int) -> TrainState:
        parameters = self._parameters()
        optimizer = self.transformation.init(parameters)
        return TrainState(parameters, optimizer, jnp.zeros((), jnp.int32), self._carry(slots))

    def _where(self, state: TrainState) -> TrainState:
        return state_shardings(self.mesh, state)
