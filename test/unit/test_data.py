"""The data's claims: what a corpus holds, what `load` refuses, which pairs a batch has and how it comes to a device."""

import dataclasses
import math
import random
import tracemalloc

import data
from data import EOS, PAD, SOS
from nmt.errors import printable

import numpy as np
import pytest
import torch
from conftest import DE, EN, refused, same_corpus, sentences, write_corpus
from hypothesis import given, settings
from hypothesis import strategies as st

# ---------------------------------------------------------------- the corpus


def test_corpus_is_lower_cased_ids_between_sos_and_eos(folder, load):
    corpus = load(folder)
    assert corpus.src_vocab.itos[4:] == [".", "hund", "schläft", "ein"]
    ids = {word: index for index, word in enumerate(corpus.src_vocab.itos)}
    assert sentences(corpus.train.src)[1] == [2, ids["ein"], ids["hund"], ids["schläft"], ids["."], 3]
    assert corpus.train.src.ids.dtype == torch.int32
    assert corpus.train.src.lengths.tolist() == [6, 6, 6, 6]
    assert (corpus.src_lang, corpus.trg_lang) == ("de", "en")


def test_references_keep_words_outside_the_vocabulary(folder, load):
    corpus = load(folder)
    assert corpus.test.trg_tokens == [["a", "dachshund", "barks", "."]]
    assert corpus.test.src_tokens == [["ein", "dackel", "bellt", "."]]
    assert data.UNK in sentences(corpus.test.trg)[0]
    assert corpus.train.src_tokens is None


def test_corpus_that_keeps_case_has_it_in_ids_and_words_and_a_cache_of_its_own(folder, load):
    lower, keep = load(folder), load(folder, case="keep")
    assert keep.src_vocab.itos[4:] == [".", "Hund", "schläft", "Ein"]
    assert keep.test.trg_tokens == [["A", "dachshund", "barks", "."]]
    for case, corpus in (("lower", lower), ("keep", keep)):
        lines = len(load.lines)
        assert same_corpus(load(folder, case=case), corpus)
        assert load.lines[lines:] == [], "from the cache"
    assert keep.fingerprint == lower.fingerprint


@pytest.mark.parametrize("case", ["lower", "keep"])
def test_a_test_pair_alone_has_the_words_and_ids_that_it_has_in_its_corpus(tmp_path, load, load_test, case):
    folder = write_corpus(tmp_path / "whole", test=(["Ein Dackel", "", "Der Hund schläft."] * 3, ["A dog"] * 9))
    corpus = load(folder, case=case)
    (tmp_path / "alone").mkdir()
    for lang in ("de", "en"):
        (folder / f"test.{lang}").rename(tmp_path / "alone" / f"test.{lang}")
    for _ in range(2):
        words = load_test(tmp_path / "alone", case=case)
        split = words.encoded(corpus.src_vocab, corpus.trg_vocab)
        assert (split.src_tokens, split.trg_tokens) == (corpus.test.src_tokens, corpus.test.trg_tokens)
        assert sentences(split.src) == sentences(corpus.test.src)
        assert sentences(split.trg) == sentences(corpus.test.trg)
        assert words.notes == ["3 pairs dropped: empty in test.de or test.en"]
        assert [line for line in corpus.notes if "test." in line] == words.notes
    assert sum("tokenising" in line for line in load_test.lines) == 1, "the second time from the cache"


def test_a_test_pair_is_told_with_the_models_types_and_the_unknown_words(folder, load, load_test):
    corpus = load(folder)
    words = load_test(folder)
    vocabs = (corpus.src_vocab, corpus.trg_vocab)
    assert list(words.lines(words.encoded(*vocabs), *vocabs)) == [
        f"data: 1 test pairs; 8 de and 8 en types; in {folder}",
        "unknown words: de test 50.0%; en test 50.0%",
    ]


def test_a_test_pair_is_the_one_of_the_corpus_that_load_takes(tmp_path, load_test):
    """Where two folders have one, and one of them has the other files too. Otherwise nobody knows which is meant."""
    for folder in (tmp_path, tmp_path / "multi30k"):
        write_corpus(folder, test=([f"In {folder.name}"], ["In"]))
    refused("data", load_test, tmp_path, says="two corpora")
    for rest, folder in ((tmp_path, tmp_path / "multi30k"), (tmp_path / "multi30k", tmp_path)):
        (rest / "val.de").rename(tmp_path / "val.away")
        assert load_test(tmp_path).folder == str(folder)
        (tmp_path / "val.away").rename(rest / "val.de")


