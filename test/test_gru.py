"""gru.py against the plain model: every step on its own, written from the contract's formulas and nothing else."""

import random

import pytest
import torch
from torch import nn

import gru

SRC_VOCAB, TRG_VOCAB, EMB, HID = 13, 11, 5, 7
PAD, SOS, EOS = 1, 2, 3
SRC_LEN, TRG_LEN, BATCH = 6, 8, 4


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    random.seed(0)


@pytest.fixture
def model():
    model = gru.build(SRC_VOCAB, TRG_VOCAB, emb_dim=EMB, hid_dim=HID).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


@pytest.fixture
def pairs():
    """A padded batch: src [src len, batch], its lengths, trg [trg len, batch], the flat real positions of trg[1:]."""
    src = torch.randint(4, SRC_VOCAB, (SRC_LEN, BATCH))
    trg = torch.randint(4, TRG_VOCAB, (TRG_LEN, BATCH))
    src_len = torch.tensor([6, 3, 5, 4])
    trg_len = torch.tensor([8, 8, 4, 5])
    for ids, lengths in ((src, src_len), (trg, trg_len)):
        ids[0] = SOS
        for column, length in enumerate(lengths.tolist()):
            ids[length - 1, column] = EOS
            ids[length:, column] = PAD
    return src, src_len, trg, (trg[1:].flatten() != PAD).nonzero().squeeze(1)


def plain_cell(rnn, x, h):
    """One GRU step; PyTorch stacks the gates r, z, n."""
    w_ir, w_iz, w_in = rnn.weight_ih_l0.chunk(3)
    w_hr, w_hz, w_hn = rnn.weight_hh_l0.chunk(3)
    b_ir, b_iz, b_in = rnn.bias_ih_l0.chunk(3)
    b_hr, b_hz, b_hn = rnn.bias_hh_l0.chunk(3)
    r = torch.sigmoid(x @ w_ir.T + b_ir + h @ w_hr.T + b_hr)
    z = torch.sigmoid(x @ w_iz.T + b_iz + h @ w_hz.T + b_hz)
    n = torch.tanh(x @ w_in.T + b_in + r * (h @ w_hn.T + b_hn))
    return (1 - z) * n + z * h


def plain_context(model, src, src_len):
    """The encoder's last state, each sentence on its own."""
    columns = []
    for column in range(src.shape[1]):
        h = torch.zeros(1, HID, dtype=torch.float64)
        for t in range(len(src) if src_len is None else int(src_len[column])):
            h = plain_cell(model.encoder.rnn, model.encoder.embedding.weight[src[t, column]].unsqueeze(0), h)
        columns.append(h)
    return torch.cat(columns)


def plain_logits(model, src, trg, ratio, src_len=None):
    """[trg len, batch, vocabulary], with the draws in the contract's order."""
    context = plain_context(model, src, src_len)
    h, y = context, trg[0]
    logits = [torch.zeros(trg.shape[1], TRG_VOCAB, dtype=torch.float64)]
    for t in range(1, len(trg)):
        e = model.decoder.embedding.weight[y]
        h = plain_cell(model.decoder.rnn, torch.cat((e, context), 1), h)
        logits.append(torch.cat((e, h, context), 1) @ model.decoder.fc_out.weight.T + model.decoder.fc_out.bias)
        forced = random.random() < ratio
        y = trg[t] if forced else logits[t].argmax(1)
    return torch.stack(logits)


def plain_loss_sum(logits, trg, smoothing=0.0):
    """Cross entropy with label smoothing over real positions, position by position."""
    total = logits.new_zeros(())
    for t in range(1, len(trg)):
        for column in range(trg.shape[1]):
            if trg[t, column] != PAD:
                log_p = logits[t, column].log_softmax(0)
                total = total - (1 - smoothing) * log_p[trg[t, column]] - smoothing * log_p.mean()
    return total


def gradients(loss, model):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("with_lengths", [False, True])
@pytest.mark.parametrize("ratio", [1.0, 0.0, 0.5])
def test_logits_equal_the_plain_model(model, pairs, ratio, with_lengths):
    src, src_len, trg, _ = pairs
    src_len = src_len if with_lengths else None
    random.seed(7)
    expected = plain_logits(model, src, trg, ratio, src_len)
    after = random.random()
    random.seed(7)
    actual = model(src, trg, ratio, src_len)
    assert actual.shape == (TRG_LEN, BATCH, TRG_VOCAB)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)
    assert random.random() == after, "as many draws, the last one unused among them"


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("with_lengths", [False, True])
@pytest.mark.parametrize("ratio", [1.0, 0.0, 0.5])
def test_loss_and_every_gradient_equal_the_plain_model(model, pairs, ratio, with_lengths, smoothing):
    src, src_len, trg, positions = pairs
    src_len = src_len if with_lengths else None
    random.seed(3)
    expected = plain_loss_sum(plain_logits(model, src, trg, ratio, src_len), trg, smoothing)
    expected_gradients = gradients(expected, model)
    random.seed(3)
    actual = gru.TrainingLoss(model, smoothing)(src, trg, src_len, positions, ratio)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)
    for name, gradient in gradients(actual, model).items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=0, atol=1e-10, msg=name)


