"""Checks a new machine: are its devices right, are they equally fast, do they reach each other, does training learn?

    bash test/check_device.sh
    bash test/check_device.sh --device=npu --quick
    python -m bench.check_device --device cpu --processes 2

It prints a page: a row a check, with what was measured and what is expected, and at the end what to report. The same is
in `result.json`. Exit code 0: every check passed. 8: one did not. Others are those of train_8p.py.

`bench/device_checks.py` has the checks of a device. They run in one process for each device. Each process writes down
what it finds, and this one watches: a process that dies or hangs ends them all, and is named.
"""

import dataclasses
import datetime
import functools
import importlib.metadata
import itertools
import json
import multiprocessing.resource_tracker
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from nmt import flags
from nmt.errors import UserError, prepare_imports, printable, run_main

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "sample"
CHECK_FAILED = 8  # the exit code
SLOW = 0.5  # a device below this part of the others' median speed is slow
GRACE = 10.0  # seconds that the ranks get to report what they have waited for
PASS, FAIL, SKIPPED = "pass", "FAIL", "skipped"

CHECK = "flags"
EXAMPLES = """examples:
  bash test/check_device.sh                     all devices of this machine, some minutes
  bash test/check_device.sh --device=npu        its NPUs
  bash test/check_device.sh --quick             without the training
  bash test/check_device.sh --device_list=4,5   two of its devices

Through bash, --conda_name=NAME activates a conda environment first.
Every flag may be written with underscores or hyphens, and with = or a space.
Exit codes: 0 every check passed; 8 one did not; 2 a bad flag, or there is no such device; others as in train_8p.py.
"""


@dataclass(frozen=True)
class Settings:
    """What the check can be told. `flags.row` says what a row holds."""

    # fmt: off
    device: str = flags.row(CHECK, "auto", ("auto", "npu", "cuda", "cpu"),
        "what to check; auto: npu, then cuda, then cpu")
    device_list: list[int] | None = flags.row(CHECK, None, flags.index_list,
        "indices such as 0,1,2,3; left out: all devices of this machine, on a CPU --processes")
    processes: int | None = flags.row(CHECK, None, flags.positive_int,
        "on a CPU, how many processes stand in for devices; left out: 2")
    quick: bool = flags.row(CHECK, False, None, "leave the training of sample/ out")
    epochs: int = flags.row(CHECK, 10, flags.positive_int,
        "times through sample/ in the training; with another number than 10 the BLEU is reported only")
    deadline: float = flags.row(CHECK, 300.0, flags.seconds,
        "seconds without a sign of life after which a check or the training has failed", unit="SECONDS")
    output: str | None = flags.row(CHECK, None, "DIR",
        "a new folder for the result; left out: test/output/check_device/TIME in the repository")
    tiny: bool = flags.row(CHECK, False, None, "small sizes, whose speeds mean nothing: for simulated devices")
    debug: bool = flags.row(CHECK, False, None, "show the traceback of every error")
    # fmt: on


def build_parser() -> flags.StrictParser:
    return flags.parser_of(
        Settings,
        prog="check_device",
        usage="bash test/check_device.sh [--flag=value]...",
        description="Checks the devices of a machine, and says what to report.",
        epilog=EXAMPLES,
    )


# `--help` needs no package.
if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv[1:]):
    sys.exit(run_main(lambda argv: build_parser().print_help(), []))
# A bad flag is told at once: the imports take seconds.
if __name__ == "__main__" and (code := run_main(build_parser().parse_args, sys.argv[1:])):
    sys.exit(code)
prepare_imports()

import data
from bench import accept, device_checks, logs
from bench.device_checks import Check
from nmt import devices, distributed, jsonlines, launch
from nmt.checkout import commit_of
from nmt.distributed import World
from nmt.signals import StopRequest

import torch


class Row(NamedTuple):
    """A row of the page.

    Attributes:
        check: its name.
        outcome: `PASS`, `FAIL` or `SKIPPED`.
        measured, expected: in words.
        figures: by device, in the units of `device_checks.Check`.
    """

    check: str
    outcome: str
    measured: str
    expected: str = ""
    figures: dict[str, float] = {}


