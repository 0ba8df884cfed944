"""gru.py against the plain model: every step on its own, written from the contract's formulas and nothing else."""

import copy
import doctest
import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F

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
    """A padded batch: src [src len, batch], its lengths, trg [trg len, batch], and the flat real positions of trg[1:]."""
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
