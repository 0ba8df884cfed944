"""BLEU and losses: against cases by hand and against sacreBLEU."""

import collections
import dataclasses
import math
from typing import NamedTuple

import data
import gru
import scoring
from nmt import checkpoint, kernels, search
from nmt.distributed import World

import hypothesis
import hypothesis.strategies as st
import pytest
import sacrebleu
import torch
from conftest import refused
from hypothesis import given
from torchtext.data.metrics import bleu_score

BEAM = {"beam_size": 3, "length_penalty": 0.5}
VOCAB = data.Vocabulary(["<unk>", "<pad>", "<sos>", "<eos>", "a", "b", "c", " "])
repeatable = hypothesis.settings(deadline=None, max_examples=50, derandomize=True)  # at each run the same cases


def test_bleu_of_a_case_by_hand():
    # 4 of 5 words, 3 of 4 pairs, 2 of 3 triples and 1 of 2 quadruples are right. There is no brevity penalty.
    scores = scoring.evaluate(["the dog runs fast now".split()], ["the dog runs fast here".split()])
    expected = 100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    assert scores.bleu == pytest.approx(expected, rel=1e-6)
    assert scores.sacrebleu == pytest.approx(expected, rel=1e-6)
    assert "tok:none" in scores.sacrebleu_signature


def test_short_translations_pay_the_brevity_penalty():
    scores = scoring.evaluate(["a b c d".split()], ["a b c d e f".split()])
    assert scores.bleu == pytest.approx(100 * math.exp(1 - 6 / 4), rel=1e-6)


def test_an_empty_translation_scores_nothing():
    assert scoring.evaluate([[], ["a"]], [["a", "b"], ["c"]]).bleu == 0


# ---------------------------------------------------------------- tokens of any characters


def plain_bleu(translations: list[list[str]], references: list[list[str]]) -> float:
    """BLEU with one reference, 0 to 100, counted n-gram by n-gram."""
    right, total = [0] * 4, [0] * 4
    for translation, reference in zip(translations, references, strict=True):
        for size in range(1, 5):
            counts, allowed = (
                collections.Counter(tuple(tokens[start : start + size]) for start in range(len(tokens) - size + 1))
                for tokens in (translation, reference)
            )
            right[size - 1] += (counts & allowed).total()
            total[size - 1] += counts.total()
    if 0 in right:
        return 0.0
    length, reference_length = (sum(map(len, sentences)) for sentences in (translations, references))
    brevity = math.exp(min(0.0, 1 - reference_length / length))
    return 100 * brevity * math.prod(r / t for r, t in zip(right, total, strict=True)) ** 0.25


def test_a_token_with_a_space_is_one_token():
    """Kind A. By itself torchtext's scorer splits it, and fails or counts words."""
    spanish = ["en", "ee. uu."]
    cases = [spanish, "a b c d e".split()], [spanish, "a b c d f".split()]
    assert 100 * bleu_score(cases[0], [[reference] for reference in cases[1]]) == pytest.approx(70.71, abs=0.01)
    with pytest.raises(IndexError):
        bleu_score([["los", *spanish, "."]], [[["los", *spanish, "."]]])

    scores = scoring.evaluate(*cases)
    assert scores.bleu == pytest.approx(69.14, abs=0.01)
    assert scores.bleu == pytest.approx(plain_bleu(*cases), rel=1e-6)
    assert scores.sacrebleu == pytest.approx(scores.bleu, rel=1e-6)
    assert scoring.evaluate([["los", *spanish, "."]], [["los", *spanish, "."]]).bleu == pytest.approx(100)


tokens = st.one_of(st.sampled_from(["a", "b", "ee. uu.", " ", "a b"]), st.text(min_size=1, max_size=3))


@st.composite
def scored(draw, tokens=tokens):
    """Translations and references, with parts that the reference has in common with the translation."""
    sentence = st.lists(tokens, max_size=8)
    pairs = draw(st.lists(st.tuples(sentence, sentence, st.integers(0, 8)), min_size=1, max_size=4))
    return [one for one, _, _ in pairs], [one[:cut] + other[cut:] for one, other, cut in pairs]


@repeatable
@given(scored())
def test_bleu_is_a_plain_count_of_n_grams_of_tokens_of_any_characters(case):
    """Kind A."""
    scores, expected = scoring.evaluate(*case), plain_bleu(*case)
    assert scores.bleu == pytest.approx(expected, rel=1e-5)
    if expected:  # otherwise sacreBLEU smooths
        assert scores.sacrebleu == pytest.approx(expected, rel=1e-9)
    assert 0 <= scores.chrf <= 100 + 1e-9


