"""gru.py against the plain model in plain_model.py."""

import copy
import functools
import random
import subprocess
import sys

import gru
from nmt import kernels, search

import pytest
import torch
from conftest import REPOSITORY
from plain_model import (
    BATCH,
    EMB,
    EOS,
    HID,
    LOGITS_ROW,
    PAD,
    SOS,
    SRC_VOCAB,
    TRG_LEN,
    TRG_VOCAB,
    gradients,
    make_batch,
    padded_batch,
    plain_context,
    plain_logits,
    plain_loss_sum,
)

pytestmark = pytest.mark.usefixtures("seeded")


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


@pytest.fixture(params=["one block", "small blocks"])
def blocks(request, monkeypatch):
    """The blocks: larger than the batch; or logits of one step or two, and parts of a step everywhere else."""
    if request.param == "small blocks":
        monkeypatch.setattr(kernels.OutputLoss, "BLOCK", 10 * LOGITS_ROW)
        monkeypatch.setattr(kernels.OutputLoss, "SOFTMAX_ROWS", 2)
        monkeypatch.setattr(kernels.GRUSteps, "BLOCK", 3)
        monkeypatch.setattr(kernels.GRUSteps, "EXACT_BLOCK", 3)


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


def test_no_value_on_the_device_decides_a_shape(pairs, monkeypatch):
    """Where it did, the host would wait for the device: on the meta device, which has no values, it is an error."""
    src, src_len, trg, _ = pairs
    monkeypatch.setattr(kernels, "as_autocast", lambda *tensors: tensors)  # it does not know that device
    batch = padded_batch(src, src_len, trg)
    batch = batch._replace(**{name: getattr(batch, name).to("meta") for name in ("src", "src_last", "trg", "targets")})
    model = gru.build(SRC_VOCAB, TRG_VOCAB, emb_dim=EMB, hid_dim=HID, dropout=0.5, output_dropout=0.3, device="meta")
    for ratio in (1.0, 0.5):
        gru.TrainingLoss(model, 0.1)(batch, ratio).backward()
    assert model.decoder.fc_out.weight.grad.device.type == "meta"


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
        monkeypatch.setattr(kernels, "computes_steps", lambda device, ours=ours: ours)
        random.seed(3)
        loss = gru.TrainingLoss(model, 0.1)(batch, ratio)
        results.append((loss, gradients(loss, model), search.greedy(model, src, src_len, SOS, EOS, max_len=9)))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-10)


# Against the float64 loss and gradients at the published sizes. What the formulas lose is far below one percent.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_in_float32_and_bfloat16_loss_and_gradients_are_close_to_float64(dtype, tolerance):
    sizes = (300, 500)
    model = gru.build(*sizes)
    gru.init_orthogonal(model)
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


def test_a_target_of_sos_alone_has_the_row_of_zeros_alone(model, pairs):
    src, src_len, trg, _ = pairs
    assert torch.equal(model(src, trg[:1], 1.0, src_len), plain_logits(model, src, trg[:1], 1.0, src_len))


@pytest.mark.filterwarnings("ignore:dropout option")
@pytest.mark.parametrize(
    "option",
    [
        {"num_layers": 2},
        {"bias": False},
        {"batch_first": True},
        {"dropout": 0.5},
        {"bidirectional": True},
        {"proj_size": 4},
    ],
    ids=lambda option: next(iter(option)),
)
@pytest.mark.parametrize("part", [gru.Encoder, gru.Decoder])
def test_an_option_of_the_gru_that_would_be_ignored_is_refused_in_the_model_too(monkeypatch, part, option):
    """As where somebody writes it into gru.py. Once it trained, saved, and left the option out without a word."""
    monkeypatch.setattr(gru, "GRU", functools.partial(kernels.GRU, **option))
    (name,) = option
    with pytest.raises(ValueError, match=name):
        part(10, 8, 8, 0.0)


