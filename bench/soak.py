"""A long run: memory, descriptors, threads and temporary files of two ranks must stay as they are.

    python -m bench.soak --minutes 10

Trains on `sample/` with two processes, and saves the run's state each half minute. It looks at all processes of the run
every five seconds, and prints what it saw once a minute. At the end it stops the run by SIGTERM. The figures compare
the last third of the time with the second one. In the first third memory settles.
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench import machine
from nmt.errors import run_main

EVERY = 5.0  # seconds between two looks
COLUMNS = ("MB", "descriptors", "threads", "temporary files", "files")


def family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # it has ended
    found = [pid]
    for parent in found:
        found += [child for child, its_parent in parents.items() if its_parent == parent]
    return found


def look(pid: int, folder: Path, temporary: Path) -> dict[str, float]:
    """What a run holds now, by `COLUMNS`. MB are those that its processes hold for themselves, of 10^6 bytes."""
    seen = dict.fromkeys(COLUMNS, 0.0)
    for process in family(pid):
        about = Path(f"/proc/{process}")
        try:
            status = dict(line.split(":", 1) for line in (about / "status").read_text().splitlines())
            seen["descriptors"] += len(os.listdir(about / "fd"))
        except OSError:
            continue
        seen["MB"] += int(status.get("RssAnon", "0 kB").split()[0]) * 1024 / 1e6
        seen["threads"] += int(status["Threads"])
    seen["temporary files"] = sum(len(files) for _, _, files in os.walk(temporary))
    seen["files"] = len(os.listdir(folder))
    return seen


def growth(rows: list[dict[str, float]]) -> dict[str, float]:
    """By how much the medians of the last third of the rows exceed those of the second third."""
    third = len(rows) // 3
    middle, last = rows[third : 2 * third], rows[2 * third :]
    return {
        name: statistics.median(row[name] for row in last) - statistics.median(row[name] for row in middle)
        for name in COLUMNS
    }


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("flags", nargs="*", metavar="FLAG", help="of train_8p.py, after a lone --")
    args = parser.parse_args(argv)
    print(machine.describe("cpu"))
    print("minute", *COLUMNS, sep="  ")
    with tempfile.TemporaryDirectory() as parent:
        folder, temporary, log = Path(parent, "run"), Path(parent, "tmp"), Path(parent, "log")
        folder.mkdir()
        temporary.mkdir()
        command = [*machine.TRAIN, "--device=cpu", "--multiprocessing-distributed", "--device-list=0,1"]
        command += ["--epochs=100000", "--save-every=0.5", "--", *args.flags]
        environment = os.environ | {"TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"}
        with (
            open(log, "w") as output,
            subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=output) as run,
        ):
            rows, start, minute = [], time.monotonic(), 1
            while time.monotonic() < start + 60 * args.minutes and run.poll() is None:
                time.sleep(min(EVERY, 2 * args.minutes))
                rows.append(look(run.pid, folder, temporary))
                if time.monotonic() >= start + 60 * minute:
                    print(
                        f"{minute:6d}", *(f"{rows[-1][name]:{len(name)}.0f}" for name in COLUMNS), sep="  ", flush=True
                    )
                    minute += 1
            run.send_signal(signal.SIGTERM)
            code = run.wait()
        lines = log.read_text().splitlines()
    if code != 128 + signal.SIGTERM:
        raise SystemExit("the run ended by itself:\n" + "\n".join(lines[-20:]))
    print("states saved:", sum(line.startswith("state: ") for line in lines))
    for name, value in growth(rows).items():
        machine.print_figure(f"growth of {name}", value, "no growth")


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
