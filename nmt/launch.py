"""Starts one process per device and watches over them: all finish, or none is left.

The launcher never blocks and takes no exception from a signal. It looks at its ranks several times a second: whether
they run, what they report, their last step. So it always ends, and says which of them failed.
"""

import atexit
import contextlib
import math
import multiprocessing
import multiprocessing.connection
import multiprocessing.process
import multiprocessing.resource_tracker
import multiprocessing.util
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from nmt.errors import LostPeer, UserError, in_one_line, is_expected, prepare_output
from nmt.signals import GRACE, Stopped, StopRequest, end_with_parent

CONTEXT = multiprocessing.get_context("spawn")
POLL = 0.2  # seconds between two looks at the ranks
ROOT_CAUSE_WAIT = 1.0  # seconds in which the other ranks may report too: the first report is the cause
KILL_WAIT = 5.0  # seconds for the system to end a killed process. One that waits for a broken device may stay.
CHECK = "see the lines above for what it was doing"


@dataclass(frozen=True)
class StepCounter:
    """How many steps a rank has done, in memory that it shares with its launcher."""

    counts: Any  # of all ranks of the node, a ctypes array
    index: int

    def get(self) -> int:
        return self.counts[self.index]

    def set(self, step: int) -> None:
        self.counts[self.index] = step


def step_counters(count: int) -> list[StepCounter]:
    """A counter for each of `count` ranks."""
    counts = CONTEXT.RawArray("q", count)
    return [StepCounter(counts, index) for index in range(count)]


class Report(NamedTuple):
    """How a rank's work ended."""

    when: float  # on the machine's monotonic clock
    error: BaseException | str | None  # an expected error or `Stopped` as it is, another one in one line


@dataclass(eq=False)
class Rank:
    """A child process as its launcher sees it.

    Attributes:
        number: of the rank, among those of all nodes.
        pipe: the child reports on it how its work ended.
        report: what it said there.
        moved: when it last finished a step or was started, on the monotonic clock.
        held: for how many seconds it has been stopped, as by SIGSTOP. Time in which the launcher was stopped too does
            not count.
    """

    number: int
    index: int
    process: multiprocessing.process.BaseProcess
    pipe: multiprocessing.connection.Connection
    counter: StepCounter | None
    report: Report | None = None
    runs: bool = True
    moved: float = field(default_factory=time.monotonic)
    held: float = 0.0
    _step: int = 0
    _seen: float = field(default_factory=time.monotonic)

    def look(self) -> None:
        """Takes in what there is to see of the process."""
        now = time.monotonic()
        ended = self.process.exitcode is not None  # before the pipe is read: a last word may still be in it
        with contextlib.suppress(EOFError, OSError):
            if self.report is None and self.pipe.poll():
                self.report = self.pipe.recv()
        if self.counter is not None and self.counter.get() != self._step:
            self._step, self.moved = self.counter.get(), now
        held = not ended and is_held(self.process.pid)
        self.held = self.held + min(now - self._seen, 5 * POLL) if held else 0.0
        self._seen, self.runs = now, not ended

    @property
    def error(self) -> BaseException | str | None:
        return None if self.report is None else self.report.error

    @property
    def failed(self) -> bool:
        """Whether it ended without a word, or with an error."""
        return self.error is not None or (not self.runs and self.report is None)

    @property
    def idle(self) -> float:
        """Seconds since its last step."""
        return time.monotonic() - self.moved

    def failure(self, how: str, todo: str) -> UserError:
        """The error to raise for this rank. It says after which step."""
        where = f"process {self.index} of this node"
        if self.counter is not None:
            where += f", after step {self._step}" if self._step else ", before the end of its first step"
        return UserError("distributed", f"rank {self.number} {how}", where, todo)


def is_held(pid: int | None) -> bool:
    """Whether a process is stopped, as by SIGSTOP or a debugger. Elsewhere than on Linux nobody can say."""
    try:
        about = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return False
    return about.rpartition(")")[2].split()[0] in ("T", "t")


