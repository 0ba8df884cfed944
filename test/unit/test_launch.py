"""The processes of a run: how a failure of one ends all, and where they meet."""

import contextlib
import errno
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from nmt import launch
from nmt.errors import UserError

import pytest
from conftest import REPOSITORY, TEST_PATHS, eventually, gone, heed_signals, refused, state

DEADLINE = 120


def die(index: int, how: str) -> None:
    """A rank with a fault, beside one that would wait for it for ever."""
    if index == 0:
        time.sleep(DEADLINE)
    elif how == "raise":
        raise ValueError("the cause")
    elif how == "user":
        raise UserError("data", "what", "where", "todo")
    elif how == "exit":
        os._exit(0)
    else:
        os.kill(os.getpid(), 9)


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ("raise", "distributed", "rank 1 failed: ValueError: the cause"),
        ("user", "data", "what; where; todo"),
        ("exit", "distributed", "rank 1 ended early with exit code 0"),
        ("kill", "distributed", "rank 1 was killed by signal 9"),
    ],
)
def test_a_rank_that_fails_ends_the_run_with_its_reason(how, kind, message):
    """Rows 1, 3 and 4."""
    refused(kind, launch.launch, die, 2, (how,), says=message)


def fail_after_the_others(index: int) -> None:
    """Rank 0's scoring or saving, say, of which the others do nothing."""
    if index == 0:
        time.sleep(2)
        raise UserError("io", "what", "where", "todo")


def test_a_failure_after_the_other_ranks_have_finished_is_not_laid_to_them():
    assert refused("io", launch.launch, fail_after_the_others, 2, ()) == "error[io]: what; where; todo"


def lose_the_output(index: int, number: int) -> None:
    raise OSError(number, os.strerror(number))


