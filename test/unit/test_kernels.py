"""The hand-written computations: their gradients, their memory, their precision. test_gru.py has the whole model."""

import gru
from nmt import kernels, products

import pytest
import torch
from conftest import refused
from plain_model import EMB, HID, LOGITS_ROW, PAD, SRC_VOCAB, TRG_VOCAB, gradients, make_batch
from torch import nn

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.fixture
def products_of_the_loss(monkeypatch):
    """The results of the products that `OutputLoss` has made."""
    results, apply = [], kernels.OutputLoss.apply

    def recorded(*args):
        with monkeypatch.context() as patch:
            mm = kernels.mm
            patch.setattr(kernels, "mm", lambda *args, **kwargs: results.append(mm(*args, **kwargs)) or results[-1])
            return apply(*args)

    monkeypatch.setattr(kernels.OutputLoss, "apply", recorded)
    return results


def test_no_more_logits_than_a_block_or_a_step_has_are_there_at_a_time(model, pairs, monkeypatch, products_of_the_loss):
    *_, batch = pairs
    bound = products.FEWEST_ROWS * LOGITS_ROW
    assert max(batch.trg_rows_per_step) * LOGITS_ROW <= bound < len(batch.targets) * LOGITS_ROW
    monkeypatch.setattr(kernels.OutputLoss, "BLOCK", bound)
    with torch.no_grad():
        gru.TrainingLoss(model)(batch, 1.0)
    assert max(result.untyped_storage().nbytes() for result in products_of_the_loss) <= bound
    assert len(products_of_the_loss) > 1


def test_without_gradients_the_loss_is_the_same_and_their_products_are_left_out(model, pairs, products_of_the_loss):
    *_, batch = pairs
    criterion = gru.TrainingLoss(model, 0.1)
    with torch.no_grad():
        loss = criterion(batch, 1.0)
    assert len(products_of_the_loss) == 2, "the context's logits and all others"
    assert loss == criterion(batch, 1.0)
    assert len(products_of_the_loss) == 2 + 6
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
    actual = kernels.OutputLoss.apply(features, context, weight, bias, targets, [4] * 3, 0.0, PAD, False)
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
    loss = kernels.OutputLoss.apply(*tensors, targets, [rows], 0.0, PAD, True)
    gradients = torch.autograd.grad(loss * (32 / rows), tensors)
    assert all(gradient.isfinite().all() for gradient in gradients)
    expected = torch.full((vocabulary,), 32 / vocabulary)
    expected[5] -= 32
    torch.testing.assert_close(gradients[3].float(), expected, rtol=1e-2, atol=0)
    torch.testing.assert_close(gradients[2][:, 0].float(), expected, rtol=1e-2, atol=0)


def test_under_autocast_products_are_in_half_and_gradients_in_float32(pairs, monkeypatch):
    *_, batch = pairs
    model = gru.build(SRC_VOCAB, TRG_VOCAB, emb_dim=EMB, hid_dim=HID)
    expected = gru.TrainingLoss(model, 0.1)(batch, 1.0)
    expected_gradients = gradients(expected, model)
    seen = []
    for function in (kernels.GRUSteps, kernels.OutputLoss):
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


def test_the_devices_own_kernels_refuse_steps_of_different_sizes(model, pairs, monkeypatch):
    *_, batch = pairs
    monkeypatch.setattr(kernels, "computes_steps", lambda device: False)
    with pytest.raises(ValueError, match="same number of rows"):
        gru.TrainingLoss(model)(batch, 1.0)


@pytest.fixture
def nan_memory():
    """New memory, which is undefined, is full of NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("onednn", [False, True], ids=["torch.mm", "oneDNN"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_gradient_depends_on_undefined_memory(dtype, onednn, nan_memory, monkeypatch):
    """Neither numbers of rows nor the vocabulary fill the blocks of the processor's matrix instructions."""
    monkeypatch.setattr(products, "float32_by_onednn", lambda: onednn)
    model = gru.build(30, 500, emb_dim=32, hid_dim=32)
    gru.init_orthogonal(model)
    src, trg = (torch.randint(4, size, (12, 19)) for size in (30, 500))
    model, lengths = model.to(dtype), torch.arange(19) % 9 + 4
    loss = gru.TrainingLoss(model, 0.1)(make_batch(src, lengths, trg), 0.7)
    assert all(gradient.isfinite().all() for gradient in gradients(loss, model).values())


