"""Embeddings from counts of words: the formula against a plain count, what they know, and where they go."""

import math
import warnings

import data
import gru
from nmt import cooccurrence

import pytest
import torch
from conftest import REPOSITORY
from torch.nn.functional import normalize

SPECIALS = len(data.SPECIALS)


def side(sentences):
    """Ids and offsets of sentences of ids from 0, which become the first words after the special ones."""
    ids = [[data.SOS, *(SPECIALS + word for word in sentence), data.EOS] for sentence in sentences]
    offsets = torch.tensor([0, *map(len, ids)]).cumsum(0)
    return torch.tensor(sum(ids, []), dtype=torch.int32), offsets


@pytest.fixture
def split():
    """40 pairs of a few words each. Source word 6 and target word 7 occur in none."""
    torch.manual_seed(0)
    src, trg = (
        [torch.randint(0, types, (int(length),)).tolist() for length in torch.randint(1, 6, (40,))] for types in (6, 7)
    )
    return side(src), side(trg)


def start_with(model, src, trg):
    """Vectors from the counts in the place of drawn ones."""
    tables = embeddings_of(model)
    gru.use_vectors(model, *cooccurrence.embeddings(src, trg, *map(len, tables), tables[0].shape[1]))


def plain_association(pairs, src_types, trg_types):
    """M by the formula, one pair of words after the other."""
    matrix = torch.zeros(src_types, trg_types)
    for f in range(SPECIALS, src_types):
        for e in range(SPECIALS, trg_types):
            n_f, n_e = sum(f in src for src, _ in pairs), sum(e in trg for _, trg in pairs)
            both = sum(f in src and e in trg for src, trg in pairs)
            if both:
                rarer = min(n_f, n_e)
                information = max(0.0, math.log(len(pairs) * both / (n_f * n_e)))
                matrix[f, e] = information * both / (both + 1) * rarer / (rarer + 1)
    return matrix


def sentences_of(ids, offsets):
    return [set(ids[a:b].tolist()) for a, b in zip(offsets, offsets[1:], strict=False)]


def pairs_of(split, indices=None):
    pairs = list(zip(*(sentences_of(*side) for side in split), strict=True))
    return pairs if indices is None else [pairs[index] for index in indices]


def test_the_association_is_that_of_a_plain_count(split):
    found = cooccurrence.association(*split, SPECIALS + 7, SPECIALS + 8)
    expected = plain_association(pairs_of(split), SPECIALS + 7, SPECIALS + 8)
    torch.testing.assert_close(found.to_dense(), expected)
    assert (expected > 0).sum() > 10


def test_a_repeated_word_counts_once(split):
    twice = (side([[0, 0, 1], [1], [0]]), side([[2], [3], [2]]))
    once = (side([[0, 1], [1], [0]]), side([[2], [3], [2]]))
    types = SPECIALS + 4
    found, expected = (cooccurrence.association(*pairs, types, types).to_dense() for pairs in (twice, once))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_the_vectors_are_the_factors_of_the_association(split):
    """With as many features as words, their products are the association. Only the rows' lengths differ."""
    types = SPECIALS + 8
    torch.manual_seed(0)
    src, trg = cooccurrence.embeddings(*split, types, types, 64)
    assert src.shape == trg.shape == (types, types)
    matrix = cooccurrence.association(*split, types, types).to_dense()
    left, values, right = torch.linalg.svd(matrix)
    products = normalize(left * values.sqrt(), dim=1) @ normalize(right.T * values.sqrt(), dim=1).T
    known = matrix.any(dim=1), matrix.any(dim=0)
    torch.testing.assert_close((src @ trg.T)[known[0]][:, known[1]], products[known[0]][:, known[1]], rtol=0, atol=1e-4)
    for rows, has_any in zip((src, trg), known, strict=True):
        torch.testing.assert_close(rows.norm(dim=1), has_any.float(), rtol=0, atol=1e-5)
        assert not has_any.all()


@pytest.fixture(scope="module")
def sample():
    return data.load(REPOSITORY / "sample", log=lambda line: None)


@pytest.fixture(scope="module")
def sample_pairs(sample):
    return [(side.ids, side.offsets) for side in (sample.train.src, sample.train.trg)]


def test_on_the_sample_they_translate_words(sample, sample_pairs):
    src, trg = cooccurrence.embeddings(*sample_pairs, len(sample.src_vocab), len(sample.trg_vocab), 256)
    for word, translation in {"hund": "dog", "uhr": "clock", "frau": "woman", "garten": "garden"}.items():
        (index,) = sample.src_vocab.encode([word])
        assert index != data.UNK
        assert sample.trg_vocab.itos[int((trg @ src[index]).argmax())] == translation


@pytest.fixture
def model(sample):
    torch.manual_seed(0)
    model = gru.build(len(sample.src_vocab), len(sample.trg_vocab), emb_dim=24, hid_dim=32)
    gru.init_orthogonal(model)
    return model


def test_only_embeddings_and_output_weights_change_and_keep_their_scale(sample, sample_pairs, model):
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    start_with(model, *sample_pairs)
    changed = ["encoder.embedding.weight", "decoder.embedding.weight", "decoder.fc_out.weight"]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in changed)
    for name in changed:
        assert model.get_parameter(name).std().item() == pytest.approx(before[name].std().item(), rel=0.05)
    new, old = model.decoder.fc_out.weight, before[changed[2]]
    assert torch.equal(new[:, :24], old[:, :24])  # what the embedding says
    assert torch.equal(new[:SPECIALS], old[:SPECIALS])


