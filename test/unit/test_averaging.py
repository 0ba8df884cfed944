"""The average of the weights: against its formula, and where it takes the model's place."""

import copy
from types import SimpleNamespace

import gru
import scoring
import train_8p
from nmt import checkpoint, precision
from nmt.averaging import EVERY, WeightAverage
from nmt.errors import run_main

import pytest
import torch
from conftest import SMALL
from torch import nn


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def average_of(model, part):
    return WeightAverage(SimpleNamespace(model=model, refresh_model=lambda: None), part)


def walk(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter)


def expected_kept(eta, first, last):
    """What is left of an average from before step `first` after step `last`."""
    kept = 1.0
    for step in range(first, last + 1):
        kept *= 1 - (eta + 1) / (step + eta)  # as the source has it
    return kept


def test_the_average_is_that_of_its_source(model):
    average = average_of(model, part=0.25)
    expected = model.weight.detach().clone()
    for step in range(1, 401):
        walk(model)
        average.update(step)
        if step % EVERY == 0:
            kept = expected_kept(3, step - EVERY + 1, step)
            expected = kept * expected + (1 - kept) * model.weight.detach()
        torch.testing.assert_close(average.model.weight.detach(), expected)


def test_at_an_epochs_end_it_takes_in_the_steps_since(model):
    average = average_of(model, part=0.25)
    for step in range(1, EVERY + 1):
        walk(model)
        average.update(step)
    before = average.model.weight.detach().clone()
    walk(model)
    for _ in range(2):  # the second time there is nothing to take in
        average.catch_up(EVERY + 3)
        kept = expected_kept(3, EVERY + 1, EVERY + 3)
        expected = kept * before + (1 - kept) * model.weight.detach()
        torch.testing.assert_close(average.model.weight.detach(), expected)
    after = average.model.weight.detach().clone()
    walk(model)
    average.update(2 * EVERY + 2)  # counted from there
    assert torch.equal(average.model.weight, after)
    average.update(2 * EVERY + 3)
    assert not torch.equal(average.model.weight, after)


def test_a_part_of_one_is_the_mean(model):
    average = average_of(model, part=1.0)
    taken_in = []
    for step in range(1, 6):
        walk(model)
        average.catch_up(step)
        taken_in.append(model.weight.detach().clone())
    torch.testing.assert_close(average.model.weight.detach(), torch.stack(taken_in).mean(0))


def test_the_first_weights_leave_the_average_with_the_first_step(model):
    with torch.no_grad():
        model.weight.fill_(1000.0)
    average = average_of(model, part=0.2)
    with torch.no_grad():
        model.weight.zero_()
    average.catch_up(1)
    assert not average.model.weight.any()


def test_without_a_part_the_average_is_the_model_itself(model):
    average = average_of(model, part=0.0)
    assert average.model is model
    before = model.weight.detach().clone()
    average.catch_up(EVERY)
    assert torch.equal(model.weight, before)


def test_the_averages_gru_is_laid_out_for_cudnn(monkeypatch):
    """A copy is not, and PyTorch warns of that on a GPU. On a CPU the call is the only sign of it."""
    flattened = []
    model = gru.build(6, 7, emb_dim=3, hid_dim=4)
    monkeypatch.setattr(torch.nn.GRU, "flatten_parameters", lambda self: flattened.append(self))
    average = average_of(model, part=0.2)
    assert {id(each) for each in flattened} == {id(average.model.encoder.rnn), id(average.model.decoder.rnn)}


def test_what_is_trained_does_not_see_the_average(model):
    average = average_of(model, part=0.2)
    for step in (EVERY, 2 * EVERY):
        walk(model)
        trained = model.weight.detach().clone()
        average.update(step)
        assert torch.equal(model.weight, trained)
    assert not torch.equal(average.model.weight, trained)


@pytest.mark.parametrize("level", ["O0", "O2", "O3"])
def test_what_is_averaged_are_the_weights_after_the_step(model, level):
    choice = precision.Choice(level, torch.float32 if level == "O0" else torch.bfloat16)
    trainer = precision.make_trainer(choice, model, torch.device("cpu"))
    average = WeightAverage(trainer, part=0.2)
    trainer.backward((trainer.working_model(torch.ones(1, 3, dtype=choice.dtype)) ** 2).sum())
    trainer.step(0.1, max_norm=0.0)
    before = average.model.weight.detach().clone()
    average.catch_up(1)  # which keeps nothing of itself
    assert not torch.equal(average.model.weight, before)
    torch.testing.assert_close(average.model.weight.to(choice.dtype), trainer.working_model.weight)


def run_two_epochs(corpus, folder):
    flags = ["-b", "16", "--epochs", "2", "--average", "0.2"]
    assert run_main(train_8p.main, [*SMALL, *flags, "--data-dir", str(corpus), "--ckptpath", str(folder / "m")]) == 0


def test_the_average_is_what_is_validated_and_kept(tiny_corpus, tmp_path, monkeypatch, capsys):
    made, validated = [], []
    losses = scoring.losses

    def recorded(model, *args):
        validated.append((model, copy.deepcopy(model.state_dict())))
        return losses(model, *args)

    monkeypatch.setattr(train_8p, "WeightAverage", lambda *args: made.append(WeightAverage(*args)) or made[-1])
    monkeypatch.setattr(scoring, "losses", recorded)
    monkeypatch.setattr(train_8p, "score", lambda *_: {})
    run_two_epochs(tiny_corpus, tmp_path)
    assert [model for model, _ in validated] == [made[0].model] * 2
    assert not torch.equal(made[0].model.encoder.embedding.weight, made[0]._trainer.model.encoder.embedding.weight)
    kept = checkpoint.load(tmp_path / "m").state_dict
    assert any(all(torch.equal(kept[name], weights[name]) for name in kept) for _, weights in validated)


def test_each_step_and_each_epochs_end_reach_the_average(tiny_corpus, tmp_path, monkeypatch, capsys):
    seen = []

    class Recorder(WeightAverage):
        def update(self, step):
            seen.append(step)

        def catch_up(self, step):
            seen.append(f"end {step}")

    monkeypatch.setattr(train_8p, "WeightAverage", Recorder)
    monkeypatch.setattr(train_8p, "score", lambda *_: {})
    run_two_epochs(tiny_corpus, tmp_path)
    steps = [entry for entry in seen if isinstance(entry, int)]
    assert steps == list(range(1, len(steps) + 1))
    half = len(steps) // 2
    assert half >= 2
    assert [seen[half], seen[-1]] == [f"end {half}", f"end {2 * half}"]