@pytest.mark.parametrize("counts", [[4, 4, 4], [4, 3, 3, 1]])
def test_run_equals_nn_gru(counts):
    """`GRU.run` with a context against PyTorch's own kernels, sentence by sentence, gradients too."""
    rnn, inputs, context = kernels.GRU(EMB + 3, HID).double(), torch.randn(sum(counts), EMB), torch.randn(4, 3)
    hidden = torch.randn(4, HID)
    leaves = [tensor.double().requires_grad_() for tensor in (inputs, context, hidden)]
    leaves += rnn.parameters()
    weights = torch.randn(sum(counts), HID).double()
    outputs, last = rnn.run(leaves[0], counts, leaves[2], rnn.context_gates(4, leaves[1]))
    actual = torch.autograd.grad((outputs * weights).sum(), leaves)
    rows = kernels.step_rows(counts)
    total = 0
    for column in range(4):
        own = [row.start + column for row, count in zip(rows, counts, strict=True) if column < count]
        x = torch.cat((leaves[0][own], leaves[1][column].expand(len(own), -1)), dim=1)
        expected, _ = rnn(x.unsqueeze(1), leaves[2][column].view(1, 1, -1))
        torch.testing.assert_close(outputs[own], expected.squeeze(1), rtol=0, atol=1e-12)
        total = total + (expected.squeeze(1) * weights[own]).sum()
    for gradient, expected in zip(actual, torch.autograd.grad(total, leaves), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bidirectional": True}, "bidirectional=True"),
        ({"num_layers": 2}, "num_layers=2"),
        ({"batch_first": True}, "batch_first=True"),
        ({"bias": False}, "bias=False"),
        ({"dropout": 0.5}, "dropout=0.5"),
        ({"num_layers": 2, "dropout": 0.5}, "num_layers=2, dropout=0.5"),
    ],
)
@pytest.mark.filterwarnings("ignore:dropout option")  # PyTorch's own word about it
def test_a_gru_that_run_does_not_compute_is_refused(device, options, said):
    """Kind O. On a CPU it trained, saved, and left the option out without a word."""
    assert torch.nn.GRU(3, 4, device=device, **options), "PyTorch has it"
    with pytest.raises(ValueError, match="use torch.nn.GRU") as refusal:
        kernels.GRU(3, 4, device=device, **options)
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_gru_takes_nn_grus_options_with_their_defaults():
    """Kind O. `proj_size` is none of a GRU's, and PyTorch says so."""
    rnn = kernels.GRU(3, 4, 1, True, False, 0.0, False, dtype=torch.float64)
    assert rnn.weight_ih_l0.dtype == torch.float64
    with pytest.raises(ValueError, match="num_layers=2"):
        kernels.GRU(3, 4, 2)
    with pytest.raises(ValueError, match="proj_size"):
        kernels.GRU(3, 4, proj_size=2)


def test_batches_of_other_sizes_have_products_of_the_same_shapes(monkeypatch):
    """oneDNN compiles a kernel for each shape, which takes longer than the product."""
    model = gru.build(SRC_VOCAB, TRG_VOCAB, emb_dim=32, hid_dim=32).bfloat16()
    shapes, mm = set(), kernels.mm

    def recorded(a, b, *args, **kwargs):
        shapes.add((*a.shape, b.shape[1]))
        return mm(a, b, *args, **kwargs)

    monkeypatch.setattr(kernels, "mm", recorded)
    lengths = torch.full((20,), 9)
    counts = []
    for shorter in range(6):
        lengths[:shorter] = 9 - shorter  # the last steps have fewer rows
        src, trg = (torch.randint(4, size, (9, 20)) for size in (SRC_VOCAB, TRG_VOCAB))
        gru.TrainingLoss(model)(make_batch(src, lengths, trg), 1.0).backward()
        counts.append(len(shapes))
    assert counts[-1] <= counts[0] + 8, "two more numbers of rows, where a multiple of sixteen is passed"


