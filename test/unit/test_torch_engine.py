"""The engine of PyTorch: batches of any sentences, in both precisions, with and without a shortlist."""

import math

import data
import gru
from nmt import checkpoint, devices, engine, search, torch_engine
from nmt.torch_engine import TorchEngine, choose_dtype, shortlist_of

import pytest
import torch
from conftest import refused
from torch import nn

SRC, TRG = 30, 60
INFO = engine.ModelInfo(
    src_lang="de",
    trg_lang="en",
    src_words=data.SPECIALS + [f"s{word}" for word in range(4, SRC)],
    trg_words=data.SPECIALS + [f"t{word}" for word in range(4, TRG)],
    case="lower",
    sizes={"input_dim": SRC, "output_dim": TRG, "emb_dim": 8, "hid_dim": 16},
)
GREEDY = {"beam_size": 1, "length_penalty": 1.0, "max_length": 9}
BEAM = {"beam_size": 4, "length_penalty": 1.2, "max_length": 9, "n_best": 3}
DECODINGS = pytest.mark.parametrize("options", [GREEDY, BEAM], ids=["greedy", "beam"])


@pytest.fixture(autouse=True)
def own_memory(monkeypatch):
    """The test's process keeps its C library as it is."""
    monkeypatch.setattr(devices, "keep_freed_memory", lambda: None)


def a_model(ends=0.0):
    """The same model each time. With `ends` its sentences end earlier, and at different steps."""
    torch.manual_seed(0)
    model = gru.build(**INFO.sizes).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    with torch.no_grad():
        model.decoder.fc_out.bias[data.EOS] += ends
    return model


def sentences(count=23):
    generator = torch.Generator().manual_seed(1)
    sizes = torch.randint(0, 12, (count,), generator=generator).tolist()
    return [[data.SOS, *torch.randint(4, SRC, (size,), generator=generator).tolist(), data.EOS] for size in sizes]


def alone(model, sentence, options, words=None):
    """The hypotheses of one sentence, by the search itself."""
    options = dict(options)
    max_len = options.pop("max_length")
    src, length = torch.tensor(sentence).unsqueeze(1), torch.tensor([len(sentence)])
    ids, scores = search.beam_search(model, src, length, data.SOS, data.EOS, max_len=max_len, words=words, **options)
    return [(found[: found.index(data.EOS)] if data.EOS in found else found) for found in ids[:, 0].T.tolist()], scores[
        0
    ]


def log_probability(model, sentence, ids, max_length):
    """log P of a translation by reading it as the reference, and its length."""
    tokens = ids if len(ids) == max_length else [*ids, data.EOS]
    trg = torch.tensor([data.SOS, *tokens]).unsqueeze(1)
    with torch.no_grad():
        log_p = model(torch.tensor(sentence).unsqueeze(1), trg, 1.0).log_softmax(2)
    return sum(log_p[t, 0, trg[t, 0]].item() for t in range(1, len(trg))), len(tokens)


@DECODINGS
def test_each_sentence_has_the_hypotheses_that_it_has_alone_in_the_order_of_the_input(options, monkeypatch):
    monkeypatch.setattr(torch_engine, "BATCH_ROWS", 20)
    expected = [alone(a_model(), sentence, options) for sentence in sentences()]
    found = TorchEngine(a_model(), INFO).translate(sentences(), **options)
    assert [[list(best.ids) for best in hypotheses] for hypotheses in found] == [ids for ids, _ in expected]
    for hypotheses, (_, scores) in zip(found, expected, strict=True):
        assert [best.score for best in hypotheses] == pytest.approx(scores.tolist(), abs=1e-5)


@DECODINGS
def test_scores_are_log_probabilities_of_the_plain_model(options):
    model, power, many = a_model(2.0), options["length_penalty"], sentences(60)  # some are kept when they have ended
    found = TorchEngine(a_model(2.0), INFO).translate(many, **options)
    for sentence, hypotheses in zip(many, found, strict=True):
        assert len(hypotheses) == options.get("n_best", 1)
        for ids, score in hypotheses:
            log_p, length = log_probability(model, sentence, ids, options["max_length"])
            assert score == pytest.approx(log_p / length**power, abs=1e-5)


@DECODINGS
def test_a_shortlist_with_all_words_changes_nothing(options):
    everything = torch.arange(TRG, dtype=torch.int32).expand(SRC, TRG).contiguous()
    found, expected = (
        TorchEngine(a_model(), INFO, shortlist=table).translate(sentences(), **options) for table in (everything, None)
    )
    for hypotheses, others in zip(found, expected, strict=True):
        assert [best.ids for best in hypotheses] == [best.ids for best in others]
        assert [best.score for best in hypotheses] == pytest.approx([best.score for best in others], abs=1e-6)


@DECODINGS
def test_with_a_shortlist_the_search_is_that_of_a_model_with_these_words_alone(options, monkeypatch):
    monkeypatch.setattr(torch_engine.shortlists, "STEP", 1)
    monkeypatch.setattr(torch_engine.shortlists, "FREQUENT", 6)
    table = torch.zeros(SRC, 2, dtype=torch.int32)
    table[:, 0] = torch.arange(SRC) + 25
    few, (sentence, *_) = a_model(), sorted(sentences(), key=len)[-1:]
    kept = sorted({*range(10), *(word + 25 for word in sentence)})
    with torch.no_grad():
        few.decoder.fc_out.bias[[word for word in range(TRG) if word not in kept]] = -1e9
    expected, scores = alone(few, sentence, options)
    (found,) = TorchEngine(a_model(), INFO, shortlist=table).translate([sentence], **options)
    assert [best.ids for best in found] == expected
    assert [best.score for best in found] == pytest.approx(scores.tolist(), abs=1e-5)
    assert max(max(best.ids, default=0) for best in found) > 10, "a word of the table"
    whole, _ = alone(a_model(), sentence, options)
    assert whole != expected


