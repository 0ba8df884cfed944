"""What a run tells about itself: the step lines that other tools read, the speed, and a bar for people.

Step lines keep the original's form: means since the last line, in brackets means since the epoch began.

    [npu id: 0 ] Epoch: [0][ 50/57]	Time  0.270 ( 0.271)	Data  0.001 ( 0.001)	Loss 5.9470e+00 (5.9470e+00)
"""

import sys
import threading
import time

from nmt import devices, distributed
from nmt.errors import UserError

import torch
from torch import Tensor
from tqdm import tqdm

WARM_UP_STEPS = 5  # of a run: kernels are chosen and memory is claimed in them
PATIENCE = 3  # lines in a row without a finite loss before the run is given up


# tqdm would make a lock between processes, which a rank that is ended leaves behind; only rank 0 writes.
tqdm.set_lock(threading.RLock())


def say(line: str) -> None:
    """Prints a line of the log at once, above the bar if there is one."""
    tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()


class EpochLog:
    """Times one epoch, and prints its lines on rank 0.

    The device is synchronised where the clock is read, and nowhere else: at the lines, after the warm-up, at the end.
    Losses add up on the device.

    Args:
        world: the ranks; only rank 0 prints.
        epoch: the epoch's number.
        epochs: how many the run has.
        steps: the epoch's number of steps.
        steps_before: the run's steps before this epoch.
        print_freq: steps between two lines; the last step always has one.
    """

    def __init__(
        self, world: distributed.World, epoch: int, epochs: int, steps: int, steps_before: int, print_freq: int
    ):
        self._world, self._epoch, self._steps, self._print_freq = world, epoch, steps, print_freq
        warm_up = max(0, WARM_UP_STEPS - steps_before)
        self._warm_up = warm_up if steps > warm_up else 0  # an epoch of warm-up steps alone is timed as it is
        self._step = self._pairs = self._not_finite = 0
        self._totals = torch.zeros(2, dtype=torch.float64)  # since the epoch began, on the host: NPUs have no float64
        self._since_line = torch.zeros(2, device=world.device)  # sum of the losses, number of target positions
        self._data_time = self._data_time_since_line = 0.0
        self._start = self._line = self._timed_from = self._waiting_since = self._now()
        self._line_step = 0
        self._bar = None
        if world.is_main and sys.stdout.isatty():
            self._bar = tqdm(total=steps, desc=f"epoch {epoch + 1}/{epochs}", unit="step", leave=False, file=sys.stdout)

    def _now(self) -> float:
        devices.synchronize(self._world.device)
        return time.perf_counter()

    def data_ready(self) -> None:
        """To be called when the host has built a batch: what passed since the last step's end was the data's time."""
        self._data_time_since_line += time.perf_counter() - self._waiting_since

    def step_done(self, totals: Tensor, pairs: int) -> None:
        """Counts a step.

        Args:
            totals: [2] sum of the losses and number of target positions, over all ranks, on the device.
            pairs: pairs of the step over all ranks.

        Raises:
            UserError: diverged, the loss was not finite on several lines in a row.
        """
        self._step += 1
        self._since_line += totals
        if self._step == self._warm_up:
            self._timed_from = self._now()
        elif self._step > self._warm_up:
            self._pairs += pairs
        if self._bar is not None:
            self._bar.update()
        if self._step % self._print_freq == 0 or self._step == self._steps:
            self._print_line()
        self._waiting_since = time.perf_counter()

    def _print_line(self) -> None:
        now = self._now()
        since_line = self._since_line.cpu().double()
        self._totals += since_line
        self._data_time += self._data_time_since_line
        steps = self._step - self._line_step
        loss = float(since_line[0] / since_line[1])
        mean_loss = float(self._totals[0] / self._totals[1])
        if self._world.is_main:
            line = (
                f"[{self._world.device_type} id: {self._world.index} ] "
                f"Epoch: [{self._epoch}][{self._step:{len(str(self._steps))}d}/{self._steps}]\t"
                f"Time {(now - self._line) / steps:6.3f} ({(now - self._start) / self._step:6.3f})\t"
                f"Data {self._data_time_since_line / steps:6.3f} ({self._data_time / self._step:6.3f})\t"
                f"Loss {loss:.4e} ({mean_loss:.4e})"
            )
            if self._bar is None:
                say(line)
            else:
                self._bar.set_postfix_str(f"loss {loss:.3f}, {self._rate(now):.0f} pairs/s")
        self._not_finite = 0 if loss - loss == 0 else self._not_finite + 1
        if self._not_finite == PATIENCE:
            raise UserError(
                "diverged",
                f"the loss was {loss} on {PATIENCE} lines in a row",
                f"epoch {self._epoch}, step {self._step}",
                "lower --lr, or --loss-scale if one is in use; the best checkpoint so far is kept",
            )
        self._line, self._line_step, self._data_time_since_line = now, self._step, 0.0
        self._since_line.zero_()

    def _rate(self, now: float) -> float:
        return self._pairs / max(now - self._timed_from, 1e-9)

    def finish(self) -> tuple[float, float]:
        """Ends the epoch.

        Returns:
            Pairs a second over all ranks, each pair counted once and the run's warm-up left out; the mean loss.
        """
        rate = self._rate(self._now())
        if self._bar is not None:
            self._bar.close()
        return rate, float(self._totals[0] / self._totals[1])
