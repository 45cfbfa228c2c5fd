"""seqio tasks of the five corpora, and any other task or mixture as a source of documents.

Importing this module registers `pg19_bytes`, `pg19_sentencepiece` and so on for each corpus; `github_shuffled_bytes`
and `github_shuffled_sentencepiece` draw another order of each repository's files every time they are read. Each example
is a whole document: `targets` (its tokens), `targets_pretokenized` (its text), `document_id`, `title`, `licence`.

    import seqio, memorizing.data.tasks as tasks
    tasks.use(data_dir=..., vocabulary=...)         or set TFDS_DATA_DIR and MEMORIZING_VOCABULARY
    seqio.get_mixture_or_task("isabelle_sentencepiece").get_dataset(split="train")

The documents are those of `builders.py`, the tokens those that `memorizing prepare` writes.
"""

import difflib
import functools
import importlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from memorizing.data import builders  # before seqio: it keeps TensorFlow quiet, and registers the datasets

import numpy as np  # isort: skip
import seqio
import tensorflow as tf

from memorizing.data.corpora import github
from memorizing.data.documents import SPLITS, Document, Problem, Split, state_of
from memorizing.data.tokens import PreparedTokens
from memorizing.data.vocabulary import ByteVocabulary, IdVocabulary, SentencePieceVocabulary, Vocabulary
from memorizing.errors import InputError

C4_MINIMUM_TOKENS = 4096
_given_vocabulary: list[Path] = []


def use(data_dir: Path | None = None, vocabulary: Path | None = None) -> None:
    """Says where the datasets lie that TFDS built, and a prepared folder or SentencePiece model for the vocabulary."""
    if data_dir is not None:
        seqio.set_tfds_data_dir_override(str(data_dir))
    if vocabulary is not None:
        _given_vocabulary[:] = [vocabulary]


class LosslessSentencePieces(seqio.Vocabulary):
    """The vocabulary of `memorizing.data.vocabulary` as seqio has them: it decodes exactly what it encoded."""

    def __init__(self) -> None:
        super().__init__(extra_ids=0)

    @property
    def own(self) -> SentencePieceVocabulary:
        """The vocabulary that was given to `use`.

        Raises:
            InputError: when none was, or it is not a SentencePiece vocabulary.
        """
        path = _given_vocabulary[0] if _given_vocabulary else os.environ.get("MEMORIZING_VOCABULARY")
        if not path:
            raise InputError(
                "the SentencePiece tasks need a vocabulary: set MEMORIZING_VOCABULARY, or call "
                "memorizing.data.tasks.use(vocabulary=...), to a folder made by `memorizing prepare` or a model file"
            )
        return _load(Path(path))

    @property
    def eos_id(self) -> int:
        return 1

    @property
    def unk_id(self) -> int:
        return 2

    @property
    def _base_vocab_size(self) -> int:
        return self.own.size

    def _encode(self, s: str) -> Sequence[int]:
        return self.own.encode(s).tolist()

    def _decode(self, ids) -> str:
        return self.own.decode(np.asarray(list(ids), np.int32))

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
        own = self.own
        tokens = tf.numpy_function(lambda text: own.encode(text.decode("utf-8")), [s], tf.int32, stateful=False)
        return tf.ensure_shape(tokens, [None])

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        own = self.own
        return tf.ensure_shape(tf.numpy_function(lambda tokens: own.decode(tokens).encode(), [ids], tf.string), [])


@functools.lru_cache(maxsize=4)
def _load(path: Path) -> SentencePieceVocabulary:
    if path.is_dir():
        vocabulary = PreparedTokens(path).vocabulary
        if not isinstance(vocabulary, SentencePieceVocabulary):
            raise InputError(f"{path} has a vocabulary of {vocabulary.kind}: name one of SentencePiece")
        return vocabulary
    try:
        return SentencePieceVocabulary(path.read_bytes())
    except (OSError, RuntimeError) as error:
        raise InputError(f"{path} is no prepared folder and no SentencePiece model: {error}") from error


def _to_targets(dataset: tf.data.Dataset) -> tf.data.Dataset:
    return dataset.map(
        lambda example: {
            "targets": example["text"],
            **{name: example[name] for name in ("document_id", "title", "licence")},
        },
        num_parallel_calls=tf.data.AUTOTUNE,
    )


@seqio.map_over_dataset(num_seeds=1)
def _reshuffle(example: dict[str, tf.Tensor], seed: tuple[tf.Tensor, tf.Tensor]) -> dict[str, tf.Tensor]:
    def other_order(text: bytes, *seed: np.ndarray) -> bytes:
        return github.reshuffled(text.decode("utf-8"), int(seed[0]) ^ int(seed[1])).encode("utf-8")

    return {
        **example,
        "targets": tf.ensure_shape(tf.numpy_function(other_order, [example["targets"], *seed], tf.string), []),
    }


