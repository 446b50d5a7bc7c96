from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from scrimp.base.errors import ScrimpError
from scrimp.data import Corpus, Loader, MicroBatch, Split, evaluation_batches, evaluation_bytes
from scrimp.data.rows import make_rows

BOS, EOS, PAD = 257, 258, 256
ROWS = [f"{number} " + "é" * (number * 7 % 53) for number in range(80)]
TALK = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "that"}]
MakeCorpus = Callable[..., Corpus]


def loader(split: Split, **options: object) -> Loader:
    return Loader(split, **{"seq": 16, "batch": 6, "micro_batch": 6, "pad_id": PAD, **options})  # type: ignore[arg-type]


def whole_epoch(split: Split, **options: object) -> list[MicroBatch]:
    """Return an epoch's rows, as one batch of micro-batches of one."""
    sequences = loader(split, **options).sequences
    return loader(split, batch=sequences, micro_batch=1, **options).step(0)


def predicted(batches: list[MicroBatch]) -> list[tuple[int, int]]:
    """Return all pairs (input, target) that the loss sees."""
    pairs = []
    for batch in batches:
        seen = batch.labels != -100
        assert batch.targets == int(seen.sum())
        pairs += list(zip(batch.input_ids[seen].tolist(), batch.labels[seen].tolist(), strict=True))
    return pairs


@pytest.fixture(params=["bytes_tokenizer", "merging_tokenizer"])
def split(request: pytest.FixtureRequest, corpus_of: MakeCorpus) -> Split:
    """Return a split in each of the two forms of the stream."""
    return corpus_of(ROWS, request.getfixturevalue(request.param)).train


@pytest.mark.parametrize("seq", [1, 5, 16, 1000])
@pytest.mark.parametrize("packing", ["packed", "padded"])
def test_an_epoch_predicts_every_token_once(split: Split, seq: int, packing: str) -> None:
    stream = [int(token) for token in split.tokens]
    expected = [pair for pair in pairwise(stream) if split.shared or pair[1] != BOS]
    assert sorted(predicted(whole_epoch(split, seq=seq, packing=packing))) == sorted(expected)


def test_labels_are_shifted_and_padding_is_none(
    bytes_tokenizer: PreTrainedTokenizerFast, corpus_of: MakeCorpus
) -> None:
    train = corpus_of(["abc"], bytes_tokenizer).train
    (batch,) = loader(train, seq=4, batch=1, micro_batch=1).step(0)
    assert batch.input_ids.tolist() == [[BOS, 97, 98, 99]]
    assert batch.labels.tolist() == [[97, 98, 99, EOS]]
    (batch,) = loader(train, seq=6, batch=1, micro_batch=1, packing="padded").step(0)
    assert batch.input_ids.tolist() == [[BOS, 97, 98, 99, PAD, PAD]]
    assert batch.labels.tolist() == [[97, 98, 99, EOS, -100, -100]]
    assert (batch.input_ids.dtype, batch.labels.dtype, batch.position_ids) == (torch.int64, torch.int64, None)


def test_a_step_is_a_function_of_its_number(split: Split) -> None:
    whole = loader(split)
    forwards = [whole.step(step)[0].input_ids for step in range(20)]
    for step in (19, 3, 11):
        assert torch.equal(loader(split).step(step)[0].input_ids, forwards[step])


@pytest.mark.parametrize("micro_batch", [1, 2, 3])
def test_micro_batches_cut_the_same_batch(split: Split, micro_batch: int) -> None:
    for step in (0, 7, 30):
        (large,) = loader(split).step(step)
        small = loader(split, micro_batch=micro_batch).step(step)
        assert len(small) == 6 // micro_batch
        assert torch.equal(torch.cat([batch.input_ids for batch in small]), large.input_ids)
        assert torch.equal(torch.cat([batch.labels for batch in small]), large.labels)
        assert sum(batch.targets for batch in small) == large.targets


def test_every_epoch_visits_each_row_once_in_another_order(split: Split) -> None:
    every = loader(split)
    places = np.concatenate([every.order(step) for step in range(every.sequences)])  # six epochs
    epochs = places.reshape(6, every.sequences)
    for epoch in epochs:
        assert sorted(epoch) == list(range(every.sequences))
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert loader(split, seed=1).order(0).tolist() != every.order(0).tolist()