@pytest.mark.parametrize(("number", "code"), [(errno.EPIPE, 0), (errno.ENOSPC, 5)])
def test_an_output_that_a_rank_loses_ends_the_run_as_that_of_one_process_does(number, code):
    script = f"""
import sys
sys.path[:0] = {[str(REPOSITORY), *TEST_PATHS]}
import test_launch
from nmt import launch
from nmt.errors import run_main
if __name__ == "__main__":
    sys.exit(run_main(lambda argv: launch.launch(test_launch.lose_the_output, 1, ({number},)), []))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, timeout=DEADLINE
    )
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.count("\n") == bool(code)


def fail_for_a_reason(index: int) -> None:
    raise UserError("data", "what", "where", "todo") from ValueError("the cause")


@pytest.mark.parametrize("debug", [False, True])
def test_debug_shows_the_traceback_of_a_ranks_error(capfd, debug):
    refused("data", launch.launch, fail_for_a_reason, 1, (), debug)
    assert ("ValueError: the cause" in capfd.readouterr().err) == debug


def say_umlauts(index: int) -> None:
    print("läuft")


def test_a_rank_says_what_its_outputs_encoding_lacks(capfd, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    launch.launch(say_umlauts, 1, ())
    assert capfd.readouterr().out == "l\\xe4uft\n"


def test_a_port_that_is_taken_is_an_error_of_the_distributed_kind():
    """Row 38. Where none was asked for, there is another."""
    store = launch.host_store("127.0.0.1", 0, 1)
    assert str(store.port) in refused("distributed", launch.host_store, "127.0.0.1", store.port, 1)
    assert launch.host_store("127.0.0.1", 0, 1).port != store.port


def test_an_absent_master_is_an_error_within_the_timeout():
    """Row 39."""
    start = time.monotonic()
    refused("distributed", launch.join_store, "127.0.0.1", 1, 2.0)
    assert time.monotonic() - start < 10


# ---------------------------------------------------------------- who is to blame


def count_then_fail(index: int, counters, how: str) -> None:
    """Rank 1 fails after its seventh step. Rank 0 is in order, and has learned of that as from a collective."""
    if index == 0:
        while counters[1].get() != 7:
            time.sleep(0.05)
        time.sleep(1.5 if how == "hang" else 0.5)
        raise RuntimeError("[../gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:12345")
    counters[index].set(7)
    die(index, how) if how in ("raise", "exit", "kill") else time.sleep(DEADLINE)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("kill", "rank 5 was killed by signal 9"),
        ("exit", "rank 5 ended early with exit code 0"),
        ("raise", "rank 5 failed: ValueError: the cause"),
        ("hang", "rank 5 made no progress for "),
    ],
)
def test_the_rank_that_fails_is_named_with_its_step_and_what_to_do_and_the_innocent_one_is_silent(capfd, how, message):
    """Rows 1 to 4: the other rank reports too, and its report comes first where the fault is silent."""
    counters = launch.step_counters(2)
    options = {"counters": counters, "first_rank": 4, "timeout": 2.0, "todo": "go on with --resume auto"}
    said = refused("distributed", launch.launch, count_then_fail, 2, (counters, how), **options)
    assert said.startswith(f"error[distributed]: {message}")
    assert "; process 1 of this node, after step 7; " in said
    assert said.endswith("see its traceback above" if how == "raise" else "; go on with --resume auto")
    err = capfd.readouterr().err
    assert ("ValueError: the cause" in err) == (how == "raise"), "a bug shows its traceback"
    assert "Connection closed" not in err
    assert multiprocessing.active_children() == []


def stop_in_the_third_step(index: int, counters) -> None:
    counters[index].set(2)
    if index == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(DEADLINE)


def test_a_rank_that_is_stopped_ends_the_run_within_the_timeout():
    """Row 2, where no collective notices it."""
    counters, start = launch.step_counters(2), time.monotonic()
    options = {"counters": counters, "timeout": 2.0}
    said = refused("distributed", launch.launch, stop_in_the_third_step, 2, (counters,), **options)
    assert re.search(r"rank 1 made no progress for (\d+) s \(it is stopped, as by SIGSTOP\)", said)
    assert "after step 2" in said
    assert time.monotonic() - start < 30, "with the start of two processes"


def lose_a_peer(index: int) -> None:
    raise RuntimeError("NCCL communicator was aborted on rank 0")


def test_a_rank_of_another_node_is_not_known_here(capfd):
    said = refused("distributed", launch.launch, lose_a_peer, 1, ())
    assert "rank 0 failed: lost another rank: RuntimeError: NCCL communicator was aborted" in said
    assert said.endswith("; see what the other ranks say; the cause is there")
    assert capfd.readouterr().err == ""


# ---------------------------------------------------------------- signals, and the launcher's death

# A launcher whose ranks do what the first argument says. They tell their ids first.
PROGRAM = """
import ctypes, os, signal, sys, threading, time
from nmt import launch, signals
from nmt.errors import Stopped, run_main

def block():
    "Waits where Python runs no handler, as in a collective of a rank that has gone."
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)

def work(index, counters, how):
    with signals.StopRequest() as stop:
        counters[index].set(3)
        os.write(1, f"{os.getpid()}\\n".encode())
        if how == "blocked" and index == 1:
            block()
        elif how == "stopped" and index == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        while stop.signal is None:
            time.sleep(0.05)
        if how == "full" and index == 0:
            raise launch.UserError("io", "no room", "where", "todo")
        time.sleep(0.3)  # it saves
        raise Stopped(stop.exit_code, "the state is saved")

def main(argv):
    counters = launch.step_counters(2)
    launch.launch(work, 2, (counters, argv[0]), counters=counters, todo="go on")

if __name__ == "__main__":
    signals.GRACE.update({signal.SIGTERM: float(sys.argv[2]), signal.SIGINT: 2.0})
    sys.exit(run_main(main, sys.argv[1:]))