def test_the_vectors_are_as_long_as_drawn_ones_and_the_output_layers_parts_differ(sample, sample_pairs, model):
    drawn = [rows[SPECIALS:].detach().norm(dim=1).mean().item() for rows in embeddings_of(model)]
    start_with(model, *sample_pairs)
    vectors = cooccurrence.embeddings(*sample_pairs, len(sample.src_vocab), len(sample.trg_vocab), 24)
    for table, rows, length in zip(embeddings_of(model), vectors, drawn, strict=True):
        assert table[rows.any(dim=1)].norm(dim=1).tolist() == pytest.approx(
            [length] * int(rows.any(dim=1).sum()), rel=0.02
        )
    hidden, context = model.decoder.fc_out.weight[SPECIALS:, 24:].detach().split(32, dim=1)
    assert torch.corrcoef(torch.stack((hidden.flatten(), context.flatten())))[0, 1].abs() < 0.1


def embeddings_of(model):
    return model.encoder.embedding.weight, model.decoder.embedding.weight


def test_similar_words_start_with_similar_output_weights(sample, sample_pairs, model):
    def correlation():
        """Of the products of the output layer's rows with those of the embedding, over all pairs of words."""
        weight = model.decoder.fc_out.weight[SPECIALS:].detach()
        tables = [normalize(part, dim=1) for part in (vectors[SPECIALS:], weight[:, 24:56], weight[:, 56:])]
        products = [(table @ table.T).flatten() for table in tables]
        return torch.corrcoef(torch.stack(products))[0, 1:]

    vectors = cooccurrence.embeddings(*sample_pairs, len(sample.src_vocab), len(sample.trg_vocab), 24)[1]
    assert correlation().abs().max() < 0.1
    start_with(model, *sample_pairs)
    assert correlation().min() > 0.7


def test_a_vocabulary_smaller_than_the_embedding_keeps_the_other_features(split):
    torch.manual_seed(0)
    model = gru.build(SPECIALS + 7, SPECIALS + 8, emb_dim=16, hid_dim=8)
    gru.init_orthogonal(model)
    before = model.decoder.embedding.weight.detach().clone()
    start_with(model, *split)
    after = model.decoder.embedding.weight.detach()
    assert torch.equal(after[:, 11:], before[:, 11:])
    assert not torch.isclose(after[SPECIALS:-1, :11], before[SPECIALS:-1, :11]).all(dim=1).any()
    lengths = after[SPECIALS:-1, :11].norm(dim=1)  # as many drawn features have it
    torch.testing.assert_close(lengths, (before.std() * 11**0.5).expand_as(lengths))
    assert torch.equal(after[-1], before[-1])  # a word in no pair


def test_pairs_in_which_nothing_goes_together(split):
    """One pair alone says nothing: all information is log 1."""
    alone = (side([[0, 1]]), side([[0, 1, 2]]))
    torch.manual_seed(0)
    model = gru.build(SPECIALS + 2, SPECIALS + 3, emb_dim=4, hid_dim=4)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    start_with(model, *alone)
    assert all(map(torch.equal, model.parameters(), before))


@pytest.mark.parametrize("pairs", [([[0], [1]], [[0], []]), ([[0], [0], []], [[0], [0], [1]])])
@pytest.mark.parametrize("dim", [1, 2])
def test_the_smallest_models_get_finite_weights(pairs, dim):
    """One number has no deviation, and equal ones have none either."""
    torch.manual_seed(0)
    model = gru.build(SPECIALS + 2, SPECIALS + 2, emb_dim=dim, hid_dim=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        start_with(model, *map(side, pairs))
    for parameter in model.parameters():
        assert parameter.isfinite().all()


def test_a_large_corpus_is_read_in_part(split, monkeypatch):
    monkeypatch.setattr(cooccurrence, "MAX_PAIRS", 16)
    indices = cooccurrence.pairs_to_count(*split)
    assert indices.tolist() == [pair * 40 // 16 for pair in range(16)]
    found = cooccurrence.association(*split, SPECIALS + 7, SPECIALS + 8)
    expected = plain_association(pairs_of(split, indices.tolist()), SPECIALS + 7, SPECIALS + 8)
    torch.testing.assert_close(found.to_dense(), expected)


@pytest.mark.parametrize("limit", [700, 1800])
def test_long_sentences_make_no_more_counts_than_the_memory_is_for(monkeypatch, limit):
    """Also where every other sentence is long."""
    sentences = [[0, 1] * (6 if pair % 2 else 1) for pair in range(40)]
    split = (side(sentences), side(sentences))
    word_pairs = math.prod(offsets.diff() for _, offsets in split)
    monkeypatch.setattr(cooccurrence, "MAX_COUNTS", limit)
    indices = cooccurrence.pairs_to_count(*split)
    assert limit - word_pairs.max() < word_pairs[indices].sum() <= limit < word_pairs.sum()
    assert indices.tolist() == sorted(indices.tolist())
    assert {index % 2 for index in indices.tolist()} == {0, 1}


def test_one_pair_too_long_to_count_keeps_no_other_out(monkeypatch):
    sentences = [[0, 1]] * 39
    split = (side([[0, 1] * 50, *sentences]), side([[0, 1] * 50, *sentences]))
    monkeypatch.setattr(cooccurrence, "MAX_COUNTS", 5000)
    assert cooccurrence.pairs_to_count(*split).tolist() == list(range(1, 40))


def test_nothing_is_said_about_unfinished_parts_of_torch(split):
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # else torch says it once a process, and an earlier test has heard it
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            cooccurrence.embeddings(*split, SPECIALS + 7, SPECIALS + 8, 8)
    finally:
        torch.set_warn_always(before)
