"""Reading long texts into memory, and writing on from there: `Reader`, which `memorizing generate` and `memorize` use.

    read     whole segments by the call that training and evaluation make; the tokens left over wait for others
    write    those at once, then a token at a time (model/decoding.py); a segment that is full goes to caches and memory

Everything a reader reads and writes is one document, to which its memory belongs.
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
from memorizing.model.settings import ModelSettings
from memorizing.model.transformer import Carry, Parameters, abstract_model, apply_model, empty_carry
from memorizing.parallel.mesh import constrain_tree, everywhere, init_sharded, shardings
from memorizing.shapes import Batch
from memorizing.storage.snapshots import (
    ReadText,
    Snapshot,
    Source,
    check_again,
    check_not_empty,
    is_older,
    load_snapshot,
    read_text_of,
    save_snapshot,
)


@dataclasses.dataclass(frozen=True)
class SamplingSettings:
    """How the next token is drawn from the model's probabilities.

    Attributes:
        temperature: by which logits are divided: below 1 the likely gets likelier; 0 for always the likeliest token.
        top_k: only the so many likeliest tokens are drawn; 0 for all.
        top_p: only the likeliest tokens that together have this probability are drawn (arXiv 1904.09751).
        seed: the same one writes the same text.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if self.temperature < 0 or not np.isfinite(self.temperature):
            raise InputError(f"temperature = {self.temperature}: must be 0 (always the likeliest token) or more")
        if self.top_k < 0:
            raise InputError(f"top_k = {self.top_k}: must be 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p = {self.top_p}: must be above 0 and at most 1 (all tokens)")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed = {self.seed}: must be at least 0 and below 2^32")


def check_tokens(tokens: int) -> None:
    """Refuses to write nothing."""
    if tokens < 1:
        raise InputError(f"tokens = {tokens}: must be at least 1")


