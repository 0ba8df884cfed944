"""The log of a run: the step lines that other tools read, the speed, and a bar for people.

Step lines keep the original's form: means since the last line, and in brackets means since the epoch began.

    [npu id: 0 ] Epoch: [0][ 50/57]	Time  0.270 ( 0.271)	Data  0.001 ( 0.001)	Loss 5.9470e+00 (5.9470e+00)

They count epochs from 0, as the original did. Everything else that people read counts from 1.
"""

import math
import os
import sys
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, TypeVar

from nmt import devices
from nmt.distributed import World
from nmt.errors import UserError, printable

import torch
from torch import Tensor
from tqdm import tqdm

WARM_UP_STEPS = 5  # of a run: in them kernels are chosen and memory is claimed
COMPILE_STEPS = 2  # of a run, whose seconds the ModelZoo calls CompileTime
# Nats a target token, of a run that may still learn. A guess among a million words costs 14. A learning rate ten times
# too high costs up to 50 for some steps, and the run may recover. A rate a thousand times too high costs far more.
HIGHEST_LOSS = 100.0
Result = TypeVar("Result")
LINES_WITHOUT_A_LOSS = 3  # so many lines in a row without a loss up to that end the run

# By default tqdm makes a lock between processes, and a rank that is killed leaves it behind. Only rank 0 writes.
tqdm.set_lock(threading.RLock())


def only_rank_0_speaks(rank: int) -> None:
    """Silences the standard output of the other ranks to the end of the process. apex and torch_npu print there too."""
    if rank > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def say(line: str) -> None:
    """Prints a line of the log at once, above the bar if there is one.

    It stays one line: control characters other than tabs are escaped. So no file name, no word of a corpus and no
    other text from outside can make a line that looks like a result.
    """
    tqdm.write("\t".join(map(printable, line.split("\t"))), file=sys.stdout)
    sys.stdout.flush()


def say_all(lines: Generator[str, None, Result]) -> Result:
    """Prints lines as they come, and returns what their generator returns."""
    while True:
        try:
            say(next(lines))
        except StopIteration as end:
            return end.value


def mean(sums: Tensor) -> float:
    """A loss for a target token. `sums` is [2]: the sum of the losses, and the number of target tokens."""
    loss, tokens = sums
    return float(loss / tokens)


def may_recover(loss: float) -> bool:
    """Whether a mean loss is that of a run that may still learn: finite, and at most `HIGHEST_LOSS`."""
    return math.isfinite(loss) and loss <= HIGHEST_LOSS


@dataclass(frozen=True)
class StepLine:
    """What a step line says, also where a terminal shows the bar instead.

    Attributes:
        epoch: from 0.
        step, steps: of the epoch. The line comes after `step`, which counts from 1.
        seconds, data_seconds: a step, and the part of it in which the host built the batch.
        loss, mean_loss: nats a target token, since the last line and since the epoch began.
        pairs_per_second: over all ranks, since the last line.
    """

    epoch: int
    step: int
    steps: int
    seconds: float
    data_seconds: float
    loss: float
    mean_loss: float
    pairs_per_second: float


