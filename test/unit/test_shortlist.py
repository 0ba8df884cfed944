"""The probable translations of each word against IBM model 1 written plainly, and the words of a batch."""

import itertools
import random
from collections import defaultdict

import data
from nmt import cooccurrence, shortlist

import pytest
import torch

SRC_TYPES, TRG_TYPES = 12, 14


@pytest.fixture
def pairs():
    """Pairs of sentences as lists of ids, with the ends and an unknown word."""
    generator = random.Random(0)
    drawn = [
        [
            [data.SOS, *(generator.randrange(4, types) for _ in range(generator.randint(1, 6))), data.EOS]
            for types in both
        ]
        for both in itertools.repeat((SRC_TYPES - 1, TRG_TYPES), 40)
    ]
    drawn[3][0][1] = drawn[5][1][1] = data.UNK
    return drawn


def side(sentences):
    """Ids and offsets, as a corpus has them."""
    offsets = torch.tensor([0, *itertools.accumulate(map(len, sentences))])
    return torch.tensor(list(itertools.chain.from_iterable(sentences)), dtype=torch.int32), offsets


def plain_model_1(pairs, rounds):
    """t[f][e] of IBM model 1 after so many rounds, from the formulas."""
    t = defaultdict(lambda: defaultdict(lambda: 1.0))
    for _ in range(rounds):
        counts = defaultdict(lambda: defaultdict(float))
        for src, trg in pairs:
            src, trg = ([word for word in words if word >= 4] for words in (src, trg))
            for e, f in itertools.product(trg, src):
                counts[f][e] += t[f][e] / sum(t[other][e] for other in src)
        t = {f: {e: count / sum(of_f.values()) for e, count in of_f.items()} for f, of_f in counts.items()}
        t = defaultdict(lambda: defaultdict(float), t)
    return t


def test_each_row_has_the_most_probable_translations_of_ibm_model_1(pairs):
    table = shortlist.build(*(side(sentences) for sentences in zip(*pairs, strict=True)), SRC_TYPES, TRG_TYPES, width=5)
    assert (table.shape, table.dtype) == ((SRC_TYPES, 5), torch.int32)
    t = plain_model_1(pairs, shortlist.ROUNDS)
    for word in range(4, SRC_TYPES - 1):
        probable = sorted(t[word].values(), reverse=True)[:5]
        assert [t[word][e] for e in table[word].tolist()] == pytest.approx(probable, rel=1e-4)
        assert len(set(table[word].tolist())) == 5


def test_a_word_without_pairs_and_the_special_ids_have_unk(pairs):
    table = shortlist.build(*(side(sentences) for sentences in zip(*pairs, strict=True)), SRC_TYPES, TRG_TYPES)
    assert (table[[*range(4), SRC_TYPES - 1]] == data.UNK).all()
    assert (table[4:-1, 0] >= 4).all()
    assert int(table.max()) < TRG_TYPES


def test_pairs_without_words_give_unk_alone():
    empty = side([[data.SOS, data.UNK, data.EOS]])
    assert (shortlist.build(empty, empty, SRC_TYPES, TRG_TYPES) == data.UNK).all()


def test_of_a_large_corpus_fewer_pairs_are_read(pairs, monkeypatch):
    sides = [side(sentences) for sentences in zip(*pairs, strict=True)]
    links, together = shortlist.count_links(*sides, TRG_TYPES)
    assert (
        len(links)
        == len(together)
        == sum(sum(word >= 4 for word in src) * sum(word >= 4 for word in trg) for src, trg in pairs)
    )
    monkeypatch.setattr(shortlist, "MAX_LINKS", 200)
    fewer, _ = shortlist.count_links(*sides, TRG_TYPES)
    assert 0 < len(fewer) <= 200
    monkeypatch.setattr(cooccurrence, "MAX_PAIRS", 1)
    assert 0 < len(shortlist.count_links(*sides, TRG_TYPES)[0]) <= 36


def test_the_words_of_a_batch_are_translations_frequent_words_and_specials(monkeypatch):
    monkeypatch.setattr(shortlist, "STEP", 1)
    table = torch.zeros(SRC_TYPES, 3, dtype=torch.int32)
    table[7] = torch.tensor([90, 50, 20])
    table[8] = torch.tensor([50, 60, 0])
    src = torch.tensor([[data.SOS, data.SOS], [7, 8], [data.EOS, 8], [data.PAD, data.EOS]])
    words = shortlist.words_of(src, table, 100, frequent=2)
    assert words.tolist() == [0, 1, 2, 3, 4, 5, 20, 50, 60, 90]
    assert shortlist.words_of(src, table[:, :1], 100, frequent=0).tolist() == [0, 1, 2, 3, 50, 90]


def test_further_frequent_words_fill_a_shortlist_up(monkeypatch):
    monkeypatch.setattr(shortlist, "STEP", 8)
    table = torch.zeros(SRC_TYPES, 1, dtype=torch.int32)
    table[7] = 20
    src = torch.tensor([[7]])
    assert shortlist.words_of(src, table, 100, frequent=5).tolist() == [*range(15), 20]
    assert shortlist.words_of(src, table, 22, frequent=16).tolist() == [*range(22)], "there are no more"
