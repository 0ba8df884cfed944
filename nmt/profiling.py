"""A profile of a few training steps, by PyTorch's profiler."""

import time
from collections.abc import Callable
from pathlib import Path

from nmt.storage import Log

import torch
from torch.profiler import ProfilerActivity

FIRST, LAST = 6, 10  # steps of this process, from 1: before them kernels are chosen and memory is claimed
ROWS = 20  # operators in the table


def write(folder: Path, profiler: torch.profiler.profile, steps: str, log: Log) -> None:
    """Writes the trace and the table of the most expensive operators. No name is used twice."""
    name = f"train_8p.{time.time_ns() // 1_000_000}"
    trace, table = folder / f"{name}.pt.trace.json", folder / f"{name}.operators.txt"
    averages = profiler.key_averages()
    spent = {"self_cpu_time_total": sum(row.self_cpu_time_total for row in averages)}
    spent["self_device_time_total"] = sum(row.self_device_time_total for row in averages)
    by = "self_device_time_total" if spent["self_device_time_total"] else "self_cpu_time_total"
    try:
        profiler.export_chrome_trace(str(trace))
        text = averages.table(sort_by=by, row_limit=ROWS, max_name_column_width=60)
        table.write_text(f"{steps}\n{text}\n", encoding="utf-8")
    except (OSError, RuntimeError) as error:
        log(f"warning: cannot write the profile to {folder}: {getattr(error, 'strerror', None) or error}")
    else:
        log(f"profile: {steps} are in {trace}, the most expensive operators in {table.name}")


class StepProfile:
    """Profiles steps `FIRST` to `LAST` of this process, if it is asked to.

    Args:
        folder: where the files go. None: nothing is profiled.
        device_type: "npu", "cuda" or "cpu". On an NPU torch_npu has a profiler of its own, and this one sees the host.
        log: takes lines.
    """

    def __init__(self, folder: str | None, device_type: str, log: Log):
        self._done, self._log = 0, log
        self._profiler: torch.profiler.profile | None = None
        if folder is None:
            return
        if device_type == "npu":
            log("note: --profile sees the host alone: torch_npu.profiler and msprof show what an NPU does")
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device_type == "cuda")
        self._profiler = torch.profiler.profile(
            activities=activities,
            schedule=torch.profiler.schedule(wait=FIRST - 2, warmup=1, active=LAST - FIRST + 1, repeat=1),
            on_trace_ready=self._writer(Path(folder)),
        )
        self._profiler.start()

    def _writer(self, folder: Path) -> Callable[[torch.profiler.profile], None]:
        def finish(profiler: torch.profiler.profile) -> None:
            if self._done >= FIRST:  # otherwise it has only warmed up
                write(folder, profiler, f"steps {FIRST} to {self._done}", self._log)

        return finish

    def step_done(self) -> None:
        """Call this after each step."""
        if self._profiler is None:
            return
        self._done += 1
        self._profiler.step()
        if self._done == LAST:
            self.close()

    def close(self) -> None:
        """Ends the profile, also one of fewer steps."""
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        if self._done < FIRST:
            self._log(f"note: there is no profile: it begins with step {FIRST}, and there were {self._done}")