class Failure(NamedTuple):
    """A rank that died, hung or gave up: which check it was in, and what happened."""

    rank: int
    check: str
    what: str


# ---------------------------------------------------------------- main


def main(argv: list[str], rows: list[Row]) -> None:
    """Makes the checks.

    Args:
        argv: the flags.
        rows: those of the page are added to it.
    """
    settings = Settings(**vars(build_parser().parse_args(argv)))
    device_type = devices.choose_device_type(settings.device)
    indices = indices_of(settings, device_type)
    folder = new_folder(settings)
    start = datetime.datetime.now(datetime.timezone.utc)
    data.load(SAMPLE, log=lambda line: None)  # the ranks find it in the cache
    for line in heading(device_type, indices, start):
        print(line, flush=True)
    table = device_checks.checks(device_type, indices)
    found, failure = run_ranks(settings, device_type, indices, folder)
    of_devices = rows_of(table, found, failure, device_type, indices)
    of_training = training(settings, device_type, indices, folder, broken=failure is not None)
    for row in itertools.chain(of_devices, of_training):
        rows.append(row)
        for line in lines_of(row):
            print(line, flush=True)

    seconds = (datetime.datetime.now(datetime.timezone.utc) - start).total_seconds()
    about = machine(device_type, indices) | {"command": command(argv), "seconds": f"{seconds:.0f}"}
    failed = [row.check for row in rows if row.outcome == FAIL]
    result: dict[str, Any] = {"verdict": FAIL if failed else PASS, "failed": failed, "about": about}
    result["checks"] = [row._asdict() for row in rows]
    path = folder / "result.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print("\nTo report this machine, send this page and result.json:")
    for name, value in (about | {"JSON": shown(path)}).items():
        print(f"  {name + ':':<13}{printable(value)}")
    print(f"\n{last_line(rows, f'{len(indices)} x {device_type}')}", flush=True)


def heading(device_type: str, indices: Sequence[int], start: datetime.datetime) -> Iterable[str]:
    """The lines above the rows. One says why it is not an NPU, if it is not and torch_npu is there."""
    if reason := devices.passed_over(device_type):
        yield f"note: torch_npu is installed, but there is no NPU to check: {printable(reason)}"
    yield f"Checking {len(indices)} x {device_type}; {start:%Y-%m-%d %H:%M} UTC"
    yield ""
    yield from lines_of(Row("check", "result", "measured", "expected"))


def last_line(rows: Sequence[Row], of: str) -> str:
    """The verdict on the devices that `of` names.

    >>> last_line([Row("GRU, float32", FAIL, "error 5e-02"), Row("argmax, float32", PASS, "error 0.0e+00")], "2 x npu")
    'check_device: FAIL: 2 x npu, 1 passed, 0 skipped, 1 failed; GRU, float32'
    """
    passed, skipped, failed = ([row.check for row in rows if row.outcome == name] for name in (PASS, SKIPPED, FAIL))
    counts = f"{len(passed)} passed, {len(skipped)} skipped, {len(failed)} failed"
    return "; ".join([f"check_device: {'FAIL' if failed else 'PASS'}: {of}, {counts}", *failed])


