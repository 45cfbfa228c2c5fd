"""seqio tasks of the corpora, and any other task or mixture as a source of documents.

Importing this module registers `pg19_bytes`, `pg19_sentencepiece` and so on for each corpus. `github_shuffled_bytes`
and `github_shuffled_sentencepiece` put each repository's files in another order every time they are read. An example is
a whole document: `targets` (its tokens), `targets_pretokenized` (its text), `document_id`, `title`, `license`.

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from memorizing.data import builders  # before seqio: quiets TensorFlow and registers the datasets

import numpy as np  # isort: skip
import seqio
import tensorflow as tf

from memorizing.data.documents import SPLITS, Document, Problem, Split, files_digest
from memorizing.data.tokens import given_vocabulary
from memorizing.data.vocabulary import ByteVocabulary, IdVocabulary, SentencePieceVocabulary, Vocabulary
from memorizing.errors import InputError

_given_vocabulary: list[Path] = []


def use(data_dir: Path | None = None, vocabulary: Path | None = None) -> None:
    """Sets the folder of the TFDS datasets, and the prepared folder or SentencePiece model of the vocabulary."""
    if data_dir is not None:
        seqio.set_tfds_data_dir_override(str(data_dir))
    if vocabulary is not None:
        _given_vocabulary[:] = [vocabulary]


class LosslessSentencePieces(seqio.Vocabulary):
    """The SentencePiece vocabulary of `memorizing.data.vocabulary` for seqio. It decodes exactly what it encoded."""

    def __init__(self) -> None:
        super().__init__(extra_ids=0)

    @property
    def wrapped(self) -> SentencePieceVocabulary:
        """The vocabulary that was given to `use`.

        Raises:
            InputError: if none was given, or it is not a SentencePiece vocabulary.
        """
        path = _given_vocabulary[0] if _given_vocabulary else os.environ.get("MEMORIZING_VOCABULARY")
        if not path:
            raise InputError(
                "the SentencePiece tasks need a vocabulary. Set MEMORIZING_VOCABULARY, or call "
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
        return self.wrapped.size

    def _encode(self, s: str) -> Sequence[int]:
        return self.wrapped.encode(s).tolist()

    def _decode(self, ids) -> str:
        return self.wrapped.decode(np.asarray(list(ids), np.int32))

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
        wrapped = self.wrapped
        tokens = tf.numpy_function(lambda text: wrapped.encode(text.decode("utf-8")), [s], tf.int32, stateful=False)
        return tf.ensure_shape(tokens, [None])

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        wrapped = self.wrapped
        return tf.ensure_shape(tf.numpy_function(lambda tokens: wrapped.decode(tokens).encode(), [ids], tf.string), [])


@functools.lru_cache(maxsize=4)
def _load(path: Path) -> SentencePieceVocabulary:
    vocabulary = given_vocabulary(path, "the vocabulary of the SentencePiece tasks")
    if not isinstance(vocabulary, SentencePieceVocabulary):
        raise InputError(f"{path} has a vocabulary of {vocabulary.kind}. Give one of SentencePiece")
    return vocabulary


def _to_targets(dataset: tf.data.Dataset) -> tf.data.Dataset:
    return dataset.map(
        lambda example: {
            "targets": example["text"],
            **{name: example[name] for name in ("document_id", "title", "license")},
        },
        num_parallel_calls=tf.data.AUTOTUNE,
    )


def _reorder(reordered: Callable[[str, int], str]) -> Callable[[tf.data.Dataset], tf.data.Dataset]:
    def other_order(text: bytes, *seed: np.integer) -> bytes:
        return reordered(text.decode("utf-8"), int(seed[0]) ^ int(seed[1])).encode("utf-8")

    @seqio.map_over_dataset(num_seeds=1)
    def reorder(example: dict[str, tf.Tensor], seed: tuple[tf.Tensor, tf.Tensor]) -> dict[str, tf.Tensor]:
        text = tf.numpy_function(other_order, [example["targets"], *seed], tf.string)
        return {**example, "targets": tf.ensure_shape(text, [])}

    return reorder


def _long_enough(minimum_tokens: int) -> Callable[[tf.data.Dataset], tf.data.Dataset]:
    return lambda dataset: dataset.filter(lambda example: tf.size(example["targets"]) >= minimum_tokens)


def _register() -> None:
    vocabularies = {"bytes": seqio.ByteVocabulary(), "sentencepiece": LosslessSentencePieces()}
    for kind, vocabulary in vocabularies.items():
        for corpus, builder in builders.BUILDERS.items():
            source = cast(Any, seqio.TfdsDataSource(f"{builder.name}:{builder.VERSION}"))
            features = {"targets": seqio.Feature(vocabulary, add_eos=False, dtype=tf.int32)}
            reader, tokenize = builder.CORPUS, seqio.preprocessors.tokenize
            only_long = [_long_enough(reader.task_minimum_tokens)] if reader.task_minimum_tokens else []
            steps = {corpus: [_to_targets, tokenize, *only_long]}
            if reader.has_orders:
                steps[f"{corpus}_shuffled"] = [_to_targets, _reorder(reader.reordered), tokenize, *only_long]
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
    """Imports `modules` and returns the registered task or mixture.

    Raises:
        InputError: if it is not registered, a module cannot be imported, or it has no suitable `targets`.
    """
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as error:  # any error of the user's module
            reason = str(error) if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
            raise InputError(f"Prepare.task_modules names {module!r}, which cannot be imported: {reason}") from error
    names = [*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()]
    if name not in names:
        close = difflib.get_close_matches(name, names, n=3, cutoff=0.5) or sorted(names)[:12]
        raise InputError(
            f"Prepare.task = {name!r} is not registered with seqio. Give the module that registers it in "
            f"Prepare.task_modules, or use one of {', '.join(close)}"
        )
    task = seqio.get_mixture_or_task(name)
    if "targets" not in task.output_features:
        raise InputError(
            f"Prepare.task = {name!r} has the features {', '.join(task.output_features)}, but no `targets`. Add this "
            "feature; documents are read from it"
        )
    feature = task.output_features["targets"]
    if feature.rank != 1 or not tf.as_dtype(feature.dtype).is_integer:
        raise InputError(
            f"Prepare.task = {name!r} has the feature `targets` of rank {feature.rank} and type "
            f"{tf.as_dtype(feature.dtype).name}. A document is an array of token ids: use rank 1 and int32"
        )
    return task


def vocabulary_of(task: seqio.Task | seqio.Mixture) -> Vocabulary:
    """Returns the vocabulary of the task's `targets`."""
    vocabulary = cast(Any, task.output_features["targets"].vocabulary)
    if isinstance(vocabulary, LosslessSentencePieces):
        return vocabulary.wrapped
    if isinstance(vocabulary, seqio.ByteVocabulary):
        return ByteVocabulary(vocabulary.vocab_size)
    if isinstance(vocabulary, seqio.SentencePieceVocabulary):
        return SentencePieceVocabulary(cast(bytes, vocabulary.sp_model), vocabulary.vocab_size)
    return IdVocabulary(vocabulary.vocab_size)


