"""gru.py against the plain model: every step on its own, written from the contract's formulas and nothing else."""

import copy
import random

import data
import gru

import pytest
import torch
from torch import nn

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
    """A padded batch: src [src len, batch], its lengths, trg [trg len, batch]; and the same as a `Batch`."""
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


LOGITS_ROW = 64 * 8  # bytes of a row of logits in float64, its width rounded up to 64


@pytest.fixture(params=["one block", "small blocks"])
def blocks(request, monkeypatch):
    """The logits' blocks: larger than the batch, and of one step or two."""
    if request.param == "small blocks":
        monkeypatch.setattr(gru.OutputLoss, "BLOCK", 10 * LOGITS_ROW)
        monkeypatch.setattr(gru.OutputLoss, "SOFTMAX_ROWS", 8)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("form", ["without padding", "padded", "padded, the encoder reads the padding"])
@pytest.mark.parametrize("ratio", [1.0, 0.0, 0.5])
def test_loss_and_every_gradient_equal_the_plain_model(model, pairs, ratio, form, smoothing, blocks):
    src, src_len, trg, batch = pairs
    if form != "without padding":
        src_len = src_len if form == "padded" else None
        batch = padded_batch(src, src_len, trg)
    random.seed(3)
    expected = plain_loss_sum(plain_logits(model, src, trg, ratio, src_len), trg, smoothing)
    expected_gradients = gradients(expected, model)
    random.seed(3)
    actual = gru.TrainingLoss(model, smoothing)(batch, ratio)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)
    for name, gradient in gradients(actual, model).items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=0, atol=1e-10, msg=name)


def test_no_more_logits_than_a_block_or_a_step_has_are_there_at_a_time(model, pairs, monkeypatch):
    *_, batch = pairs
    bound, sizes, mm = 10 * LOGITS_ROW, [], torch.mm
    assert max(batch.trg_rows_per_step) * LOGITS_ROW <= bound < len(batch.targets) * LOGITS_ROW
    monkeypatch.setattr(gru.OutputLoss, "BLOCK", bound)
    monkeypatch.setattr(
        torch, "mm", lambda *args, out: sizes.append(out.untyped_storage().nbytes()) or mm(*args, out=out)
    )
    with torch.no_grad():
        gru.TrainingLoss(model)(batch, 1.0)
    assert max(sizes) <= bound
    assert len(sizes) > 1


def test_without_gradients_the_loss_is_the_same_and_their_products_are_left_out(model, pairs, monkeypatch):
    *_, batch = pairs
    criterion = gru.TrainingLoss(model, 0.1)
    products, mm = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda *args, **kwargs: products.append(args) or mm(*args, **kwargs))
    with torch.no_grad():
        loss = criterion(batch, 1.0)
    assert len(products) == 1
    assert loss == criterion(batch, 1.0)
    assert len(products) > 2
    assert not loss.requires_grad


def test_the_gradients_are_those_of_what_becomes_of_the_loss(model, pairs):
    *_, batch = pairs
    once = gradients(gru.TrainingLoss(model)(batch, 1.0), model)
    for name, gradient in gradients(gru.TrainingLoss(model)(batch, 1.0) * 3, model).items():
        torch.testing.assert_close(gradient, once[name] * 3)


def test_the_loss_of_half_precision_logits_is_summed_in_float32():
    features, context, weight = (torch.randn(*shape).bfloat16() for shape in ((12, 8), (4, 8), (5000, 16)))
    targets = torch.arange(12)
    logits = (features @ weight[:, :8].T).float().view(3, 4, -1) + (context @ weight[:, 8:].T).float()
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), targets, reduction="sum")
    bias = torch.zeros(5000).bfloat16()
    actual = gru.OutputLoss.apply(features, context, weight, bias, targets, [4] * 3, 0.0, PAD, False)
    assert actual.dtype == torch.float32
    # Target 1 is padding.
    expected -= nn.functional.cross_entropy(logits[0, 1], targets[1])
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)


def test_gradients_of_very_many_rows_do_not_overflow_in_float16():
    """Of one token in all of them, of which float16 cannot add up more than 65504."""
    rows, vocabulary = 80_000, 8
    features, context = torch.ones(rows, 4), torch.zeros(rows, 4)
    weight, bias, targets = torch.zeros(vocabulary, 8), torch.zeros(vocabulary), torch.full((rows,), 5)
    tensors = [tensor.half().requires_grad_() for tensor in (features, context, weight, bias)]
    loss = gru.OutputLoss.apply(*tensors, targets, [rows], 0.0, PAD, True)
    gradients = torch.autograd.grad(loss * (32 / rows), tensors)
    assert all(gradient.isfinite().all() for gradient in gradients)
    expected = torch.full((vocabulary,), 32 / vocabulary)
    expected[5] -= 32
    torch.testing.assert_close(gradients[3].float(), expected, rtol=1e-2, atol=0)
    torch.testing.assert_close(gradients[2][:, 0].float(), expected, rtol=1e-2, atol=0)


