"""A factory of a run's state on its devices: a new state, abstract shapes (for a restore or a plan), the train call."""

import dataclasses
import functools
import zlib

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from memorizing.memory.bank import Bank
from memorizing.memory.search_choice import make_search
from memorizing.model.carry import Carry, empty_carry
from memorizing.model.transformer import abstract_model, create_model
from memorizing.parallel.mesh import SplitSize, check_sizes, init_sharded, placed, shardings
from memorizing.parallel.topology import training_options
from memorizing.shapes import Batch
from memorizing.storage.prebuilt import begin_documents
from memorizing.storage.saved_banks import indexed, resized
from memorizing.storage.train_state import TrainState
from memorizing.training.memory_dropout import limit_memory
from memorizing.training.optimizer import learning_rate_multipliers, make_optimizer, trainable_mask
from memorizing.training.settings import RunSettings
from memorizing.training.step import StepOptions, TrainCall, make_train_call, state_shardings


class StateFactory:
    """Creates a run's state on the devices of a mesh (see `init_sharded`), and the call that trains it.

    Attributes:
        run, mesh: settings and devices.
        schedule: the memory's size at each step.
        graph: structure of the model.
        trainable: which parameters are trained; None for all.
        optimizer: transformation of gradients to updates.
    """

    def __init__(self, run: RunSettings, mesh: Mesh):
        self.run, self.mesh, self.schedule = run, mesh, run.memory_schedule
        model, optimizer = run.model, run.optimizer
        for _, slots in self.schedule.sizes:
            check_sizes(mesh, [SplitSize("M", "a size of the memory, by Training.memory_growth or Memory.size", slots)])
        self.graph, parameters = abstract_model(model, run.memory)
        self.trainable = trainable_mask(optimizer, parameters, model.memory_layers)
        factors = learning_rate_multipliers(optimizer, parameters, model.memory_layers, self.trainable)
        self.optimizer = make_optimizer(optimizer, self.trainable, factors)

    def state(self) -> TrainState:
        """Creates the state at step 0."""
        return init_sharded(self.mesh, functools.partial(self._make, self.schedule.at(0)), self._where)

    def abstract_state(self, step: int) -> TrainState:
        """Returns shapes, dtypes and shardings of the state at the end of `step`."""
        with jax.set_mesh(self.mesh):  # the form of an index depends on the devices
            state = jax.eval_shape(functools.partial(self._make, self.schedule.after(step)))
        return placed(state, self._where(state))

    def train_call(self) -> TrainCall:
        """Returns the jitted train call of the run."""
        with jax.set_mesh(self.mesh):
            options = training_options()
        training = self.run.training
        dropout_seed = training.seed if self.run.model.dropout else None
        how = StepOptions(training.update == "call", dropout_seed, training.negative_rows)
        return make_train_call(self.graph, self.optimizer, how, self.trainable, self._begin, options)

    def grown(self, state: TrainState, slots: int) -> TrainState:
        """Returns the state with a memory of `slots` slots. It keeps its tokens, as after a restart (see `resized`)."""
        empty = lambda: self._carry(slots).banks  # noqa: E731
        if not state.carry.banks:
            banks = init_sharded(self.mesh, empty, functools.partial(shardings, self.mesh))
            return state._replace(carry=state.carry._replace(banks=banks))
        with jax.set_mesh(self.mesh):
            abstract = jax.eval_shape(empty)
        pairs = zip(state.carry.banks, abstract, strict=True)
        banks = tuple(resized(bank, each, self.mesh) for bank, each in pairs)
        return state._replace(carry=state.carry._replace(banks=banks))

    def index_kind(self) -> int:
        """Returns a number for the search and its settings; indexes with another number were made by another search."""
        with jax.set_mesh(self.mesh):
            return zlib.crc32(repr(make_search(self.run.memory)).encode()) & 0x7FFFFFFF

    def indexed(self, state: TrainState) -> TrainState:
        """Returns the state, with the search's index rebuilt for banks that have none."""

        def with_index(bank: Bank, abstract: Bank) -> Bank:
            if jax.tree.structure(bank) == jax.tree.structure(abstract):
                return bank
            with jax.set_mesh(self.mesh):
                search = make_search(self.run.memory)
            return indexed(bank, search, self.run.batch.segment_length, self.mesh)

        if not state.carry.banks:
            return state
        with jax.set_mesh(self.mesh):
            abstract = jax.eval_shape(functools.partial(self._carry, self.run.memory.size)).banks
        return state._replace(carry=state.carry._replace(banks=tuple(map(with_index, state.carry.banks, abstract))))

    def _begin(self, carry: Carry, batch: Batch, step: jax.Array, prebuilt: tuple[Bank, ...]) -> tuple[Carry, Batch]:
        """Returns what the model reads: a prebuilt memory at the start of a document, and memory dropout."""
        if prebuilt:
            carry, batch = begin_documents(carry, batch, prebuilt, self.run.memory)
        if self.run.training.memory_dropout:
            carry = limit_memory(carry, self.run.training.memory_dropout, self.run.training.seed, step)
        return carry, batch

    def _make(self, slots: int) -> TrainState:
        parameters = create_model(self.run.model, self.run.memory, self.run.training.seed)[1]
        optimizer = self.optimizer.init(parameters)
        return TrainState(parameters, optimizer, jnp.zeros((), jnp.int32), self._carry(slots))

    def _carry(self, slots: int) -> Carry:
        memory, batch = dataclasses.replace(self.run.memory, size=slots), self.run.batch
        return empty_carry(self.run.model, memory, batch.size, batch.segment_length)

    def _where(self, state: TrainState) -> TrainState:
        return state_shardings(self.mesh, state)