@repeatable
@given(scored(st.text(st.characters(exclude_categories=["Z", "C"]), min_size=1, max_size=2)))
def test_for_tokens_without_white_space_each_score_is_the_librarys_own(case):
    """Kind A: no figure of before has changed."""
    texts = [" ".join(words) for words in case[0]], [[" ".join(words) for words in case[1]]]
    scores = scoring.evaluate(*case)
    assert scores.bleu == 100 * bleu_score(case[0], [[reference] for reference in case[1]])
    assert scores.sacrebleu == sacrebleu.BLEU(tokenize="none", force=True).corpus_score(*texts).score
    assert scores.chrf == sacrebleu.CHRF().corpus_score(*texts).score


@pytest.fixture
def split():
    sentences = [["a", "b"], ["c"], ["a", "c", "b", "a"]]
    side = data.Side.encode(sentences, VOCAB)
    return data.Split(side, side, sentences, sentences)


@pytest.fixture
def model(split):
    """One that ends each sentence of `split` after another number of words, so that they can be told apart."""
    torch.manual_seed(10)
    model = gru.build(len(VOCAB), len(VOCAB), emb_dim=4, hid_dim=5).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    for options in ({}, BEAM):
        lengths = {len(words) for words in scoring.translate(model, split.src, VOCAB, World(), **options)}
        assert len(lengths) == 3
        assert max(lengths) < scoring.MAX_LENGTH - 1
    return model


def words(ids: list[int]) -> list[str]:
    return [word for word in VOCAB.decode(ids) if word != " "]


def test_translations_come_in_the_order_of_the_sources(model, split, monkeypatch):
    whole = scoring.translate(model, split.src, VOCAB, World())
    for index in range(3):
        alone = data.Side.encode([split.src_tokens[index]], VOCAB)
        assert scoring.translate(model, alone, VOCAB, World()) == [whole[index]]
    monkeypatch.setattr(scoring, "BATCH_SIZE", 1)
    assert scoring.translate(model, split.src, VOCAB, World()) == whole


def test_more_ranks_than_sentences_share_the_work_all_the_same(model, split, monkeypatch):
    whole = scoring.translate(model, split.src, VOCAB, World())
    loader = data.Loader(split, "cpu")
    losses = scoring.losses(model, loader, World())
    parts = []
    monkeypatch.setattr(World, "sum", lambda self, tensor: parts.append(tensor.clone()) or torch.ones_like(tensor))
    for rank in range(5):
        scoring.translate(model, split.src, VOCAB, World(rank=rank, size=5))
    assert [words(row) for row in sum(parts).tolist()] == whole
    parts.clear()
    for rank in range(5):
        scoring.losses(model, loader, World(rank=rank, size=5))
    forced, free_running, count = sum(parts).tolist()
    assert (forced / count, free_running / count) == pytest.approx((losses.forced, losses.free_running), rel=1e-5)


def test_a_translation_does_not_depend_on_how_ended_sentences_are_dropped(split, model, monkeypatch):
    """One by one on a CPU. Elsewhere by halves, with sources padded to a multiple."""
    whole = scoring.translate(model, split.src, VOCAB, World())
    widths, pad = [], data.pad
    monkeypatch.setattr(data, "pad", lambda *args, **options: widths.append(options) or pad(*args, **options))
    monkeypatch.setattr(kernels, "computes_steps", lambda device: False)
    assert scoring.translate(model, split.src, VOCAB, World()) == whole
    assert widths == [{"length_step": data.LENGTH_STEP}]


def test_a_beam_translates_as_one_sentence_at_a_time_does(model, split):
    whole = scoring.translate(model, split.src, VOCAB, World(), **BEAM)
    for index in range(3):
        src, src_len = data.pad(split.src, torch.tensor([index]))
        ids = search.beam_search(model, src, src_len, data.SOS, data.EOS, **BEAM).ids[:, 0, 0]
        assert words(ids.tolist()) == whole[index]


@hypothesis.settings(repeatable, max_examples=10)
@given(st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=6), min_size=2, max_size=9), st.data())
def test_bleu_does_not_depend_on_the_batch_or_on_the_number_of_ranks(sentences, draws):
    """Each rank fills its own rows, and their sum is the whole."""
    side = data.Side.encode(sentences, VOCAB)
    torch.manual_seed(10)
    model = gru.build(len(VOCAB), len(VOCAB), emb_dim=4, hid_dim=5).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    alone = scoring.translate(model, side, VOCAB, World())
    size, parts = draws.draw(st.integers(1, 4)), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "BATCH_SIZE", draws.draw(st.integers(1, 10)))
        patch.setattr(World, "sum", lambda self, tensor: parts.append(tensor.clone()) or torch.ones_like(tensor))
        for rank in range(size):
            scoring.translate(model, side, VOCAB, World(rank=rank, size=size))
    shared = [words(row) for row in sum(parts).tolist()]
    assert scoring.evaluate(shared, sentences) == scoring.evaluate(alone, sentences)


