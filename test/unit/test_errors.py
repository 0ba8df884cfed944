"""Errors: what the program says and how it ends when its surroundings are not as it needs them."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from nmt import errors

import pytest
from conftest import REPOSITORY, SMALL


def test_the_exit_codes_are_those_that_the_manual_promises():
    assert errors.EXIT_CODES == {"usage": 2, "data": 3, "checkpoint": 4, "io": 5, "distributed": 6, "diverged": 7}


INTERRUPTED_IMPORT = """
import os, signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background may inherit that it is ignored
os.kill(os.getpid(), signal.SIGINT)
while True: pass
"""


def test_an_interrupt_during_the_imports_is_one_line(tmp_path):
    (tmp_path / "torch.py").write_text(INTERRUPTED_IMPORT)
    done = subprocess.run(
        [sys.executable, REPOSITORY / "train_8p.py"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "interrupted\n")


def test_missing_packages_are_named_with_what_to_do(tmp_path):
    done = subprocess.run(
        [sys.executable, "-S", REPOSITORY / "train_8p.py"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error[usage]: not installed: torch, numpy, spacy")
    assert f"{REPOSITORY / 'requirements.txt'}" in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_output_whose_encoding_lacks_a_letter_loses_no_run(tiny_corpus, tmp_path):
    command = [sys.executable, REPOSITORY / "train_8p.py", *SMALL, "--data-dir", tiny_corpus, "--epochs", "1"]
    env = os.environ | {"PYTHONIOENCODING": "gbk"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "l\\xe4uft" in done.stdout
    assert (tmp_path / "seq2seq-gru-model.pth.tar").exists()


@pytest.mark.parametrize(("flags", "code"), [([], 0), (["--lr", "nan"], 2)])
def test_a_closed_output_is_no_error_and_a_closed_stderr_does_not_go_to_stdout(tiny_corpus, flags, code):
    command = [sys.executable, str(REPOSITORY / "train_8p.py"), *SMALL, "--data-dir", str(tiny_corpus), "--performance"]
    for closed in ("1>&-", "2>&-"):
        shell = ["sh", "-c", f'exec "$@" {closed}', "sh"]
        done = subprocess.run([*shell, *command, *flags], capture_output=True, text=True, timeout=120)
        assert done.returncode == code
        assert "error[" not in done.stdout
        assert done.stderr.count("\n") == (code > 0 and closed == "1>&-")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_for_the_output_is_an_io_error(tiny_corpus):
    command = [sys.executable, REPOSITORY / "train_8p.py", *SMALL, "--data-dir", tiny_corpus, "--performance"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 5
    assert done.stderr.startswith("error[io]: No space left on device")
    assert "Traceback" not in done.stderr
