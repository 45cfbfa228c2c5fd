"""Inference: `Reader` reads long texts into memory and continues them; `memorizing generate` and `memorize` use it.

    read     runs the model on whole segments, as training and evaluation do; the rest of the tokens waits
    write    runs the model on the waiting tokens, then token by token (`decoding.py`); a full segment goes to the
             XL caches and the memory

Everything that a reader reads and writes is one document, which has one memory.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from memorizing.data.documents import FolderSettings, Problem, read_path
from memorizing.data.vocabulary import TextStream, Vocabulary, encoded_text
from memorizing.errors import InputError
from memorizing.generation.decoding import PartialSegment, close_segment, extend, open_segment
from memorizing.memory.bank import clear
from memorizing.memory.settings import MemorySettings
from memorizing.model.carry import Carry, empty_carry
from memorizing.model.parameters import Parameters
from memorizing.model.settings import ModelSettings
from memorizing.model.transformer import abstract_model, apply_model
from memorizing.parallel.mesh import constrain_tree, everywhere, init_sharded, shardings
from memorizing.shapes import Batch
from memorizing.storage.snapshot_owner import SnapshotOwner
from memorizing.storage.snapshots import (
    ReadText,
    Snapshot,
    check_again,
    check_not_empty,
    is_older,
    load_snapshot,
    read_text_of,
    save_snapshot,
)


@dataclasses.dataclass(frozen=True)
class SamplingSettings:
    """Settings of sampling.

    Attributes:
        temperature: divisor of the logits. Below 1, likely tokens get likelier; 0 always takes the likeliest token.
        top_k: sample from the `top_k` likeliest tokens; 0 for all tokens.
        top_p: sample from the smallest set of tokens whose probabilities add up to `top_p` (nucleus sampling, arXiv
            1904.09751); 1 for all tokens.
        seed: random seed; the same seed gives the same text.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if self.temperature < 0 or not np.isfinite(self.temperature):
            raise InputError(
                f"temperature = {self.temperature}: must be a number, 0 or more. Use 0 for the likeliest token"
            )
        if self.top_k < 0:
            raise InputError(f"top_k = {self.top_k} is below 0. Use 0 for all tokens, or a number of tokens")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p = {self.top_p}: must be above 0 and at most 1. Use 1 to sample from all tokens")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed = {self.seed} is not a whole number from 0 to 2^32 - 1. Use one in that range")


def check_tokens(tokens: int) -> None:
    """Rejects a number of tokens to write that is less than 1."""
    if tokens < 1:
        raise InputError(f"tokens = {tokens} writes nothing. Use at least 1")


def sample(
    logits_BV: Float[jax.Array, "B V"], rng: jax.Array, temperature: float, top_k: int, top_p: float
) -> Int[jax.Array, "B"]:
    """Samples a token for each row; see `SamplingSettings`. Among equal logits, lower ids come first.

    `top_p` keeps the likeliest tokens until their probabilities reach it: at least one token.
    """
    if temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    order_BV = jnp.argsort(-logits_BV, axis=-1, stable=True)
    sorted_BV = jnp.take_along_axis(logits_BV, order_BV, axis=-1) / temperature
    if top_k:
        sorted_BV = jnp.where(jnp.arange(sorted_BV.shape[-1]) < top_k, sorted_BV, -jnp.inf)
    if top_p < 1:
        mass_BV = jax.nn.softmax(sorted_BV, axis=-1)
        before_BV = jnp.cumsum(mass_BV, axis=-1) - mass_BV
        kept_BV = (before_BV < top_p).at[:, 0].set(True)
        sorted_BV = jnp.where(kept_BV, sorted_BV, -jnp.inf)
    rank_B = jax.random.categorical(rng, sorted_BV)
    return jnp.take_along_axis(order_BV, rank_B[:, None], axis=-1)[:, 0].astype(jnp.int32)


