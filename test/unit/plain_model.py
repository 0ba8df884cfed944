"""The plain model: every step on its own, from the contract's formulas and nothing else. And small data for it.

These are the formulas step by step, which `gru.py` must equal. `bench/plain.py` instead has the original's arithmetic,
with which speed is compared.
"""

import random

import data
import gru

import torch
from torch import nn

SRC_VOCAB, TRG_VOCAB, EMB, HID = 13, 11, 5, 7
PAD, SOS, EOS = 1, 2, 3
SRC_LEN, TRG_LEN, BATCH = 6, 8, 4
LOGITS_ROW = 64 * 8  # bytes of a row of logits in float64, its width rounded up to 64


def small_model():
    """A model of these sizes in float64, with weights large enough to matter."""
    model = gru.build(SRC_VOCAB, TRG_VOCAB, emb_dim=EMB, hid_dim=HID).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


def small_pairs():
    """A padded batch: src [src len, batch], its lengths, trg [trg len, batch]. And the same as a `Batch`."""
    src = torch.randint(4, SRC_VOCAB, (SRC_LEN, BATCH))
    trg = torch.randint(4, TRG_VOCAB, (TRG_LEN, BATCH))
    src_len = torch.tensor([6, 3, 5, 4])
    trg_len = torch.tensor([8, 8, 4, 5])
    for ids, lengths in ((src, src_len), (trg, trg_len)):
        ids[0] = SOS
        for column, length in enumerate(lengths.tolist()):
            ids[length - 1, column] = EOS
            ids[length:, column] = PAD
    return src, src_len, trg, make_batch(src, src_len, trg)


def make_batch(src, src_len, trg):
    """The batch without padding, sentence by sentence and token by token."""
    columns = range(src.shape[1])
    trg_len = [int((trg[:, column] != PAD).sum()) for column in columns]
    by_trg = sorted(columns, key=lambda column: -trg_len[column])
    by_src = sorted(columns, key=lambda column: -src_len[column])
    src_rows = [(t, column) for t in range(len(src)) for column in by_src if t < src_len[column]]
    trg_rows = [(t, column) for t in range(len(trg)) for column in by_trg if t + 1 < trg_len[column]]
    counts = [[sum(t == step for t, _ in rows) for step in range(rows[-1][0] + 1)] for rows in (src_rows, trg_rows)]
    return data.Batch(
        src=torch.stack([src[row] for row in src_rows]),
        src_rows_per_step=counts[0],
        src_last=torch.tensor([src_rows.index((int(src_len[column]) - 1, column)) for column in by_trg]),
        trg=torch.stack([trg[row] for row in trg_rows]),
        targets=torch.stack([trg[t + 1, column] for t, column in trg_rows]),
        trg_rows_per_step=counts[1],
        target_tokens=len(trg_rows),
    )


def padded_batch(src, src_len, trg):
    """The batch as accelerators have it: padding is read, and as a target ignored."""
    steps, size = len(trg) - 1, src.shape[1]
    return data.Batch(
        src=src.flatten(),
        src_rows_per_step=[size] * len(src),
        src_last=(len(src) - 1 if src_len is None else src_len - 1) * size + torch.arange(size),
        trg=trg[:-1].flatten(),
        targets=trg[1:].flatten(),
        trg_rows_per_step=[size] * steps,
        target_tokens=int((trg[1:] != PAD).sum()),
    )


def plain_cell(rnn, x, h):
    """One GRU step. PyTorch stacks the gates r, z, n."""
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


def gradients(loss, model):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
