"""Greedy decoding and beam search against plain ones: one sentence, one hypothesis, one step at a time."""

import itertools
import math

import data
import gru
from nmt import kernels, search

import plain_model
import pytest
import torch
from torch import nn

VOCAB, BATCH, MAX_LEN = 7, 6, 9


@pytest.fixture(params=range(3))
def model(request):
    torch.manual_seed(request.param)
    model = gru.build(VOCAB, VOCAB, emb_dim=5, hid_dim=6).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.8)
    return model


@pytest.fixture
def sources():
    """[src len, batch] and [batch]."""
    generator = torch.Generator().manual_seed(0)
    sentences = [torch.randint(4, VOCAB, (size,), generator=generator).tolist() for size in (5, 1, 3, 3, 2, 4)]
    side = data.Side.encode([[str(token) for token in sentence] for sentence in sentences], numbers())
    return data.pad(side, torch.arange(BATCH))


def numbers():
    return data.Vocabulary(data.SPECIALS + [str(token) for token in range(4, VOCAB)])


def found_by(model, sources, beam_size, **options):
    options = {"max_len": MAX_LEN} | options
    return search.beam_search(model, *sources, data.SOS, data.EOS, beam_size=beam_size, **options)


def alone(sources, column):
    """One sentence without its batch-mates' padding."""
    src, src_len = sources
    return src[: src_len[column], [column]], src_len[[column]]


def log_probability(model, source, tokens):
    """log P(tokens | source), by reading them as the reference."""
    trg = torch.tensor([data.SOS, *tokens]).unsqueeze(1)
    log_p = model(source[0], trg, 1.0, source[1]).log_softmax(2)
    return sum(log_p[t, 0, trg[t, 0]].item() for t in range(1, len(trg)))


def tokens_of(ids):
    """A hypothesis as long as its probability counts: to its `<eos>`, if it has one."""
    ids = ids.tolist()
    return ids[: ids.index(data.EOS) + 1] if data.EOS in ids else ids


def plain_beam(model, source, beam_size, length_penalty):
    """[(score, tokens)] of all hypotheses of a sentence, the best first."""
    context = model.encoder(*source)
    live, done = [(0.0, [], context)], []
    for step in range(MAX_LEN):
        candidates = []
        for log_p, tokens, hidden in live:
            prev_token = torch.tensor([tokens[-1] if tokens else data.SOS])
            logits, after = model.decoder(prev_token, hidden, context)
            for token, step_log_p in enumerate(logits[0].log_softmax(0).tolist()):
                candidates.append((log_p + step_log_p, [*tokens, token], after))
        candidates.sort(key=lambda candidate: -candidate[0])
        live = []
        for log_p, tokens, hidden in candidates[: beam_size - len(done)]:
            if tokens[-1] == data.EOS or step == MAX_LEN - 1:
                done.append((log_p / len(tokens) ** length_penalty, tokens))
            else:
                live.append((log_p, tokens, hidden))
    return sorted(done, key=lambda hypothesis: -hypothesis[0])


@pytest.mark.parametrize("seed", range(8))
def test_greedy_equals_one_sentence_at_a_time_whatever_the_batch(seed):
    torch.manual_seed(seed)
    model = plain_model.small_model()
    src, src_len, _, _ = plain_model.small_pairs()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    with torch.no_grad():
        model.decoder.fc_out.bias[data.EOS] += 2.0  # so that sentences end early, and at different steps
        expected = [plain_model.plain_greedy(model, src[:, [i]], int(src_len[i]), 9) for i in range(len(src_len))]
    translations = search.greedy(model, src, src_len, data.SOS, data.EOS, max_len=9)
    assert translations.shape == (9, len(src_len))
    for column, tokens in enumerate(expected):
        assert translations[:, column].tolist() == tokens + [data.EOS] * (9 - len(tokens))


def test_greedy_stops_after_max_len_tokens():
    torch.manual_seed(0)
    model = plain_model.small_model()
    src, src_len, _, _ = plain_model.small_pairs()
    with torch.no_grad():
        model.decoder.fc_out.bias[data.EOS] -= 100
    translations = search.greedy(model, src, src_len, data.SOS, data.EOS, max_len=5)
    assert translations.shape == (5, len(src_len))
    assert not (translations == data.EOS).any()


def test_a_beam_of_one_is_greedy(model, sources):
    ids, scores = found_by(model, sources, 1)
    assert torch.equal(ids[:, :, 0], search.greedy(model, *sources, data.SOS, data.EOS, MAX_LEN))
    assert scores.shape == (BATCH, 1)