def shown(path: Path) -> str:
    """A path as a user would type it here."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def indices_of(settings: Settings, device_type: str) -> list[int]:
    """The devices to check.

    Raises:
        UserError: usage, the flags contradict each other or this machine.
    """
    if settings.processes is not None and (device_type != "cpu" or settings.device_list):
        other = "--device-list" if settings.device_list else f"--device {device_type}"
        raise UserError("usage", f"--processes beside {other}", "--processes", "leave one of them out")
    if settings.device_list:
        devices.check_indices(device_type, settings.device_list, "--device-list")
        return settings.device_list
    return list(range((settings.processes or 2) if device_type == "cpu" else devices.device_count(device_type)))


def new_folder(settings: Settings) -> Path:
    """A folder that no other run has used.

    Raises:
        UserError: io, it cannot be made, or usage, it is there.
    """
    now = datetime.datetime.now(datetime.timezone.utc)
    default = ROOT / "test" / "output" / "check_device" / f"{now:%Y-%m-%dT%H-%M-%S.%f}"
    folder = Path(settings.output) if settings.output else default
    try:
        folder.mkdir(parents=True)
    except FileExistsError as error:
        raise UserError("usage", "is there already", str(folder), "give a folder that is not there") from error
    except OSError as error:
        raise UserError("io", f"cannot make it: {error.strerror}", str(folder), "give another with --output") from error
    return folder.resolve()


# ---------------------------------------------------------------- the ranks


def run_ranks(
    settings: Settings, device_type: str, indices: Sequence[int], folder: Path
) -> tuple[list[list[dict[str, Any]]], Failure | None]:
    """Runs the checks on all devices at once.

    Returns:
        The findings of each rank, and which of them failed, if one did.

    Raises:
        Stopped: a signal has ended the run.
    """
    common = World(size=len(indices), local_size=len(indices), device_type=device_type, timeout=settings.deadline)
    store = distributed.host_store("127.0.0.1", 0, nodes=1)  # stays open as long as this function runs
    counters = launch.step_counters(len(indices))
    worlds = [
        dataclasses.replace(common, rank=rank, index=index, meeting=("127.0.0.1", store.port), counter=counters[rank])
        for rank, index in enumerate(indices)
    ]
    sizes = device_checks.TINY if settings.tiny else device_checks.SIZES[device_type]
    ranks: list[launch.Rank] = []
    multiprocessing.resource_tracker.ensure_running()
    with StopRequest(ends=False) as stop:
        try:
            for world in worlds:
                args = (worlds, sizes, SAMPLE, folder)
                ranks.append(
                    launch.start(device_checks.examine, world.rank, args, settings.debug, world.rank, world.counter)
                )
            error = supervise(ranks, stop, settings.deadline)
        finally:
            launch.kill(ranks)
    found = [jsonlines.read(device_checks.record_path(folder, world.rank)) for world in worlds]
    return found, None if error is None else failure_of(error, found)


def supervise(ranks: list[launch.Rank], stop: StopRequest, deadline: float) -> Exception | None:
    """Waits for the ranks. Returns the error of the one that fails, and leaves the others running.

    A rank shows that it is alive at the beginning and at the end of each check. A collective ends by itself after
    `deadline` seconds. So the ranks that report that they have waited are not the one that hung.
    """
    running = ranks
    while running:
        running = launch.look(ranks)
        late = [rank for rank in running if rank.idle > deadline + GRACE]
        if late or launch.has_failed(ranks, deadline):
            launch.settle(ranks)
            if stop.signal is None and launch.has_failed(ranks, deadline):
                return launch.root_cause(ranks, deadline, launch.CHECK)
        if stop.signal is not None:
            raise launch.wind_down(ranks, stop, stop.signal, launch.CHECK)
        if late:
            hung = min(late, key=lambda rank: rank.counter.get() if rank.counter else 0)
            return hung.failure(f"made no progress for {hung.idle:.0f} s", launch.CHECK)
    return None


def failure_of(error: Exception, found: list[list[dict[str, Any]]]) -> Failure:
    """Which rank it was, and in which check."""
    what = str(error.args[1] if isinstance(error, UserError) else error)
    named = re.search(r"\brank (\d+)", what)
    rank = int(named[1]) if named else min(range(len(found)), key=lambda rank: len(found[rank]))
    begun = [line["begins"] for line in found[rank] if "begins" in line]
    return Failure(rank, begun[-1] if begun else "the start", what.removeprefix(f"rank {rank} "))


# ---------------------------------------------------------------- the rows


def label(device_type: str, index: int) -> str:
    """A device as the page names it."""
    return f"process {index}" if device_type == "cpu" else f"{device_type}:{index}"


def rows_of(
    table: Sequence[Check],
    found: list[list[dict[str, Any]]],
    failure: Failure | None,
    device_type: str,
    indices: Sequence[int],
) -> Iterable[Row]:
    """The rows of the checks that the ranks have made.

    Args:
        table: from `device_checks.checks`.
        found, failure: from `run_ranks`.
        device_type, indices: the devices.
    """
    labels = [label(device_type, index) for index in indices]
    names = [next((line["device"] for line in lines if "device" in line), None) for lines in found]
    told = f"rank {failure.rank} ({labels[failure.rank]}) {failure.what}" if failure else ""
    known = ", ".join(sorted({name for name in names if name}))
    if failure and not any(failure.check == check.name for check in table):
        yield Row("the devices start", FAIL, told, "all of them")
    else:
        yield Row("the devices start", PASS, f"{len(labels)} x {known}", "all of them")
    for check in table:
        if check.skipped:
            yield Row(check.name, SKIPPED, check.skipped)
            continue
        lines = [next((line for line in lines if line.get("check") == check.name), None) for lines in found]
        row = row_of(check, dict(zip(labels, lines, strict=True)), device_type)
        if failure and failure.check == check.name:
            row = row._replace(outcome=FAIL, measured=told if row.outcome == PASS else f"{told}; {row.measured}")
        elif failure and None in lines and row.outcome != FAIL:
            row = row._replace(outcome=SKIPPED, measured=f"rank {failure.rank} had failed before")
        yield row


def row_of(check: Check, lines: dict[str, dict[str, Any] | None], device_type: str) -> Row:
    """The row of a check from what the devices have found, by their labels."""
    made = {name: line for name, line in lines.items() if line is not None}
    figures = {name: line["value"] for name, line in made.items() if "value" in line}
    of = {name: f" ({line['of']})" if "of" in line else "" for name, line in made.items()}
    expected, bad = expectation(check, figures, device_type, len(lines))
    problems: dict[str, list[str]] = {}
    for name, line in made.items():
        if "problem" in line:
            problems.setdefault(line["problem"], []).append(name)
    words = [f"{what} ({', '.join(names)})" for what, names in problems.items()]
    if bad or problems:
        words += [f"{name}: {quantity(figures[name], check.unit)}{of[name]}" for name in bad]
        if check.compared and bad:
            others = [value for name, value in figures.items() if name not in bad]
            words.append(f"the others' median is {quantity(statistics.median(others), check.unit)}")
        return Row(check.name, FAIL, "; ".join(words), expected, figures)
    if not figures and check.unit:
        return Row(check.name, SKIPPED, "this device cannot tell it")
    if not figures:
        return Row(check.name, PASS, "right", expected)
    low, high = min(figures, key=figures.__getitem__), max(figures, key=figures.__getitem__)
    if check.unit == "error":
        measured = quantity(figures[high], check.unit) + of[high]
    elif quantity(figures[low], check.unit) == quantity(figures[high], check.unit):
        measured = quantity(figures[low], check.unit) + of[low]
    else:
        measured = f"{quantity(figures[low], check.unit)} to {quantity(figures[high], check.unit)}"
    return Row(check.name, PASS, measured, expected, figures)


def expectation(check: Check, figures: dict[str, float], device_type: str, count: int) -> tuple[str, list[str]]:
    """What is expected of a check's figures, and the devices that do not have it."""
    if check.most is not None:
        return f"at most {check.most:.0e}", [n for n, value in figures.items() if value > check.most]
    if check.least is not None:
        least = f"at least {quantity(check.least, check.unit)}"
        return least, [name for name, value in figures.items() if value < check.least]
    if not check.compared:
        return ("the number of every rank" if check.together and not check.unit else "reported only"), []
    if device_type == "cpu" or count == 1:
        return "reported only", []  # processes of one CPU are no devices, and one device has none beside it
    return f"at least {SLOW:g} of the others' median", slow_ones(figures)