def test_no_value_on_the_device_decides_a_shape(pairs, monkeypatch):
    """Where it did, the host would wait for the device: on the meta device, which has no values, it is an error."""
    src, src_len, trg, _ = pairs
    monkeypatch.setattr(gru, "as_autocast", lambda *tensors: tensors)  # it does not know that device
    batch = padded_batch(src, src_len, trg)
    batch = batch._replace(**{name: getattr(batch, name).to("meta") for name in ("src", "src_last", "trg", "targets")})
    model = gru.build(SRC_VOCAB, TRG_VOCAB, emb_dim=EMB, hid_dim=HID, dropout=0.5, output_dropout=0.3, device="meta")
    for ratio in (1.0, 0.5):
        gru.TrainingLoss(model, 0.1)(batch, ratio).backward()
    assert model.decoder.fc_out.weight.grad.device.type == "meta"


def test_under_autocast_products_are_in_half_and_gradients_in_float32(pairs, monkeypatch):
    *_, batch = pairs
    model = gru.build(SRC_VOCAB, TRG_VOCAB, emb_dim=EMB, hid_dim=HID)
    expected = gru.TrainingLoss(model, 0.1)(batch, 1.0)
    expected_gradients = gradients(expected, model)
    seen = []
    for function in (gru.GRUSteps, gru.OutputLoss):
        apply = function.apply
        monkeypatch.setattr(
            function, "apply", lambda *inputs, apply=apply: seen.append([inputs[0], inputs[3]]) or apply(*inputs)
        )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = gru.TrainingLoss(model, 0.1)(batch, 1.0)
    assert [tensor.dtype for tensors in seen for tensor in tensors] == [torch.bfloat16] * 6
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=0)
    for name, gradient in gradients(loss, model).items():
        assert gradient.dtype == torch.float32
        error = (gradient - expected_gradients[name]).norm() / expected_gradients[name].norm()
        assert error < 0.05, name


def test_without_targets_the_loss_and_every_gradient_are_zero(model, pairs):
    """A rank without pairs takes part with weight 0."""
    *_, batch = pairs
    loss = gru.TrainingLoss(model, 0.1)(batch._replace(targets=torch.full_like(batch.targets, PAD)), 1.0)
    assert loss == 0
    assert all((gradient == 0).all() for gradient in gradients(loss, model).values())


@pytest.mark.parametrize("ratio", [1.0, 0.5])
def test_by_the_devices_own_kernels_loss_and_every_gradient_are_the_same(model, pairs, ratio, monkeypatch):
    """What runs on CUDA and NPU, here with the CPU's `nn.GRU`."""
    src, src_len, trg, _ = pairs
    batch = padded_batch(src, src_len, trg)
    results = []
    for ours in (True, False):
        monkeypatch.setattr(gru, "computes_steps", lambda device, ours=ours: ours)
        random.seed(3)
        loss = gru.TrainingLoss(model, 0.1)(batch, ratio)
        results.append((loss, gradients(loss, model), model.greedy(src, src_len, SOS, EOS, max_len=9)))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-10)


def test_the_devices_own_kernels_refuse_steps_of_different_sizes(model, pairs, monkeypatch):
    *_, batch = pairs
    monkeypatch.setattr(gru, "computes_steps", lambda device: False)
    with pytest.raises(ValueError, match="same number of rows"):
        gru.TrainingLoss(model)(batch, 1.0)


@pytest.fixture
def nan_memory():
    """New memory, which is undefined, is full of NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_gradient_depends_on_undefined_memory(dtype, nan_memory):
    """With a vocabulary whose rows end inside a block of the processor's matrix instructions."""
    model = gru.build(30, 500, emb_dim=32, hid_dim=32)
    gru.init_tuned(model)
    src, trg = (torch.randint(4, size, (12, 16)) for size in (30, 500))
    model = model.to(dtype)
    loss = gru.TrainingLoss(model, 0.1)(make_batch(src, torch.full((16,), 12), trg), 1.0)
    assert all(gradient.isfinite().all() for gradient in gradients(loss, model).values())