@pytest.mark.parametrize("gap", [1e-6, 5e-7, 2e-7])
def test_a_beam_of_one_is_greedy_where_two_words_all_but_tie(sources, gap):
    """In a sum over fifty steps such a gap is lost."""
    model = gru.build(VOCAB, VOCAB + 1, emb_dim=5, hid_dim=6).eval()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    with torch.no_grad():
        model.decoder.fc_out.bias.copy_(torch.tensor([-9.0, -9.0, -9.0, -9.0, 0.0, gap, -9.0, -9.0]))
    greedy = search.greedy(model, *sources, data.SOS, data.EOS, 50)
    assert (greedy == 5).all()
    assert torch.equal(found_by(model, sources, 1, max_len=50).ids[:, :, 0], greedy)


@pytest.mark.parametrize("on_accelerator", [False, True])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
@pytest.mark.parametrize("beam_size", [2, 3, 5])
def test_all_hypotheses_equal_the_plain_search(model, sources, beam_size, length_penalty, on_accelerator, monkeypatch):
    expected = [plain_beam(model, alone(sources, column), beam_size, length_penalty) for column in range(BATCH)]
    if on_accelerator:
        monkeypatch.setattr(kernels, "computes_steps", lambda device: False)
    ids, scores = found_by(model, sources, beam_size, length_penalty=length_penalty, n_best=beam_size)
    assert ids.shape == (MAX_LEN, BATCH, beam_size)
    for column, hypotheses in enumerate(expected):
        assert [tokens_of(ids[:, column, rank]) for rank in range(beam_size)] == [tokens for _, tokens in hypotheses]
        assert scores[column].tolist() == pytest.approx([score for score, _ in hypotheses], abs=1e-5)


@pytest.mark.parametrize("beam_size", [1, 2, 3])
def test_the_search_without_a_sort_equals_the_plain_search(model, sources, beam_size, monkeypatch):
    """Three groups of two words, and one word left over."""
    monkeypatch.setattr(search, "GROUP", 2)
    monkeypatch.setattr(search, "FEWEST_GROUPS", 3)
    monkeypatch.setattr(search, "BLOCK", 3 * VOCAB)  # the last block of rows is smaller, or not
    monkeypatch.setattr(torch.Tensor, "logsumexp", None)
    expected = [plain_beam(model, alone(sources, column), beam_size, 1.0) for column in range(BATCH)]
    ids, scores = found_by(model, sources, beam_size, n_best=beam_size)
    for column, hypotheses in enumerate(expected):
        assert [tokens_of(ids[:, column, rank]) for rank in range(beam_size)] == [tokens for _, tokens in hypotheses]
        assert scores[column].tolist() == pytest.approx([score for score, _ in hypotheses], abs=1e-5)


@pytest.mark.parametrize("words", [512, 515, 527, 600])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("count", [1, 3, 10, 32])
def test_the_largest_are_those_of_a_sort_of_all(words, rows, count):
    torch.manual_seed(words)
    logits = torch.randn(4 * rows, words)
    logits[0, -3:] += 9  # of those that are left over, if any are
    logits[1, ::32] += 9  # all of them in one group, or in a few
    offsets = torch.randn(4, rows)
    offsets[2, -1] = -math.inf if rows > 1 else 0.0
    maxima, sums = search.survey(logits)
    assert maxima is not None
    torch.testing.assert_close(sums, logits.logsumexp(1))
    for shift in (offsets, None):
        candidates = logits.view(4, rows, words) + (0 if shift is None else shift.unsqueeze(2))
        expected = candidates.flatten(1).topk(count)
        best, places = search.top(logits.view(4, rows, words), maxima, shift, count)
        assert torch.equal(best, expected.values)
        assert torch.equal(places, expected.indices)


def test_log_sum_exp_holds_for_logits_that_are_far_from_zero():
    logits = torch.randn(5, 520) + torch.tensor([[-1e4], [0.0], [1e4], [-70.0], [80.0]])
    logits[1, -1] = 300.0  # it is left over
    _, sums = search.survey(logits)
    torch.testing.assert_close(sums, logits.logsumexp(1))
    for row in range(5):
        torch.testing.assert_close(search.survey(logits[[row]])[1], logits[[row]].logsumexp(1))
    assert search.survey(logits, with_sums=False)[1] is None