class Reader:
    """A model with one memory, which reads texts one after another as one document and continues them.

    `memorizing.open_reader` opens one for a run.
    """

    def __init__(
        self,
        source: SnapshotOwner,
        memory: MemorySettings,
        parameters: Parameters,
        vocabulary: Vocabulary,
        folder: FolderSettings,
        mesh: Mesh,
        say: Callable[[str], None] = lambda text: None,
    ):
        self.memory = dataclasses.replace(memory, report_recall=False)
        self._source, self._parameters, self._vocabulary = source, parameters, vocabulary
        self._folder, self._mesh, self._say = folder, mesh, say
        self._programs = _programs(
            source.model, self.memory, source.segment_length, vocabulary.special, vocabulary.size
        )
        empty = functools.partial(empty_carry, source.model, self.memory, 1, source.segment_length)
        self._carry: Carry = init_sharded(mesh, empty, functools.partial(shardings, mesh))
        # The inputs of the partial segment, which is not in the carry yet. There is at least one, to continue from.
        self._inputs = [vocabulary.begin]
        # Logits after these inputs, and the partial segment without its carry. None until the next token is needed.
        self._partial: tuple[jax.Array, Any] | None = None
        self._texts: list[ReadText] = []
        # Text of the tokens written since the last text was read, and their number.
        self._written: tuple[TextStream, int] | None = None
        self._is_older = False

    @property
    def tokens(self) -> int:
        """Number of tokens read and written."""
        return sum(text.tokens for text in self._texts)

    @property
    def tokens_in_memory(self) -> int:
        """Number of tokens in the memory; the maximum over layers, where these drop different tokens."""
        return max((int(bank.length_B[0]) for bank in self._carry.banks), default=0)

    def read(self, text: str, name: str = "text") -> int:
        """Reads a text after everything read before, and returns its number of tokens. Snapshots record its `name`.

        Raises:
            InputError: if `Memory.writes = 'never'` and no snapshot was loaded, so that the memory would stay empty.
        """
        if not self.tokens_in_memory:
            check_not_empty(self.memory, "load one first (--memory=DIR, reader.load)")
        tokens = encoded_text(self._vocabulary, text, name)
        self._note(tokens, name)
        self._inputs += tokens.tolist()
        self._partial = self._written = None
        length, first = self._source.segment_length, 0
        while len(self._inputs) - first > length:
            inputs = np.asarray(self._inputs[first : first + length], np.int32)
            with jax.set_mesh(self._mesh):
                self._carry = self._programs.read_segment(self._parameters, self._carry, inputs[None])
            first += length
        del self._inputs[:first]
        return len(tokens)

    def read_files(self, path: str | Path) -> None:
        """Reads a file, or the documents of a folder in order of their names (see the run's `Folder` settings).

        Raises:
            InputError: if there is no document, or a document is not text.
        """
        for document in read_path("--document", Path(path), self._folder):
            if isinstance(document, Problem):
                self._say(f"{document.place}: {document.message}")
            else:
                self._say(f"{document.id}: {self.read(document.text, document.id):,} tokens")

    def clear_memory(self) -> None:
        """Empties the memory; the partial segment and the XL caches remain. Snapshots record that it was emptied."""
        with jax.set_mesh(self._mesh):
            banks = tuple(clear(bank, np.ones(1, bool)) for bank in self._carry.banks)
        self._carry, self._partial, self._written = self._carry._replace(banks=banks), None, None
        self._texts.append(ReadText("(memory cleared)", 0, ""))

    def write(
        self,
        prompt: str = "",
        tokens: int = 100,
        temperature: float | int = 1.0,
        top_k: int = 0,
        top_p: float | int = 1.0,
        seed: int = 0,
    ) -> str:
        """Reads the prompt, writes `tokens` tokens after it, and returns their text without the prompt.

        Two calls without a prompt write the same as one call with the sum of their tokens. A character whose bytes are
        not all written yet is returned by the next call, or by `rest`.
        """
        return "".join(self.stream(prompt, tokens, SamplingSettings(float(temperature), top_k, float(top_p), seed)))

    def stream(self, prompt: str, tokens: int, sampling: SamplingSettings) -> Iterator[str]:
        """Writes as `write` does, and yields the text as it comes, in whole characters."""
        check_tokens(tokens)
        if prompt:
            self.read(prompt, "prompt")
        last_input = np.asarray(self._inputs[-1:], np.int32)
        text, before = self._written or (TextStream(self._vocabulary, last_input), 0)
        written: list[int] = []
        try:
            for number in range(before, before + tokens):
                rng = jax.random.fold_in(jax.random.key(sampling.seed), number)
                written.append(self._next(rng, sampling))
                if new_text := text.push(written[-1]):
                    yield new_text
        finally:
            self._note(np.asarray(written, np.int32), "written")
            self._written = text, before + len(written)

    def rest(self) -> str:
        """Returns the bytes that were written and are no whole character yet, as U+FFFD; empty if there are none."""
        return self._written[0].rest() if self._written else ""

    def _next(self, rng: jax.Array, sampling: SamplingSettings) -> int:
        """Samples a token and reads it."""
        programs, length = self._programs, self._source.segment_length
        sampling = dataclasses.replace(sampling, seed=0)  # `rng` holds the seed; another one would compile again
        with jax.set_mesh(self._mesh):
            if self._partial is None:
                inputs = np.pad(np.asarray(self._inputs, np.int32), (0, length - len(self._inputs)))
                self._partial = programs.begin(self._parameters, self._carry, inputs[None], len(self._inputs))
            (logits_BV, partial), self._partial = self._partial, None
            if len(self._inputs) == length:
                self._carry, partial = programs.close(self._carry, partial)
                self._inputs = []
            token_B, logits_BV, partial = programs.step(
                self._parameters, self._carry, partial, logits_BV, rng, sampling
            )
        self._partial = logits_BV, partial
        self._inputs.append(int(token_B[0]))
        return self._inputs[-1]

    def _note(self, tokens_T: Int[np.ndarray, "T"], name: str) -> None:
        if len(tokens_T):
            self._texts.append(read_text_of(tokens_T, name))

    def save(self, folder: str | Path) -> bool:
        """Saves everything read and written as a snapshot. Returns False if `folder` already holds the same snapshot.

        Raises:
            InputError: if `folder` holds something else, or part of the memory was made with other parameters.
        """
        self._check_saved()
        snapshot = Snapshot(self._carry, self._inputs, self._texts)
        return save_snapshot(Path(folder), snapshot, self._source, self.memory)

    def check_save(self, folder: str | Path, paths: Sequence[str | Path]) -> None:
        """Checks, before the files are read, that the texts read so far and these files could be saved in `folder`.

        Raises:
            InputError: if `folder` holds a snapshot of other texts or of another model, or the memory is never written.
        """
        self._check_saved()
        if not Path(folder).exists():
            return
        documents = [each for path in paths for each in read_path("--document", Path(path), self._folder)]
        texts = [(each.id, each.text) for each in documents if not isinstance(each, Problem)]
        encoded = [read_text_of(encoded_text(self._vocabulary, text, name), name) for name, text in texts]
        texts = [*self._texts, *(text for text in encoded if text.tokens)]
        check_again(Path(folder), texts, self._source, self.memory)

    def _check_saved(self) -> None:
        check_not_empty(self.memory)
        if self._is_older:
            raise InputError(
                "the loaded snapshot was made with the parameters that training began with, and this run has others by "
                "now. A snapshot needs one set of parameters. Read all texts again, without loading the snapshot"
            )

    def load(self, folder: str | Path) -> None:
        """Replaces everything read so far by a snapshot.

        Raises:
            InputError: if there is no snapshot, another model made it, or it is damaged.
        """
        self._carry, self._inputs, self._texts = load_snapshot(Path(folder), self._source, self.memory, self._mesh)
        self._partial, self._written, self._is_older = None, None, is_older(Path(folder), self._source)


