"""Batches: what the model reads of some pairs, with padding and without, and how they come to a device."""

import random

import data
from data import EOS, PAD, SOS

import pytest
import torch

PAIRS = 9


def draw_side(rng, longest):
    """Sentences of 1 to `longest` words; no id occurs twice, so that each can be told from the others."""
    lengths = [rng.randint(1, longest) for _ in range(PAIRS)]
    ids, offsets, next_id = [], [0], 4
    for length in lengths:
        ids += [SOS, *range(next_id, next_id + length), EOS]
        next_id += length
        offsets.append(len(ids))
    return data.Side(torch.tensor(ids, dtype=torch.int32), torch.tensor(offsets))


@pytest.fixture(params=range(3))
def split(request):
    rng = random.Random(request.param)
    return data.Split(draw_side(rng, 7), draw_side(rng, 5))


def sentence(side, index, fixed_length=0):
    tokens = side.ids[side.offsets[index] : side.offsets[index + 1]].tolist()
    if fixed_length and len(tokens) > fixed_length:
        tokens = [*tokens[: fixed_length - 1], EOS]
    return tokens


def read_back(rows, counts):
    """The columns of a batch as lists."""
    columns = [[] for _ in range(counts[0])]
    start = 0
    for count in counts:
        for column in range(count):
            columns[column].append(rows[start + column].item())
        start += count
    assert start == len(rows)
    return columns


def check(batch, split, indices, fixed_length=0):
    """That a batch has these pairs, each once and each source with its own target."""
    without_padding = [
        [token for token in column if token != PAD] for column in read_back(batch.trg, batch.trg_rows_per_step)
    ]
    targets = [
        [token for token in column if token != PAD] for column in read_back(batch.targets, batch.trg_rows_per_step)
    ]
    pairs = []
    for index in indices.tolist():
        trg = sentence(split.trg, index, fixed_length)
        column = targets.index(trg[1:])
        assert without_padding[column][: len(trg) - 1] == trg[:-1]
        pairs.append(column)
        src = sentence(split.src, index, fixed_length)
        src_columns = read_back(batch.src, batch.src_rows_per_step)
        own = next(place for place, tokens in enumerate(src_columns) if tokens[: len(src)] == src)
        starts = [sum(batch.src_rows_per_step[:step]) for step in range(len(batch.src_rows_per_step))]
        read = fixed_length or len(src)  # to the end of the padding, or to <eos>
        assert batch.src_last[column] == starts[read - 1] + own
        assert all(token == PAD for token in src_columns[own][len(src) :])
    assert sorted(pairs) == list(range(len(indices)))
    assert batch.target_tokens == sum(len(sentence(split.trg, index, fixed_length)) - 1 for index in indices.tolist())
    assert batch.target_tokens == (batch.targets != PAD).sum()


INDICES = torch.tensor([3, 0, 7, 5])


def test_a_batch_has_a_row_for_each_token_and_no_other(split):
    batch = data.make_batch(split, INDICES)
    check(batch, split, INDICES)
    assert len(batch.src) == split.src.lengths_of(INDICES).sum()
    assert len(batch.trg) == len(batch.targets) == batch.target_tokens
    for counts in (batch.src_rows_per_step, batch.trg_rows_per_step):
        assert counts[0] == len(INDICES)
        assert counts == sorted(counts, reverse=True)
        assert counts[-1] > 0
    assert not (torch.cat((batch.src, batch.trg)) == PAD).any()


def test_with_a_fixed_length_sources_are_padded_and_read_to_the_end(split):
    batch = data.make_batch(split, INDICES, fixed_length=5)
    check(batch, split, INDICES, fixed_length=5)
    assert batch.src_rows_per_step == [len(INDICES)] * 5
    assert len(batch.trg) == batch.target_tokens


@pytest.mark.parametrize("fixed_length", [0, 5])
@pytest.mark.parametrize("resident_bytes", [0, 1 << 30])
def test_with_padding_a_batch_has_the_same_pairs_and_rounded_lengths(split, fixed_length, resident_bytes):
    """What NPUs and GPUs get, here on the CPU."""
    loader = data.Loader(split, "cpu", fixed_length=fixed_length, resident_bytes=resident_bytes, padded=True)
    batch = loader(INDICES)
    check(batch, split, INDICES, fixed_length)
    assert set(batch.src_rows_per_step + batch.trg_rows_per_step) == {len(INDICES)}
    if fixed_length:
        assert len(batch.src_rows_per_step) == len(batch.trg_rows_per_step) + 1 == fixed_length
    else:
        assert (
            len(batch.src_rows_per_step) % data.LENGTH_STEP
            == (len(batch.trg_rows_per_step) + 1) % data.LENGTH_STEP
            == 0
        )
        assert len(batch.src_rows_per_step) - split.src.lengths_of(INDICES).max() < data.LENGTH_STEP


def test_on_a_cpu_the_loader_makes_plain_batches(split):
    for ours, plain in zip(data.Loader(split, "cpu")(INDICES), data.make_batch(split, INDICES), strict=True):
        assert torch.equal(ours, plain) if isinstance(ours, torch.Tensor) else ours == plain


@pytest.mark.parametrize("padded", [False, True])
def test_a_rank_without_pairs_gets_one_that_does_not_count(split, padded):
    batch = data.Loader(split, "cpu", padded=padded)(INDICES[:0])
    assert batch.target_tokens == 0
    assert len(batch.src_last) == 1
    assert (batch.targets == PAD).all()


def test_no_value_on_the_device_decides_a_shape(split):
    """Where it did, the host would wait for the device: on the meta device, which has no values, it is an error."""
    plan = data._plan(split, INDICES, 0, data.LENGTH_STEP)
    batch = data._padded_batch(
        plan._replace(spans=plan.spans.to("meta")), *(side.ids.to("meta") for side in (split.src, split.trg))
    )
    assert batch.src.device.type == batch.src_last.device.type == "meta"


def test_columns_are_as_long_as_the_longest_sentence_or_a_multiple(split):
    for step in (1, 4):
        columns, lengths = data.pad(split.src, INDICES, length_step=step)
        assert lengths.tolist() == split.src.lengths_of(INDICES).tolist()
        assert len(columns) == -(-int(lengths.max()) // step) * step
        for column, index in enumerate(INDICES.tolist()):
            expected = sentence(split.src, index)
            assert columns[:, column].tolist() == expected + [PAD] * (len(columns) - len(expected))