class TaskShard(NamedTuple):
    """One of `count` shards of a split of a task, which may be a member of the mixture."""

    task: str
    split: Split
    number: int
    count: int


def shards(task: seqio.Task | seqio.Mixture) -> dict[Split, list[TaskShard]]:
    """Returns the shards of a task, by split; of a mixture, those of all its tasks, one task after another.

    Every document of a mixture is read once and its rates do not count. seqio itself would end a mixture with the first
    of its tasks that ends.

    Raises:
        InputError: if there is no train split.
    """
    of_split: dict[Split, list[TaskShard]] = {}
    for split in SPLITS:
        for member in members(task):
            if split in splits_of(member):
                with _source_errors(member):
                    count = len(member.source.list_shards(split))
                of_member = (TaskShard(member.name, split, number, count) for number in range(count))
                of_split.setdefault(split, []).extend(of_member)
    if "train" not in of_split:
        names = ", ".join(sorted({split for member in members(task) for split in splits_of(member)}))
        raise InputError(f"Prepare.task = {task.name!r} has the splits {names}, but no train split to prepare")
    return of_split


def splits_of(task: seqio.Task) -> Sequence[str]:
    """Returns the splits of a task's source.

    Raises:
        InputError: if the source cannot be read, for example a TFDS dataset that was never built.
    """
    with _source_errors(task):
        return tuple(task.splits)