def _long_enough(dataset: tf.data.Dataset) -> tf.data.Dataset:
    return dataset.filter(lambda example: tf.size(example["targets"]) >= C4_MINIMUM_TOKENS)


def _register() -> None:
    vocabularies = {"bytes": seqio.ByteVocabulary(), "sentencepiece": LosslessSentencePieces()}
    for kind, vocabulary in vocabularies.items():
        for corpus, builder in builders.BUILDERS.items():
            source = cast(Any, seqio.TfdsDataSource(f"{builder.name}:{builder.VERSION}"))
            features = {"targets": seqio.Feature(vocabulary, add_eos=False, dtype=tf.int32)}
            longest = [_long_enough] if corpus == "c4" else []
            steps = {corpus: [_to_targets, seqio.preprocessors.tokenize, *longest]}
            if corpus == "github":
                steps["github_shuffled"] = [_to_targets, _reshuffle, seqio.preprocessors.tokenize]
            for name, preprocessors in steps.items():
                seqio.TaskRegistry.add(
                    f"{name}_{kind}",
                    source=source,
                    preprocessors=preprocessors,
                    output_features=features,
                    metric_fns=[],
                )


_register()


def find(name: str, modules: Sequence[str]) -> seqio.Task | seqio.Mixture:
    """A registered task or mixture, once `modules` are imported.

    Raises:
        InputError: when it is not registered, a module is missing, or it has no `targets`.
    """
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise InputError(f"Prepare.task_modules names {module!r}: {error}") from error
    names = [*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()]
    if name not in names:
        close = difflib.get_close_matches(name, names, n=3, cutoff=0.5) or sorted(names)[:12]
        raise InputError(
            f"Prepare.task = {name!r} is not registered with seqio: name the module that does it in "
            f"Prepare.task_modules, or use one of {', '.join(close)}"
        )
    task = seqio.get_mixture_or_task(name)
    if "targets" not in task.output_features:
        raise InputError(
            f"Prepare.task = {name!r} has the features {', '.join(task.output_features)}, but no `targets`, from which "
            "documents are read"
        )
    return task


def vocabulary_of(task: seqio.Task | seqio.Mixture) -> Vocabulary:
    """What the ids of its targets mean."""
    vocabulary = cast(Any, task.output_features["targets"].vocabulary)
    if isinstance(vocabulary, LosslessSentencePieces):
        return vocabulary.own
    if isinstance(vocabulary, seqio.ByteVocabulary):
        return ByteVocabulary(vocabulary.vocab_size)
    if isinstance(vocabulary, seqio.SentencePieceVocabulary):
        return SentencePieceVocabulary(cast(bytes, vocabulary.sp_model), vocabulary.vocab_size)
    return IdVocabulary(vocabulary.vocab_size)


def pieces(task: seqio.Task | seqio.Mixture) -> dict[Split, list[tuple[Split, int, int]]]:
    """Each file of a task's source on its own; of a mixture, which cannot be divided, the whole split.

    Raises:
        InputError: when it has no train split.
    """
    found: dict[Split, list[tuple[Split, int, int]]] = {}
    for split in (split for split in SPLITS if split in task.splits):
        count = len(task.source.list_shards(split)) if isinstance(task, seqio.Task) else 1
        found[split] = [(split, number, count) for number in range(count)]
    if "train" not in found:
        raise InputError(f"Prepare.task = {task.name!r} has the splits {', '.join(task.splits)}, but no train split")
    return found


def members(task: seqio.Task | seqio.Mixture) -> list[seqio.Task]:
    """The tasks of a mixture, by name, or the task itself."""
    return [task] if isinstance(task, seqio.Task) else list(task.tasks)


def state(task: seqio.Task | seqio.Mixture) -> str:
    """Of the files it reads, where its source says which: other sizes or times of change give another."""
    shards = [file for its in members(task) for split in its.splits for file in its.source.list_shards(split)]
    return state_of(Path(), [Path(os.fspath(shard)) for shard in shards])


def read(task: seqio.Task | seqio.Mixture, piece: tuple[Split, int, int], seed: int) -> Iterator[Document | Problem]:
    """Its examples in order, each a document."""
    split, number, count = piece
    shard = seqio.ShardInfo(number, count) if count > 1 else None
    dataset = task.get_dataset(None, split=split, shuffle=False, seed=seed, shard_info=shard, num_epochs=1)
    vocabulary = vocabulary_of(task)
    for place, example in enumerate(dataset.as_numpy_iterator()):
        tokens = np.asarray(example["targets"], np.int32)
        id, title, licence, text = (
            example[name].decode("utf-8") if isinstance(example.get(name), bytes) else ""
            for name in ("document_id", "title", "licence", "targets_pretokenized")
        )
        yield Document(id or f"{split}-{number}-{place}", title, text or vocabulary.decode(tokens), licence, tokens)
