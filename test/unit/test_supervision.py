"""The real program on two ranks, and what becomes of it when a rank or a launcher fails.

What a launcher does in each case stands in test_launch.py, with ranks that start faster.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPOSITORY, SMALL, eventually, gone, heed_signals, state

DEADLINE = 120
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]

pytestmark = [
    pytest.mark.usefixtures("no_launcher"),
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux"),
]


def children(pid: int) -> list[int]:
    """The ids of a process's children, in the order in which they were started."""
    return [int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()]


def ranks_of(pid: int) -> list[int]:
    """The ids of a launcher's ranks, or of torchrun's."""

    def is_rank(child):
        words = Path(f"/proc/{child}/cmdline").read_text().split("\0")
        return any("spawn_main" in word or word.endswith("train_8p.py") for word in words)

    return sorted(child for child in children(pid) if is_rank(child))


@contextlib.contextmanager
def training(corpus: Path, folder: Path, *flags: str, launcher=()):
    """A run on two ranks in a session of its own, and their ids. It is some steps into its training."""
    program = [sys.executable, *launcher, str(REPOSITORY / "train_8p.py"), *SMALL, "--data-dir", str(corpus)]
    program += ["--multiprocessing-distributed", "--device-list", "0,1", "--epochs", "100000", "-b", "16", "-p", "1"]
    with open(folder / "log", "w+") as log:
        process = subprocess.Popen(
            [*program, *flags],
            cwd=folder,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=heed_signals,
        )
        try:
            steps = re.compile(r"Epoch: \[0\]\[2/4\]")
            assert eventually(
                lambda: steps.search((folder / "log").read_text()) or process.poll() is not None, DEADLINE
            )
            ranks = ranks_of(process.pid)
            assert len(ranks) == 2, process.communicate()[1]
            yield process, ranks
        finally:
            for rank in ranks_of(process.pid) if process.poll() is None else ():
                os.kill(rank, signal.SIGKILL)
            process.kill()
            process.communicate(timeout=DEADLINE)


@pytest.mark.parametrize("fault", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
def test_a_rank_that_is_killed_or_stopped_is_named_with_its_step(tiny_corpus, tmp_path, fault):
    """Rows 1 and 2. The other rank waits for it in a collective, and shows no traceback."""
    with training(tiny_corpus, tmp_path, "--dist-timeout", "4") as (process, ranks):
        os.kill(ranks[1], fault)
        assert eventually(lambda: state(ranks[1]) == ("T" if fault == signal.SIGSTOP else "")), "the fault"
        start = time.monotonic()
        _, err = process.communicate(timeout=DEADLINE)
        assert time.monotonic() - start < 20
        assert process.returncode == 6
        last = err.splitlines()[-1]
        how = "was killed by signal 9" if fault == signal.SIGKILL else r"made no progress for \d+ s"
        assert re.match(rf"error\[distributed\]: rank 1 {how}.*; process 1 of this node, after step \d+; ", last)
        assert "Traceback" not in err
        assert gone(ranks)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("is_stopped", [False, True])
def test_a_signal_ends_the_real_program(tiny_corpus, tmp_path, number, is_stopped):
    """Rows 6 to 8."""
    with training(tiny_corpus, tmp_path) as (process, ranks):
        if is_stopped:
            os.kill(ranks[1], signal.SIGSTOP)
            assert eventually(lambda: state(ranks[1]) == "T")
        start = time.monotonic()
        os.killpg(process.pid, number)
        _, err = process.communicate(timeout=DEADLINE)
        assert time.monotonic() - start < (5 if number == signal.SIGINT else 35)
        assert process.returncode == 128 + number
        assert err.splitlines()[-1].startswith("stopped by ")
        assert "Traceback" not in err
        assert gone(ranks)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [[], TORCHRUN], ids=["own", "torchrun"])