def constant_gates(dtype, update_bias):
    """A GRU of one value whose steps move the state towards tanh(1), by the same part each time."""
    rnn = kernels.GRU(1, 1)
    with torch.no_grad():
        for parameter in rnn.parameters():
            parameter.zero_()
        rnn.bias_ih_l0[1:] = torch.tensor([update_bias, 1.0])  # r, z, n
    return rnn.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_states_have_all_their_digits_in_half_precision_too(dtype):
    """Each step goes a thousandth of the way, less than half resolves. The second call begins where the first ends."""
    steps, rnn = [1] * 250, constant_gates(dtype, 6.9)
    inputs, start = torch.zeros(250, 1).to(dtype), torch.full((1, 1), 0.5)
    _, middle = rnn.run(inputs, steps, start, rnn.context_gates(1))
    outputs, last = rnn.run(inputs, steps, middle, rnn.context_gates(1))
    assert (outputs.dtype, last.dtype) == (dtype, torch.float32)
    kept = rnn.bias_ih_l0[1].float().sigmoid() ** 500
    torch.testing.assert_close(
        last.item(), (kept * 0.5 + (1 - kept) * torch.tensor(1.0).tanh()).item(), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gradients_of_states_add_up_in_half_precision_too(dtype):
    """A state that is kept as it is has the gradients of all steps. bfloat16 cannot count beyond 256."""
    rnn, start = constant_gates(dtype, 100.0), torch.full((1, 1), 0.5, requires_grad=True)
    outputs, _ = rnn.run(torch.zeros(2000, 1).to(dtype), [1] * 2000, start, rnn.context_gates(1))
    (gradient,) = torch.autograd.grad(outputs.float().sum() / 3, start)
    assert gradient.item() == pytest.approx(2000 / 3, rel=3e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_softmax_for_torch_compile_is_that_of_the_loss(dtype):
    """With padding among the targets, and a scale. As it is here, and not compiled: a slow test compiles it."""
    exact = kernels.accumulate_dtype(dtype)
    logits, context_logits, targets = torch.randn(15, 70).to(dtype), torch.randn(5, 70).to(exact), torch.arange(15)
    rest = (0.1, PAD, 0.5)
    loss, d_logits, d_context = kernels.softmax_and_gradient(logits, context_logits, targets, *rest)
    expected, expected_d_context = logits.clone(), torch.zeros_like(context_logits)
    expected_loss = kernels.OutputLoss.softmax(expected, context_logits, targets, [5] * 3, *rest, expected_d_context)
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(d_logits, expected)
    torch.testing.assert_close(d_context, expected_d_context)


def test_a_loss_that_cannot_be_compiled_is_told(monkeypatch):
    def broken(*args):
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(kernels, "compiled_softmax", lambda: broken)
    refused(
        "usage",
        kernels.compile_softmax,
        torch.device("cpu"),
        torch.float32,
        says=["--compile-loss", "no compiler", "g++"],
    )
    assert not kernels.OutputLoss.COMPILED


def test_dropout_drops_with_its_probability_and_keeps_the_mean():
    torch.manual_seed(0)
    x = torch.ones(1000, 1001, requires_grad=True)
    for p in (0.0, 0.3, 0.5):
        y = kernels.Dropout(p)(x)
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
        dropped = kernels.Dropout(p)(torch.ones(1_000_000)) == 0
        for distance in range(1, together + 1):
            both = (dropped[:-distance] & dropped[distance:]).double().mean()
            assert abs(both - p * p) < 0.002
        columns = dropped.view(-1, together).double().mean(0)
        assert ((columns - p).abs() < 0.005).all()


def test_dropout_of_one_and_in_evaluation_are_as_ever():
    assert (kernels.Dropout(1.0)(torch.ones(9)) == 0).all()
    assert (kernels.Dropout(0.5).eval()(torch.ones(9)) == 1).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_frozen_gru_runs_as_before(dtype, seeded):
    gru_ = kernels.GRU(EMB + HID, HID).to(dtype)
    rows_per_step = [4, 4, 3, 1]
    inputs, context, hidden = (torch.randn(rows, size).to(dtype) for rows, size in ((12, EMB), (4, HID), (4, HID)))

    def run(first_state):
        with torch.no_grad():
            outputs, last = gru_.run(inputs, rows_per_step, first_state, gru_.context_gates(4, context))
            _, after = gru_.run(inputs[:4], [4], first_state, gru_.context_gates(4, context))
            return outputs, last, after

    expected = [run(state) for state in (hidden, None)]
    kernels.freeze([gru_, nn.Linear(2, 2)])
    tolerance = {"rtol": 0, "atol": 2e-2 if dtype == torch.bfloat16 else 1e-5}
    for state, values in zip((hidden, None), expected, strict=True):
        torch.testing.assert_close(run(state), values, **tolerance)
    steps = gru_._steps
    assert steps is not None and list(steps) == [EMB], "it ran by its own steps"
    assert gru_.run(inputs, rows_per_step, hidden, gru_.context_gates(4, context))[0].requires_grad, "they train on"