def launch(
    worker: Callable,
    count: int,
    args: tuple,
    debug: bool = False,
    *,
    counters: Sequence[StepCounter] | None = None,
    first_rank: int = 0,
    timeout: float = math.inf,
    todo: str = CHECK,
) -> None:
    """Runs `worker(index, *args)` in `count` new processes and waits for all of them. For the main thread.

    When it returns or raises, no process is left. The first SIGTERM or Ctrl-C is handed on to the ranks. They have
    `signals.GRACE` seconds to end. A second one ends them at once.

    Args:
        debug: whether a child shows the traceback of an expected error too, and that of a lost rank. It always shows
            that of any other.
        counters: the children count their steps there, if they do.
        first_rank: the number of the first one among the ranks of all nodes.
        timeout: so many seconds a rank may be stopped.
        todo: what the user can do after a rank has died or hung.

    Raises:
        UserError: the first failure's own, or distributed if a rank died, hung or raised another error.
        OSError: the output has no reader or no room. `errors.run_main` handles it.
        Stopped: a signal has ended the run.
    """
    ranks: list[Rank] = []
    # Starting a process makes a helper, and that would let the signals in again that `start` keeps out.
    multiprocessing.resource_tracker.ensure_running()
    with StopRequest(ends=False) as stop:
        try:
            for index in range(count):
                ranks.append(
                    start(worker, index, args, debug, first_rank + index, counters[index] if counters else None)
                )
            supervise(ranks, stop, timeout, todo)
        finally:
            kill(ranks)


def start(worker: Callable, index: int, args: tuple, debug: bool, number: int, counter: StepCounter | None) -> Rank:
    """Starts one child. It takes no signal until it can handle one."""
    pipe, child_end = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(
        target=run_worker, args=(worker, index, args, child_end, os.getpid(), debug, f"rank {number}")
    )
    before = signal.pthread_sigmask(signal.SIG_BLOCK, GRACE)
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    child_end.close()
    return Rank(number, index, process, pipe, counter)


def look(ranks: list[Rank]) -> list[Rank]:
    """Waits until a rank ends, at most `POLL` seconds, and looks at all of them.

    Returns:
        Those that still run.
    """
    multiprocessing.connection.wait([rank.process.sentinel for rank in ranks if rank.runs], POLL)
    for rank in ranks:
        rank.look()
    return [rank for rank in ranks if rank.runs]


def supervise(ranks: list[Rank], stop: StopRequest, timeout: float, todo: str) -> None:
    """Waits for the ranks. Raises the error of the one that fails, or `Stopped` after a signal."""
    running = ranks
    while running:
        running = look(ranks)
        if has_failed(ranks, timeout):
            settle(ranks)
        told = [rank.error for rank in ranks if isinstance(rank.error, Stopped)]
        if stop.signal is not None or told:
            raise wind_down(ranks, stop, stop.signal or told[0].exit_code - 128, todo)
        if has_failed(ranks, timeout):  # still: a stopped rank may have been continued
            raise root_cause(ranks, timeout, todo)


def has_failed(ranks: list[Rank], timeout: float) -> bool:
    return any(rank.failed or rank.held >= timeout for rank in ranks)


def settle(ranks: list[Rank]) -> None:
    """Lets the other ranks report too."""
    until = time.monotonic() + ROOT_CAUSE_WAIT
    while time.monotonic() < until and look(ranks):
        time.sleep(POLL / 4)  # a rank that ends ends the wait of `look`


def wind_down(ranks: list[Rank], stop: StopRequest, number: int, todo: str) -> Stopped:
    """Hands a signal on to the ranks and gives them time to save.

    Args:
        stop: the launcher's own request. It may be without a signal, where a rank alone was told to stop.
        number: the signal.
    """
    deadline = (stop.since if stop.signal else time.monotonic()) + GRACE[signal.Signals(number)]
    running = [rank for rank in ranks if rank.runs]
    for rank in running:
        if rank.process.pid and rank.process.exitcode is None:
            os.kill(rank.process.pid, number)
    while running and not stop.again and time.monotonic() < deadline:
        running = look(ranks)
    errors = [rank.error for rank in ranks]
    notes = [error.what for error in errors if isinstance(error, Stopped) and error.what][:1]
    notes += [str(error) for error in errors if isinstance(error, UserError) and not isinstance(error, LostPeer)][:1]
    if running:
        why = "by a second signal" if stop.again else "because it is stopped" if running[0].held else "after its time"
        notes.append(str(running[0].failure(f"was killed {why}", todo)).partition(": ")[2])
    return Stopped(128 + number, "; ".join(notes))