def slow_ones(speeds: dict[str, float]) -> list[str]:
    """The devices that are much slower than the others.

    >>> slow_ones({"npu:0": 100.0, "npu:1": 99.0, "npu:2": 40.0})
    ['npu:2']
    """

    def of_others(name: str) -> float:
        return statistics.median(speed for other, speed in speeds.items() if other != name)

    return [name for name, speed in speeds.items() if len(speeds) > 1 and speed < SLOW * of_others(name)]


def quantity(value: float, unit: str) -> str:
    """A figure in its unit.

    >>> quantity(1.23e13, "FLOP/s"), quantity(0.00012, "error")
    ('12.3 TFLOP/s', 'error 1.2e-04')
    """
    if unit == "error":
        return f"error {value:.1e}"
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def lines_of(row: Row) -> list[str]:
    """A row as lines of text: long words stand on lines of their own."""
    name, measured, expected = map(printable, (row.check, row.measured, row.expected))
    first = f"{row.outcome:<8}{name:<38} {measured:<44} {expected}".rstrip()
    if len(measured) <= 44 or not expected:
        return [first]
    return [f"{row.outcome:<8}{name:<38} {'':<44} {expected}".rstrip(), f"{'':<8}  {measured}"]


# ---------------------------------------------------------------- training


def training(settings: Settings, device_type: str, indices: Sequence[int], folder: Path, broken: bool) -> Iterable[Row]:
    """Trains `sample/` as a user would, on the first device and on all, and yields a row for each.

    Args:
        settings, device_type, indices: as in `main`.
        folder: for the logs.
        broken: whether a rank has failed before. Then there is no training on all.
    """
    for title, several, name in (("one device", False, "one"), ("all devices", True, "all")):
        check = f"training sample/ on {title}"
        reason = "--quick" if settings.quick else ""
        if several and not reason:
            reason = "there is one device" if len(indices) == 1 else "a rank had failed before" if broken else ""
        if reason:
            yield Row(check, SKIPPED, reason)
            continue
        log, seconds = folder / f"train-{name}.log", time.monotonic()
        code = train(settings, device_type, indices if several else indices[:1], several, log)
        text = log.read_text(encoding="utf-8", errors="replace")  # drivers and libraries print there too
        yield row_of_training(check, text, code, time.monotonic() - seconds, settings)
        for path in folder.glob("*.pth.tar*"):
            path.unlink()


