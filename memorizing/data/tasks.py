"""seqio tasks of the five corpora, and any other task or mixture as a source of documents.

Importing this module registers `pg19_bytes`, `pg19_sentencepiece` and so on for each corpus; `github_shuffled_bytes`
and `github_shuffled_sentencepiece` draw another order of each repository's files every time they are read. Each example
is a whole document: `targets` (its tokens), `targets_pretokenized` (its text), `document_id`, `title`, `license`.

    import seqio, memorizing.data.tasks as tasks
    tasks.use(data_dir=..., vocabulary=...)         or set TFDS_DATA_DIR and MEMORIZING_VOCABULARY
    seqio.get_mixture_or_task("isabelle_sentencepiece").get_dataset(split="train")

The documents are those of `builders.py`, the tokens those that `memorizing prepare` writes.
"""

import contextlib
import difflib
import functools
import importlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from memorizing.data import builders  # before seqio: it keeps TensorFlow quiet, and registers the datasets

import numpy as np  # isort: skip
import seqio
import tensorflow as tf

from memorizing.data.corpora import github
from memorizing.data.documents import SPLITS, Document, Problem, Split, state_of
from memorizing.data.tokens import given_vocabulary
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
    vocabulary = given_vocabulary(path, "the vocabulary of the SentencePiece tasks")
    if not isinstance(vocabulary, SentencePieceVocabulary):
        raise InputError(f"{path} has a vocabulary of {vocabulary.kind}: name one of SentencePiece")
    return vocabulary


def _to_targets(dataset: tf.data.Dataset) -> tf.data.Dataset:
    return dataset.map(
        lambda example: {
            "targets": example["text"],
            **{name: example[name] for name in ("document_id", "title", "license")},
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
        except Exception as error:  # the module's own, whatever it is
            what = str(error) if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
            raise InputError(f"Prepare.task_modules names {module!r}, which cannot be imported: {what}") from error
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
    feature = task.output_features["targets"]
    if feature.rank != 1 or not tf.as_dtype(feature.dtype).is_integer:
        raise InputError(
            f"Prepare.task = {name!r} has the feature `targets` of rank {feature.rank} and type "
            f"{tf.as_dtype(feature.dtype).name}: a document is one row of whole numbers, rank 1 and int32"
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


class Piece(NamedTuple):
    """One of `count` shards of a task's split; the task is one of the mixture's, if it is a mixture."""

    task: str
    split: Split
    number: int
    count: int


def pieces(task: seqio.Task | seqio.Mixture) -> dict[Split, list[Piece]]:
    """Each file of a task's source on its own; of a mixture those of each of its tasks, one after another.

    So every document of a mixture is there once, and its rates do not count: seqio itself would end a mixture with
    the first of its tasks that ends.

    Raises:
        InputError: when it has no train split.
    """
    found: dict[Split, list[Piece]] = {}
    for split in SPLITS:
        for its in members(task):
            if split in splits_of(its):
                with _of_source(its):
                    count = len(its.source.list_shards(split))
                found.setdefault(split, []).extend(Piece(its.name, split, number, count) for number in range(count))
    if "train" not in found:
        known = sorted({split for its in members(task) for split in splits_of(its)})
        raise InputError(f"Prepare.task = {task.name!r} has the splits {', '.join(known)}, but no train split")
    return found


def splits_of(task: seqio.Task) -> Sequence[str]:
    """The splits of a task's source.

    Raises:
        InputError: when it has none, as a dataset of TFDS that was never built.
    """
    with _of_source(task):
        return tuple(task.splits)


@contextlib.contextmanager
def _of_source(task: seqio.Task) -> Iterator[None]:
    """What a source, a preprocessor or seqio's own checks say is wrong, as an InputError that names the task."""
    try:
        yield
    except InputError:
        raise
    except (ValueError, LookupError, AssertionError, OSError, RuntimeError, tf.errors.OpError) as error:
        remedy = "see its source and preprocessors"
        if isinstance(task.source, seqio.TfdsDataSource):
            remedy = (
                f"its dataset {task.source.tfds_dataset.name} must be in --data_dir, or where TFDS_DATA_DIR says; "
                "`memorizing prepare --data_dir` puts those of our corpora there"
            )
        raise InputError(
            f"the seqio task {task.name!r} cannot be read ({type(error).__name__}: {str(error)[:500]}): {remedy}"
        ) from error


def members(task: seqio.Task | seqio.Mixture) -> list[seqio.Task]:
    """The tasks of a mixture, by name, or the task itself."""
    return [task] if isinstance(task, seqio.Task) else list(task.tasks)


def state(task: seqio.Task | seqio.Mixture) -> str:
    """Of the files it reads, where its source says which: other sizes or times of change give another."""
    shards = [file for its in members(task) for split in splits_of(its) for file in its.source.list_shards(split)]
    return state_of(Path(), [Path(os.fspath(shard)) for shard in shards])


def read(task: seqio.Task | seqio.Mixture, piece: Piece, seed: int) -> Iterator[Document | Problem]:
    """Its examples in order, each a document.

    Raises:
        InputError: when they cannot be read, or have ids that the vocabulary has not.
    """
    own = next(its for its in members(task) if its.name == piece.task)
    shard = seqio.ShardInfo(piece.number, piece.count) if piece.count > 1 else None
    vocabulary = vocabulary_of(task)
    place = f"{piece.split}-{piece.number}" if own is task else f"{own.name}-{piece.split}-{piece.number}"
    with _of_source(own):
        dataset = own.get_dataset(None, split=piece.split, shuffle=False, seed=seed, shard_info=shard, num_epochs=1)
        for number, example in enumerate(dataset.as_numpy_iterator()):
            yield _document(own.name, f"{place}-{number}", example, vocabulary)


def _document(task: str, place: str, example: Mapping[str, Any], vocabulary: Vocabulary) -> Document:
    tokens = np.asarray(example["targets"])
    unknown = tokens[(tokens < 0) | (tokens >= vocabulary.size)]
    if len(unknown):
        raise InputError(
            f"the seqio task {task!r} has an example ({place}) whose `targets` hold the id {unknown[0]}, but its "
            f"vocabulary has the ids 0 to {vocabulary.size - 1}: give the feature the vocabulary that its ids are of"
        )
    id, title, license, text = (
        example[name].decode("utf-8") if isinstance(example.get(name), bytes) else ""
        for name in ("document_id", "title", "license", "targets_pretokenized")
    )
    tokens = tokens.astype(np.int32)
    return Document(id or place, title, text or vocabulary.decode(tokens), license, tokens)