# ---------------------------------------------------------------- long sentences


class Sources(NamedTuple):
    """What `Copier` keeps: [sentences, src len] token ids."""

    ids: torch.Tensor

    def select(self, rows):
        return Sources(self.ids[rows])


class Copier:
    """A translator that is sure of repeating its source. Its state is the place of the next token."""

    def start(self, src, src_len):
        return Sources(src.T), torch.ones(src.shape[1], 1)

    def step(self, prev_token, hidden, memory):
        ids = memory.ids.repeat_interleave(len(prev_token) // len(memory.ids), 0)
        places = hidden.long().clamp(max=ids.shape[1] - 1)
        return 20.0 * torch.nn.functional.one_hot(ids.gather(1, places)[:, 0], len(VOCAB)), hidden + 1


def of_lengths(src: list[int], trg: list[int]) -> data.Split:
    """A split whose sentences have so many words."""
    sides = [[list("abc" * size)[:size] for size in lengths] for lengths in (src, trg)]
    return data.Split(*(data.Side.encode(side, VOCAB) for side in sides), *sides)


@pytest.mark.parametrize("beam_size", [1, 3])
def test_a_perfect_model_is_perfect_with_long_references_too(beam_size):
    """Kind C. With the limit of 50 tokens the same model loses."""
    split = of_lengths([60, 7, 60], [60, 7, 60])
    bleus = []
    for limit in (scoring.MAX_LENGTH, scoring.longest_translation(split, None)):
        options = {"max_length": limit, "beam_size": beam_size, "length_penalty": 1.2}
        translations = scoring.translate(Copier(), split.src, VOCAB, World(), **options)
        bleus.append(scoring.evaluate(translations, split.references).bleu)
    assert bleus[0] < 90
    assert bleus[1] == pytest.approx(100)


def test_validation_has_the_limit_of_its_pairs_or_of_the_flag(monkeypatch):
    """Kind C."""
    split = of_lengths([60, 7], [60, 7])
    monkeypatch.setattr(scoring, "losses", lambda *_: scoring.Losses(1.0, 1.0))
    monkeypatch.setattr(Copier, "eval", lambda self: self, raising=False)
    loader = data.Loader(split, "cpu")
    assert scoring.validate(Copier(), loader, VOCAB, World()).bleu == pytest.approx(100)
    assert scoring.validate(Copier(), loader, VOCAB, World(), 20).bleu < 50


@pytest.mark.parametrize(
    ("src", "trg", "given", "limit", "note"),
    [
        ([40], [50], None, 50, None),
        (
            [40],
            [60, 51, 50],
            None,
            60,
            "2 of 3 val references have more than 50 tokens: translations may have 60",
        ),
        ([70], [50], None, 70, None),
        ([70], [60], 40, 40, "1 of 1 val references have more than 40 tokens: their translations end there"),
        ([7], [7], 300, 300, None),
    ],
)
def test_a_translations_length_follows_the_longest_sentence_above_50(src, trg, given, limit, note):
    """Kind C. Corpora of short sentences keep the original's limit, and so their figures."""
    split = of_lengths(src * len(trg), trg)
    assert scoring.longest_translation(split, given) == limit
    assert list(scoring.note_on_length(split, given, "val")) == ([f"note: {note}"] if note else [])


def test_white_space_words_of_a_translation_are_dropped(split, model, monkeypatch):
    ids = torch.tensor([4, 7, 5, 3]).unsqueeze(1)
    monkeypatch.setattr(scoring, "greedy", lambda model, src, *rest: ids.expand(4, src.shape[1]))
    assert scoring.translate(model, split.src, VOCAB, World(), max_length=4) == [["a", "b"]] * 3


@pytest.mark.parametrize(("ratio", "name"), [(1.0, "forced"), (0.0, "free_running")])
def test_the_mean_loss_is_over_target_positions_of_all_batches(model, split, monkeypatch, ratio, name):
    total, count = 0.0, 0
    for index in range(3):
        (src, src_len), (trg, _) = (data.pad(side, torch.tensor([index])) for side in (split.src, split.trg))
        logits = model(src, trg, ratio, src_len)
        for t in range(1, len(trg)):
            total -= logits[t, 0].log_softmax(0)[trg[t, 0]].item()
            count += 1
    monkeypatch.setattr(scoring, "BATCH_SIZE", 2)
    losses = scoring.losses(model, data.Loader(split, "cpu"), World())
    assert getattr(losses, name) == pytest.approx(total / count, rel=1e-5)


def test_a_validation_has_losses_on_all_ranks_and_bleu_and_examples_on_rank_0(model, split, monkeypatch):
    loader = data.Loader(split, "cpu")
    found = scoring.validate(model, loader, VOCAB, World())
    translations = scoring.translate(model, split.src, VOCAB, World())
    assert found.losses == scoring.losses(model, loader, World())
    assert found.bleu == scoring.evaluate(translations, split.references).bleu
    assert [example[2] for example in found.examples] == [" ".join(translations[index]) for index in (0, 1)]
    monkeypatch.setattr(World, "sum", lambda self, tensor: tensor)
    other = scoring.validate(model, loader, VOCAB, World(rank=1, size=2))
    assert math.isnan(other.bleu)
    assert other.losses.are_finite


def test_a_model_whose_losses_are_not_finite_translates_nothing(model, split, monkeypatch):
    monkeypatch.setattr(scoring, "translate", lambda *_: pytest.fail("it was asked to translate"))
    torch.nn.init.constant_(model.decoder.fc_out.bias, math.nan)
    found = scoring.validate(model, data.Loader(split, "cpu"), VOCAB, World())
    assert not found.losses.are_finite


# ---------------------------------------------------------------- checkpoints


def saved_with(**changes) -> checkpoint.Checkpoint:
    state = gru.build(6, 7, emb_dim=3, hid_dim=4).state_dict()
    about = {"src_lang": "de", "trg_lang": "en"}
    words = [*data.SPECIALS, "a", "b", "c"]
    return dataclasses.replace(checkpoint.Checkpoint(state, {}, words[:6], words, about=about), **changes)


def test_a_restored_model_has_the_checkpoints_weights_and_translates():
    saved = saved_with()
    model = scoring.restore(saved, "model.pth.tar")
    torch.testing.assert_close(dict(model.state_dict()), dict(saved.state_dict), rtol=0, atol=0)
    assert not model.training


def test_weights_of_another_model_are_refused_with_the_first_that_does_not_fit():
    state = saved_with().state_dict
    odd = saved_with(state_dict=state | {"decoder.fc_out.bias": torch.zeros(3)})
    assert "decoder.fc_out.bias" in refused("checkpoint", scoring.restore, odd, "odd")
    linear = saved_with(state_dict=torch.nn.Linear(2, 2).state_dict())
    assert "no state dict of this model" in refused("checkpoint", scoring.restore, linear, "other")


def corpus_of(src: list[str], trg: list[str], langs=("de", "en")) -> data.Corpus:
    vocabs = (data.Vocabulary([*data.SPECIALS, *words]) for words in (src, trg))
    empty = data.Side.encode([], VOCAB)
    split = data.Split(empty, empty)
    return data.Corpus(*vocabs, split, split, split, *langs, "", [])


def test_a_checkpoint_has_its_own_vocabularies_or_takes_the_datas_where_they_fit():
    saved, corpus = saved_with(), corpus_of(["x", "y"], ["x", "y", "z"])
    model = scoring.restore(saved, "model")
    own = scoring.vocabularies(saved, model, corpus, "model")
    assert [vocab.itos[4:] for vocab in own] == [["a", "b"], ["a", "b", "c"]]
    without = saved_with(src_vocab=None, trg_vocab=None)
    assert scoring.vocabularies(without, model, corpus, "model") == (corpus.src_vocab, corpus.trg_vocab)
    other = corpus_of(["x"], ["x", "y", "z"])
    assert "trained with [6, 7] types, this data has [5, 7]" in refused(
        "checkpoint", scoring.vocabularies, without, model, other, "model"
    )
    french = corpus_of(["x", "y"], ["x", "y", "z"], langs=("fr", "en"))
    assert "give --src-lang de" in refused("checkpoint", scoring.vocabularies, saved, model, french, "model")


def test_pairs_are_encoded_anew_only_where_the_vocabularies_differ(split):
    same, other = data.Vocabulary(list(VOCAB.itos)), data.Vocabulary([*data.SPECIALS, "c", "a"])
    assert scoring.in_vocabularies(split, (VOCAB, VOCAB), (same, same)) is split
    changed = scoring.in_vocabularies(split, (VOCAB, VOCAB), (same, other))
    assert changed.src.ids.tolist() == split.src.ids.tolist()
    assert changed.trg.ids.tolist()[:4] == [data.SOS, 5, data.UNK, data.EOS], "<sos> a <unk> <eos>"