def train(settings: Settings, device_type: str, indices: Sequence[int], several: bool, log: Path) -> int | None:
    """Runs train_8p.py with its output in `log`. Returns its exit code. None: it was ended, because it hung."""
    chosen = ",".join(map(str, indices))
    arguments = ["--device", device_type, "--device-list", chosen, "--amp", "--epochs", str(settings.epochs)]
    arguments += ["--data-dir", str(SAMPLE), "--ckptpath", str(log.with_suffix(".pth.tar"))]
    arguments += ["--dist-timeout", f"{settings.deadline:g}"]
    arguments += ["--multiprocessing-distributed"] if several else []
    arguments += ["--emb-dim", "16", "--hid-dim", "24"] if settings.tiny else []
    command = [sys.executable, str(ROOT / "train_8p.py"), *arguments]
    with open(log, "wb") as file:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
        size, moved = 0, time.monotonic()
        try:
            while process.poll() is None:
                time.sleep(0.1)
                if log.stat().st_size != size:
                    size, moved = log.stat().st_size, time.monotonic()
                if time.monotonic() - moved > settings.deadline + 2 * GRACE:
                    return None
            return process.returncode
        finally:
            if process.poll() is None:
                process.terminate()  # it ends its ranks, in order
                try:
                    process.wait(GRACE)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def row_of_training(check: str, log: str, code: int | None, seconds: float, settings: Settings) -> Row:
    """The row of a training.

    Args:
        check: its name.
        log: its output.
        code: from `train`.
        seconds: that it took.
        settings: as in `main`.
    """
    lines = [line for line in log.splitlines() if line.strip()]
    if code != 0:
        errors = [line for line in lines if line.startswith("error[")] or lines[-1:] or ["it printed nothing"]
        how = "it printed nothing more and was ended" if code is None else f"exit code {code}"
        return Row(check, FAIL, f"{how}: {errors[-1]}", "exit code 0")
    run = logs.parse(log)
    bleu = float(run.final["BLEU score"])
    precision, batch = run.facts["precision"], int(run.facts["batch"])
    measured = f"BLEU {bleu:.2f}, {run.rate:.0f} pairs/s, {seconds:.0f} s, {precision}"
    figures = {"BLEU": bleu, "pairs/s": run.rate, "seconds": seconds}
    if settings.epochs != 10 or settings.tiny:
        return Row(check, PASS, measured, "reported only", figures)
    accepted = accept.expected("sample", "tuned", precision, batch)
    assert accepted is not None
    outcome = PASS if accepted.bleu.takes(bleu) else FAIL
    return Row(check, outcome, measured, f"BLEU {accepted.bleu.low:.1f} to {accepted.bleu.high:.1f}", figures)


