"""Rows read every token once per epoch, in order, at any step; and the thread that prefetches."""

import itertools
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memorizing.data.batches import BatchSettings, Prefetcher, Schedule, batches, read_batch
from memorizing.data.tokens import Tokenized, TokenSplit, write_split
from memorizing.data.vocabulary import ByteVocabulary
from memorizing.errors import InputError
from memorizing.shapes import BEGIN_TOKEN

LENGTHS = [5, 16, 0, 1, 40, 8, 23]


@pytest.fixture(scope="module")
def split(tmp_path_factory) -> TokenSplit:
    """Documents whose tokens tell which document and place they are."""
    folder = tmp_path_factory.mktemp("batches") / "train"
    texts = [
        "".join(chr(48 + (31 * number + place) % 75) for place in range(length))
        for number, length in enumerate(LENGTHS)
    ]
    encode = ByteVocabulary().encode
    documents = [Tokenized(str(n), "", "", encode(text), len(text.encode())) for n, text in enumerate(texts)]
    write_split(folder, documents, np.uint16)
    return TokenSplit(folder)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 50), min_size=1, max_size=12).filter(any),
    rows=st.integers(1, 5),
    segment_length=st.integers(1, 16),
    seed=st.integers(0, 3),
)
def test_each_epoch_reads_every_segment_once_in_order(lengths, rows, segment_length, seed):
    schedule = Schedule(np.array(lengths), rows, segment_length, seed)
    segments = [-(-length // segment_length) for length in lengths]
    taken = []  # (step, row, document) whenever a row starts one
    before = [None] * rows
    for step in range(3 * sum(segments)):
        for row, (document, segment) in enumerate(schedule.at(step)):
            if segment == 0:
                assert before[row] is None or before[row] == (before[row][0], segments[before[row][0]] - 1)
                taken.append((step, row, document))
            else:
                assert before[row] == (document, segment - 1)
            before[row] = (document, segment)
    readable = [document for document, count in enumerate(segments) if count]
    order = [document for _, _, document in taken]
    for epoch in itertools.batched(order, len(readable)):
        assert len(set(epoch)) == len(epoch)  # whoever comes last may not have begun
        if len(epoch) == len(readable):
            assert sorted(epoch) == readable


def test_targets_of_an_epoch_are_the_whole_documents(split):
    """Independently of the schedule: put together what each row read, document by document."""
    settings_ = BatchSettings(size=3, segment_length=8, segments_per_call=2, seed=1)
    read = [[] for _ in range(3)]
    for batch in itertools.islice(batches(split, settings_, 0), 30):
        for segment in range(2):
            for row in range(3):
                mask = batch.mask_BN[segment, row]
                assert not mask[np.argmin(mask) :].any() or mask.all()  # padding is at the end
                assert not batch.targets_BN[segment, row][~mask].any()
                targets, inputs = batch.targets_BN[segment, row][mask], batch.inputs_BN[segment, row][mask]
                if batch.starts_document_B[segment, row]:
                    read[row].append([])
                    assert inputs[0] == BEGIN_TOKEN
                elif read[row][-1]:
                    assert inputs[0] == read[row][-1][-1]
                np.testing.assert_array_equal(inputs[1:], targets[:-1])
                read[row][-1] += targets.tolist()
    documents = [split.read(number, 0, length).tolist() for number, length in enumerate(LENGTHS) if length]
    complete = [text for row in read for text in row[:-1]]  # the last of each row may not be at its end
    assert len(complete) > 2 * len(documents)
    assert all(text in documents for text in complete)
    counts = [complete.count(text) for text in documents]
    assert max(counts) - min(counts) <= 2


@pytest.mark.parametrize("first_step", [4, 6, 38])
def test_any_step_can_be_computed_directly(split, first_step):
    settings_ = BatchSettings(size=2, segment_length=8, segments_per_call=2, seed=5)
    in_order = list(itertools.islice(batches(split, settings_, 0), 25))[first_step // 2 :]
    for expected, found in zip(in_order, batches(split, settings_, first_step), strict=False):
        for one, other in zip(expected, found, strict=True):
            np.testing.assert_array_equal(one, other)


def test_the_schedule_answers_out_of_order(split):
    steps = np.random.default_rng(0).permutation(100)
    in_order, at_random = (Schedule(split.lengths, 3, 4, seed=2) for _ in range(2))
    expected = [in_order.at(step) for step in range(100)]
    for step in steps:
        assert at_random.at(int(step)) == expected[step]


def test_batches_do_not_depend_on_segments_per_call(split):
    def flat(segments_per_call: int) -> list[np.ndarray]:
        settings_ = BatchSettings(size=2, segment_length=8, segments_per_call=segments_per_call)
        calls = itertools.islice(batches(split, settings_, 0), 12 // segments_per_call)
        return [np.concatenate(parts) for parts in zip(*calls, strict=True)]

    for one, other in zip(flat(1), flat(6), strict=True):
        np.testing.assert_array_equal(one, other)


def test_order_differs_between_seeds_and_epochs():
    lengths = np.full(50, 4)
    orders = [[Schedule(lengths, 1, 4, seed).at(step)[0][0] for step in range(100)] for seed in (0, 1)]
    assert sorted(orders[0][:50]) == sorted(orders[0][50:]) == sorted(orders[1][:50]) == list(range(50))
    assert len({tuple(orders[0][:50]), tuple(orders[0][50:]), tuple(orders[1][:50])}) == 3


def test_rows_without_a_document_are_masked(split):
    batch = read_batch(split, [None, (1, 0)], 8)
    assert not batch.mask_BN[0].any() and batch.mask_BN[1].all() and batch.starts_document_B.tolist() == [True, True]


def test_a_split_of_empty_documents_is_refused():
    with pytest.raises(InputError, match="every document is empty"):
        Schedule(np.zeros(3, np.int64), 1, 8, 0)


def test_prefetcher_yields_items_and_then_raises_the_error():
    def items():
        yield from range(5)
        raise OSError("the disk is gone")

    ahead = Prefetcher(items())
    assert list(itertools.islice(ahead, 5)) == [0, 1, 2, 3, 4]
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            next(ahead)
    ahead.close()


def test_prefetcher_ends_with_its_items_and_on_close():
    assert list(Prefetcher(iter("abc"))) == ["a", "b", "c"]
    before = threading.active_count()
    ahead = Prefetcher(itertools.count())
    assert next(ahead) == 0
    ahead.close()
    assert threading.active_count() == before