# Against the float64 loss and gradients at the published sizes; what the formulas lose is far below one percent.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_in_float32_and_bfloat16_loss_and_gradients_are_close_to_float64(dtype, tolerance):
    sizes = (300, 500)
    model = gru.build(*sizes)
    gru.init_tuned(model)
    src, trg = (torch.randint(4, size, (length, 16)) for size, length in zip(sizes, (12, 13), strict=True))
    for column in range(16):
        trg[13 - column // 2 :, column] = PAD
    batch = make_batch(src, torch.arange(16) % 9 + 4, trg)
    results = {}
    for kind in (torch.float64, dtype):
        same = copy.deepcopy(model).to(dtype).to(kind)  # the same weights, rounded
        loss = gru.TrainingLoss(same, 0.1)(batch, 1.0)
        results[kind] = loss.double() / batch.target_tokens, gradients(loss, same)
    (exact, exact_gradients), (loss, approximate) = results.values()
    torch.testing.assert_close(loss, exact, rtol=tolerance / 10, atol=0)
    for name, gradient in approximate.items():
        error = (gradient.double() - exact_gradients[name]).norm() / exact_gradients[name].norm()
        assert error < tolerance, name


@pytest.mark.parametrize("counts", [[4, 4, 4], [4, 3, 3, 1]])
def test_run_equals_nn_gru(counts):
    """`GRU.run` with a constant input against PyTorch's own kernels, sentence by sentence, gradients too."""
    rnn, inputs, constant = gru.GRU(EMB + 3, HID).double(), torch.randn(sum(counts), EMB), torch.randn(4, 3)
    hidden = torch.randn(4, HID)
    leaves = [tensor.double().requires_grad_() for tensor in (inputs, constant, hidden)]
    leaves += rnn.parameters()
    weights = torch.randn(sum(counts), HID).double()
    outputs = rnn.run(leaves[0], counts, leaves[2], rnn.share(4, leaves[1]))
    actual = torch.autograd.grad((outputs * weights).sum(), leaves)
    rows = gru.step_rows(counts)
    total = 0
    for column in range(4):
        own = [row.start + column for row, count in zip(rows, counts, strict=True) if column < count]
        x = torch.cat((leaves[0][own], leaves[1][column].expand(len(own), -1)), dim=1)
        expected, _ = rnn(x.unsqueeze(1), leaves[2][column].view(1, 1, -1))
        torch.testing.assert_close(outputs[own], expected.squeeze(1), rtol=0, atol=1e-12)
        total = total + (expected.squeeze(1) * weights[own]).sum()
    for gradient, expected in zip(actual, torch.autograd.grad(total, leaves), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)


def test_dropout_drops_with_its_probability_and_keeps_the_mean():
    torch.manual_seed(0)
    x = torch.ones(1000, 1001, requires_grad=True)
    for p in (0.0, 0.3, 0.5):
        y = gru.Dropout(p)(x)
        kept = y[y != 0]
        assert abs((y == 0).double().mean().item() - p) < 0.002
        assert torch.equal(kept, torch.full_like(kept, kept[0].item()))
        assert abs(kept[0].item() * (1 - p) - 1) < 2e-5
        (gradient,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(gradient, y), "what is dropped has no gradient"


def test_dropout_is_independent_from_element_to_element():
    """Eight elements share a 64-bit number, or four."""
    torch.manual_seed(0)
    for p, together in ((0.5, 8), (0.3, 4)):
        dropped = gru.Dropout(p)(torch.ones(1_000_000)) == 0
        for distance in range(1, together + 1):
            both = (dropped[:-distance] & dropped[distance:]).double().mean()
            assert abs(both - p * p) < 0.002
        columns = dropped.view(-1, together).double().mean(0)
        assert ((columns - p).abs() < 0.005).all()


def test_dropout_of_one_and_in_evaluation_are_as_ever():
    assert (gru.Dropout(1.0)(torch.ones(9)) == 0).all()
    assert (gru.Dropout(0.5).eval()(torch.ones(9)) == 1).all()


def test_a_target_of_sos_alone_has_the_row_of_zeros_alone(model, pairs):
    src, src_len, trg, _ = pairs
    assert torch.equal(model(src, trg[:1], 1.0, src_len), plain_logits(model, src, trg[:1], 1.0, src_len))


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


def test_raised_update_gates_keep_more_of_the_state():
    model = gru.build(30, 30, emb_dim=4, hid_dim=6)
    gru.init_tuned(model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    gru.raise_update_gates(model, 1.5)
    for name, parameter in model.named_parameters():
        added = torch.zeros_like(parameter)
        if name.endswith("rnn.bias_ih_l0"):
            added[6:12] = 1.5  # PyTorch's order is r, z, n
        assert torch.equal(parameter, before[name] + added), name
    with torch.no_grad():  # without inputs n is 0: the state shrinks by z alone
        for parameter in model.encoder.rnn.parameters():
            if parameter.dim() == 2:
                parameter.zero_()
        _, state = model.encoder.rnn(torch.zeros(1, 1, 4), torch.ones(1, 1, 6))
    torch.testing.assert_close(state, torch.full((1, 1, 6), 1.5).sigmoid())


def test_hidden_sizes_that_differ_are_refused():
    with pytest.raises(ValueError, match="hidden size"):
        gru.Seq2Seq(gru.Encoder(5, 2, 3, 0.0), gru.Decoder(5, 2, 4, 0.0), torch.device("cpu"))