def test_a_test_pair_that_is_not_there_is_downloaded_into_an_empty_folder_alone(tmp_path, load_test, monkeypatch):
    asked = []
    monkeypatch.setattr(data.download, "download_multi30k", lambda folder, **_: asked.append(write_corpus(folder)))
    assert len(load_test(tmp_path / "data").src_tokens) == 4
    assert asked == [tmp_path / "data"]
    (tmp_path / "data" / "test.en").unlink()
    refused("data", load_test, tmp_path / "data", says="test.en")
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("name", "text", "kind", "says"),
    [
        ("test.de", b"\xff\n", "data", "is not UTF-8"),
        ("test.de", b"Ein\nHund\n", "data", "2 lines and 1 lines"),
        ("test.de", b"\n", "data", "0 usable pairs"),
    ],
)
def test_a_faulty_test_pair_is_refused(folder, load_test, name, text, kind, says):
    (folder / name).write_bytes(text)
    refused(kind, load_test, folder, says=[says, name])


@pytest.mark.parametrize(("language", "wrong"), [("src", -1), ("trg", 8)])
def test_id_outside_the_vocabulary_is_refused_before_a_device_gets_it(folder, load, language, wrong):
    corpus = load(folder)
    corpus.check_ids()
    side = getattr(corpus.val, language)
    ids = side.ids.clone()
    ids[1] = wrong
    split = dataclasses.replace(corpus.val, **{language: dataclasses.replace(side, ids=ids)})
    assert len(corpus.trg_vocab) == 8
    refused("data", dataclasses.replace(corpus, val=split).check_ids, says=[f"token id {wrong}", "val"])


@pytest.fixture
def spaced(tmp_path, load):
    """A corpus with two spaces between any two words."""
    lines = [[line.replace(" ", "  ") for line in side] for side in (DE, EN)]
    pair = ([lines[0][0]], [lines[1][0]])
    return load(write_corpus(tmp_path / "spaced", train=lines, val=pair))


def test_white_space_tokens_are_read_as_in_training_but_are_no_reference_words(spaced):
    assert " " in spaced.src_vocab.itos
    assert spaced.val.src_tokens == [["ein", " ", "hund", " ", "bellt", "."]]
    assert spaced.val.trg_tokens == [["a", " ", "dog", " ", "barks", "."]]
    assert spaced.val.references == [["a", "dog", "barks", "."]]


def test_the_words_of_a_split_are_those_of_its_ids(spaced):
    """So that a model with a vocabulary of its own is scored on the sentences that another one is validated on."""
    for split in (spaced.val, spaced.test):
        assert torch.equal(data.Side.encode(split.src_tokens, spaced.src_vocab).ids, split.src.ids)
        assert torch.equal(data.Side.encode(split.trg_tokens, spaced.trg_vocab).ids, split.trg.ids)


# ---------------------------------------------------------------- loading


def test_one_language_twice_is_refused(folder, load):
    refused("usage", load, folder, says=["both languages are de", "--src-lang, --trg-lang"], trg_lang="de")


def no_download(*args, **options):
    raise AssertionError("nothing may be downloaded")


def test_the_folder_that_was_read_is_told_in_one_line_whatever_its_name(tmp_path, load):
    """Kind E."""
    folder = write_corpus(tmp_path / "a\nBLEU score = 99\x1b[2J")
    for _ in range(2):
        line = printable(next(load(folder).lines()))
        assert line.startswith("data: 64 training, 4 validation, 4 test pairs; ")
        assert line.endswith(f" in {tmp_path}/a\\nBLEU score = 99\\x1b[2J")


def test_a_file_or_a_mistyped_path_is_refused_and_nothing_is_made(tmp_path, load, monkeypatch):
    monkeypatch.setattr(data.download, "download_multi30k", no_download)
    (tmp_path / "file").write_text("")
    refused("data", load, tmp_path / "file", says="not a folder")
    refused("data", load, tmp_path / "typo" / "deep", says="no such folder")
    refused("data", load, tmp_path / "typo", says=["there is no such folder", "name data or make it"])
    assert not (tmp_path / "typo").exists()


