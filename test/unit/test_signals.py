"""SIGTERM, Ctrl-C and the death of a parent: what a single process does. Those of ranks are in test_launch.py."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from nmt import signals
from nmt.errors import run_main
from nmt.signals import Stopped, StopRequest

import pytest
from conftest import REPOSITORY, SMALL, eventually, gone, heed_signals, state

DEADLINE = 60
TERM, INT = signal.SIGTERM, signal.SIGINT

# A program that says it is ready and then does what the first argument says, as the training loop would.
PROGRAM = """
import ctypes, os, signal, sys, time
from nmt import signals
from nmt.errors import Stopped, run_main

def block():
    "Waits where Python runs no handler, as in a collective."
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)

def main(argv):
    how = argv[0]
    try:
        if how == "raises":
            print("ready", flush=True)
            time.sleep(60)
        if how == "raises, blocked":
            print("ready", flush=True)
            block()
        with signals.StopRequest() as stop:
            print("ready", flush=True)
            if how == "blocked":
                block()
            while stop.signal is None or how == "goes on":
                time.sleep(0.02)
            if how == "saves":
                time.sleep(1.5)
                raise Stopped(stop.exit_code, "the state is saved")
            if how == "hangs later":
                raise Stopped(stop.exit_code)
    finally:
        if how == "hangs later":
            block()
        print("tidied up", flush=True)

if __name__ == "__main__":
    grace = float(sys.argv[2])
    signals.GRACE.update({signal.SIGTERM: grace, signal.SIGINT: min(grace, 3.0)})
    sys.exit(run_main(main, sys.argv[1:]))
