"""The same program on a CUDA device; skipped where there is none."""

import re

import train_8p
from nmt import precision
from nmt.errors import run_main

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]

ON_GPU = ["--emb-dim", "16", "--hid-dim", "24", "--device", "cuda", "--epochs", "1", "-b", "16", "--print-freq", "1"]


def losses(corpus, folder, capsys, *flags: str) -> list[float]:
    """The loss of each step of a run that must end well."""
    code = run_main(train_8p.main, [*ON_GPU, "--data-dir", str(corpus), "--ckptpath", str(folder / "model"), *flags])
    out, err = capsys.readouterr()
    assert code == 0, err
    assert "device=cuda" in out
    assert "BLEU score = " in out
    return [float(loss) for loss in re.findall(r"Loss (\S+) ", out)]


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
    assert all(loss == loss for loss in losses(tiny_corpus, tmp_path, capsys, *flags))


def test_float32_has_the_losses_of_the_cpu(tiny_corpus, tmp_path, capsys):
    # A performance run has more steps, and so another course of the rate: hence a constant one.
    alike = ("--dropout", "0", "--output-dropout", "0", "--schedule", "constant", "--warmup", "0")
    on_gpu = losses(tiny_corpus, tmp_path, capsys, *alike)
    arguments = [flag if flag != "cuda" else "cpu" for flag in ON_GPU]
    run_main(train_8p.main, [*arguments, *alike, "--data-dir", str(tiny_corpus), "--performance"])
    on_cpu = [float(loss) for loss in re.findall(r"Loss (\S+) ", capsys.readouterr().out)]
    assert on_gpu == pytest.approx(on_cpu[: len(on_gpu)], rel=1e-3)
