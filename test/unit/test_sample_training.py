"""What the sample corpus is for: a model that reads the source learns it, and one that does not, does not."""

import os
import subprocess
import sys

from bench import logs

import pytest
from conftest import REPOSITORY

pytestmark = pytest.mark.slow

BLIND = """
import sys
import gru, train_8p
from nmt.errors import run_main

encode_rows = gru.Encoder.encode_rows
gru.Encoder.encode_rows = lambda *args: 0 * encode_rows(*args)
sys.exit(run_main(train_8p.main, sys.argv[1:]))
"""


def bleu_of_ten_epochs(tmp_path, *command: str) -> float:
    """The test BLEU of ten epochs on the sample."""
    done = subprocess.run(
        [sys.executable, *command, "--device", "cpu", "--amp", "--amp-dtype", "bfloat16"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr
    assert "precision=bfloat16/" in done.stdout or "O0" in command
    return float(logs.parse(done.stdout).final["BLEU score"])


@pytest.mark.parametrize("level", ["O0", "O1", "O2", "O3"])
def test_ten_epochs_on_the_sample_give_a_bleu_above_50(tmp_path, level):
    assert bleu_of_ten_epochs(tmp_path, str(REPOSITORY / "train_8p.py"), "--opt-level", level) > 50


def test_without_its_encoder_a_model_stays_under_15(tmp_path):
    assert bleu_of_ten_epochs(tmp_path, "-c", BLIND) < 15
