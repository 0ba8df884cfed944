"""Tokenising and caching a large corpus from cold, with one worker and with two in turn.

    python -m bench.tokenising

Generates a million pairs with `sample/generate.py`, or takes `--data-dir`. Each time it loads them with an empty cache
folder: it reads, tokenises, builds the vocabularies, writes the cache and checks it. The time includes the imports of
spaCy and torchtext, and excludes that of torch.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from bench import machine
from nmt.text import tokens as textwords

LOAD = """
import sys, time
import data
start = time.perf_counter()
corpus = data.load(sys.argv[1], cache_dir=sys.argv[2], workers=int(sys.argv[3]), log=lambda line: None)
print("loaded:", len(corpus.train), time.perf_counter() - start)
"""


def generate(folder: Path, pairs: int) -> Path:
    """Writes a corpus of so many training pairs into `folder`, and returns the folder."""
    command = [sys.executable, str(machine.ROOT / "sample" / "generate.py"), f"--pairs={pairs}", f"--out={folder}"]
    subprocess.run(command, check=True)
    return folder


def load_command(data_dir: Path, cache_dir: Path | str, workers: int) -> list[str]:
    """A command that loads a corpus and prints `loaded:`, the number of training pairs, and the seconds it took."""
    return [sys.executable, "-c", LOAD, str(data_dir.resolve()), str(cache_dir), str(workers)]


def pairs_per_second(data_dir: Path, workers: int) -> float:
    """Training pairs a second, from cold."""
    with tempfile.TemporaryDirectory() as cache_dir:
        command = load_command(data_dir, cache_dir, workers)
        _, found = machine.first_line(command, "loaded: ([0-9]+) ([0-9.e-]+)")
    return int(found[1]) / float(found[2])


def main(argv: list[str]) -> None:
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], formatter_class=formatter)
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="a corpus of one's own; left out: a generated one")
    parser.add_argument("--pairs", type=int, default=1_000_000, metavar="N", help="training pairs to generate")
    parser.add_argument("--repetitions", type=int, default=3, metavar="N", help="rounds, for the medians")
    args = parser.parse_args(argv)
    print(machine.describe())
    with tempfile.TemporaryDirectory() as folder:
        data_dir = args.data_dir or generate(Path(folder), args.pairs)
        if sum(path.stat().st_size for path in data_dir.rglob("train.*")) < 2 * textwords.BYTES_PER_PROCESS:
            print("note: so little text is tokenised in one process, whatever the number of workers")
        print("training pairs a second")

        def measure(_: int) -> dict[str, float]:
            return {f"{workers} workers": pairs_per_second(data_dir, workers) for workers in (1, 2)}

        middle = machine.repeat(args.repetitions, measure)
    machine.print_figure("two workers / one", middle["2 workers"] / middle["1 workers"], ">= 1.7")


if __name__ == "__main__":
    main(sys.argv[1:])