def test_decoder_forward_is_one_step_of_the_model(model, pairs):
    src, src_len, trg, _ = pairs
    context = plain_context(model, src, src_len).unsqueeze(0)
    logits, hidden = model.decoder(trg[0], context, context)
    assert hidden.shape == (1, BATCH, HID)
    torch.testing.assert_close(logits, plain_logits(model, src, trg, 1.0, src_len)[1], rtol=0, atol=1e-10)


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


def test_the_normal_start_draws_everything_from_a_narrow_normal():
    model = gru.build(300, 300, emb_dim=32, hid_dim=64)
    gru.init_normal(model)
    for name, parameter in model.named_parameters():
        assert 0.008 < parameter.std() < 0.012, name
        assert abs(parameter.mean()) < 0.003, name


def test_the_orthogonal_start_is_what_the_recipe_says():
    emb_dim, hid_dim, vocab = 32, 64, 300
    model = gru.build(vocab, vocab, emb_dim=emb_dim, hid_dim=hid_dim)
    gru.init_orthogonal(model)
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
    gru.init_orthogonal(model)
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


SIZES = {"input_dim": 13, "output_dim": 11, "emb_dim": 5, "hid_dim": 7}


@pytest.fixture
def state(model):
    return model.state_dict()


def test_a_restored_model_translates_as_the_one_that_was_saved(model, pairs, state):
    src, src_len, trg, _ = pairs
    restored = gru.restore({name: tensor.float() for name, tensor in state.items()}, SIZES)
    assert not restored.training
    assert restored.device == torch.device("cpu")
    expected = model.float().eval()(src, trg, 1.0, src_len)
    assert torch.equal(restored(src, trg, 1.0, src_len), expected)


def test_restoring_draws_no_weights_and_imports_no_compiler():
    """A draw on the device meta imports it, which takes a second."""
    program = """
import sys, gru, torch
before = torch.get_rng_state()
gru.restore(gru.build(4, 4, emb_dim=2, hid_dim=2).state_dict(), dict(input_dim=4, output_dim=4, emb_dim=2, hid_dim=2))
drawn = torch.get_rng_state()
torch.set_rng_state(before)
gru.build(4, 4, emb_dim=2, hid_dim=2)
assert torch.equal(drawn, torch.get_rng_state())
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=True, timeout=60)


def test_the_sizes_are_read_from_the_shapes(state):
    assert gru.sizes_of(state) == SIZES


@pytest.mark.parametrize("read", [gru.sizes_of, lambda state: gru.restore(state, SIZES)])
def test_a_state_dict_with_other_keys_is_refused(state, read):
    without = {name: tensor for name, tensor in state.items() if name != "decoder.fc_out.bias"}
    with pytest.raises(ValueError, match=r"^decoder\.fc_out\.bias is missing$"):
        read(without)
    with pytest.raises(ValueError, match=r"^attention\.weight is none of this model's$"):
        read(state | {"attention.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"^decoder\.fc_out\.bias is of type list, expected a tensor$"):
        read(state | {"decoder.fc_out.bias": [0.0] * 11})


def test_sizes_are_not_read_from_tensors_of_other_dimensions(state):
    with pytest.raises(ValueError, match=r"^encoder\.embedding\.weight has 1 dimensions, expected 2$"):
        gru.sizes_of(state | {"encoder.embedding.weight": torch.zeros(13)})


def test_a_tensor_that_does_not_fit_the_sizes_is_named_with_both_shapes(state):
    with pytest.raises(ValueError, match=r"^decoder\.rnn\.bias_hh_l0 has shape \[18\], expected \[21\]$"):
        gru.restore(state | {"decoder.rnn.bias_hh_l0": torch.zeros(18)}, SIZES)
    with pytest.raises(ValueError, match=r"^encoder\.embedding\.weight has shape \[13, 5\], expected \[14, 5\]$"):
        gru.restore(state, SIZES | {"input_dim": 14})