@pytest.mark.parametrize("name", ["data", "mine"])
def test_a_download_goes_into_data_or_into_a_folder_that_is_there(tmp_path, load, monkeypatch, name):
    monkeypatch.setattr(data.download, "download_multi30k", lambda folder, **_: write_corpus(folder))
    if name == "mine":
        (tmp_path / name).mkdir()
    assert len(load(tmp_path / name).train) == 64


def test_a_cache_folder_that_the_user_names_must_be_one(tmp_path, as_nobody):
    data.check_cache_dir(tmp_path / "new" / "cache")
    (tmp_path / "file").touch()
    says = ["the cache folder cannot be used: Not a directory", f"{tmp_path}/file/below", "--cache-dir"]
    refused("io", data.check_cache_dir, tmp_path / "file" / "below", says=says)
    (tmp_path / "closed").mkdir(mode=0o555)
    with as_nobody():
        refused("io", data.check_cache_dir, tmp_path / "closed", says="Permission denied")


def test_another_corpus_in_the_folder_is_not_mistaken_for_nothing(tmp_path, load, monkeypatch):
    monkeypatch.setattr(data.download, "download_multi30k", no_download)
    (tmp_path / "learn.fr").write_text("un\n")
    (tmp_path / "learn.en").write_text("one\n")
    refused("data", load, tmp_path, says=["no train.de/en, ", "but learn.en, learn.fr; ", "--train-name learn"])


@pytest.mark.parametrize("closed", ["", "corpus"])
def test_a_folder_that_one_may_not_look_into_is_an_io_error(tmp_path, load, closed, as_nobody):
    """Neither the data's own, nor the one above it."""
    folder = write_corpus(tmp_path / "above" / "corpus")
    (folder.parent / closed).chmod(0)
    with as_nobody():
        refused("io", load, folder, says=["cannot read: Permission denied", str(folder), "--data-dir"])
    (folder.parent / closed).chmod(0o700)


def test_nothing_is_written_beside_the_data(folder, load):
    """Row 28. That a folder may be read-only is tested with the files."""
    before = sorted(folder.iterdir())
    folder.chmod(0o555)
    load(folder)
    folder.chmod(0o755)
    assert sorted(folder.iterdir()) == before


# ---------------------------------------------------------------- the batches of an epoch


def random_split(pairs, longest=60, seed=0):
    """A split of random sentences with known ids."""
    generator = torch.Generator().manual_seed(seed)
    vocab = data.Vocabulary([*data.SPECIALS, *map(str, range(4, 100))])

    def side():
        lengths = torch.randint(1, longest, (pairs,), generator=generator).tolist()
        ids = [torch.randint(4, 100, (length,), generator=generator).tolist() for length in lengths]
        return data.Side.encode([list(map(str, sentence)) for sentence in ids], vocab)

    return data.Split(side(), side())


def batches_of(split, batch_size, **flags):
    flags = {"seed": 1234, "epoch": 0} | flags
    return data.epoch_batches(split, batch_size, **flags)


@pytest.mark.parametrize("like_length", [True, False])
@pytest.mark.parametrize(("pairs", "batch_size"), [(1, 8), (7, 8), (8, 8), (9, 8), (103, 1), (1003, 8)])
def test_each_pair_comes_once_an_epoch(like_length, pairs, batch_size):
    batches = list(batches_of(random_split(pairs), batch_size, like_length=like_length))
    assert sorted(torch.cat(batches).tolist()) == list(range(pairs))
    sizes = sorted(map(len, batches), reverse=True)
    assert sizes == [batch_size] * (pairs // batch_size) + [pairs % batch_size] * (pairs % batch_size > 0)
    assert batches[0].dtype == torch.int64


@pytest.mark.parametrize("world_size", range(1, 9))
def test_ranks_see_disjoint_batches_that_are_the_whole(world_size):
    for batch in batches_of(random_split(107), 16):
        shares = [data.rank_share(batch, rank, world_size) for rank in range(world_size)]
        assert sorted(torch.cat(shares).tolist()) == sorted(batch.tolist())
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_drop_last_leaves_the_incomplete_batch_out():
    for like_length in (True, False):
        batches = batches_of(random_split(107), 16, like_length=like_length, drop_last=True)
        assert list(map(len, batches)) == [16] * 6


def test_drop_last_keeps_the_only_batch_and_a_complete_one():
    assert list(map(len, batches_of(random_split(7), 16, drop_last=True))) == [7]
    assert list(map(len, batches_of(random_split(32), 16, drop_last=True))) == [16, 16]


@pytest.mark.parametrize("like_length", [True, False])
def test_order_is_drawn_from_seed_and_epoch_alone(like_length):
    split = random_split(500)

    def order(**flags):
        return torch.cat(list(batches_of(split, 16, like_length=like_length, **flags))).tolist()

    first = order()
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    assert order() == first
    assert order(epoch=1) != first
    assert order(seed=1) != first
    assert order(seed=0, epoch=1) != order(seed=1, epoch=0)


def test_drawing_an_order_leaves_the_global_generators_alone():
    before = torch.get_rng_state(), np.random.get_state()[2], random.getstate()
    list(batches_of(random_split(50, seed=3), 16))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[2], random.getstate()) == before[1:]


