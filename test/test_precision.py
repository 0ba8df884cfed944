"""Mixed precision as far as this version has it: which copy computes, which is updated, and when nothing is."""

import copy

import pytest
import torch
from torch import nn

import precision

CPU = torch.device("cpu")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Linear(4, 3)


@pytest.fixture
def with_bfloat16(monkeypatch):
    monkeypatch.setattr(precision, "cpu_has_bfloat16", lambda: True)


def one_step(precise, model, data, *, scale=1.0, max_norm=0.0, lr=0.1):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    with precise.forward_context():
        loss = (precise.working_model(data.to(precise.working_model.weight.dtype)).float() ** 2).sum() * scale
    precise.backward(loss)
    precise.step(optimizer, max_norm)


def test_o0_is_plain_training(model):
    data, plain = torch.randn(5, 4), copy.deepcopy(model)
    (plain(data) ** 2).sum().backward()
    precise = precision.Precision(model, CPU, "O0", 1.0)
    assert precise.working_model is model
    one_step(precise, model, data)
    torch.testing.assert_close(model.weight, plain.weight - 0.1 * plain.weight.grad)


def test_o2_computes_in_half_and_keeps_what_half_cannot_hold(model, with_bfloat16):
    precise = precision.Precision(model, CPU, "O2", 1.0)
    assert precise.working_model.weight.dtype == torch.bfloat16
    assert model.weight.dtype == torch.float32
    before = model.weight.detach().clone()
    for _ in range(3):
        one_step(precise, model, torch.randn(5, 4), lr=1e-6)
    assert not torch.equal(model.weight, before), "steps too small for bfloat16 add up in the master weights"
    assert precise.working_model.weight.grad is None
    one_step(precise, model, torch.randn(5, 4))
    assert torch.equal(precise.working_model.weight, model.weight.bfloat16()), "the copy follows the master"
    assert not torch.equal(precise.working_model.weight, before.bfloat16())


def test_o1_keeps_float32_weights_and_computes_in_half(model, with_bfloat16):
    precise = precision.Precision(model, CPU, "O1", 1.0)
    with precise.forward_context():
        assert precise.working_model(torch.randn(5, 4)).dtype == torch.bfloat16
    assert precise.working_model is model
    assert precise.name == "bfloat16/O1"


@pytest.mark.parametrize("level", ["O0", "O2"])
def test_the_clipped_gradients_are_the_unscaled_ones(model, with_bfloat16, level):
    precise = precision.Precision(model, CPU, level, 1024.0)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    one_step(precise, model, torch.randn(5, 4), max_norm=1.0, lr=1.0)
    moved = torch.stack([(new - old).norm() for new, old in zip(model.parameters(), before, strict=True)]).norm()
    assert moved.item() == pytest.approx(1.0, rel=1e-2)


@pytest.mark.parametrize("scale", [32.0, "dynamic"])
@pytest.mark.parametrize("level", ["O0", "O2"])
def test_a_step_whose_gradients_overflow_changes_no_weight(model, with_bfloat16, level, scale):
    precise = precision.Precision(model, CPU, level, scale)
    before = model.weight.detach().clone()
    one_step(precise, model, torch.randn(5, 4), scale=float("inf"), max_norm=1.0)
    assert torch.equal(model.weight, before)
    one_step(precise, model, torch.randn(5, 4), max_norm=1.0)
    assert not torch.equal(model.weight, before), "the next step is an ordinary one"


def test_amp_on_a_cpu_without_bfloat16_computes_in_float32(model, monkeypatch):
    monkeypatch.setattr(precision, "cpu_has_bfloat16", lambda: False)
    precise = precision.Precision(model, CPU, "O2", 1.0)
    assert precise.name == "float32/O0"
    assert precise.working_model is model


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("flags : avx512f avx512_bf16", True),
        ("flags : amx_bf16", True),
        ("Features : asimd bf16", True),
        ("avx2", False),
    ],
)
def test_bfloat16_instructions_are_read_off_the_processor(tmp_path, flags, expected):
    (tmp_path / "cpuinfo").write_text(flags)
    assert precision.cpu_has_bfloat16(tmp_path / "cpuinfo") is expected
    assert precision.cpu_has_bfloat16(tmp_path / "absent") is False