"""


@contextlib.contextmanager
def launched(tmp_path, how: str, grace: float = 3.0, prefix: tuple[str, ...] = ()):
    """A launcher in a group of its own, and the ids of its two ranks, which are at work."""
    (tmp_path / "program.py").write_text(PROGRAM)
    process = subprocess.Popen(
        [*prefix, sys.executable, str(tmp_path / "program.py"), how, str(grace)],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=heed_signals,
    )
    try:
        ranks = [int(process.stdout.readline()) for _ in range(2)]
        if how == "stopped":
            assert eventually(lambda: any(state(pid) == "T" for pid in ranks))
        yield process, ranks
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=30)


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux")


@needs_proc
@pytest.mark.parametrize("to_group", [False, True])
@pytest.mark.parametrize(("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")])
def test_the_ranks_have_time_to_save_after_a_signal(tmp_path, number, name, to_group):
    """Rows 6 and 8. A signal to the whole group reaches a rank twice, and is one wish."""
    with launched(tmp_path, "well") as (process, ranks):
        (os.killpg if to_group else os.kill)(process.pid, number)
        _, err = process.communicate(timeout=DEADLINE)
        assert (process.returncode, err) == (128 + number, f"stopped by {name}: the state is saved\n")
        assert gone(ranks)


@needs_proc
@pytest.mark.parametrize("how", ["blocked", "stopped"])
def test_a_rank_that_cannot_end_is_killed_after_the_grace_time(tmp_path, how):
    """Row 7."""
    with launched(tmp_path, how) as (process, ranks):
        start = time.monotonic()
        process.terminate()
        assert not eventually(lambda: process.poll() is not None, within=2.5), "it has its time"
        _, err = process.communicate(timeout=DEADLINE)
        assert time.monotonic() - start < 6
        assert process.returncode == 143
        assert gone(ranks)
        assert err.startswith("stopped by SIGTERM: the state is saved; rank 1 was killed ")
        assert err.endswith(", after step 3; go on\n")
        assert err.count("\n") == 1


@needs_proc
@pytest.mark.parametrize("how", ["blocked", "stopped"])
@pytest.mark.parametrize("again", [False, True])
def test_ctrl_c_ends_the_run_within_five_seconds_once_and_twice(tmp_path, how, again):
    """Row 8, with a rank that hears nothing."""
    with launched(tmp_path, how) as (process, ranks):
        start = time.monotonic()
        os.killpg(process.pid, signal.SIGINT)
        if again:
            time.sleep(0.3)
            os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=DEADLINE)
        assert time.monotonic() - start < 5
        assert process.returncode == 130
        assert gone(ranks)
        assert "Traceback" not in err


@needs_proc
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_while_ranks_are_being_stopped_ends_the_run_at_once(tmp_path, number):
    """It made the exit handler of multiprocessing wait for ever."""
    with launched(tmp_path, "stopped", grace=60.0) as (process, ranks):
        process.send_signal(signal.SIGTERM)
        time.sleep(1.3)
        assert process.poll() is None, "it waits for its ranks"
        process.send_signal(number)
        start = time.monotonic()
        _, err = process.communicate(timeout=DEADLINE)
        assert time.monotonic() - start < 3
        assert process.returncode == 143
        assert gone(ranks)
        assert "rank 1 was killed by a second signal" in err


@needs_proc
def test_a_signal_to_one_rank_alone_stops_the_run(tmp_path):
    with launched(tmp_path, "well") as (process, ranks):
        os.kill(ranks[1], signal.SIGTERM)
        _, err = process.communicate(timeout=DEADLINE)
        assert (process.returncode, err) == (143, "stopped by SIGTERM: the state is saved\n")


@needs_proc
def test_a_rank_that_fails_while_it_saves_is_told(tmp_path):
    with launched(tmp_path, "full") as (process, _):
        process.terminate()
        _, err = process.communicate(timeout=DEADLINE)
        assert process.returncode == 143
        assert err == "stopped by SIGTERM: the state is saved; error[io]: no room; where; todo\n"


@needs_proc
@pytest.mark.parametrize("how", ["well", "blocked", "stopped"])
def test_ranks_do_not_outlive_their_launcher(tmp_path, how):
    """Row 9, in the background of a shell, which hands down an ignored SIGINT. A stopped rank cannot even look."""
    shell = ("sh", "-c", '"$@" & echo $! >&2; wait', "sh")
    with launched(tmp_path, how, prefix=shell) as (process, ranks):
        launcher = int(process.stderr.readline())
        assert not gone([launcher]) and not gone(ranks[:1]) and not gone(ranks[1:])
        os.kill(launcher, signal.SIGKILL)
        assert eventually(lambda: gone(ranks), within=5)