def test_batch_can_be_asked_for_by_its_number(monkeypatch):
    monkeypatch.setattr(data, "POOL", 4)
    batches = batches_of(random_split(300), 16)
    in_order = [batch.tolist() for batch in batches]
    assert len(in_order) == len(batches) == 19
    backwards = batches_of(random_split(300), 16)
    assert [backwards[step].tolist() for step in reversed(range(19))] == in_order[::-1]
    with pytest.raises(IndexError):
        batches[19]


def test_nothing_is_drawn_before_a_batch_is_asked_for(monkeypatch):
    split = random_split(300)
    monkeypatch.setattr(data.np.random, "default_rng", None)
    assert len(batches_of(split, 16)) == 19


def test_an_epoch_holds_one_permutation_of_four_bytes_a_pair_and_one_pool(monkeypatch):
    pairs = 100_000
    offsets = torch.arange(0, 5 * (pairs + 1), 5)
    side = data.Side(torch.zeros(1, dtype=torch.int32).expand(5 * pairs), offsets)
    monkeypatch.setattr(data, "POOL", 4)
    batches = batches_of(data.Split(side, side), 16)
    tracemalloc.start()
    for step in range(0, len(batches), 500):
        batches[step]
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 4 * pairs <= held < 4.2 * pairs


def padding(split, batches):
    """The share of the positions of padded batches that are padding, of the sources and of the targets."""
    batches = list(batches)
    shares = []
    for side in (split.src, split.trg):
        positions = sum(int(side.lengths_of(batch).max()) * len(batch) for batch in batches)
        shares.append(1 - len(side.ids) / positions)
    return shares


def translated_split(pairs):
    """A split in which a target is about as long as its source."""
    generator = torch.Generator().manual_seed(0)
    lengths = 4 + torch.poisson(torch.full((pairs,), 10.0), generator=generator).long()
    other = (lengths + torch.randint(-2, 3, (pairs,), generator=generator)).clamp(min=3)
    sides = [
        data.Side.encode([["x"] * n for n in each.tolist()], data.Vocabulary(data.SPECIALS))
        for each in (lengths, other)
    ]
    return data.Split(*sides)


def test_like_length_leaves_little_padding_in_either_language():
    split = translated_split(6400)
    grouped, shuffled = (padding(split, batches_of(split, 32, like_length=way)) for way in (True, False))
    assert max(grouped) < 0.1
    assert min(shuffled) > 0.3


def test_pools_are_of_like_size_and_so_is_their_padding(monkeypatch):
    monkeypatch.setattr(data, "POOL", 10)
    split = translated_split(32 * 36 + 5)
    batches = batches_of(split, 32)
    assert len(batches) == 37
    pools = []
    for step in range(37):
        batches[step]
        pools.append(batches._pool)
    assert [pools.count(pool) for pool in range(4)] == [9, 9, 9, 10]


def test_like_length_does_not_train_the_short_sentences_first():
    split = random_split(3000)
    longest = [int(split.trg.lengths[batch].max()) for batch in batches_of(split, 32)]
    assert abs(np.corrcoef(longest, range(len(longest)))[0, 1]) < 0.4