"""


@contextlib.contextmanager
def started(*command: str, prepare=heed_signals, **environment: str):
    """A process that has printed its first line."""
    process = subprocess.Popen(
        command,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=prepare,
    )
    try:
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.communicate(timeout=DEADLINE)


def program(how: str, grace: float = 60.0, **options):
    return started(sys.executable, "-c", PROGRAM, how, str(grace), **options)


@pytest.mark.parametrize(("number", "name"), [(TERM, "SIGTERM"), (INT, "Ctrl-C")])
def test_the_first_signal_only_asks(number, name):
    """Row 6: there is time to save."""
    with program("saves") as process:
        process.send_signal(number)
        out, err = process.communicate(timeout=DEADLINE)
        assert (process.returncode, out, err) == (
            128 + number,
            "tidied up\n",
            f"stopped by {name}: the state is saved\n",
        )


def test_a_signal_that_nobody_asks_for_before_the_end_is_not_lost():
    with program("at the end") as process:
        process.terminate()
        assert process.communicate(timeout=DEADLINE) == ("tidied up\n", "stopped by SIGTERM\n")
        assert process.returncode == 143


@pytest.mark.parametrize("how", ["goes on", "blocked", "raises, blocked"])
@pytest.mark.parametrize("number", [TERM, INT])
def test_the_process_ends_at_the_deadline_whatever_it_does(how, number):
    """Rows 7 and 8. Nothing else would end a process that waits for a lost rank."""
    with program(how, grace=1.0) as process:
        time.sleep(0.3)  # it is ready, and about to block
        start = time.monotonic()
        process.send_signal(number)
        _, err = process.communicate(timeout=DEADLINE)
        assert process.returncode == 128 + number
        assert 0.7 < time.monotonic() - start < 5
        assert err.count("\n") == 1 and err.endswith(": at once, in the middle of its work\n")


@pytest.mark.parametrize("how", ["goes on", "blocked", "raises, blocked"])
def test_a_second_signal_ends_the_process_at_once(how):
    """Row 8."""
    with program(how) as process:
        time.sleep(0.3)  # it is ready, and about to block
        process.terminate()
        time.sleep(signals.SAME_WISH + 0.3)
        assert process.poll() is None
        process.send_signal(INT)
        process.communicate(timeout=5)
        assert process.returncode == 143, "the first one counts"


def test_a_signal_that_comes_twice_in_a_moment_is_one_wish():
    """`timeout` sends it to its child and then to the group. A terminal and a launcher do likewise."""
    with program("saves") as process:
        for _ in range(3):
            process.terminate()
            time.sleep(0.1)
        _, err = process.communicate(timeout=DEADLINE)
        assert (process.returncode, err) == (143, "stopped by SIGTERM: the state is saved\n")


def test_a_second_signal_to_a_rank_is_its_launchers_business():
    with program("saves", TORCHELASTIC_RUN_ID="x") as process:
        process.terminate()
        time.sleep(signals.SAME_WISH + 0.2)
        process.terminate()
        _, err = process.communicate(timeout=DEADLINE)
        assert (process.returncode, err) == (143, "stopped by SIGTERM: the state is saved\n")


def test_what_is_left_to_do_after_the_loop_has_a_deadline_too():
    with program("hangs later", grace=1.0) as process:
        process.terminate()
        process.communicate(timeout=10)
        assert process.returncode == 143


def test_a_signal_while_a_run_that_was_stopped_tidies_up_raises_nothing():
    request = StopRequest(raises=True)
    request.install()
    try:
        with pytest.raises(Stopped), StopRequest() as inner:
            os.kill(os.getpid(), TERM)
            assert eventually(lambda: inner.signal == TERM)
        os.kill(os.getpid(), TERM)
        time.sleep(0.05)
        assert (request.signal, request.again) == (TERM, False)
    finally:
        request.uninstall()


def test_without_a_loop_a_signal_ends_the_program_in_order():
    with program("raises") as process:
        process.terminate()
        assert process.communicate(timeout=5) == ("tidied up\n", "stopped by SIGTERM\n")
        assert process.returncode == 143
    with program("raises") as process:
        process.send_signal(INT)
        assert process.communicate(timeout=5) == ("tidied up\n", "interrupted\n")
        assert process.returncode == 130


def test_a_signal_that_was_ignored_stays_ignored():
    """As Ctrl-C is for what a shell starts in its background."""
    with program("raises", prepare=lambda: signal.signal(INT, signal.SIG_IGN)) as process:
        process.send_signal(INT)
        time.sleep(0.5)
        assert process.poll() is None
        process.terminate()
        assert process.wait(timeout=5) == 143


def test_the_former_handlers_come_back():
    before = [signal.getsignal(number) for number in signals.GRACE]
    threads = threading.active_count()
    with StopRequest() as outer:
        inside = [signal.getsignal(number) for number in signals.GRACE]
        with StopRequest():
            pass
        assert [signal.getsignal(number) for number in signals.GRACE] == inside
        assert outer.signal is None
    assert [signal.getsignal(number) for number in signals.GRACE] == before
    assert eventually(lambda: threading.active_count() == threads), "the watching threads have ended"


def test_a_program_runs_in_a_thread_too():
    """Only the main thread may take over signals."""
    codes = []
    thread = threading.Thread(target=lambda: codes.append(run_main(lambda argv: None, [])))
    thread.start()
    thread.join()
    assert codes == [0]


def test_stopped_is_no_error_that_a_handler_could_take_for_its_own(capsys):
    def main(argv):
        with contextlib.suppress(Exception):
            raise Stopped(143, "a\nb")

    assert run_main(main, []) == 143
    assert capsys.readouterr().err == "stopped by SIGTERM: a\\nb\n"


# ---------------------------------------------------------------- process 1 of a container

UNSHARE = ["unshare", "--user", "--map-root-user"] if os.geteuid() else ["unshare"]
UNSHARE += ["--pid", "--fork", "--kill-child"]
may_unshare = bool(shutil.which("unshare")) and not subprocess.run([*UNSHARE, "true"], capture_output=True).returncode
needs_unshare = pytest.mark.skipif(not may_unshare, reason="may not make a container")


def child_of(pid: int) -> int:
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)


@needs_unshare
@pytest.mark.parametrize(
    ("how", "number", "code"), [("raises", TERM, 143), ("raises", INT, 130), ("blocked", TERM, 143)]
)
def test_process_1_of_a_container_ends_at_a_signal(how, number, code):
    """Kind H. The system drops a signal to process 1 that has no handler, and so the first process here goes on."""
    with started(*UNSHARE, sys.executable, "-c", "import time; print('ready', flush=True); time.sleep(60)") as process:
        os.kill(child_of(process.pid), TERM)
        time.sleep(0.5)
        assert process.poll() is None, "the fault"
    with started(*UNSHARE, sys.executable, "-c", PROGRAM, how, "1") as process:
        os.kill(child_of(process.pid), number)
        process.communicate(timeout=10)
        assert process.returncode == code


@pytest.mark.parametrize("container", [False, pytest.param(True, marks=needs_unshare)])
def test_sigterm_ends_the_real_program_with_143(tiny_corpus, tmp_path, container):
    """Row 6 and kind H. A process without ranks died without a word."""
    command = [sys.executable, str(REPOSITORY / "train_8p.py"), *SMALL, "--data-dir", str(tiny_corpus), "-p", "1"]
    command += ["--epochs", "100000", "-b", "16", "--ckptpath", str(tmp_path / "model")]
    process = subprocess.Popen(
        (UNSHARE if container else []) + command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_signals,
    )
    try:
        while "] Epoch: [" not in process.stdout.readline():
            assert process.poll() is None, process.stderr.read()
        os.kill(child_of(process.pid) if container else process.pid, TERM)
        _, err = process.communicate(timeout=signals.GRACE[TERM] + 5)
    finally:
        process.kill()
        process.communicate(timeout=DEADLINE)
    assert process.returncode == 143
    assert err.splitlines()[-1].startswith("stopped by SIGTERM")
    assert "Traceback" not in err


def test_sigterm_during_the_imports_ends_the_program(tmp_path):
    """They take seconds, in which process 1 of a container would hear nothing."""
    (tmp_path / "torch.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(60)")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, str(REPOSITORY / "train_8p.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, preexec_fn=heed_signals)
    assert (done.returncode, done.stderr) == (143, "stopped by SIGTERM: at once, in the middle of its work\n")


# ---------------------------------------------------------------- the death of a parent

PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE, text=True)
print(child.stdout.readline(), end="", flush=True)
print(child.pid, flush=True)
time.sleep(60)
"""
CHILD = """
import os, signal, sys, time
from nmt import signals
if {polls}:
    sys.platform = "elsewhere"
signals.end_with_parent(os.getppid())
print("ready", flush=True)
if {stops}:
    os.kill(os.getpid(), signal.SIGSTOP)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("polls", "stops"), [(False, False), (False, True), (True, False)])
def test_a_process_ends_with_its_parent(polls, stops):
    """Row 9. A stopped process is ended by the system alone."""
    with started(sys.executable, "-c", PARENT, CHILD.format(polls=polls, stops=stops)) as parent:
        child = int(parent.stdout.readline())
        assert eventually(lambda: state(child) == ("T" if stops else "S"))
        parent.kill()
        parent.wait()
        assert eventually(lambda: gone([child]), within=5)


def test_a_process_whose_parent_has_gone_before_ends_at_once():
    command = [sys.executable, "-c", "from nmt import signals; signals.end_with_parent(1 << 30); print('went on')"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=DEADLINE)
    assert (done.returncode, done.stdout) == (1, "")