@pytest.mark.parametrize("beam_size", [1, 3])
def test_a_search_among_some_words_is_that_of_a_model_of_these_words(model, sources, beam_size):
    """In the other model the words that are left out are as good as impossible."""
    everywhere = found_by(model, sources, beam_size, n_best=beam_size)
    said = everywhere.ids[:, :, 0].flatten()
    left_out = [int(said[said != data.EOS].mode().values), 0]
    words = torch.tensor([word for word in range(VOCAB) if word not in left_out])
    ids, scores = found_by(model, sources, beam_size, words=words, n_best=beam_size)
    assert not torch.equal(ids, everywhere.ids), "otherwise the words make no difference"
    if beam_size == 1:
        assert torch.equal(
            ids[:, :, 0], search.greedy(model, *sources, data.SOS, data.EOS, max_len=MAX_LEN, words=words)
        )
    with torch.no_grad():
        model.decoder.fc_out.bias[left_out] = -1e9
    expected = found_by(model, sources, beam_size, n_best=beam_size)
    assert torch.equal(ids, expected.ids)
    torch.testing.assert_close(scores, expected.scores, rtol=0, atol=1e-5)


def test_a_search_among_all_words_is_the_search(model, sources):
    ids, scores = found_by(model, sources, 3, words=torch.arange(VOCAB), n_best=3)
    expected = found_by(model, sources, 3, n_best=3)
    assert torch.equal(ids, expected.ids)
    torch.testing.assert_close(scores, expected.scores, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("batch", "kept"), [(3, [2, 1]), (64, [60, 57, 54, 51])])
def test_on_a_cpu_a_sixteenth_of_the_batch_is_dropped_at_a_time(batch, kept):
    ended, found = torch.zeros(batch, dtype=torch.bool), []
    for _ in range(batch - 1):
        ended[(~ended).nonzero()[0]] = True
        rows = search.rows_to_keep(ended)
        if len(rows) < len(ended):
            assert not ended[rows].any()
            ended = ended[rows]
            found.append(len(rows))
    assert found[: len(kept)] == kept and found[-1] == 1
    assert len(search.rows_to_keep(torch.ones(batch, dtype=torch.bool))) == 0


@pytest.mark.parametrize("length_penalty", [0.0, 0.7, 1.0])
def test_the_score_is_that_of_reading_the_hypothesis_as_the_reference(model, sources, length_penalty):
    ids, scores = found_by(model, sources, 4, length_penalty=length_penalty, n_best=2)
    for column, rank in itertools.product(range(BATCH), range(2)):
        tokens = tokens_of(ids[:, column, rank])
        expected = log_probability(model, alone(sources, column), tokens) / len(tokens) ** length_penalty
        assert scores[column, rank].item() == pytest.approx(expected, abs=1e-5)


def test_at_full_size_in_float32_score_and_batch_mates_hold_too():
    torch.manual_seed(0)
    model = gru.build(300, 5893).eval()
    src, src_len = torch.randint(4, 300, (12, BATCH)), torch.tensor([12, 3, 7, 7, 9, 5])
    src[torch.arange(12).unsqueeze(1) >= src_len] = data.PAD
    ids, scores = found_by(model, (src, src_len), 5, max_len=50, length_penalty=1.2, n_best=2)
    greedy = search.greedy(model, src, src_len, data.SOS, data.EOS, 50)
    for column in range(BATCH):
        own = alone((src, src_len), column)
        assert torch.equal(search.greedy(model, *own, data.SOS, data.EOS, 50)[:, 0], greedy[:, column])
        own_ids, own_scores = found_by(model, own, 5, max_len=50, length_penalty=1.2, n_best=2)
        assert torch.equal(own_ids[:, 0], ids[:, column])
        assert own_scores[0].tolist() == pytest.approx(scores[column].tolist(), abs=1e-5)
        for rank in range(2):
            tokens = tokens_of(ids[:, column, rank])
            with torch.no_grad():
                expected = log_probability(model, own, tokens) / len(tokens) ** 1.2
            assert scores[column, rank].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("beam_size", [1, 4])
def test_a_translation_does_not_depend_on_its_batch_mates(model, sources, beam_size):
    ids, scores = found_by(model, sources, beam_size)
    for column in range(BATCH):
        own_ids, own_scores = found_by(model, alone(sources, column), beam_size)
        assert torch.equal(own_ids[:, 0], ids[:, column])
        assert own_scores[0].item() == pytest.approx(scores[column].item(), abs=1e-6)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    shuffled = found_by(model, (sources[0][:, order], sources[1][order]), beam_size)
    assert torch.equal(shuffled.ids, ids[:, order])