def sample(
    logits_BV: Float[jax.Array, "B V"], rng: jax.Array, temperature: float, top_k: int, top_p: float
) -> Int[jax.Array, "B"]:
    """Draws a token for each row, as `SamplingSettings` says; of equal logits those of lower ids come first.

    The tokens that `top_p` keeps are the fewest, likeliest first, whose probability reaches it: at least one.
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
    place_B = jax.random.categorical(rng, sorted_BV)
    return jnp.take_along_axis(order_BV, place_B[:, None], axis=-1)[:, 0].astype(jnp.int32)


class Reader:
    """A model with one memory: it reads texts one after another as one document, and writes on from there.

    Made by `memorizing.open_reader`.
    """

    def __init__(
        self,
        source: Source,
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
        self._calls = _calls(source.model, self.memory, source.segment_length, vocabulary.special, vocabulary.size)
        empty = functools.partial(empty_carry, source.model, self.memory, 1, source.segment_length)
        self._carry: Carry = init_sharded(mesh, empty, functools.partial(shardings, mesh))
        # Of the segment that is not in the carry yet: at least one, so that there is always something to go on from.
        self._inputs = [vocabulary.begin]
        # Once something is written behind these inputs: what the model made of them.
        self._opened: tuple[jax.Array, Any] | None = None
        self._texts: list[ReadText] = []
        self._is_older = False

    @property
    def tokens(self) -> int:
        """How many were read and written."""
        return sum(text.tokens for text in self._texts)

    @property
    def remembered(self) -> int:
        """How many tokens the memory holds now: the most that a layer's does, where they leave out different ones."""
        return max((int(bank.length_B[0]) for bank in self._carry.banks), default=0)

    def read(self, text: str, name: str = "text") -> int:
        """Reads a text behind all that was read before; gives its number of tokens. Snapshots note its `name`.

        Raises:
            InputError: when a memory that is only read (`Memory.writes = 'never'`) was not loaded before.
        """
        if not self.remembered:
            check_not_empty(self.memory, "load one first (--memory=DIR, reader.load)")
        tokens = encoded_text(self._vocabulary, text, name)
        self._note(tokens, name)
        self._inputs += tokens.tolist()
        self._opened = None
        length, first = self._source.segment_length, 0
        while len(self._inputs) - first > length:
            inputs = np.asarray(self._inputs[first : first + length], np.int32)
            with jax.set_mesh(self._mesh):
                self._carry = self._calls.segment(self._parameters, self._carry, inputs[None])
            first += length
        del self._inputs[:first]
        return len(tokens)

    def read_files(self, path: str | Path) -> None:
        """Reads a file, or the documents of a folder in order of their names, as the run's `Folder` settings say.

        Raises:
            InputError: when there are none, or they are no text.
        """
        for document in read_path("--document", Path(path), self._folder):
            if isinstance(document, Problem):
                self._say(f"{document.place}: {document.message}")
            else:
                self._say(f"{document.id}: {self.read(document.text, document.id):,} tokens")

    def clear_memory(self) -> None:
        """Forgets what is in the memory; the segment that is not full yet and the XL caches stay. Snapshots note it."""
        with jax.set_mesh(self._mesh):
            banks = tuple(clear(bank, np.ones(1, bool)) for bank in self._carry.banks)
        self._carry, self._opened = self._carry._replace(banks=banks), None
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
        """Reads the prompt, writes that many tokens behind it, and gives their text, without the prompt."""
        return "".join(self.stream(prompt, tokens, SamplingSettings(float(temperature), top_k, float(top_p), seed)))

    def stream(self, prompt: str, tokens: int, sampling: SamplingSettings) -> Iterator[str]:
        """`write`, piece by piece: whole characters, as soon as they are certain."""
        check_tokens(tokens)
        if prompt:
            self.read(prompt, "prompt")
        how = {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
        text, written = TextStream(self._vocabulary, np.asarray(self._inputs[-1:], np.int32)), []
        try:
            for number in range(tokens):
                rng = jax.random.fold_in(jax.random.key(sampling.seed), number)
                written.append(self._next(rng, how))
                if piece := text.push(written[-1]):
                    yield piece
            yield text.rest()
        finally:
            self._note(np.asarray(written, np.int32), "written")

    def _next(self, rng: jax.Array, how: dict[str, float]) -> int:
        """Draws a token and reads it."""
        calls, length = self._calls, self._source.segment_length
        with jax.set_mesh(self._mesh):
            if self._opened is None:
                inputs = np.pad(np.asarray(self._inputs, np.int32), (0, length - len(self._inputs)))
                self._opened = calls.opening(self._parameters, self._carry, inputs[None], len(self._inputs))
            (logits_BV, part), self._opened = self._opened, None
            if len(self._inputs) == length:
                self._carry, part = calls.closing(self._carry, part)
                self._inputs = []
            token_B, logits_BV, part = calls.step(self._parameters, self._carry, part, logits_BV, rng, **how)
        self._opened = logits_BV, part
        self._inputs.append(int(token_B[0]))
        return self._inputs[-1]

    def _note(self, tokens_T: Int[np.ndarray, "T"], name: str) -> None:
        if len(tokens_T):
            self._texts.append(read_text_of(tokens_T, name))

    def save(self, folder: str | Path) -> bool:
        """Keeps all that was read and written as a snapshot; False if just that is there already.

        Raises:
            InputError: when something else is there, or some of it is of other parameters than the model has now.
        """
        self._check_saved()
        snapshot = Snapshot(self._carry, self._inputs, self._texts)
        return save_snapshot(Path(folder), snapshot, self._source, self.memory)

    def check_save(self, folder: str | Path, paths: Sequence[str | Path]) -> None:
        """Refuses to save in `folder` what is read already and then these files, before they are read for nothing.

        Raises:
            InputError: when a snapshot of other texts, or of another model, is there; when nothing is ever written.
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
                "what was loaded is of the parameters that this run's training began with, and what is read now of "
                "those that it has: the two cannot be kept as one snapshot. Read the texts anew, without loading it"
            )

    def load(self, folder: str | Path) -> None:
        """Takes a snapshot in place of what was read until now.

        Raises:
            InputError: when there is none, another model made it, or it is damaged.
        """
        self._carry, self._inputs, self._texts = load_snapshot(Path(folder), self._source, self.memory, self._mesh)
        self._opened, self._is_older = None, is_older(Path(folder), self._source)


class _Calls:
    """What a reader computes, each compiled once. A `part` is a `PartialSegment` less its carry, which lasts longer.

    Only tokens below `size` are written, and none that are `special`.

    segment(parameters, carry, inputs_BN) -> carry                      reads a whole segment
    opening(parameters, carry, inputs_BN, count) -> logits, part        reads the beginning of one
    step(parameters, carry, part, logits, rng, ...) -> token, logits, part    draws a token and reads it
    closing(carry, part) -> carry, part                                 goes on to the next segment
    """

    def __init__(
        self, model: ModelSettings, memory: MemorySettings, segment_length: int, special: frozenset[int], size: int
    ):
        graph, _ = abstract_model(model, memory)
        token_V = np.arange(model.vocabulary_size)
        allowed_V = (token_V < size) & ~np.isin(token_V, list(special))

        def segment(parameters, carry, inputs_BN):
            rows = inputs_BN.shape[0]
            batch = Batch(inputs_BN, inputs_BN, jnp.ones(inputs_BN.shape, bool), jnp.zeros(rows, bool))
            return constrain_tree(apply_model(graph, parameters, batch, carry)[1])

        def extended(parameters, carry, part, inputs_BN, count):
            logits_BV, opened = extend(graph, parameters, inputs_BN, count, PartialSegment(carry, *part))
            return everywhere(logits_BV), constrain_tree(opened)[1:]

        def opening(parameters, carry, inputs_BN, count):
            return extended(parameters, carry, open_segment(carry, segment_length)[1:], inputs_BN, count)

        def step(parameters, carry, part, logits_BV, rng, *, temperature, top_k, top_p):
            token_B = sample(jnp.where(allowed_V, logits_BV, -jnp.inf), rng, temperature, top_k, top_p)
            return everywhere(token_B), *extended(parameters, carry, part, token_B[:, None], jnp.asarray(1))

        def closing(carry, part):
            carry = constrain_tree(close_segment(PartialSegment(carry, *part), model, memory))
            return carry, constrain_tree(open_segment(carry, segment_length))[1:]

        self.segment = jax.jit(segment, donate_argnums=1)
        self.opening = jax.jit(opening)
        self.step = jax.jit(step, donate_argnums=2, static_argnames=("temperature", "top_k", "top_p"))
        self.closing = jax.jit(closing, donate_argnums=0)


_calls = functools.cache(_Calls)
"""Readers of one model share what is compiled."""