class _Programs:
    """The compiled programs of a reader. `partial` is a `PartialSegment` without its carry, which lives longer.

    read_segment(parameters, carry, inputs_BN) -> carry                          reads a whole segment
    begin(parameters, carry, inputs_BN, count) -> logits, partial                reads the first `count` inputs of one
    step(parameters, carry, partial, logits, rng, sampling) -> token, logits, partial    samples a token and reads it
    close(carry, partial) -> carry, partial                                      begins the next segment

    Sampled tokens are below `size` and not `special`.
    """

    def __init__(
        self, model: ModelSettings, memory: MemorySettings, segment_length: int, special: frozenset[int], size: int
    ):
        graph, _ = abstract_model(model, memory)
        token_V = np.arange(model.vocabulary_size)
        allowed_V = (token_V < size) & ~np.isin(token_V, list(special))

        def read_segment(parameters, carry, inputs_BN):
            rows = inputs_BN.shape[0]
            batch = Batch(inputs_BN, inputs_BN, jnp.ones(inputs_BN.shape, bool), jnp.zeros(rows, bool))
            return constrain_tree(apply_model(graph, parameters, batch, carry)[1])

        def extended(parameters, carry, partial, inputs_BN, count):
            logits_BV, segment = extend(graph, parameters, inputs_BN, count, PartialSegment(carry, *partial))
            return everywhere(logits_BV), constrain_tree(segment)[1:]

        def begin(parameters, carry, inputs_BN, count):
            return extended(parameters, carry, open_segment(carry, segment_length)[1:], inputs_BN, count)

        def step(parameters, carry, partial, logits_BV, rng, sampling):
            logits_BV = jnp.where(allowed_V, logits_BV, -jnp.inf)
            token_B = sample(logits_BV, rng, sampling.temperature, sampling.top_k, sampling.top_p)
            return everywhere(token_B), *extended(parameters, carry, partial, token_B[:, None], jnp.asarray(1))

        def close(carry, partial):
            carry = constrain_tree(close_segment(PartialSegment(carry, *partial), model, memory))
            return carry, constrain_tree(open_segment(carry, segment_length))[1:]

        self.read_segment = jax.jit(read_segment, donate_argnums=1)
        self.begin = jax.jit(begin)
        self.step = jax.jit(step, donate_argnums=2, static_argnames="sampling")
        self.close = jax.jit(close, donate_argnums=0)


_programs = functools.cache(_Programs)
"""Readers of one model share the compiled programs."""
