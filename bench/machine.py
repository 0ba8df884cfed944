"""The tools of the other benchmarks: the machine, its product rate, processes' memory and time, and the tables.

    python -m bench.machine

prints the machine and how fast it multiplies matrices. The memory of processes is read from `/proc`, so the benchmarks
need Linux.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from nmt import products

import numpy
import torch

ROOT = Path(__file__).resolve().parent.parent
TRAIN = [sys.executable, str(ROOT / "train_8p.py")]
PRODUCT = (4096, 1280, 5893)  # rows, inner size, columns: the output layer of a batch of Multi30k
ENOUGH_SECONDS = 0.05  # of work between two readings of the clock


# ---------------------------------------------------------------- the machine


def use_all_cores() -> None:
    """Gives torch a thread for each core of this process, as `train_8p.py` does, unless OMP_NUM_THREADS is set."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(len(os.sched_getaffinity(0)))


def describe(device: torch.device | str = "cpu") -> str:
    """Date, processor, cores, memory, versions, threads and device, one `name: value` a line."""
    device = torch.device(device)
    packages = " ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "spacy"))
    facts = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(" ", "seconds"),
        "processor": _first("/proc/cpuinfo", r"model name\s*: (.*)") or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory": f"{int(_first('/proc/meminfo', r'MemTotal: *([0-9]+) kB')) / 2**20:.1f} GiB",
        "versions": f"python {platform.python_version()} {packages}",
        "torch threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
    }
    return "\n".join(f"{name}: {value}" for name, value in facts.items())


def _first(path: str, pattern: str) -> str:
    """The first match of the pattern's group in a file, or an empty string."""
    found = re.search(pattern, Path(path).read_text())
    return found[1] if found else ""


# ---------------------------------------------------------------- the limit


def matmul_rate(dtype: torch.dtype, device: torch.device | str = "cpu", repetitions: int = 7) -> float:
    """The machine's rate of products in FLOP/s: that of the fastest library at hand, see `product_rates`."""
    return max(product_rates(dtype, device, repetitions).values())


def product_rates(dtype: torch.dtype, device: torch.device | str = "cpu", repetitions: int = 7) -> dict[str, float]:
    """FLOP/s of a (4096x1280)·(1280x5893) product by each library: the median of `repetitions`, after a warm-up."""
    rows, inner, columns = PRODUCT
    left = torch.randn(rows, inner, device=device).to(dtype)
    right = torch.randn(inner, columns, device=device).to(dtype)
    out = torch.empty(rows, columns, device=device, dtype=dtype)  # a fresh one would cost page faults each time
    libraries: dict[str, Callable[[], object]] = {"torch.mm": lambda: torch.mm(left, right, out=out)}
    if dtype == torch.float32 and torch.device(device).type == "cpu":
        arrays = left.numpy(), right.numpy(), out.numpy()
        libraries["numpy"] = lambda: numpy.matmul(arrays[0], arrays[1], out=arrays[2])
        if products.onednn_answers():
            libraries["oneDNN"] = lambda: products.by_onednn(left, right)

    def seconds(multiply: Callable[[], object], count: int) -> float:
        start = clock(device)
        for _ in range(count):
            multiply()
        return (clock(device) - start) / count

    rates = {}
    for name, multiply in libraries.items():
        seconds(multiply, 1)
        count = math.ceil(ENOUGH_SECONDS / seconds(multiply, 1))
        middle = statistics.median(seconds(multiply, count) for _ in range(repetitions))
        rates[name] = 2 * rows * inner * columns / middle
    return rates


def clock(device: torch.device | str) -> float:
    """Seconds on the clock, after the device has finished its work."""
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def multiply_adds(src_len: float, steps: float, output_dim: int, emb_dim: int = 256, hid_dim: int = 512) -> float:
    """Multiply-adds of the model's matrix products for one pair, forward. Products that all steps share count once.

    With E = emb_dim, H = hid_dim, V = output_dim, S source positions and T decoder steps:

        encoder        S x (E + H) x 3H             input and recurrent products of the three gates
        decoder        T x (E + H) x 3H + H x 3H    [e_t ; h] at each step, the context's share once a sentence
        output layer   T x (E + H) x V  + H x V     [e_t ; h_t] at each step, the context's share once a sentence

    It is linear in S and T, so means over a corpus give the mean of its pairs.

    Args:
        src_len: positions of the source, `<sos>` and `<eos>` counted.
        steps: decoder steps: the target's tokens without `<sos>`.
        output_dim: size of the target vocabulary.
        emb_dim, hid_dim: sizes of the model.

    >>> multiply_adds(14, 14, 5893) / 1e6  # doctest: +ELLIPSIS
    100.19...
    """
    read = emb_dim + hid_dim
    encoder = src_len * read * 3 * hid_dim
    decoder = (steps * read + hid_dim) * 3 * hid_dim
    output = (steps * read + hid_dim) * output_dim
    return encoder + decoder + output


def flops_per_pair(
    src_lengths: torch.Tensor, trg_lengths: torch.Tensor, output_dim: int, emb_dim: int = 256, hid_dim: int = 512
) -> float:
    """FLOP that training on one of these pairs takes on average: six times its `multiply_adds`.

    A multiply-add is two FLOP. For each product forward there are two backward: for the input's gradient and for the
    weight's. So it is 2 x (1 + 2) = 6.

    Args:
        src_lengths, trg_lengths: [pairs] the sentences' lengths, `<sos>` and `<eos>` counted. A target of n tokens
            takes n - 1 steps: nothing predicts its `<sos>`.
        output_dim, emb_dim, hid_dim: as in `multiply_adds`.

    Returns:
        A product rate in FLOP/s divided by this is the limit in pairs a second.
    """
    steps = trg_lengths.double().mean().item() - 1
    return 6 * multiply_adds(src_lengths.double().mean().item(), steps, output_dim, emb_dim, hid_dim)


