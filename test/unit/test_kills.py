"""The real program is killed at random moments and goes on, until it is done. The weights are those of a quiet run."""

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time

from bench.soak import family
from nmt import checkpoint, resume

import pytest
from conftest import REPOSITORY, write_corpus

KILLS_AN_EPOCH = 5  # at most: a run has so many epochs that it is not over before its kills
DEADLINE = 900  # seconds, against hanging, on a busy machine too


def command(ranks: int, corpus, path, batch: int, epochs: int, by_torchrun: bool) -> list[str]:
    program = [
        str(REPOSITORY / "test" / "unit" / "hashing.py"),
        "--data-dir",
        str(corpus),
        "--ckptpath",
        str(path),
        "--device",
        "cpu",
    ]
    program += ["--emb-dim", "16", "--hid-dim", "24", "-b", str(batch), "--epochs", str(epochs), "-p", "1"]
    program += ["--best", "loss", "--lr", "0.001", "--beam-size", "1", "--save-every", "0.0001", "--resume", "auto"]
    # Once in about forty starts gloo's ranks wait for each other's connection. They go on after this time.
    program += ["--dist-timeout", "60"]
    if by_torchrun:
        options = ["--nproc-per-node", str(ranks), "--max-restarts", "1000", "--monitor-interval", "0.1"]
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", *options, *program]
    if ranks == 1:
        return [sys.executable, *program]
    devices = ",".join(map(str, range(ranks)))
    return [sys.executable, *program, "--multiprocessing-distributed", "--device-list", devices]


class Cycles:
    """Runs a command again and again, and kills a process of it each time, until it ends by itself."""

    def __init__(self, command: list[str], folder, path, seed: int):
        self._command, self._log, self._path = command, folder / "log", path
        self._random = random.Random(seed)
        self.kills = []  # what was killed
        self._log.touch()

    def _start(self) -> subprocess.Popen:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with open(self._log, "a") as log:
            return subprocess.Popen(self._command, stdout=log, stderr=log, env=environment, start_new_session=True)

    def run(self, cycles: int) -> None:
        """At most so many kills. Then the run ends undisturbed.

        Raises:
            AssertionError: a process was left, or the run ended with another code than 0.
        """
        process = self._start()
        deadline = time.monotonic() + DEADLINE
        while True:
            if len(self.kills) < cycles and self._wait_for_steps(process, self._random.randint(0, 6)):
                if not self._kill_one_of(process):
                    continue
                deadline = time.monotonic() + DEADLINE
            if process.poll() is None and len(self.kills) >= cycles:
                process.wait(deadline - time.monotonic())
            if process.poll() is None:
                continue
            if process.returncode == 0:
                return
            assert self.kills, self._log.read_text()
            process = self._start()

    def _wait_for_steps(self, process: subprocess.Popen, steps: int) -> bool:
        """Waits until the run has saved so many more states, and a moment longer. False: it ended before."""
        goal = self._saved() + steps
        deadline = time.monotonic() + DEADLINE
        while process.poll() is None and self._saved() < goal:
            assert time.monotonic() < deadline, self._log.read_text()[-2000:]
            time.sleep(0.005)
        time.sleep(self._random.random() * (0.05 if steps else 5.0))
        return process.poll() is None

    def _saved(self) -> int:
        return self._log.read_text().count("\nstate: step ")

    def _kill_one_of(self, process: subprocess.Popen) -> bool:
        """Kills the launcher or a rank, and sees that nothing is left of the run unless its launcher goes on."""
        members = family(process.pid)
        victim = self._random.choice([member for member in members if "resource_tracker" not in command_line(member)])
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
            self.kills.append("launcher" if victim == process.pid else "other")
        if "torch.distributed.run" in self._command and victim != process.pid:
            return True  # the agent starts the ranks anew
        process.wait(60)
        deadline = time.monotonic() + 10
        while any(os.path.exists(f"/proc/{member}") and is_alive(member) for member in members):
            assert time.monotonic() < deadline, "a process outlived its run"
            time.sleep(0.05)
        self._check_files()
        return True

    def _check_files(self) -> None:
        """Asserts that the state and the best model can be read, and are not older than what the log promised."""
        log = self._log.read_text()
        promised = [int(step) for step in re.findall(r"^state: step (\d+) is saved in ", log, re.MULTILINE)]
        if promised and "\nBLEU score = " not in log:  # then the run is complete, and its state is gone
            state = resume.load(resume.state_path(self._path))
            assert state.step >= promised[-1]
        epochs = [
            int(epoch) for epoch in re.findall(r"^validation: epoch (\d+)/.*(?:\n  .*)*\nsaved: ", log, re.MULTILINE)
        ]
        if epochs:
            assert checkpoint.load(self._path).scores["epoch"] + 1 >= epochs[-1]


def command_line(pid: int) -> str:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline") as text:
        return text.read()
    return "resource_tracker"  # it has ended


def is_alive(pid: int) -> bool:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0] != "Z"
    return False


def check(tmp_path, corpus, ranks: int, cycles: int, batch: int, by_torchrun: bool = False) -> list[str]:
    """Asserts that a run killed so often ends as a quiet one. Returns what was killed."""
    found, epochs = {}, max(4, cycles // KILLS_AN_EPOCH)
    for name, kills in (("quiet", 0), ("killed", cycles)):
        folder = tmp_path / name
        folder.mkdir()
        path = folder / "model.pth"
        runs = Cycles(command(ranks, corpus, path, batch, epochs, by_torchrun), folder, path, seed=cycles)
        runs.run(kills)
        saved, log = checkpoint.load(path), (folder / "log").read_text()
        found[name] = checkpoint.Checkpoint(saved.state_dict, sizes={}, scores=saved.scores).digest()
        # An epoch that is done twice has the same figures and weights.
        found[f"{name} lines"] = set(re.findall(r"^(?:validation: |hash: ).*", log, re.MULTILINE))
        assert not resume.state_path(path).exists()
        assert [file.name for file in folder.iterdir() if "partial" in file.name] == []
    assert len(runs.kills) == cycles, "the run was over before"
    assert found["killed"] == found["quiet"]
    assert found["killed lines"] == found["quiet lines"]
    assert len(found["quiet lines"]) == 2 * epochs
    return runs.kills


def test_a_run_whose_processes_are_killed_ends_as_a_quiet_one(tmp_path, no_launcher):
    """Rows 1, 9 and 10, and what is promised of a resumed run: two kills."""
    check(tmp_path, write_corpus(tmp_path / "corpus", 80), 2, 2, batch=4)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "cycles"), [(1, 200), (2, 20), (2, 100), (3, 20)])
def test_any_number_of_kills_does_no_harm(tmp_path, no_launcher, ranks, cycles):
    """On `sample/`. With one process all kills meet training, validation or saving."""
    kills = check(tmp_path, REPOSITORY / "sample", ranks, cycles, batch=24)
    assert set(kills) == ({"launcher", "other"} if ranks > 1 else {"launcher"})


@pytest.mark.slow
def test_torchrun_restarts_what_is_killed_and_an_agent_that_is_killed_is_started_anew(tmp_path, no_launcher):
    kills = check(tmp_path, REPOSITORY / "sample", 2, 20, batch=24, by_torchrun=True)
    assert set(kills) == {"launcher", "other"}
