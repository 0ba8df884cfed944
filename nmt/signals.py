"""SIGTERM and Ctrl-C: the first one asks a process to stop, and it ends within a deadline whatever it does.

Python runs a signal's handler in the main thread, between two steps of the interpreter. A thread that waits in a
collective gets to no such step. So a second thread watches, reads the signals from a pipe, and keeps the deadline.
"""

import contextlib
import ctypes
import multiprocessing
import os
import select
import signal
import sys
import threading
import time
from types import FrameType, TracebackType

# Seconds from the first signal to the end. With SIGTERM there is time to save. Nobody waits longer after Ctrl-C.
GRACE = {signal.SIGTERM: 30.0, signal.SIGINT: 3.5}
# A signal so soon after the first is the same wish. A terminal, `timeout` and a launcher may each hand it on.
SAME_WISH = 1.0
OF_A_RANK = 5.0  # seconds that a rank leaves to its launcher, which has the same deadline and the better message


class Stopped(BaseException):
    """SIGTERM or Ctrl-C has ended the run. No `Exception`, so that no handler of errors takes it for one.

    Args:
        exit_code: 143 or 130.
        what: what became of the work, in one line.

    >>> str(Stopped(143, "the state is saved"))
    'stopped by SIGTERM: the state is saved'
    """

    def __init__(self, exit_code: int, what: str = ""):
        super().__init__(exit_code, what)
        self.exit_code, self.what = exit_code, what

    def __str__(self) -> str:
        name = "Ctrl-C" if self.exit_code == 130 else signal.Signals(self.exit_code - 128).name
        return f"stopped by {name}" + (f": {self.what}" if self.what else "")


class StopRequest:
    """The user's wish that this process ends, as SIGTERM or Ctrl-C has told it. A context, for the main thread.

        with StopRequest() as stop:
            for batch in batches:
                ...
                if stop.signal is not None:
                    save()
                    raise Stopped(stop.exit_code, "the state is saved")

    The first signal only sets `signal`. A second one, or `GRACE` seconds, end the process at once with `exit_code`,
    also where the main thread is blocked. In a rank that a launcher has started, the launcher decides on a second one.
    A signal that was ignored before stays ignored, as after `nohup` or in the background of a shell.

    At the end of the context, the handlers of before are back. A signal that nobody has asked for is told then: the
    context raises `Stopped`.

    Args:
        raises: the first signal raises `Stopped`, or KeyboardInterrupt, in the main thread. For a process that has no
            loop which would ask.
        ends: the process ends at the deadline and at a second signal. Without, whoever asks has to see to that.

    Attributes:
        signal: the number of the first signal, or None.
        again: whether another one came, more than `SAME_WISH` seconds later.
        since: when the first one came, on the monotonic clock.
    """

    def __init__(self, *, raises: bool = False, ends: bool = True):
        self.signal: int | None = None
        self.again = False
        self.since = 0.0
        self._raises, self._ends = raises, ends
        self._has_raised = False
        self._before: dict[int, object] = {}
        self._pipe: int | None = None
        self._former_pipe = -1

    @property
    def exit_code(self) -> int:
        """130 after Ctrl-C, 143 after SIGTERM. Only after a signal."""
        assert self.signal is not None
        return 128 + self.signal

    @property
    def deadline(self) -> float:
        """When the process should have ended, on the monotonic clock. Only after a signal."""
        assert self.signal is not None
        return self.since + GRACE[signal.Signals(self.signal)]

    def install(self) -> None:
        """Takes over both signals. `uninstall` gives them back. Both only in the main thread."""
        reading, self._pipe = os.pipe()
        os.set_blocking(self._pipe, False)
        threading.Thread(target=self._watch, args=(reading,), daemon=True).start()
        self._former_pipe = signal.set_wakeup_fd(self._pipe, warn_on_full_buffer=False)
        for number in GRACE:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._handle)

    def uninstall(self) -> None:
        """Gives the signals back to who had them before.

        The deadline ends too. But an outer request learns of the signal. What is left to do has a deadline then.
        """
        if self._pipe is None:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
            if self.signal is not None and isinstance(outer := getattr(handler, "__self__", None), StopRequest):
                outer._take_over(self.signal)
        self._before.clear()
        signal.set_wakeup_fd(self._former_pipe, warn_on_full_buffer=False)
        os.close(self._pipe)  # the watching thread sees that and ends
        self._pipe = None

    def __enter__(self) -> "StopRequest":
        self.install()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.uninstall()
        if self.signal is not None and error is None:
            raise Stopped(self.exit_code)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """The handler, in the main thread. The watching thread counts, because it is never late."""
        if self._raises and not self._has_raised:
            self._has_raised = True
            raise KeyboardInterrupt if number == signal.SIGINT else Stopped(128 + number)

    def _take_over(self, number: int) -> None:
        """Counts a signal that an inner request has had, from now on. It raises nothing: the inner one has told it."""
        if self._pipe is not None and self.signal is None:
            self._has_raised, self.since, self.signal = True, time.monotonic(), number
            os.write(self._pipe, b"\0")  # no signal, but the thread looks up

    def _watch(self, reading: int) -> None:
        """The life of the watching thread."""
        with os.fdopen(reading, "rb", buffering=0) as pipe:
            while True:
                patience = None
                if self.signal is not None and self._ends:
                    patience = self.deadline + OF_A_RANK * is_rank() - time.monotonic()
                    if patience <= 0 or (self.again and not is_rank()):
                        end_at_once(self.exit_code)
                if not select.select([pipe], [], [], patience)[0]:
                    continue
                numbers = pipe.read(64)
                if not numbers:
                    return
                for number in filter(GRACE.__contains__, numbers):
                    now = time.monotonic()
                    if self.signal is None:
                        self.since, self.signal = now, number
                    elif now > self.since + SAME_WISH:
                        self.again = True


def is_rank() -> bool:
    """Whether a launcher, ours or torchrun's, supervises this process."""
    return multiprocessing.parent_process() is not None or "TORCHELASTIC_RUN_ID" in os.environ


def end_at_once(exit_code: int) -> None:
    """Ends the process, whatever its threads are doing."""
    with contextlib.suppress(OSError):
        os.write(2, f"{Stopped(exit_code, 'at once, in the middle of its work')}\n".encode())
    os._exit(exit_code)


def in_main_thread() -> bool:
    """Whether this thread may take over signals."""
    return threading.current_thread() is threading.main_thread()


def end_imports_at_sigterm() -> None:
    """Lets SIGTERM end the program while it imports. That takes seconds, and `run_main` is not there yet."""
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN:
        signal.signal(signal.SIGTERM, lambda number, frame: end_at_once(128 + number))


PR_SET_PDEATHSIG = 1  # of Linux's prctl


def end_with_parent(parent: int) -> None:
    """Ends this process when its parent has ended, in whatever way, also while this process is stopped.

    Linux does that. It counts the parent's thread that has started this process, so start ranks from the main thread.
    Elsewhere a thread looks once a second, and a stopped process has to be continued first.

    Args:
        parent: the id of the process that has started this one.
    """
    bound = sys.platform == "linux" and ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) == 0
    if os.getppid() != parent:
        os._exit(1)  # it ended before it was bound to us
    if not bound:
        threading.Thread(target=follow_parent, args=(parent,), daemon=True).start()


def follow_parent(parent: int) -> None:
    """Ends this process soon after its parent has ended."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)