def test_isolated_documents_start_at_position_zero(
    bytes_tokenizer: PreTrainedTokenizerFast, corpus_of: MakeCorpus
) -> None:
    train = corpus_of(["abc", "de"], bytes_tokenizer).train  # bos a b c eos bos d e eos
    (batch,) = loader(train, seq=8, batch=1, micro_batch=1, boundaries="isolate").step(0)
    assert batch.position_ids is not None
    assert batch.input_ids.tolist() == [[BOS, 97, 98, 99, EOS, BOS, 100, 101]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2]]
    assert batch.labels.tolist() == [[97, 98, 99, EOS, -100, 100, 101, EOS]]


def test_a_shared_separator_ends_one_isolated_document_and_begins_the_next(
    merging_tokenizer: PreTrainedTokenizerFast, corpus_of: MakeCorpus
) -> None:
    train = corpus_of(["a", "b"], merging_tokenizer).train  # sep a sep b sep
    sep, a, b = (int(train.tokens[index]) for index in (0, 1, 3))
    (batch,) = loader(train, seq=4, batch=1, micro_batch=1, boundaries="isolate").step(0)
    assert batch.position_ids is not None
    assert batch.input_ids.tolist() == [[sep, a, sep, b]]
    assert batch.position_ids.tolist() == [[0, 1, 0, 1]]
    assert batch.labels.tolist() == [[a, sep, b, sep]]


def test_padding_is_isolated_from_the_last_document(
    bytes_tokenizer: PreTrainedTokenizerFast, corpus_of: MakeCorpus
) -> None:
    train = corpus_of(["abc", "d"], bytes_tokenizer).train
    rows = whole_epoch(train, seq=5, boundaries="isolate")
    short = next(row for row in rows if PAD in row.input_ids)
    assert short.position_ids is not None
    assert short.input_ids.tolist() == [[BOS, 100, PAD, PAD, PAD]]
    assert short.position_ids.tolist() == [[0, 1, 0, 1, 2]]
    assert short.labels.tolist() == [[100, EOS, -100, -100, -100]]


@pytest.mark.parametrize("seq", [1, 7, 30])
def test_padded_rows_number_the_pieces_of_every_document(split: Split, seq: int) -> None:
    expected = []
    for document in range(split.documents):
        start, stop = split.row(document)
        expected += [(first, min(first + seq + 1, stop)) for first in range(start, stop - 1, seq)]
    rows = make_rows(split, seq=seq, packing="padded", long="split")
    assert [rows.span(index) for index in range(rows.count)] == expected
    assert rows.lost_tokens == 0


def test_rows_are_found_beyond_the_first_block_of_documents(
    bytes_tokenizer: PreTrainedTokenizerFast, corpus_of: MakeCorpus
) -> None:
    split = corpus_of([f"{number}" * (number % 5 + 1) for number in range(2500)], bytes_tokenizer).train
    rows = make_rows(split, seq=4, packing="padded", long="split")
    spans = [rows.span(index) for index in range(rows.count)]
    covered = sorted(place for start, stop in spans for place in range(start + 1, stop))
    assert covered == [place for place in range(len(split.tokens)) if split.tokens[place] != BOS]


def test_cutting_keeps_beginnings_and_says_what_is_lost(split: Split) -> None:
    cut = loader(split, packing="padded", long="cut", seq=10)
    kept = sum(row.targets for row in whole_epoch(split, packing="padded", long="cut", seq=10))
    everything = sum(row.targets for row in whole_epoch(split, packing="padded", long="split", seq=10))
    assert cut.sequences == split.documents
    assert cut.lost_tokens > 0
    assert kept + cut.lost_tokens == everything


def test_only_the_assistants_tokens_are_labels(
    merging_tokenizer: PreTrainedTokenizerFast, corpus_of: MakeCorpus
) -> None:
    train = corpus_of([TALK], merging_tokenizer).train
    (row,) = whole_epoch(train, seq=64, packing="padded")
    answer = merging_tokenizer("that<|im_end|>").input_ids
    assert row.labels[row.labels != -100].tolist() == answer


def test_a_batch_without_a_target_is_an_error(
    merging_tokenizer: PreTrainedTokenizerFast, corpus_of: MakeCorpus
) -> None:
    long_question = [{"role": "user", "content": "what? " * 50}, TALK[1]]
    train = corpus_of([long_question], merging_tokenizer).train
    cut = loader(train, seq=8, batch=1, micro_batch=1, packing="padded", long="cut")
    with pytest.raises(ScrimpError, match="step 0 holds no token to learn from"):
        cut.step(0)


def test_data_shorter_than_a_sequence_are_an_error(
    bytes_tokenizer: PreTrainedTokenizerFast, corpus_of: MakeCorpus
) -> None:
    train = corpus_of(["abc"], bytes_tokenizer).train
    with pytest.raises(ScrimpError, match="5 tokens to train on, fewer than one sequence of 5"):
        loader(train, seq=5)
    assert loader(train, seq=4).sequences == 1