@pytest.mark.parametrize("is_stopped", [False, True])
def test_the_real_ranks_do_not_outlive_what_started_them(tiny_corpus, tmp_path, launcher, is_stopped):
    """Row 9. After torchrun's agent had been killed, its ranks trained on for minutes."""
    with training(tiny_corpus, tmp_path, launcher=launcher) as (process, ranks):
        if is_stopped:
            os.kill(ranks[1], signal.SIGSTOP)
            assert eventually(lambda: state(ranks[1]) == "T")
        process.kill()
        assert eventually(lambda: gone(ranks), within=5)


@pytest.mark.slow
def test_a_rank_of_torchruns_that_lost_another_shows_no_traceback(tiny_corpus, tmp_path):
    """Row 1. The traceback that remains is torchrun's own."""
    with training(tiny_corpus, tmp_path, launcher=TORCHRUN) as (process, ranks):
        os.kill(ranks[1], signal.SIGKILL)
        _, err = process.communicate(timeout=DEADLINE)
        assert process.returncode == 1, "torchrun's, whatever it was"
        assert "error[distributed]: lost another rank: " in err or "stopped by SIGTERM" in err
        assert 'train_8p.py", line' not in err
        assert gone(ranks)


AGENT = """
import os, subprocess, sys, time
child = subprocess.Popen(sys.argv[1:], env=os.environ | {"TORCHELASTIC_RUN_ID": "x"}, stdout=subprocess.DEVNULL)
print(child.pid, flush=True)
time.sleep(300)
"""


def test_a_process_of_torchruns_ends_with_its_agent(tiny_corpus, tmp_path):
    """Row 9, fast: a stand-in for the agent, and a rank that is stopped before it could look."""
    program = [sys.executable, str(REPOSITORY / "train_8p.py"), *SMALL, "--data-dir", str(tiny_corpus)]
    agent = subprocess.Popen([sys.executable, "-c", AGENT, *program], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    rank = int(agent.stdout.readline())
    try:
        assert eventually(lambda: "libtorch" in Path(f"/proc/{rank}/maps").read_text(), DEADLINE)
        os.kill(rank, signal.SIGSTOP)
        assert eventually(lambda: state(rank) == "T")
    finally:
        agent.kill()
        agent.communicate(timeout=DEADLINE)
    assert eventually(lambda: gone([rank]), within=5)


def test_two_ranks_whose_reader_has_gone_show_no_traceback(tiny_corpus, tmp_path):
    """Row 47. The one that does not write loses the one that does."""
    flags = f"{' '.join(SMALL)} --multiprocessing-distributed --device-list 0,1 --epochs 100000 -b 16 -p 1"
    script = f'"$1" "$2" --data-dir "$3" {flags} | head -1; echo "${{PIPESTATUS[0]}}"'
    done = subprocess.run(
        ["bash", "-c", script, "bash", sys.executable, REPOSITORY / "train_8p.py", tiny_corpus],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    lines = done.stdout.splitlines()
    assert (len(lines), lines[-1], done.stderr) == (2, "0", "")


WITHOUT_MEMORY = """
import os, sys
import torch, gru, train_8p
from nmt.errors import run_main

def forward(self, *args):
    if torch.distributed.get_rank() == 1:
        torch.empty(1 << 50, dtype=torch.uint8)
    return loss(self, *args)

loss, gru.TrainingLoss.forward = gru.TrainingLoss.forward, forward
if __name__ == "__main__":
    sys.exit(run_main(train_8p.main, sys.argv[1:]))
"""


def test_a_rank_without_memory_ends_the_run_with_1_in_one_line(tiny_corpus, tmp_path):
    """Row 46: from any rank. It was 6, and a traceback."""
    (tmp_path / "program.py").write_text(WITHOUT_MEMORY)
    flags = ["--multiprocessing-distributed", "--device-list", "0,1", "--data-dir", str(tiny_corpus), "-b", "16"]
    done = subprocess.run(
        [sys.executable, "program.py", *SMALL, *flags],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert done.returncode == 1, done.stderr
    assert re.fullmatch(r"error\[memory\]: .*; rank 1, a batch of 8 pairs a device, longest .*\n", done.stderr)