def test_without_positions_the_loss_and_every_gradient_are_zero(model, pairs):
    """A rank without pairs takes part with weight 0."""
    src, src_len, trg, positions = pairs
    loss = gru.TrainingLoss(model, 0.1)(src, trg, src_len, positions[:0], 1.0)
    assert loss == 0
    assert all((gradient == 0).all() for gradient in gradients(loss, model).values())


def test_decoder_forward_is_one_step_of_the_model(model, pairs):
    src, src_len, trg, _ = pairs
    context = plain_context(model, src, src_len).unsqueeze(0)
    logits, hidden = model.decoder(trg[0], context, context)
    assert hidden.shape == (1, BATCH, HID)
    torch.testing.assert_close(logits, plain_logits(model, src, trg, 1.0, src_len)[1], rtol=0, atol=1e-10)


def plain_greedy(model, src, length, max_len):
    """One sentence at a time, one step at a time."""
    context = plain_context(model, src[:length], None)
    h, y, tokens = context, torch.tensor([SOS]), []
    for _ in range(max_len):
        e = model.decoder.embedding.weight[y]
        h = plain_cell(model.decoder.rnn, torch.cat((e, context), 1), h)
        y = (torch.cat((e, h, context), 1) @ model.decoder.fc_out.weight.T + model.decoder.fc_out.bias).argmax(1)
        if y == EOS:
            break
        tokens.append(int(y))
    return tokens


@pytest.mark.parametrize("seed", range(8))
def test_greedy_equals_one_sentence_at_a_time_whatever_the_batch(model, pairs, seed):
    src, src_len, _, _ = pairs
    torch.manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    with torch.no_grad():
        model.decoder.fc_out.bias[EOS] += 2.0  # so that sentences end early, and at different steps
        expected = [plain_greedy(model, src[:, [i]], int(src_len[i]), 9) for i in range(BATCH)]
    translations = model.greedy(src, src_len, SOS, EOS, max_len=9)
    assert translations.shape == (9, BATCH)
    for column, tokens in enumerate(expected):
        assert translations[:, column].tolist() == tokens + [EOS] * (9 - len(tokens))


def test_greedy_stops_after_max_len_tokens(model, pairs):
    src, src_len, _, _ = pairs
    with torch.no_grad():
        model.decoder.fc_out.bias[EOS] -= 100
    translations = model.greedy(src, src_len, SOS, EOS, max_len=5)
    assert translations.shape == (5, BATCH)
    assert not (translations == EOS).any()


def test_dropout_leaves_the_context_whole_in_front_of_the_output_layer(pairs):
    src, src_len, trg, _ = pairs
    model = gru.build(SRC_VOCAB, TRG_VOCAB, emb_dim=EMB, hid_dim=HID, output_dropout=0.9)
    seen = []
    model.decoder.fc_out.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model.train()
    model(src, trg, 1.0, src_len)
    dropped, context = seen[0][..., : EMB + HID], seen[0][..., EMB + HID :]
    assert (dropped == 0).double().mean() > 0.5
    assert (context != 0).all()


def test_the_state_dict_has_the_published_names():
    rnn = ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"]
    names = [f"{side}.{part}" for side in ("encoder", "decoder") for part in ["embedding.weight"]]
    names += [f"{side}.rnn.{part}" for side in ("encoder", "decoder") for part in rnn]
    names += ["decoder.fc_out.weight", "decoder.fc_out.bias"]
    assert sorted(gru.build(5, 5, emb_dim=2, hid_dim=3).state_dict()) == sorted(names)


def test_the_published_sizes_have_14_219_781_parameters():
    model = gru.build(7853, 5893)
    assert sum(parameter.numel() for parameter in model.parameters()) == 14_219_781


def test_the_modelzoo_start_draws_everything_from_a_narrow_normal():
    model = gru.build(300, 300, emb_dim=32, hid_dim=64)
    gru.init_modelzoo(model)
    for name, parameter in model.named_parameters():
        assert 0.008 < parameter.std() < 0.012, name
        assert abs(parameter.mean()) < 0.003, name


def test_the_tuned_start_is_what_the_recipe_says():
    emb_dim, hid_dim, vocab = 32, 64, 300
    model = gru.build(vocab, vocab, emb_dim=emb_dim, hid_dim=hid_dim)
    gru.init_tuned(model)
    assert all((p == 0).all() for name, p in model.named_parameters() if "bias" in name)
    for side in (model.encoder, model.decoder):
        assert 0.09 < side.embedding.weight.std() < 0.11
        for gate in side.rnn.weight_hh_l0.chunk(3):
            torch.testing.assert_close(gate @ gate.T, torch.eye(hid_dim), rtol=0, atol=1e-5)
    assert 0.045 < model.encoder.rnn.weight_ih_l0.std() < 0.055
    for weight, own in ((model.decoder.rnn.weight_ih_l0, emb_dim), (model.decoder.fc_out.weight, emb_dim + hid_dim)):
        for block in (weight[:, :own], weight[:, own:]):
            bound = (6 / sum(block.shape)) ** 0.5  # Xavier uniform of the block as a matrix of its own
            assert 0.95 * bound < block.abs().max() <= bound


def test_hidden_sizes_that_differ_are_refused():
    with pytest.raises(ValueError, match="hidden size"):
        gru.Seq2Seq(gru.Encoder(5, 2, 3, 0.0), gru.Decoder(5, 2, 4, 0.0), torch.device("cpu"))
