"""The average of the weights: against its formula, and where it takes the model's place."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import precision
import train_8p
from averaging import EVERY, WeightAverage
from errors import run_main


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def average_of(model, decay):
    return WeightAverage(SimpleNamespace(model=model, refresh_model=lambda: None), decay)


def train(model, average, steps):
    """Random walks of the weights; yields each step's number."""
    for step in range(1, steps + 1):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn_like(parameter)
        average.update(step)
        yield step


def test_the_average_is_the_exponential_one(model):
    average = average_of(model, decay=0.9)
    expected = model.weight.detach().clone()
    for step in train(model, average, 400):
        if step % EVERY == 0:
            kept = min(0.9, step / (step + 5)) ** EVERY
            expected = kept * expected + (1 - kept) * model.weight.detach()
        torch.testing.assert_close(average.model.weight.detach(), expected)


def test_early_the_average_forgets_the_first_weights(model):
    with torch.no_grad():
        model.weight.fill_(1000.0)
    average = average_of(model, decay=0.9999)
    with torch.no_grad():
        model.weight.zero_()
    for step in range(1, 101):
        average.update(step)
    assert average.model.weight.abs().max() < 0.01


def test_without_a_decay_the_average_is_the_model_itself(model):
    average = average_of(model, decay=0.0)
    assert average.model is model
    before = model.weight.detach().clone()
    average.update(EVERY)
    assert torch.equal(model.weight, before)


def test_what_is_trained_does_not_see_the_average(model):
    average = average_of(model, decay=0.9)
    with torch.no_grad():
        model.weight += 1.0
    after = model.weight.detach().clone()
    average.update(EVERY)
    assert torch.equal(model.weight, after)
    assert not torch.equal(average.model.weight, after)


@pytest.mark.parametrize("level", ["O0", "O2", "O3"])
def test_what_is_averaged_are_the_weights_after_the_step(model, level):
    choice = precision.Choice(level, torch.float32 if level == "O0" else torch.bfloat16)
    precise = precision.start(choice, model, torch.device("cpu"), precision.OptimizerSettings("adam", 0.1))
    average = WeightAverage(precise, decay=1e-9)  # which keeps nothing of itself
    precise.backward((precise.working_model(torch.ones(1, 3, dtype=choice.dtype)) ** 2).sum())
    precise.step(0.0)
    before = average.model.weight.detach().clone()
    average.update(EVERY)
    assert not torch.equal(average.model.weight, before)
    torch.testing.assert_close(average.model.weight.to(choice.dtype), precise.working_model.weight)


def test_the_average_is_what_is_validated_and_kept(tiny_corpus, tmp_path, monkeypatch, capsys):
    made, validated = [], []
    monkeypatch.setattr(train_8p, "WeightAverage", lambda *args: made.append(WeightAverage(*args)) or made[-1])
    monkeypatch.setattr(train_8p.BestKeeper, "validate", lambda self, model, *_: validated.append(model))
    monkeypatch.setattr(train_8p, "score", lambda *_: None)
    small = ["--emb-dim", "4", "--hid-dim", "6", "--device", "cpu", "-b", "16", "--epochs", "2", "--ema", "0.9"]
    assert run_main(train_8p.main, [*small, "--data-dir", str(tiny_corpus), "--ckptpath", str(tmp_path / "m")]) == 0
    assert validated == [made[0].model] * 2
    assert made[0].model is not made[0]._precise.model