# ---------------------------------------------------------------- processes


@dataclass(frozen=True)
class Line:
    """A line that a process has printed.

    Attributes:
        text: without its end.
        seconds: since the process was started.
        peak_mb: the process's peak memory until then.
    """

    text: str
    seconds: float
    peak_mb: float


def follow(command: list[str], cwd: Path | str = ROOT) -> Iterator[Line]:
    """Starts a command and yields its lines, stdout's and stderr's, as they come. Closing the iterator ends it.

    Raises:
        SystemExit: the command failed. The message has its last lines.
    """
    start, peak_mb, texts = time.perf_counter(), 0.0, []
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "encoding": "utf-8"}
    with subprocess.Popen(command, cwd=cwd, **options) as process:
        try:
            for line in process.stdout:
                seconds = time.perf_counter() - start
                # At the very end the process may have ended: then the line before has its peak.
                peak_mb = max(peak_mb, peak_rss_mb(process.pid))
                texts.append(line.rstrip("\n"))
                yield Line(texts[-1], seconds, peak_mb)
            if process.wait():
                raise SystemExit(f"{' '.join(command)} failed:\n" + "\n".join(texts[-20:]))
        finally:
            process.terminate()


def first_line(
    command: list[str], pattern: str | re.Pattern[str], cwd: Path | str = ROOT
) -> tuple[Line, re.Match[str]]:
    """Starts a command, and ends it at the first line that contains `pattern`.

    Raises:
        SystemExit: there was no such line.
    """
    with contextlib.closing(follow(command, cwd)) as lines:
        for line in lines:
            if match := re.search(pattern, line.text):
                return line, match
    raise SystemExit(f"{' '.join(command)} printed no line with {re.compile(pattern).pattern}")


def peak_rss_mb(pid: int | str = "self") -> float:
    """Peak memory of a process so far, in MB of 10^6 bytes. It is 0 if the process has ended.

    VmHWM and not `getrusage`, whose ru_maxrss a process inherits from the one that started it.
    """
    try:
        return int(_first(f"/proc/{pid}/status", r"VmHWM:\s*([0-9]+) kB") or 0) * 1024 / 1e6
    except (FileNotFoundError, ProcessLookupError):
        return 0.0


# ---------------------------------------------------------------- flags and tables


def build_parser(docstring: str, repetitions: int = 3) -> argparse.ArgumentParser:
    """The flags that all scripts have: --data-dir, --device, --repetitions. `docstring` is the script's."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=docstring.partition("\n")[0], formatter_class=formatter)
    parser.add_argument("--data-dir", required=True, type=Path, metavar="DIR", help="Multi30k, as for train_8p.py")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="where to run")
    parser.add_argument("--repetitions", type=int, default=repetitions, metavar="N", help="rounds, for the medians")
    return parser


def medians(rows: Iterable[dict[str, float]]) -> dict[str, float]:
    """Column by column, the median over the repetitions.

    >>> medians([{"plain": 1.0, "port": 20.0}, {"plain": 3.0, "port": 10.0}, {"plain": 2.0, "port": 90.0}])
    {'plain': 2.0, 'port': 20.0}
    """
    rows = list(rows)
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def repeat(repetitions: int, measure: Callable[[int], dict[str, float]]) -> dict[str, float]:
    """Calls `measure` with 1, 2, ..., prints a row of a table each time, and returns the medians, its last row."""
    rows = []

    def print_row(first: object, values: Iterable[object]) -> None:
        cells = [f"{cell:>{max(len(name), 8)}}" for name, cell in zip(rows[0], values, strict=True)]
        print(f"{first:>10}  " + "  ".join(cells), flush=True)

    for number in range(1, repetitions + 1):
        rows.append(measure(number))
        if number == 1:
            print_row("round", rows[0])
        print_row(number, map(rounded, rows[-1].values()))
    middle = medians(rows)
    print_row("median", map(rounded, middle.values()))
    return middle


def rounded(value: float) -> str:
    """Four digits or more.

    >>> [rounded(value) for value in (0.75123, 21.9123, 4612.345)]
    ['0.7512', '21.91', '4612']
    """
    return f"{value:.{max(0, min(4, 3 - math.floor(math.log10(abs(value) or 1))))}f}"


def print_figure(name: str, value: float, must: str) -> None:
    """The line for one of the figures, after the tables.

    >>> print_figure("share", 0.75123, ">= 0.65")
    figure: share = 0.7512 (must: >= 0.65)
    """
    print(f"figure: {name} = {rounded(value)} (must: {must})", flush=True)


if __name__ == "__main__":
    use_all_cores()
    place = "cuda" if torch.cuda.is_available() else "cpu"
    print(describe(place))
    for each in (torch.float32, torch.bfloat16):
        rates = {name: f"{rate / 1e9:.0f}" for name, rate in product_rates(each, place).items()}
        print(f"products in {each}, GFLOP/s: {', '.join(f'{name} {rate}' for name, rate in rates.items())}")
