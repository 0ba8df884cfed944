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

from nmt import distributed, launch

import pytest
import ranks
from conftest import REPOSITORY, eventually, gone, heed_signals, refused, state

DEADLINE = 120
RANKS = str(Path(__file__).with_name("ranks.py"))


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
    refused(kind, launch.launch, ranks.die, 2, (how,), says=message)


def test_a_failure_after_the_other_ranks_have_finished_is_not_laid_to_them():
    assert refused("io", launch.launch, ranks.fail_after_the_others, 2, ()) == "error[io]: what; where; todo"


@pytest.mark.parametrize(("number", "code"), [(errno.EPIPE, 0), (errno.ENOSPC, 5)])
def test_an_output_that_a_rank_loses_ends_the_run_as_that_of_one_process_does(number, code):
    done = subprocess.run(
        [sys.executable, RANKS, "lose", str(number)],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.count("\n") == bool(code)


@pytest.mark.parametrize("debug", [False, True])
def test_debug_shows_the_traceback_of_a_ranks_error(capfd, debug):
    refused("data", launch.launch, ranks.fail_for_a_reason, 1, (), debug)
    assert ("ValueError: the cause" in capfd.readouterr().err) == debug


def test_a_rank_says_what_its_outputs_encoding_lacks(capfd, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    launch.launch(ranks.say_umlauts, 1, ())
    assert capfd.readouterr().out == "l\\xe4uft\n"


def test_a_port_that_is_taken_is_an_error_of_the_distributed_kind():
    """Row 38. Where none was asked for, there is another."""
    store = distributed.host_store("127.0.0.1", 0, 1)
    assert str(store.port) in refused("distributed", distributed.host_store, "127.0.0.1", store.port, 1)
    assert distributed.host_store("127.0.0.1", 0, 1).port != store.port


def test_an_absent_master_is_an_error_within_the_timeout():
    """Row 39."""
    start = time.monotonic()
    refused("distributed", distributed.join_store, "127.0.0.1", 1, 2.0)
    assert time.monotonic() - start < 10


# ---------------------------------------------------------------- who is to blame


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
    said = refused("distributed", launch.launch, ranks.count_then_fail, 2, (counters, how), **options)
    assert said.startswith(f"error[distributed]: {message}")
    assert "; process 1 of this node, after step 7; " in said
    assert said.endswith("see its traceback above" if how == "raise" else "; go on with --resume auto")
    err = capfd.readouterr().err
    assert ("ValueError: the cause" in err) == (how == "raise"), "a bug shows its traceback"
    assert "Connection closed" not in err
    assert multiprocessing.active_children() == []


def test_a_rank_that_is_stopped_ends_the_run_within_the_timeout():
    """Row 2, where no collective notices it."""
    counters, start = launch.step_counters(2), time.monotonic()
    options = {"counters": counters, "timeout": 2.0}
    said = refused("distributed", launch.launch, ranks.stop_in_the_third_step, 2, (counters,), **options)
    assert re.search(r"rank 1 made no progress for (\d+) s \(it is stopped, as by SIGSTOP\)", said)
    assert "after step 2" in said
    assert time.monotonic() - start < 30, "with the start of two processes"


def test_a_rank_of_another_node_is_not_known_here(capfd):
    said = refused("distributed", launch.launch, ranks.lose_a_peer, 1, ())
    assert "rank 0 failed: lost another rank: RuntimeError: NCCL communicator was aborted" in said
    assert said.endswith("; see what the other ranks say; the cause is there")
    assert capfd.readouterr().err == ""


# ---------------------------------------------------------------- signals, and the launcher's death


@contextlib.contextmanager
def launched(how: str, grace: float = 3.0, prefix: tuple[str, ...] = (), **environment: str):
    """A launcher in a group of its own, and the ids of its two ranks, which are at work."""
    process = subprocess.Popen(
        [*prefix, sys.executable, RANKS, how, str(grace)],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=heed_signals,
    )
    try:
        pids = [int(process.stdout.readline()) for _ in range(2)]
        if how == "stopped":
            assert eventually(lambda: any(state(pid) == "T" for pid in pids))
        yield process, pids
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=30)


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux")


@needs_proc
@pytest.mark.parametrize("to_group", [False, True])
@pytest.mark.parametrize(("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")])
def test_the_ranks_have_time_to_save_after_a_signal(number, name, to_group):
    """Rows 6 and 8. A signal to the whole group reaches a rank twice, and is one wish."""
    with launched("well") as (process, pids):
        (os.killpg if to_group else os.kill)(process.pid, number)
        _, err = process.communicate(timeout=DEADLINE)
        assert (process.returncode, err) == (128 + number, f"stopped by {name}: the state is saved\n")
        assert gone(pids)