# ---------------------------------------------------------------- what to report


def machine(device_type: str, indices: Sequence[int]) -> dict[str, str]:
    """What one has to know of the machine to understand the page. No names of hosts, users or folders."""
    packages = ["torch", "torchtext", "spacy", "numpy", *(["torch_npu", "apex"] if device_type == "npu" else [])]
    versions = [f"python {platform.python_version()}"]
    for name in packages:
        module = sys.modules.get(name)
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{name} {getattr(module, '__version__', 'not installed')}")
    kernel = re.split(r"[^0-9.]", platform.release())[0]
    about = {
        "machine": f"{platform.machine()}, {devices.cores()} cores, {platform.system()} {kernel}",
        "devices": f"{len(indices)} x {device_type}: {','.join(map(str, indices))}",
        "versions": ", ".join(versions),
        "commit": commit_of(ROOT),
    }
    if device_type == "npu":
        about |= {"CANN": cann_version(), "driver": first_output("npu-smi", "info", pattern=r"Version: *(\S+)")}
    if device_type == "cuda":
        query = ("--query-gpu=driver_version", "--format=csv,noheader")
        about |= {"CUDA": str(torch.version.cuda), "driver": first_output("nvidia-smi", *query, pattern=r"(\S+)")}
    names = (*distributed.NPU_VARIABLES, "OMP_NUM_THREADS")
    about["environment"] = " ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ) or "none set"
    return about


def command(argv: Sequence[str]) -> str:
    """The command as it was typed, without the folder for the result."""
    shown = [re.sub(r"^(--output=).*", r"\1DIR", argument) for argument in argv]
    for place, argument in enumerate(shown[:-1]):
        if argument == "--output":
            shown[place + 1] = "DIR"
    return " ".join(["bash test/check_device.sh", *shown])


def cann_version() -> str:
    """CANN's version by the file in its folder, or "unknown"."""
    home = Path(os.environ.get("ASCEND_HOME_PATH") or os.environ.get("ASCEND_TOOLKIT_HOME") or "/usr/local/Ascend")
    for pattern in ("*/ascend_*_install.info", "ascend_*_install.info", "version.cfg", "version.info"):
        for path in sorted(home.glob(pattern)):
            if match := re.search(r"^[Vv]ersion *= *\[?(\S+?)\]?$", path.read_text(errors="replace"), re.MULTILINE):
                return match[1]
    return "unknown"


def first_output(*command: str, pattern: str) -> str:
    """The group of a pattern in what a command prints, or "unknown"."""
    if shutil.which(command[0]) is None:
        return "unknown"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    match = re.search(pattern, done.stdout)
    return match[1] if match and done.returncode == 0 else "unknown"


if __name__ == "__main__":
    made: list[Row] = []
    exit_code = run_main(functools.partial(main, rows=made), sys.argv[1:])
    sys.exit(exit_code or (CHECK_FAILED if any(row.outcome == FAIL for row in made) else 0))
