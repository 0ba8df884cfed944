"""Errors: what the program says and how it ends when its surroundings are not as it needs them."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import gru
import train_8p
from nmt import errors

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, SMALL


def test_the_exit_codes_are_those_that_the_manual_promises():
    codes = {"bug": 1, "memory": 1, "usage": 2, "data": 3, "checkpoint": 4, "io": 5, "distributed": 6, "diverged": 7}
    codes |= {"accept": 8}
    assert codes == errors.EXIT_CODES


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
    """Row 47."""
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


def no_memory_of_a_cpu():
    torch.empty(1 << 50, dtype=torch.uint8)


def no_memory_of_a_device():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has")


def no_memory_of_an_npu():
    raise RuntimeError("NPU out of memory. Tried to allocate 2.00 GiB")


def no_memory_of_python():
    bytes(1 << 60)


def no_memory_of_numpy():
    np.empty(1 << 55, np.uint8)


NO_MEMORY = [no_memory_of_a_cpu, no_memory_of_a_device, no_memory_of_an_npu, no_memory_of_python, no_memory_of_numpy]


@pytest.mark.parametrize("run_out", NO_MEMORY)
def test_out_of_memory_is_one_line_with_code_1(capsys, run_out):
    """Row 46, outside of the training: in the final score, say."""
    with pytest.raises((MemoryError, RuntimeError)):
        run_out()
    assert errors.run_main(lambda argv: run_out(), []) == 1
    err = capsys.readouterr().err
    assert err.startswith("error[memory]: ") and err.count("\n") == 1
    assert "out of memory" in err and "lower --batch-size" in err


@pytest.mark.parametrize("run_out", NO_MEMORY)
def test_out_of_memory_in_the_training_says_for_what(tiny_corpus, tmp_path, monkeypatch, capsys, run_out):
    """Row 46."""
    monkeypatch.setattr(gru.TrainingLoss, "forward", lambda self, *args: run_out())
    flags = [*SMALL, "--data-dir", str(tiny_corpus), "-b", "16", "--ckptpath", str(tmp_path / "model")]
    assert errors.run_main(train_8p.main, flags) == 1
    err = capsys.readouterr().err
    longest = max(len(line.split()) for line in (tiny_corpus / "train.de").read_text().splitlines()) + 2
    assert err.startswith("error[memory]: ") and err.count("\n") == 1
    assert f"; rank 0, a batch of 16 pairs a device, longest sentence {longest} tokens; lower --batch-size" in err


def test_a_bug_keeps_its_traceback():
    def fail(argv):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError):
        errors.run_main(fail, [])


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 3000ms"),
        RuntimeError("Connection closed by peer [127.0.0.1]:23456"),
        torch.distributed.DistBackendError("a watchdog's"),
        RuntimeError("HCCL function error: HcclAllReduce"),
    ],
)
def test_a_lost_rank_is_one_line_under_a_launcher(capsys, monkeypatch, error):
    """Rows 1 to 4 under torchrun: an innocent rank prints no traceback."""
    monkeypatch.setenv("RANK", "3")

    def fail(argv):
        raise error

    assert errors.run_main(fail, []) == 6
    err = capsys.readouterr().err
    assert err.startswith(f"error[distributed]: lost another rank: {type(error).__name__}: ")
    assert "; rank 3; see what the other ranks say" in err
    assert errors.run_main(fail, ["--debug"]) == 6
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--lr", "nan"], ["--data-dir", "{corpus}", "--performance"]])
def test_a_path_that_leaves_the_scripts_folder_out_is_no_matter(tiny_corpus, tmp_path, flags):
    """Kind K."""
    fault = [sys.executable, "-c", "import nmt"]
    environment = os.environ | {"PYTHONSAFEPATH": "1"}
    environment.pop("PYTHONPATH", None)
    assert subprocess.run(fault, cwd=REPOSITORY, env=environment, capture_output=True).returncode == 1, "the fault"
    command = [sys.executable, REPOSITORY / "train_8p.py", *SMALL, *(flag.format(corpus=tiny_corpus) for flag in flags)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == (2 if "nan" in flags else 0), done.stderr
    assert "ModuleNotFoundError" not in done.stderr


def test_arguments_can_be_checked_without_a_package():
    """Kind P: a wrapper asks before it touches an earlier run's files."""
    for flags, code in ((["--epochs=3", "--", "--epochs=4"], 0), (["--epochs=abc"], 2), (["--no-flag"], 2), ([], 0)):
        command = [sys.executable, "-S", REPOSITORY / "train_8p.py", "--parse-only", *flags]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (code, "" if code else "begins\n", bool(code))
