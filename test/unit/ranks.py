"""What the ranks of test_launch.py do. It imports neither torch nor pytest, so that they start fast.

As a program it is a launcher: `ranks.py HOW SECONDS` starts two ranks that `work`, and SECONDS are SIGTERM's grace.
"""

import ctypes
import os
import signal
import sys
import time

from nmt import launch, signals
from nmt.errors import Stopped, UserError, run_main

DEADLINE = 120

if __name__ == "__mp_main__" and "SLOW_IMPORT" in os.environ:  # as torch's is
    os.write(1, f"{os.getpid()}\n".encode())
    time.sleep(0.4)


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


def fail_after_the_others(index: int) -> None:
    """Rank 0's scoring or saving, say, of which the others do nothing."""
    if index == 0:
        time.sleep(2)
        raise UserError("io", "what", "where", "todo")


def lose_the_output(index: int, number: int) -> None:
    raise OSError(number, os.strerror(number))


def fail_for_a_reason(index: int) -> None:
    raise UserError("data", "what", "where", "todo") from ValueError("the cause")


def say_umlauts(index: int) -> None:
    print("läuft")


def count_then_fail(index: int, counters, how: str) -> None:
    """Rank 1 fails after its seventh step. Rank 0 is in order, and has learned of that as from a collective."""
    if index == 0:
        while counters[1].get() != 7:
            time.sleep(0.05)
        time.sleep(1.5 if how == "hang" else 0.5)
        raise RuntimeError("[../gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:12345")
    counters[index].set(7)
    die(index, how) if how in ("raise", "exit", "kill") else time.sleep(DEADLINE)


def stop_in_the_third_step(index: int, counters) -> None:
    counters[index].set(2)
    if index == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(DEADLINE)


def lose_a_peer(index: int) -> None:
    raise RuntimeError("NCCL communicator was aborted on rank 0")


def block() -> None:
    """Waits where Python runs no handler, as in a collective of a rank that has gone."""
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)


def work(index: int, counters, how: str) -> None:
    """Tells its id and trains until it is asked to stop. Then it saves. In rank 1, or in rank 0, something is wrong."""
    with signals.StopRequest() as stop:
        counters[index].set(3)
        os.write(1, f"{os.getpid()}\n".encode())
        if how == "blocked" and index == 1:
            block()
        elif how == "stopped" and index == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        while stop.signal is None:
            time.sleep(0.05)
        if how == "full" and index == 0:
            raise UserError("io", "no room", "where", "todo")
        time.sleep(0.3)
        raise Stopped(stop.exit_code, "the state is saved")


def main(argv: list[str]) -> None:
    if argv[0] == "lose":
        launch.launch(lose_the_output, 1, (int(argv[1]),))
    counters = launch.step_counters(2)
    signals.GRACE.update({signal.SIGTERM: float(argv[1]), signal.SIGINT: 1.0})
    launch.launch(work, 2, (counters, argv[0]), counters=counters, todo="go on")


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
