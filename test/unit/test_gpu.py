"""The same program on a CUDA device. Without one these tests are skipped."""

import importlib.util

import data
import gru
import train_8p
from bench import logs
from nmt import kernels, precision
from nmt.errors import run_main

import pytest
import torch
from conftest import step_lines

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]

ON_GPU = ["--emb-dim", "16", "--hid-dim", "24", "--device", "cuda", "--epochs", "1", "-b", "16", "--print-freq", "1"]


def losses_of(out: str) -> list[float]:
    """The loss of each step line. All must be numbers."""
    lines = step_lines(out)
    assert len(lines) == out.count("\tLoss ")
    return [float(loss) for *_, loss, _ in lines]


def losses(corpus, folder, capsys, *flags: str) -> list[float]:
    """The loss of each step of a run that must end well."""
    code = run_main(train_8p.main, [*ON_GPU, "--data-dir", str(corpus), "--ckptpath", str(folder / "model"), *flags])
    out, err = capsys.readouterr()
    assert code == 0, err
    run = logs.parse(out)
    assert run.facts["device"] == "cuda"
    assert "BLEU score" in run.final
    return losses_of(out)


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--amp", "--opt-level", "O1"],
        ["--amp"],
        ["--amp", "--loss-scale", "dynamic"],
        ["--amp", "--opt-level", "O3"],
        pytest.param(
            ["--amp", "--amp-dtype", "bfloat16"],
            marks=pytest.mark.skipif(
                torch.cuda.is_available() and torch.cuda.get_device_capability() < precision.BFLOAT16_CAPABILITY,
                reason="this GPU has no bfloat16",
            ),
        ),
    ],
)
def test_every_precision_trains_and_scores(tiny_corpus, tmp_path, capsys, flags):
    assert len(losses(tiny_corpus, tmp_path, capsys, *flags)) == 4


def test_float32_has_the_losses_of_the_cpu(tiny_corpus, tmp_path, capsys):
    # A performance run has more steps, and so another course of the rate: hence a constant one.
    alike = ("--dropout", "0", "--output-dropout", "0", "--schedule", "constant", "--warmup", "0")
    on_gpu = losses(tiny_corpus, tmp_path, capsys, *alike)
    arguments = [flag if flag != "cuda" else "cpu" for flag in ON_GPU]
    run_main(train_8p.main, [*arguments, *alike, "--data-dir", str(tiny_corpus), "--performance"])
    on_cpu = losses_of(capsys.readouterr().out)
    assert on_gpu == pytest.approx(on_cpu[: len(on_gpu)], rel=1e-3)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="torch.compile needs triton on a GPU")
def test_a_compiled_loss_has_the_losses_of_the_other(tiny_corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(kernels.OutputLoss, "COMPILED", False)
    expected = losses(tiny_corpus, tmp_path, capsys, "--amp")
    assert losses(tiny_corpus, tmp_path, capsys, "--amp", "--compile-loss") == pytest.approx(expected, rel=1e-2)
    assert kernels.OutputLoss.COMPILED


@pytest.mark.parametrize("scale", [32.0, "dynamic"])
def test_a_step_does_not_wait_for_the_device(tiny_corpus, scale):
    device, corpus = torch.device("cuda"), data.load(tiny_corpus)
    model = gru.build(len(corpus.src_vocab), len(corpus.trg_vocab), emb_dim=16, hid_dim=24, device=device)
    trainer = precision.make_trainer(precision.Choice("O2", torch.float16, scale), model, device)
    criterion = gru.TrainingLoss(trainer.working_model, 0.1)
    batch = data.Loader(corpus.train, device)(torch.arange(16))
    for mode in ("default", "error"):  # what is made once, is made in the first step
        torch.cuda.set_sync_debug_mode(mode)
        try:
            trainer.backward(criterion(batch, 1.0) / 100)
            trainer.step(1e-3, max_norm=1.0)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert trainer.skipped_steps() == 0