def test_a_split_without_documents_is_an_error(
    bytes_tokenizer: PreTrainedTokenizerFast, corpus_of: MakeCorpus
) -> None:
    with pytest.raises(ScrimpError, match="empty"):
        loader(corpus_of(["abc"], bytes_tokenizer).held_out)


def test_a_micro_batch_that_does_not_divide_the_batch_is_an_error(split: Split) -> None:
    with pytest.raises(ScrimpError, match="does not divide"):
        loader(split, batch=6, micro_batch=4)


@pytest.mark.parametrize("packing", ["packed", "padded"])
@pytest.mark.parametrize("seq", [3, 16, 5000])
def test_an_evaluation_predicts_every_token_once(split: Split, seq: int, packing: str) -> None:
    batches = list(evaluation_batches(split, seq=seq, micro_batch=4, packing=packing, pad_id=PAD))  # type: ignore[arg-type]
    everything = whole_epoch(split, seq=16, packing="padded")
    assert sorted(predicted(batches)) == sorted(predicted(everything))


@pytest.mark.parametrize("packing", ["packed", "padded"])
def test_a_limited_evaluation_takes_whole_documents_by_hash(
    split: Split, bytes_tokenizer: PreTrainedTokenizerFast, packing: str
) -> None:
    limit = 500
    batches = list(
        evaluation_batches(split, seq=16, micro_batch=4, packing=packing, pad_id=PAD, max_tokens=limit)  # type: ignore[arg-type]
    )
    order = np.argsort(split.hashes)
    lengths = np.diff(split.offsets)[order] - 1 + split.shared
    count = int((np.cumsum(lengths) <= limit).sum())
    assert 1 < count < split.documents
    assert sum(batch.targets for batch in batches) == lengths[:count].sum()
    counted = evaluation_bytes(split, bytes_tokenizer, seq=16, packing=packing, max_tokens=limit)  # type: ignore[arg-type]
    assert counted == split.bytes[order[:count]].sum()


def test_a_limit_below_one_document_still_takes_one(split: Split) -> None:
    batches = list(evaluation_batches(split, seq=16, micro_batch=4, pad_id=PAD, max_tokens=1))
    assert sum(batch.targets for batch in batches) > 0


def test_isolated_evaluation_starts_each_document_at_zero(split: Split) -> None:
    batches = list(
        evaluation_batches(split, seq=10_000, micro_batch=1, boundaries="isolate", pad_id=PAD, max_tokens=200)
    )
    (batch,) = batches
    assert batch.position_ids is not None
    starts = (batch.position_ids[0] == 0).nonzero().flatten().tolist()
    begins = int(split.tokens[0])
    assert [int(batch.input_ids[0, start]) for start in starts[:-1]] == [begins] * (len(starts) - 1)
    assert len(starts) > 2


def test_the_bytes_of_an_evaluation_are_those_of_the_text(
    split: Split, bytes_tokenizer: PreTrainedTokenizerFast
) -> None:
    whole = sum(len(row.encode()) for row in ROWS)
    for packing in ("packed", "padded"):
        assert evaluation_bytes(split, bytes_tokenizer, seq=7, packing=packing) == whole  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["bytes_tokenizer", "merging_tokenizer"])
def test_what_is_cut_is_not_counted(name: str, request: pytest.FixtureRequest, corpus_of: MakeCorpus) -> None:
    tokenizer = request.getfixturevalue(name)
    split = corpus_of(["abc", "the text of a longer document"], tokenizer).train
    seq = 6
    batches = list(
        evaluation_batches(split, seq=seq, micro_batch=2, packing="padded", long="cut", pad_id=PAD)
    )
    labels = [row[row != -100] for batch in batches for row in batch.labels]
    text = "".join(str(tokenizer.decode(row.tolist(), skip_special_tokens=True)) for row in labels)
    assert text.startswith("abcthe")
    assert evaluation_bytes(split, tokenizer, seq=seq, packing="padded", long="cut") == len(text.encode())


def test_evaluating_on_nothing_yields_nothing(
    bytes_tokenizer: PreTrainedTokenizerFast, corpus_of: MakeCorpus
) -> None:
    empty = corpus_of(["abc"], bytes_tokenizer).held_out
    assert list(evaluation_batches(empty, seq=4, micro_batch=1, pad_id=PAD, max_tokens=10)) == []
    assert evaluation_bytes(empty, bytes_tokenizer, seq=4) == 0