def root_cause(ranks: list[Rank], timeout: float, todo: str) -> UserError | OSError:
    """The error to show. The other ranks fail because one did.

    A killed rank could not report, and comes first. Then comes a rank's own error, the earliest of several. Then a rank
    that is stopped, or for which the others have waited in vain. Some backends abort a rank that has waited so, and
    others let it report that.

    Args:
        timeout: so long the ranks wait for each other.
        todo: what to do where no rank's own error says it.
    """
    silent = [rank for rank in ranks if rank.report is None]
    dead = [(rank, rank.process.exitcode) for rank in silent if not rank.runs]
    for rank, code in dead:
        if code != -signal.SIGABRT:
            return rank.failure(how_it_died(code), todo)
    reports = [(rank.report.when, rank) for rank in ranks if rank.report is not None and rank.report.error is not None]
    reports.sort(key=lambda each: each[0])
    for _, rank in reports:
        if isinstance(rank.error, UserError | OSError) and not isinstance(rank.error, LostPeer):
            return rank.error
        if isinstance(rank.error, str):
            return rank.failure(f"failed: {rank.error}", "see its traceback above")
    waiting = [rank for rank in silent if rank.runs]
    for rank in sorted(waiting, key=lambda rank: -rank.held):
        if rank.held or rank.idle >= timeout / 2:
            state = " (it is stopped, as by SIGSTOP)" if rank.held else ""
            return rank.failure(f"made no progress for {rank.idle:.0f} s{state}", todo)
    for rank, code in dead:
        return rank.failure(how_it_died(code), todo)
    _, rank = reports[0]
    assert isinstance(rank.error, LostPeer)
    _, what, where, own_todo = rank.error.args
    return rank.failure(f"failed: {what} ({where})", own_todo if todo == CHECK else f"{own_todo}; then {todo}")


def how_it_died(exitcode: int | None) -> str:
    if exitcode is None or exitcode >= 0:
        return f"ended early with exit code {exitcode}"
    return f"was killed by signal {-exitcode}" + (" (out of memory?)" if exitcode == -signal.SIGKILL else "")


def kill(ranks: list[Rank]) -> None:
    """Ends the ranks that still run. None has anything left to do: they have ended, or had their time."""
    for rank in ranks:
        rank.process.kill()
    deadline = time.monotonic() + KILL_WAIT
    for rank in ranks:
        rank.process.join(max(0.0, deadline - time.monotonic()))
        rank.pipe.close()
        if rank.process.is_alive():
            # Nor can the system end it now. multiprocessing would wait for it when this process ends.
            print(f"note: rank {rank.number}, process {rank.process.pid}, does not end", file=sys.stderr)
            atexit.unregister(multiprocessing.util._exit_function)  # type: ignore[attr-defined]


def run_worker(worker: Callable, index: int, args: tuple, pipe, parent: int, debug: bool, name: str) -> None:
    """One child's life: it works, reports how that ended, and ends when its parent ends."""
    end_with_parent(parent)
    prepare_output()
    try:
        StopRequest(raises=True).install()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, GRACE)
        worker(index, *args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        pipe.send(Report(time.monotonic(), Stopped(130)))
        os._exit(130)
    except Stopped as stopped:
        pipe.send(Report(time.monotonic(), stopped))
        os._exit(stopped.exit_code)
    except Exception as error:
        told = in_one_line(error, name)
        expected = is_expected(told)
        if debug or not expected:
            traceback.print_exc()
        pipe.send(Report(time.monotonic(), told if expected else f"{type(error).__name__}: {error}"))
        # Not sys.exit: the interpreter would wait for collectives that no other rank will join.
        os._exit(1)
    pipe.send(Report(time.monotonic(), None))
    leave(0)


def leave(code: int) -> None:
    """Writes a rank's output and ends it at once. At a normal exit, threads of collectives can abort the process."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
