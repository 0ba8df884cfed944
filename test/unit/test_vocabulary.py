"""The vocabulary's claims: torchtext's order, ids that never change, and special words that no text can write."""

import random
from collections import Counter

from nmt.text import vocabulary
from nmt.text.vocabulary import Vocabulary

import pytest


def test_vocabulary_has_torchtexts_order_and_the_special_ids():
    from torchtext.vocab import Vocab

    generator = random.Random(1)
    token_lists = [[generator.choice("äbcdefgzß ") for _ in range(9)] for _ in range(9)] + [["<pad>"] * 50, ["rare"]]
    counter = Counter(token for tokens in token_lists for token in tokens)
    vocab = Vocabulary.build(counter, min_freq=2)
    assert vocab.itos == Vocab(counter, min_freq=2, specials=["<unk>", "<pad>", "<sos>", "<eos>"]).itos
    assert vocab.itos[:4] == ["<unk>", "<pad>", "<sos>", "<eos>"]
    assert (vocabulary.UNK, vocabulary.PAD, vocabulary.SOS, vocabulary.EOS) == (0, 1, 2, 3)
    assert "rare" not in vocab.itos


def test_vocabulary_is_by_frequency_and_ties_are_alphabetical():
    assert Vocabulary.build({"b": 2, "c": 3, "a": 2, "d": 1}).itos[4:] == ["c", "a", "b"]


def test_of_more_words_than_wanted_the_most_frequent_ones_stay():
    counts = {"b": 2, "c": 3, "a": 2, "d": 1}
    assert Vocabulary.build(counts, max_words=2).itos[4:] == ["c", "a"]
    assert Vocabulary.build(counts, min_freq=1, max_words=9).itos[4:] == ["c", "a", "b", "d"]
    assert Vocabulary.build(counts, min_freq=3, max_words=2).itos[4:] == ["c"]


def test_encoding_never_adds_a_word():
    vocab = Vocabulary.build({"a": 2})
    assert vocab.encode(["a", "new", "new"]) == [4, 0, 0]
    assert len(vocab) == 5


def test_special_words_in_a_text_are_unknown_words():
    assert Vocabulary.build({"a": 2}).encode(["<pad>", "<eos>", "a"]) == [0, 0, 4]


def test_decoding_ends_at_eos_and_skips_a_leading_sos():
    vocab = Vocabulary.build({"a": 2})
    assert vocab.decode([2, 4, 0, 3, 4]) == ["a", "<unk>"]
    assert vocab.decode([4, 4]) == ["a", "a"]
    assert vocab.decode([3, 4]) == []


def test_vocabulary_without_the_specials_is_refused():
    with pytest.raises(ValueError, match="begins with"):
        Vocabulary(["a", "b"])