def test_a_beam_as_wide_as_the_vocabulary_finds_the_most_probable_translation_of_two_tokens(model, sources):
    """Greedy does not: its first token may be one that nothing probable follows."""
    ids, scores = found_by(model, sources, VOCAB, max_len=2, length_penalty=0.0)
    pairs = [[data.EOS]] + [[a, b] for a in range(VOCAB) if a != data.EOS for b in range(VOCAB)]
    for column in range(BATCH):
        best = max(pairs, key=lambda tokens: log_probability(model, alone(sources, column), tokens))
        assert tokens_of(ids[:, column, 0]) == best


def test_a_high_length_penalty_gives_no_shorter_translations(model, sources):
    lengths = [
        sum(len(tokens_of(ids)) for ids in found_by(model, sources, 4, length_penalty=penalty).ids[:, :, 0].T)
        for penalty in (0.0, 1.0, 2.0)
    ]
    assert lengths == sorted(lengths)


def test_the_n_best_are_distinct_and_in_order(model, sources):
    ids, scores = found_by(model, sources, 5, n_best=5)
    for column in range(BATCH):
        assert len({tuple(ids[:, column, rank].tolist()) for rank in range(5)}) == 5
        assert all(math.isfinite(score) for score in scores[column].tolist())
        assert scores[column].tolist() == sorted(scores[column].tolist(), reverse=True)


@pytest.mark.parametrize(("beam_size", "n_best"), [(0, 1), (VOCAB + 1, 1), (2, 3), (2, 0)])
def test_a_beam_that_cannot_be_is_refused(model, sources, beam_size, n_best):
    with pytest.raises(ValueError, match="beam_size"):
        found_by(model, sources, beam_size, n_best=n_best)


class Parrot:
    """A hand-made model that says each sentence again, word by word. It has the three calls of decoding and no more."""

    class Memory:
        def __init__(self, sentences):
            self._sentences = sentences  # [sentences, src len]

        def select(self, rows):
            return Parrot.Memory(self._sentences[rows])

    def start(self, src, src_len):
        return self.Memory(src.T), torch.zeros(src.shape[1], 1)

    def step(self, prev_token, hidden, memory):
        """The hidden state counts the words. The next word is twice as probable as all others together."""
        sentences = memory._sentences.repeat_interleave(len(hidden) // len(memory._sentences), 0)
        place = hidden.long().clamp(max=sentences.shape[1] - 1)
        logits = torch.zeros(len(hidden), VOCAB).scatter_(1, sentences.gather(1, place), math.log(2 * (VOCAB - 1)))
        return logits, hidden + 1


E = data.EOS
PARROT_SRC = torch.tensor([[4, 5, 6], [6, E, 5], [5, E, 4], [E, E, 6], [E, E, E]])  # [src len, batch]


@pytest.mark.parametrize("on_accelerator", [False, True])
def test_a_model_needs_start_step_and_select_alone(on_accelerator, monkeypatch):
    if on_accelerator:
        monkeypatch.setattr(kernels, "computes_steps", lambda device: False)
    kept, select = [], Parrot.Memory.select
    monkeypatch.setattr(Parrot.Memory, "select", lambda self, rows: kept.append(len(rows)) or select(self, rows))
    expected = [[4, 6, 5, E], [5, E], [6, 5, 4, 6, E]]
    arguments = (Parrot(), PARROT_SRC, torch.tensor([4, 2, 5]), data.SOS, E)
    greedy = search.greedy(*arguments, max_len=9)
    ids, scores = search.beam_search(*arguments, beam_size=3, max_len=9, length_penalty=0.0)
    assert kept == ([1, 1] if on_accelerator else [2, 1, 2, 1])
    for column, tokens in enumerate(expected):
        assert tokens_of(greedy[:, column]) == tokens_of(ids[:, column, 0]) == tokens
        assert scores[column, 0].item() == pytest.approx(len(tokens) * math.log(2 / 3), abs=1e-5)


def test_step_broadcasts_the_memory_of_a_sentence_over_its_hypotheses(model, sources):
    memory, hidden = model.start(*sources)
    tokens = torch.arange(2 * BATCH) % VOCAB
    several = hidden.repeat_interleave(2, 0) * torch.linspace(0.5, 1, 2 * BATCH).unsqueeze(1)
    logits, after = model.step(tokens, several, memory)
    for row in range(2 * BATCH):
        one = model.step(tokens[[row]], several[[row]], memory.select(torch.tensor([row // 2])))
        torch.testing.assert_close((logits[[row]], after[[row]]), one, rtol=0, atol=1e-12)
        context = hidden[[row // 2]].unsqueeze(0)
        whole = model.decoder(tokens[[row]], several[[row]].unsqueeze(0), context)
        torch.testing.assert_close((logits[[row]], after[[row]].unsqueeze(0)), whole, rtol=0, atol=1e-12)
