"""Whether other work takes the cores that this process computes on.

PyTorch's threads wait for each other at the end of each operation. Where one of them has no core, all wait. On a busy
machine two threads may be several times slower than one.

Linux counts for each thread how long it has run, and how long it was ready to run but had no core. Their share says it:
it is near 0 on a quiet machine, whatever the machine computes, and whatever the load was before.
"""

import time
from pathlib import Path

from nmt.storage import Log

TASKS = Path("/proc/self/task")
WATCHED = 2.0  # seconds: a shorter time says little
MUCH = 0.25  # of the time that its threads could have run in


def times() -> tuple[float, float] | None:
    """Seconds that the threads of this process have run, and that they have waited for a core. None: nobody counts."""
    ran = waited = 0
    try:
        for task in TASKS.iterdir():
            text = (task / "schedstat").read_text().split()
            ran, waited = ran + int(text[0]), waited + int(text[1])
    except (OSError, ValueError, IndexError):  # not Linux, or a thread that has ended meanwhile
        return None
    return ran / 1e9, waited / 1e9


class CoreWatch:
    """Says once if the threads of this process wait for cores. It looks at the first seconds of the training.

    Args:
        threads: that an operation has. One thread has nothing to mend, so then it says nothing.
        log: takes the note.
    """

    def __init__(self, threads: int, log: Log):
        self._threads, self._log = threads, log
        self._began, self._start = time.monotonic(), times() if threads > 1 else None

    def look(self) -> None:
        """Call this from time to time."""
        if self._start is None or time.monotonic() - self._began < WATCHED:
            return
        start, end, self._start = self._start, times(), None
        if end is None:
            return
        ran, waited = end[0] - start[0], end[1] - start[1]
        if waited > MUCH * (ran + waited):
            part = waited / (ran + waited)
            self._log(
                f"note: other processes take the cores: the {self._threads} threads of this one waited {part:.0%} of "
                "their time; OMP_NUM_THREADS=1 in front of the command may be several times as fast"
            )