@settings(max_examples=80, deadline=None)
@given(
    pairs=st.integers(1, 150),
    batch_size=st.integers(1, 40),
    pool=st.integers(1, 6),
    seeds=st.tuples(st.integers(0, 1 << 31), st.integers(0, 1 << 31)),
    like_length=st.booleans(),
    drop_last=st.booleans(),
    world_size=st.integers(1, 9),
    draws=st.data(),
)
def test_batches_keep_their_promises(pairs, batch_size, pool, seeds, like_length, drop_last, world_size, draws):
    """Row 5, and what a resumed run stands on.

    Together the batches are the data, or all but an incomplete batch. No pair comes twice. All ranks have as many
    steps, and their shares are disjoint and together the batch. A run that goes on at step k sees the straight run's.
    """
    split = random_split(pairs, longest=6)
    flags = {"seed": seeds[0], "epoch": seeds[1], "like_length": like_length, "drop_last": drop_last}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "POOL", pool)
        batches = [batch.tolist() for batch in data.epoch_batches(split, batch_size, **flags)]
        seen = [index for batch in batches for index in batch]
        assert len(set(seen)) == len(seen)
        full = pairs // batch_size
        is_dropped = drop_last and full > 0
        assert len(seen) == (full * batch_size if is_dropped else pairs)
        assert set(seen) <= set(range(pairs))
        rest = [pairs % batch_size] * (pairs % batch_size > 0 and not is_dropped)
        assert sorted(map(len, batches)) == sorted([batch_size] * full + rest)

        shares = [
            [data.rank_share(torch.tensor(batch), rank, world_size).tolist() for batch in batches]
            for rank in range(world_size)
        ]
        for step, batch in enumerate(batches):
            assert sorted(index for share in shares for index in share[step]) == sorted(batch)
        loader = data.Loader(split, "cpu")
        words = [sum(loader(torch.tensor(share[-1], dtype=torch.int64)).target_tokens for share in shares)]
        assert words == [int((split.trg.lengths_of(torch.tensor(batches[-1])) - 1).sum())], (
            "an empty share counts nothing"
        )

        resumed_at = draws.draw(st.integers(0, len(batches)))
        resumed = data.epoch_batches(split, batch_size, **flags)
        assert len(resumed) == len(batches)
        assert [resumed[step].tolist() for step in range(resumed_at, len(resumed))] == batches[resumed_at:]


# ---------------------------------------------------------------- padded columns


def naive_columns(side, indices, fixed_length):
    """The padded sentences one by one, as torchtext's Field(fix_length=...) has them."""
    rows = [sentences(side)[index] for index in indices]
    if fixed_length:
        rows = [[data.SOS, *row[1:-1][: fixed_length - 2], data.EOS] for row in rows]
    length = fixed_length or max(map(len, rows))
    return [[row[step] if step < len(row) else data.PAD for row in rows] for step in range(length)]


@pytest.mark.parametrize("fixed_length", [0, 5, 46, 70])
def test_padded_sentences_are_what_a_naive_loop_makes(fixed_length):
    split = random_split(40)
    for indices in batches_of(split, 16):
        for side in (split.src, split.trg):
            columns, lengths = data.pad(side, indices, fixed_length)
            assert columns.tolist() == naive_columns(side, indices, fixed_length)
            assert columns.dtype == torch.int64
            assert lengths.tolist() == side.lengths[indices].tolist() == side.lengths_of(indices).tolist()


@pytest.mark.parametrize(("words", "kept"), [(43, 43), (44, 44), (45, 44), (200, 44)])
def test_fixed_length_of_46_keeps_44_words_and_eos(words, kept):
    vocab = data.Vocabulary([*data.SPECIALS, "a"])
    side = data.Side.encode([["a"] * words], vocab)
    column = data.pad(side, torch.tensor([0]), 46)[0][:, 0].tolist()
    assert column == [data.SOS] + [4] * kept + [data.EOS] + [data.PAD] * (44 - kept)


# ---------------------------------------------------------------- a batch


PAIRS = 9
INDICES = torch.tensor([3, 0, 7, 5])


def draw_side(rng, longest):
    """Sentences of 1 to `longest` words. No id occurs twice, so that each can be told from the others."""
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
        assert len(columns) == math.ceil(int(lengths.max()) / step) * step
        for column, index in enumerate(INDICES.tolist()):
            expected = sentence(split.src, index)
            assert columns[:, column].tolist() == expected + [PAD] * (len(columns) - len(expected))
