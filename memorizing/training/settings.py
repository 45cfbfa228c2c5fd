"""Settings of a training run: `TrainingSettings` (gin section `Training`), and `RunSettings` with all that a run needs.

Each dataclass checks its own values. `RunSettings` checks the combinations that no single dataclass can judge.
"""

import dataclasses
import itertools
from typing import Literal

from memorizing.data.batches import BatchSettings
from memorizing.errors import InputError
from memorizing.memory.eviction import EVICTION_RULES
from memorizing.memory.search import SEARCHES
from memorizing.memory.search.proposed import is_worth_it
from memorizing.memory.settings import MemorySettings, at_memory_size
from memorizing.model.settings import ModelSettings
from memorizing.parallel.mesh import MeshSettings
from memorizing.sections import LARGEST_COUNT, LARGEST_SEED, check_range, section_name
from memorizing.training.memory_schedule import MemorySchedule, memory_schedule
from memorizing.training.metrics import WRITERS
from memorizing.training.optimizer import OptimizerSettings


@dataclasses.dataclass(frozen=True)
class TrainingSettings:
    """Settings of the training loop. A step is one segment of every row.

    Attributes:
        steps: number of steps to train for.
        seed: random seed of the new parameters and of dropout.
        update: when the parameters change: after each `segment` (the paper), or once after each `call`, with the
            gradients of its segments added up (gradient accumulation over `Batch.segments_per_call` segments).
        negative_rows: number of other rows whose memories each row's queries also search, in one softmax with their
            own: contrastive training over documents (Focused Transformer). Each costs one more search.
        memory_from_step: first step with a memory. Steps before it neither read nor write it and cost less; keys mean
            little that early.
        memory_growth: pairs (first step, slots): a small memory first, a larger one later (the paper's stable recipe),
            and no memory before the first pair. The last size is `Memory.size`. One pair acts like `memory_from_step`.
        memory_dropout: share of the rows of each segment, from 0 to 1, that may read only the newest part of their
            memory. The part has a random size (see memory_dropout.py), so that any memory size works later.
        init_from: folder of another run whose parameters this one starts from, for fine-tuning (see
            storage/init_from.py). The optimizer and the step count start again, and memory layers may be new. Empty to
            initialize all parameters at random.
        init_step: step of that run's checkpoint; 0 for the newest.
        prebuilt_memory: folder of a snapshot (`memorizing memorize`) made with the parameters of `init_from`. Every
            document starts with its memory. Its keys go stale as the parameters change.
        checkpoint_every: steps between checkpoints. The last step is always saved.
        checkpoints_kept: number of newest checkpoints to keep.
        checkpoint_kept_every: keeps the checkpoints at multiples of this many steps as well; 0 for none of them.
        metric_writers: names of the writers that get the run's metrics (see metrics.py). Reports read `jsonl`.
        data: folder of prepared tokens.
    """

    steps: int = 500_000
    seed: int = 0
    update: Literal["segment", "call"] = "segment"
    negative_rows: int = 0
    memory_from_step: int = 0
    memory_growth: tuple[tuple[int, int], ...] = ()
    memory_dropout: float = 0.0
    init_from: str = ""
    init_step: int = 0
    prebuilt_memory: str = ""
    checkpoint_every: int = 1000
    checkpoints_kept: int = 2
    checkpoint_kept_every: int = 0
    metric_writers: tuple[str, ...] = ("jsonl", "tensorboard")
    data: str = ""

    def __post_init__(self):
        check_range(self, 1, LARGEST_COUNT, "steps", "checkpoint_every", "checkpoints_kept")
        check_range(self, 0, LARGEST_COUNT, "negative_rows", "memory_from_step", "init_step", "checkpoint_kept_every")
        check_range(self, 0, LARGEST_SEED, "seed")
        if not 0 <= self.memory_dropout <= 1:
            raise InputError(f"Training.memory_dropout = {self.memory_dropout}: must be a share, from 0 to 1")
        if unknown := [name for name in self.metric_writers if name not in WRITERS]:
            raise InputError(
                f"Training.metric_writers = {self.metric_writers}: {unknown[0]!r} is unknown. Choose from "
                f"{', '.join(WRITERS)}"
            )
        if self.init_step and not self.init_from:
            raise InputError(
                f"Training.init_step = {self.init_step} is set, but Training.init_from = '' names no run. Set "
                "Training.init_from to that run's folder"
            )
        if self.prebuilt_memory and not self.init_from:
            raise InputError(
                f"Training.prebuilt_memory = {self.prebuilt_memory!r} is set, but Training.init_from = ''. A snapshot "
                "can be read only by the parameters that made it. Start from these: set Training.init_from to their run"
            )
        self._check_growth()

    def _check_growth(self) -> None:
        growth = self.memory_growth
        if growth and self.memory_from_step:
            raise InputError(
                f"Training.memory_growth = {growth} and Training.memory_from_step = {self.memory_from_step} both set "
                "the first step with a memory. Leave memory_from_step at 0 and start memory_growth at that step"
            )
        rises = all(a < b and few < many for (a, few), (b, many) in itertools.pairwise(growth))
        if growth and (not rises or growth[0][0] < 0 or growth[0][1] < 1):
            raise InputError(
                f"Training.memory_growth = {growth}: must be pairs (first step, slots) that both rise, such as "
                "((0, 512), (1000, 8192))"
            )


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """The settings of a training run, checked against each other when created.

    Raises:
        InputError: for settings that contradict each other. The message names both.
    """

    model: ModelSettings = dataclasses.field(default_factory=ModelSettings)
    memory: MemorySettings = dataclasses.field(default_factory=MemorySettings)
    batch: BatchSettings = dataclasses.field(default_factory=BatchSettings)
    optimizer: OptimizerSettings = dataclasses.field(default_factory=OptimizerSettings)
    training: TrainingSettings = dataclasses.field(default_factory=TrainingSettings)
    mesh: MeshSettings = dataclasses.field(default_factory=MeshSettings)

    @property
    def memory_schedule(self) -> MemorySchedule:
        """The memory's size at each step."""
        return memory_schedule(self.memory.size, self.training.memory_from_step, self.training.memory_growth)

    def by_name(self) -> dict[str, str]:
        """Returns the `repr` of each setting by its gin name, except those of the mesh."""
        kinds = [kind for kind in (*SEARCHES.values(), *EVICTION_RULES.values()) if dataclasses.fields(kind)]
        parts = [
            self.model,
            self.memory,
            self.batch,
            self.optimizer,
            self.training,
            *map(self.memory.section_of, kinds),
        ]
        return {
            f"{section_name(type(part))}.{field.name}": repr(getattr(part, field.name))
            for part in parts
            for field in dataclasses.fields(part)
            if field.repr
        }

    def with_memory_size(self, size: int) -> "RunSettings":
        """Returns the settings that read a trained model with another `Memory.size` (see `at_memory_size`).

        Each document then starts with an empty memory. A memory that grew in training has this size throughout.

        Raises:
            InputError: if the other settings do not allow this size.
        """
        memory = dataclasses.replace(at_memory_size(self.memory, size), clear_at_documents=True)
        return dataclasses.replace(self, memory=memory, training=dataclasses.replace(self.training, memory_growth=()))

    def __post_init__(self):
        check_memory_size(self.memory.size, self.batch.segment_length)
        writes_late = self.memory.size > 0 and self.memory.writes == "beyond_cache"
        self.model.check_segment_length(self.batch.segment_length, writes_late)
        if self.memory.size:
            self._check_memory_is_read()
            self._check_writing()
        self._check_growth()
        self._check_steps()
        if self.training.negative_rows >= self.batch.size:
            raise InputError(
                f"Training.negative_rows = {self.training.negative_rows}, but each row has only {self.batch.size - 1} "
                f"other rows (Batch.size = {self.batch.size}). Use at most {self.batch.size - 1}, or a larger batch"
            )

    def _check_memory_is_read(self) -> None:
        if not self.model.memory_layers:
            raise InputError(
                f"Memory.size = {self.memory.size}, but Model.memory_layers = () names no layer that reads it. Give a "
                "layer, or set Memory.size = 0"
            )
        if self.training.memory_from_step >= self.training.steps:
            raise InputError(
                f"Training.memory_from_step = {self.training.memory_from_step} is not before the last step, "
                f"Training.steps = {self.training.steps}, so the memory of {self.memory.size} would never be used. "
                "Start it earlier, train for longer, or set Memory.size = 0"
            )

    def _check_writing(self) -> None:
        """Checks what the memory keeps against how documents are read."""
        memory, segment = self.memory, self.batch.segment_length
        if segment % memory.write_every:
            raise InputError(
                f"Memory.write_every = {memory.write_every} does not divide Batch.segment_length = {segment}, so "
                "segments would write different numbers of tokens. Use a divisor"
            )
        if memory.writes == "beyond_cache" and not self.model.xl_cache:
            raise InputError(
                "Memory.writes = 'beyond_cache' writes the tokens that leave the XL cache, but Model.xl_cache = False. "
                "Set Memory.writes = 'segment' or Model.xl_cache = True"
            )
        if memory.writes == "beyond_cache" and memory.maximum_age is not None and memory.maximum_age <= segment:
            raise InputError(
                f"Memory.maximum_age = {memory.maximum_age} with Memory.writes = 'beyond_cache': tokens are already "
                f"older than Batch.segment_length = {segment} when they are written, so all would be ignored. Use a "
                "larger age"
            )
        room = memory.size - segment // memory.write_every
        if memory.sink > room:
            raise InputError(
                f"Memory.sink = {memory.sink} leaves no room for a segment in Memory.size = {memory.size}. Use at most "
                f"{room}, or a larger memory"
            )

    def _check_growth(self) -> None:
        """Checks that every size through which the memory grows is one that the other settings allow."""
        growth = self.training.memory_growth
        _ = self.memory_schedule  # raises if the growth does not end at Memory.size
        if self.memory.uses_slot_table and len(growth) > 1:
            raise InputError(
                f"Training.memory_growth = {growth}: only a memory of the newest tokens can grow. These settings "
                "keep other tokens (Memory.eviction, sink, duplicate_score, writes, clear_at_documents). Set "
                "Training.memory_growth = () or change them"
            )
        if self.memory.writes == "never" and not self.memory.clear_at_documents and len(growth) > 1:
            raise InputError(
                f"Training.memory_growth = {growth} with Memory.writes = 'never' and Memory.clear_at_documents = "
                "False: rows get the prebuilt memory only once, so it would keep its first size. Set "
                "Training.memory_growth = ()"
            )
        for first, slots in growth if self.memory.size else ():
            try:
                memory = dataclasses.replace(self.memory, size=slots)
                training = dataclasses.replace(self.training, memory_growth=())
                RunSettings(self.model, memory, self.batch, self.optimizer, training, self.mesh)
            except InputError as error:
                raise InputError(f"Training.memory_growth = {growth}: {error}") from error
            if first >= self.training.steps:
                raise InputError(
                    f"Training.memory_growth = {growth}: step {first} is not before the last step, Training.steps = "
                    f"{self.training.steps}. Grow earlier, or train for longer"
                )

    def _check_steps(self) -> None:
        """Checks that steps at which something happens are ends of compiled calls."""
        call, training = self.batch.segments_per_call, self.training
        steps = {name: getattr(training, name) for name in ("steps", "checkpoint_every", "memory_from_step")}
        growth = {f"memory_growth[{place}]": step for place, (step, _) in enumerate(training.memory_growth)}
        for name, value in (steps | growth).items():
            if value % call:
                raise InputError(
                    f"Training.{name} = {value} is not a multiple of Batch.segments_per_call = {call}, the steps of "
                    f"one compiled call. Use {value // call * call} or {(value // call + 1) * call}"
                )
        kept, every = training.checkpoint_kept_every, training.checkpoint_every
        if kept % every:
            raise InputError(
                f"Training.checkpoint_kept_every = {kept} is not a multiple of Training.checkpoint_every = {every}, so "
                f"some of those steps would not be saved. Use {(kept // every + 1) * every}"
            )

    def check_can_begin(self) -> None:
        """Rejects settings under which a new run would train nothing, or a part of the model would have no effect.

        Raises:
            InputError: for a memory that stays empty or cannot hold its snapshot, an index that is never used,
                negative rows without a difference, or memory parameters that are trained without a memory.
        """
        memory, training = self.memory, self.training
        if memory.writes == "never" and training.negative_rows:
            raise InputError(
                f"Training.negative_rows = {training.negative_rows} with Memory.writes = 'never': all rows have the "
                "same memory, so none is a negative. Set Training.negative_rows = 0"
            )
        if not memory.size:
            trainable = self.optimizer.trainable
            if trainable and {*trainable} <= {"gates", "index"}:
                raise InputError(
                    f"Optimizer.trainable = {trainable} with Memory.size = 0: these parameters have no effect without "
                    "a memory, so nothing would be trained. Set Memory.size"
                )
            return
        if memory.writes == "never" and not training.prebuilt_memory:
            raise InputError(
                "Memory.writes = 'never' without Training.prebuilt_memory: the memory would stay empty. Give a "
                "snapshot (configs/variants/frozen_memory.gin), or set Memory.writes = 'segment'"
            )
        self._check_prebuilt()
        segment, size, features = self.batch.segment_length, self.model.head_size, self.model.index_size
        if memory.proposer == "learned" and not is_worth_it(segment * self.model.group, size, features):
            raise InputError(
                f"Memory.proposer = 'learned' with segments of {segment} tokens and heads of {size}: Model.index_size "
                f"= {features} features would never be used, because computing them costs more than scoring all keys. "
                "Use fewer features, or longer segments"
            )

    def _check_prebuilt(self) -> None:
        if not self.training.prebuilt_memory or not self.memory.uses_slot_table:
            return
        if not dataclasses.replace(self.memory, clear_at_documents=True).uses_slot_table:
            raise InputError(
                "Training.prebuilt_memory with Memory.clear_at_documents = False: a memory of the newest tokens that "
                "outlasts documents has another layout than any snapshot. Set Memory.clear_at_documents = True, "
                "Memory.writes = 'never' (it is only read), or another Memory.eviction there and in the snapshot"
            )


def check_memory_size(size: int, segment_length: int) -> None:
    """Rejects a memory that segments do not fill evenly.

    Raises:
        InputError: naming the nearest sizes that they do.
    """
    if size % segment_length:
        below, above = size // segment_length * segment_length, (size // segment_length + 1) * segment_length
        raise InputError(
            f"Memory.size = {size} is not a multiple of Batch.segment_length = {segment_length}, so a segment's "
            f"write would wrap around. Use {above}" + (f" or {below}" if below else "")
        )
