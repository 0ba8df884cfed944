"""Memory of training on 29,000 pairs and on 5,000,000: it must not grow with the corpus.

    python -m bench.large_corpus

Generates both corpora with `sample/generate.py`. Tokenises each into an empty cache, with two workers if it is large
enough for them, and reads it once more from there. Then trains some steps on each in turn with `train_8p.py
--performance`. Memory is RssAnon of `/proc/PID/status`, the memory that a process holds for itself. The corpus lies in
mapped files, whose pages the system takes back when it needs them.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from bench import logs, machine, tokenising

SAMPLE_SECONDS = 0.05


class Watched:
    """Runs a command until it has printed a line with `pattern`.

    Attributes:
        match: of `pattern`, in that line.
        peak_mb, end_mb: its RssAnon in MB of 10^6 bytes: the highest, and the last before that line.

    Raises:
        SystemExit: there was no such line.
    """

    def __init__(self, command: list[str], pattern: str | re.Pattern[str]):
        self.match, self.peak_mb, self.end_mb = None, 0.0, 0.0
        done, lines = threading.Event(), []
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "encoding": "utf-8"}
        with subprocess.Popen(command, cwd=machine.ROOT, **options) as process:
            sampler = threading.Thread(target=self._sample, args=(process.pid, done))
            sampler.start()
            for line in process.stdout:
                lines.append(line)
                if match := re.search(pattern, line):
                    self.match = match
                    break
            done.set()
            sampler.join()
            process.terminate()
        if self.match is None:
            raise SystemExit(
                f"{' '.join(command)} printed no line with {re.compile(pattern).pattern}:\n{''.join(lines[-20:])}"
            )

    def _sample(self, pid: int, done: threading.Event) -> None:
        status = Path(f"/proc/{pid}/status")
        while not done.wait(SAMPLE_SECONDS):
            # One that has just been started, or has ended, has no such line.
            if found := re.search(r"RssAnon:\s*([0-9]+) kB", status.read_text()):
                self.end_mb = int(found[1]) * 1024 / 1e6
                self.peak_mb = max(self.peak_mb, self.end_mb)


def prepare(folder: Path, pairs: int) -> tuple[dict[str, float], list[str]]:
    """Generates a corpus of so many pairs in `folder`, tokenises it, and reads it once more.

    Returns:
        What that took, and the flags with which `train_8p.py` trains on it.
    """
    data_dir, cache_dir = tokenising.generate(folder / "corpus", pairs), folder / "cache"
    load = tokenising.load_command(data_dir, cache_dir, 2)
    cold, warm = (Watched(load, "loaded: [0-9]+ ([0-9.e-]+)") for _ in range(2))
    figures = {
        "pairs": pairs,
        "text MB": megabytes(data_dir),
        "tokenising s": float(cold.match[1]),
        "tokenising MB": cold.peak_mb,
        "cache MB": megabytes(cache_dir),
        "warm load s": float(warm.match[1]),
    }
    return figures, [f"--data-dir={data_dir}", f"--cache-dir={cache_dir}"]


def train(flags: list[str], steps: int) -> Watched:
    """Trains so many steps."""
    command = [*machine.TRAIN, "--performance", "--device=cpu", "-p", str(steps), *flags]
    return Watched(command, logs.STEP)


def megabytes(folder: Path) -> float:
    """The size of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def main(argv: list[str]) -> None:
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], formatter_class=formatter)
    parser.add_argument("--small", type=int, default=29_000, metavar="N", help="training pairs of the small corpus")
    parser.add_argument("--large", type=int, default=5_000_000, metavar="N", help="training pairs of the large corpus")
    parser.add_argument("--batch-size", type=int, default=128, metavar="N", help="pairs in a batch")
    parser.add_argument("--steps", type=int, default=120, metavar="N", help="training steps, of one epoch at most")
    parser.add_argument("--repetitions", type=int, default=3, metavar="N", help="rounds of training, for the medians")
    args = parser.parse_args(argv)
    print(machine.describe())
    with tempfile.TemporaryDirectory() as folder:
        small, small_flags = prepare(Path(folder) / "small", args.small)
        large, large_flags = prepare(Path(folder) / "large", args.large)
        for name in small:
            print(f"{name:15}{machine.rounded(small[name]):>10}{machine.rounded(large[name]):>10}", flush=True)

        def measure(_: int) -> dict[str, float]:
            row = {}
            for name, flags in (("small", small_flags), ("large", large_flags)):
                trained = train([*flags, f"--batch-size={args.batch_size}"], args.steps)
                row |= {f"{name} peak MB": trained.peak_mb, f"{name} end MB": trained.end_mb}
            return row

        middle = machine.repeat(args.repetitions, measure)
    for name in ("peak", "end"):
        ratio = middle[f"large {name} MB"] / middle[f"small {name} MB"]
        machine.print_figure(f"memory ({name}) of training, large / small corpus", ratio, "<= 1.2")


if __name__ == "__main__":
    main(sys.argv[1:])