def test_a_beam_may_be_wider_than_the_shortlist(monkeypatch):
    monkeypatch.setattr(torch_engine.shortlists, "STEP", 1)
    monkeypatch.setattr(torch_engine.shortlists, "FREQUENT", 2)
    options = {"beam_size": 20, "length_penalty": 1.0, "max_length": 4, "n_best": 20}
    table = torch.zeros(SRC, 1, dtype=torch.int32)
    (found,) = TorchEngine(a_model(), INFO, shortlist=table).translate(sentences()[:1], **options)
    assert len(found) == 20


@DECODINGS
def test_bfloat16_translates_nearly_as_float32(options):
    half, whole = (
        TorchEngine(a_model(), INFO, dtype=dtype).translate(sentences(200), **options)
        for dtype in (torch.bfloat16, torch.float32)
    )
    same = [ours[0].ids == theirs[0].ids for ours, theirs in zip(half, whole, strict=True)]
    assert sum(same) > 0.75 * len(same)
    for (ours, *_), (theirs, *_), equal in zip(half, whole, same, strict=True):
        assert ours.score != theirs.score
        assert not equal or ours.score == pytest.approx(theirs.score, abs=0.1)


def test_a_batch_bounds_its_memory(monkeypatch):
    monkeypatch.setattr(torch_engine, "BATCH_TOKENS", 100)
    lengths = [2, 30, 7, 7, 40, 150, 3, 9]
    found = list(torch_engine.batches(lengths, 4))
    assert sorted(place for places in found for place in places) == list(range(len(lengths)))
    assert [lengths[place] for places in found for place in places] == sorted(lengths)
    for places in found:
        assert len(places) == 1 or len(places) * max(lengths[place] for place in places) <= 100
        assert len(places) <= 4
    assert [len(places) for places in found] == [4, 2, 1, 1]


@pytest.mark.parametrize(
    ("limits", "most"),
    [
        ({"BATCH_SENTENCES": 5}, 5),
        ({"BATCH_ROWS": 12}, 3),
        ({"BATCH_LOGITS": 2 * 4 * TRG}, 2),
        ({"BATCH_IDS": 4 * 9}, 1),
        ({"BATCH_IDS": 1}, 1),
        ({"BATCH_TOKENS": 1}, 1),
    ],
)
def test_rows_words_and_length_of_a_batch_are_bounded(limits, most, monkeypatch):
    for name, limit in limits.items():
        monkeypatch.setattr(torch_engine, name, limit)
    sizes, searched = [], search.beam_search
    monkeypatch.setattr(
        search,
        "beam_search",
        lambda model, src, *rest, **named: (sizes.append(src.shape[1]), searched(model, src, *rest, **named))[1],
    )
    translated = TorchEngine(a_model(), INFO).translate(sentences(7), **BEAM)
    assert max(sizes) == most and sum(sizes) == 7
    assert all(len(hypotheses) == 3 for hypotheses in translated)


def test_no_sentences_have_no_translations():
    assert TorchEngine(a_model(), INFO).translate([], **GREEDY) == []


def saved_with(table):
    return checkpoint.Checkpoint({}, INFO.sizes, INFO.src_words, INFO.trg_words, shortlist=table)


def test_a_shortlist_is_what_the_checkpoint_has():
    table = torch.arange(12, dtype=torch.int32).view(3, 4)
    for size in (None, 0):
        assert shortlist_of(saved_with(table), size, "file") is None
        assert shortlist_of(saved_with(None), size, "file") is None
    assert shortlist_of(saved_with(table), 3, "file").tolist() == [[0, 1, 2], [4, 5, 6], [8, 9, 10]]
    refused("usage", shortlist_of, saved_with(table), 5, "file", says=["4 probable translations", "--shortlist 5"])
    refused("checkpoint", shortlist_of, saved_with(None), 5, "the/file", says=["holds no shortlist", "the/file"])


@pytest.mark.parametrize("gains", [False, True])
def test_auto_is_bfloat16_where_the_processor_gains(gains, monkeypatch):
    monkeypatch.setattr(devices, "cpu_gains_from_bfloat16", lambda: gains)
    assert choose_dtype("auto") == (torch.bfloat16 if gains else torch.float32)
    assert (choose_dtype("float32"), choose_dtype("bfloat16")) == (torch.float32, torch.bfloat16)


def test_greedy_scores_are_of_all_tokens():
    """Fifty steps: each sentence is cut, none has ended."""
    model = a_model()
    with torch.no_grad():
        model.decoder.fc_out.bias[data.EOS] = -100.0
    options = {"beam_size": 1, "length_penalty": 0.0, "max_length": 50}
    ((best,),) = TorchEngine(model, INFO).translate([[data.SOS, 5, data.EOS]], **options)
    assert len(best.ids) == 50
    log_p, _ = log_probability(model, [data.SOS, 5, data.EOS], best.ids, 50)
    assert best.score == pytest.approx(log_p, abs=1e-4) and math.isfinite(log_p)


def test_without_scores_greedy_translations_are_the_same_and_have_none():
    found = TorchEngine(a_model(), INFO, scores=False).translate(sentences(), **GREEDY)
    expected = TorchEngine(a_model(), INFO).translate(sentences(), **GREEDY)
    assert [best.ids for (best,) in found] == [best.ids for (best,) in expected]
    assert all(math.isnan(best.score) for (best,) in found)
    beam = TorchEngine(a_model(), INFO, scores=False).translate(sentences(), **BEAM)
    assert all(math.isfinite(best.score) for hypotheses in beam for best in hypotheses)
