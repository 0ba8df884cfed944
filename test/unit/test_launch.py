"""The processes of a run: how a failure of one ends all, and where they meet."""

import errno
import os
import subprocess
import sys
import time

from nmt import launch
from nmt.errors import UserError

import pytest
from conftest import REPOSITORY, TEST_PATHS, refused

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
    store = launch.host_store("127.0.0.1", 0, 1)
    refused("distributed", launch.host_store, "127.0.0.1", store.port, 1)


def test_an_absent_master_is_an_error_within_the_timeout():
    refused("distributed", launch.join_store, "127.0.0.1", 1, 2.0)