@contextlib.contextmanager
def _source_errors(task: seqio.Task) -> Iterator[None]:
    """Turns errors of a source, a preprocessor or seqio's checks into an InputError that names the task."""
    try:
        yield
    except InputError:
        raise
    except (ValueError, LookupError, AssertionError, OSError, RuntimeError, tf.errors.OpError) as error:
        remedy = "Check its source and preprocessors"
        if isinstance(task.source, seqio.TfdsDataSource):
            remedy = (
                f"Its dataset {task.source.tfds_dataset.name} must be in --data_dir or TFDS_DATA_DIR. "
                "`memorizing prepare --data_dir` builds those of this package's corpora there"
            )
        raise InputError(
            f"the seqio task {task.name!r} cannot be read ({type(error).__name__}: {str(error)[:500]}). {remedy}"
        ) from error


def members(task: seqio.Task | seqio.Mixture) -> list[seqio.Task]:
    """Returns the tasks of a mixture, or the task itself."""
    return [task] if isinstance(task, seqio.Task) else list(task.tasks)


def state(task: seqio.Task | seqio.Mixture) -> str:
    """Returns a digest of the names, sizes and times of the files that the task reads."""
    shards = [
        file for member in members(task) for split in splits_of(member) for file in member.source.list_shards(split)
    ]
    return files_digest(Path(), [Path(os.fspath(shard)) for shard in shards])


def read(task: seqio.Task | seqio.Mixture, shard: TaskShard, seed: int) -> Iterator[Document | Problem]:
    """Yields the examples of a shard in order, each as a document.

    Raises:
        InputError: if they cannot be read, or hold ids that are not in the vocabulary.
    """
    member = next(member for member in members(task) if member.name == shard.task)
    shard_info = seqio.ShardInfo(shard.number, shard.count) if shard.count > 1 else None
    vocabulary = vocabulary_of(task)
    place = f"{shard.split}-{shard.number}" if member is task else f"{member.name}-{shard.split}-{shard.number}"
    with _source_errors(member):
        dataset = member.get_dataset(
            None, split=shard.split, shuffle=False, seed=seed, shard_info=shard_info, num_epochs=1
        )
        for number, example in enumerate(dataset.as_numpy_iterator()):
            yield _document(member.name, f"{place}-{number}", example, vocabulary)


def _document(task: str, place: str, example: Mapping[str, Any], vocabulary: Vocabulary) -> Document:
    tokens = np.asarray(example["targets"])
    unknown = tokens[(tokens < 0) | (tokens >= vocabulary.size)]
    if len(unknown):
        raise InputError(
            f"the seqio task {task!r} has an example ({place}) whose `targets` hold the id {unknown[0]}, but its "
            f"vocabulary has the ids 0 to {vocabulary.size - 1}. Give the feature the vocabulary of its ids"
        )
    id, title, license, text = (
        example[name].decode("utf-8") if isinstance(example.get(name), bytes) else ""
        for name in ("document_id", "title", "license", "targets_pretokenized")
    )
    tokens = tokens.astype(np.int32)
    return Document(id or place, title, text or vocabulary.decode(tokens), license, tokens)