class RunBar:
    """One bar for the whole run, on a terminal: the epoch, and the time that is left.

    The time left is the steps to come, and the validations to come as soon as one is done. It is that of this process's
    own pace so far.

    Args:
        epochs: of the run.
        steps: of an epoch.
        done: steps of the run that are done.
    """

    def __init__(self, epochs: int, steps: int, done: int):
        self._epochs, self._steps, self._done = epochs, steps, done
        self._step_seconds = self._validation_seconds = 0.0
        self._timed_steps = self._validations = 0
        self._since: float | None = None  # when the validation began
        layout = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps{postfix}"
        total = epochs * steps
        self._bar = tqdm(total=total, initial=done, bar_format=layout, leave=False, file=sys.stdout)
        self._name_epoch()

    def _name_epoch(self) -> None:
        epoch = min(self._done // self._steps + 1, self._epochs)
        self._bar.set_description_str(f"epoch {epoch}/{self._epochs}", refresh=False)

    def seconds_left(self) -> float:
        """Seconds to the end of the training, as far as they are known."""
        steps = self._epochs * self._steps - self._done
        validations = self._epochs - self._done // self._steps
        pace = self._step_seconds / max(1, self._timed_steps)
        return steps * pace + validations * self._validation_seconds / max(1, self._validations)

    def step_done(self) -> None:
        """Counts a step. The first of an epoch ends the validation before it."""
        if self._since is not None:
            self._validation_seconds += time.perf_counter() - self._since
            self._validations += 1
            self._since = None
            self._name_epoch()
        self._done += 1
        self._bar.update()

    def line(self, steps: int, seconds: float, what: str) -> None:
        """Shows how long the run will take, and what a step line would say.

        Args:
            steps, seconds: since the last line.
            what: is shown behind the time.
        """
        self._timed_steps, self._step_seconds = self._timed_steps + steps, self._step_seconds + seconds
        left = tqdm.format_interval(self.seconds_left())
        self._bar.set_postfix_str(f"{left} left, {what}")

    def epoch_done(self) -> None:
        """The validation begins."""
        self._since = time.perf_counter()
        self._bar.set_postfix_str("validation")

    def close(self) -> None:
        self._bar.close()


class EpochLog:
    """Times one epoch and prints its lines.

    The device is synchronised where the clock is read, and nowhere else: at the lines, after the warm-up, at the end.
    Losses add up on the device.

    Args:
        world: the ranks.
        epoch: the epoch's number, from 0.
        steps: the epoch's number of steps.
        steps_before: this process's steps before.
        print_freq: steps between two lines. The last step always has one.
        bar: takes the place of the lines.
        told: is called with each line.
    """

    def __init__(
        self,
        world: World,
        epoch: int,
        *,
        steps: int,
        steps_before: int,
        print_freq: int,
        bar: RunBar | None = None,
        told: Callable[[StepLine], object] = lambda line: None,
    ):
        self._bar, self._told = bar, told
        self._world, self._epoch, self._steps, self._print_freq = world, epoch, steps, print_freq
        warm_up = max(0, WARM_UP_STEPS - steps_before)
        self._warm_up = warm_up if steps > warm_up else 0  # an epoch of warm-up steps alone is timed as it is
        self._compile_steps = 0 if steps_before else min(COMPILE_STEPS, steps)
        self._first = 0  # the step of the epoch that this process began with
        self._step = self._pairs = self._lines_above = 0
        self._seconds = 0.0  # that other processes took for the pairs that are counted
        # The sum of the losses and the number of target tokens: since the last line, on the device, and since the epoch
        # began, on the host, because NPUs have no float64.
        self._since_line = torch.zeros(2, device=world.device)
        self._totals = torch.zeros(2, dtype=torch.float64)
        self._data_time = self._data_time_since_line = 0.0
        self._start = self._line = self._timed_from = self._waiting_since = self._now()
        self._line_step = self._line_pairs = 0

    def _now(self) -> float:
        devices.synchronize(self._world.device)
        return time.perf_counter()

    def data_ready(self) -> None:
        """Call this when the host has built a batch. The time since the end of the last step was the data's."""
        self._data_time_since_line += time.perf_counter() - self._waiting_since

    def step_done(self, total_loss: Tensor, total_tokens: Tensor, pairs: int) -> None:
        """Counts a step.

        Args:
            total_loss: [] the sum of the losses over all ranks, on the device.
            total_tokens: [] their number of target tokens, likewise.
            pairs: the step's pairs over all ranks.

        Raises:
            UserError: diverged, if the loss was not finite, or above `HIGHEST_LOSS`, on several lines in a row.
        """
        self._step += 1
        self._since_line += torch.stack((total_loss, total_tokens))
        done = self._step - self._first
        if done == self._compile_steps:
            say(f"* CompileTime {self._now() - self._start:.3f}")
        if done == self._warm_up:
            self._timed_from = self._now()
        elif done > self._warm_up:
            self._pairs += pairs
        self._line_pairs += pairs
        if self._bar is not None:
            self._bar.step_done()
        if self._step % self._print_freq == 0 or self._step == self._steps:
            self._print_line()
        self._waiting_since = time.perf_counter()

    def _print_line(self) -> None:
        now = self._now()
        since_line = self._since_line.cpu().double()
        self._totals += since_line
        self._data_time += self._data_time_since_line
        steps, done = self._step - self._line_step, self._step - self._first
        line = StepLine(
            self._epoch,
            self._step,
            self._steps,
            seconds=(now - self._line) / steps,
            data_seconds=self._data_time_since_line / steps,
            loss=mean(since_line),
            mean_loss=mean(self._totals),
            pairs_per_second=self._line_pairs / max(now - self._line, 1e-9),
        )
        loss = line.loss
        if self._bar is None:
            say(
                f"[{self._world.device_type} id: {self._world.index} ] "
                f"Epoch: [{self._epoch}][{self._step:{len(str(self._steps))}d}/{self._steps}]\t"
                f"Time {line.seconds:6.3f} ({(now - self._start) / done:6.3f})\t"
                f"Data {line.data_seconds:6.3f} ({self._data_time / done:6.3f})\t"
                f"Loss {loss:.4e} ({line.mean_loss:.4e})"
            )
        else:
            self._bar.line(steps, now - self._line, f"loss {loss:.3f}, {self._rate(now):.0f} pairs/s")
        self._told(line)
        self._lines_above = 0 if may_recover(loss) else self._lines_above + 1
        if self._lines_above == LINES_WITHOUT_A_LOSS:
            raise UserError(
                "diverged",
                f"no loss up to {HIGHEST_LOSS:g} on {LINES_WITHOUT_A_LOSS} lines in a row, the last one is {loss:g}",
                f"epoch {self._epoch + 1}, step {self._step}",
                "lower --lr, or --loss-scale if one is in use; the best checkpoint so far is kept",
            )
        self._line, self._line_step, self._line_pairs, self._data_time_since_line = now, self._step, 0, 0.0
        self._since_line.zero_()

    def _rate(self, now: float) -> float:
        return self._pairs / max(self._seconds + now - self._timed_from, 1e-9)

    def state(self) -> dict[str, Any]:
        """What a run goes on from, see `nmt.resume.Part`. Waits for the device."""
        timed = self._step - self._first > self._warm_up
        return {
            "step": self._step,
            "pairs": self._pairs,
            "seconds": self._seconds + (self._now() - self._timed_from if timed else 0.0),
            "since_line": self._since_line.tolist(),
            "totals": self._totals.tolist(),
            "lines_above": self._lines_above,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Takes over what `state` gave. Call it before the first step."""
        self._step = self._first = self._line_step = state["step"]
        self._pairs, self._seconds, self._lines_above = state["pairs"], state["seconds"], state["lines_above"]
        self._since_line.copy_(torch.tensor(state["since_line"]))
        self._totals.copy_(torch.tensor(state["totals"], dtype=torch.float64))
        if self._steps - self._step <= self._warm_up:
            self._warm_up = 0
        self._compile_steps = min(self._compile_steps, self._steps - self._step)

    def finish(self) -> tuple[float, float]:
        """Ends the epoch.

        Returns:
            Pairs a second over all ranks, without the run's warm-up, and the mean loss. Each pair counts once.
        """
        rate = self._rate(self._now())
        if self._bar is not None:
            self._bar.epoch_done()
        return rate, mean(self._totals)