@needs_proc
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_ranks_import_ends_them_without_tracebacks(number):
    """Row 8. Python's own handler would raise in the midst of an import."""
    with launched("well", SLOW_IMPORT="1") as (process, pids):
        os.killpg(process.pid, number)
        out, err = process.communicate(timeout=DEADLINE)
        assert (process.returncode, out) == (128 + number, ""), "no rank has got to its work"
        assert err in ("stopped by SIGTERM\n", "stopped by Ctrl-C\n")
        assert gone(pids)


@needs_proc
@pytest.mark.parametrize("how", ["blocked", "stopped"])
def test_a_rank_that_cannot_end_is_killed_after_the_grace_time(how):
    """Row 7."""
    with launched(how, grace=1.5) as (process, pids):
        start = time.monotonic()
        process.terminate()
        assert not eventually(lambda: process.poll() is not None, within=1.0), "it has its time"
        _, err = process.communicate(timeout=DEADLINE)
        assert time.monotonic() - start < 6
        assert process.returncode == 143
        assert gone(pids)
        assert err.startswith("stopped by SIGTERM: the state is saved; rank 1 was killed ")
        assert err.endswith(", after step 3; go on\n")
        assert err.count("\n") == 1


@needs_proc
@pytest.mark.parametrize("how", ["blocked", "stopped"])
@pytest.mark.parametrize("again", [False, True])
def test_ctrl_c_ends_the_run_within_five_seconds_once_and_twice(how, again):
    """Row 8, with a rank that hears nothing."""
    with launched(how) as (process, pids):
        start = time.monotonic()
        os.killpg(process.pid, signal.SIGINT)
        if again:
            time.sleep(0.3)
            os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=DEADLINE)
        assert time.monotonic() - start < 5
        assert process.returncode == 130
        assert gone(pids)
        assert "Traceback" not in err


@needs_proc
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_while_ranks_are_being_stopped_ends_the_run_at_once(number):
    """It made the exit handler of multiprocessing wait for ever."""
    with launched("stopped", grace=60.0) as (process, pids):
        process.send_signal(signal.SIGTERM)
        time.sleep(1.3)
        assert process.poll() is None, "it waits for its ranks"
        process.send_signal(number)
        start = time.monotonic()
        _, err = process.communicate(timeout=DEADLINE)
        assert time.monotonic() - start < 3
        assert process.returncode == 143
        assert gone(pids)
        assert "rank 1 was killed by a second signal" in err


@needs_proc
def test_a_signal_to_one_rank_alone_stops_the_run():
    with launched("well") as (process, pids):
        os.kill(pids[1], signal.SIGTERM)
        _, err = process.communicate(timeout=DEADLINE)
        assert (process.returncode, err) == (143, "stopped by SIGTERM: the state is saved\n")


@needs_proc
def test_a_rank_that_fails_while_it_saves_is_told():
    with launched("full") as (process, _):
        process.terminate()
        _, err = process.communicate(timeout=DEADLINE)
        assert process.returncode == 143
        assert err == "stopped by SIGTERM: the state is saved; error[io]: no room; where; todo\n"


@needs_proc
@pytest.mark.parametrize("how", ["well", "blocked", "stopped"])
def test_ranks_do_not_outlive_their_launcher(how):
    """Row 9, in the background of a shell, which hands down an ignored SIGINT. A stopped rank cannot even look."""
    shell = ("sh", "-c", '"$@" & echo $! >&2; wait', "sh")
    with launched(how, prefix=shell) as (process, pids):
        launcher = int(process.stderr.readline())
        assert not gone([launcher]) and not gone(pids[:1]) and not gone(pids[1:])
        os.kill(launcher, signal.SIGKILL)
        assert eventually(lambda: gone(pids), within=5)
