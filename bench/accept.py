"""Which BLEU to accept from a device: ranges by data, recipe and precision, from the logs in results/.

    python -m bench.accept [--data multi30k|sample] [--recipe tuned|modelzoo] [--precision bfloat16/O2] [--bleu X]

Without a flag it prints every range. With `--bleu` it says whether the ranges that fit take that BLEU, and exits with
1 if none does. The BLEU is that of the line `Final Train Accuracy`: with the recipe's own beam, on the test pairs,
after the recipe's ten epochs.

The rule. One run's BLEU is accepted within

    mean ± 3 · s · sqrt(1 + 1 / n)

of the n runs of its row (same data, recipe, precision and batch). The root is there because the mean of few runs is
itself uncertain. s is the deviation of one run: of all runs of the same data and recipe, from their common mean. Runs
of other seeds and of other machines count alike, because another machine rounds otherwise and so makes another run of
the same seed. s is no row's own, because three runs say little about their deviation: two rows of `modelzoo` have 0.1
by chance. It counts what the precisions differ by as chance too, which makes the ranges wide rather than narrow. The
ends are rounded outwards to a tenth.

A BLEU below the range: look for a fault. A BLEU above it is no success either: other data, other flags, or a score of
other pairs. A BLEU within it is no proof. A run of half its epochs is less than two BLEU worse than a whole one.
"""

import argparse
import functools
import math
import re
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path

from bench import logs

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 3  # deviations on each side
DATA = ("multi30k", "sample")
RECIPES = ("tuned", "modelzoo")
DEFAULT_BEAM = {"tuned": "beam of 10", "modelzoo": "greedy"}  # how a recipe's own BLEU is decoded

# Each run once. A log of several runs has a pattern of the lines that head the parts to take.
MULTI30K: tuple[str, ...] = (
    "results/multi30k-tuned-seed1234-cpu.log",
    "results/multi30k-tuned-seed2-cpu.log",
    "results/multi30k-tuned-seed3-cpu.log",
    "results/multi30k-tuned-bfloat16-cpu.log",
    "results/multi30k-tuned-amp-cpu.log",
    "results/multi30k-tuned-amp-seed2-cpu.log",
    "results/multi30k-tuned-amp-seed3-cpu.log",
    "results/multi30k-tuned-8p-cpu.log",
    "results/h200/tuned-amp.log",
    "results/modelzoo/float32.log",
    "results/modelzoo/bfloat16-O1.log",
    "results/modelzoo/float16-O1.log",
    "results/modelzoo/bfloat16-O2.log",
    "results/modelzoo/bfloat16-O2-seed2.log",
    "results/modelzoo/bfloat16-O2-seed3.log",
    "results/modelzoo/float16-O2.log",
    "results/modelzoo/float16-O2-seed2.log",
    "results/modelzoo/float16-O2-seed3.log",
)
SAMPLE: tuple[str, ...] = (
    "results/sample-train_full_1p-cpu.log",
    "results/sample-train_full_1p-bfloat16-cpu.log",
    "results/sample-train_full_1p-amx-cpu.log",
    "results/sample-precisions-cpu.log",
    "results/accept/tuned-float32.log",
    "results/accept/tuned-float32-seed2.log",
    "results/accept/tuned-float32-seed3.log",
    "results/accept/tuned-bfloat16.log",
    "results/accept/tuned-bfloat16-seed2.log",
    "results/accept/tuned-bfloat16-seed3.log",
)
# O0 of that log is the run of sample-train_full_1p-cpu.log on the same machine, to the last digit.
PARTS = {"results/sample-precisions-cpu.log": r"# python3 train_8p\.py .*--opt-level O[123]$"}


@dataclass(frozen=True)
class Key:
    """What the runs of a row share.

    Attributes:
        data: "multi30k" or "sample".
        recipe: "tuned" or "modelzoo".
        precision: as the line `run:` says it, such as "bfloat16/O2".
        batch: pairs a step over all devices. `tuned` has another on several devices.
    """

    data: str
    recipe: str
    precision: str
    batch: int


@dataclass(frozen=True)
class Range:
    """Which BLEU to accept.

    Attributes:
        low, high: the ends, both accepted.
        mean: of the runs.
        deviation: of one run, by the rule at the top of this file.
        runs: how many.
    """

    low: float
    high: float
    mean: float
    deviation: float
    runs: int

    def takes(self, bleu: float) -> bool:
        return self.low <= bleu <= self.high


@dataclass(frozen=True)
class Accepted:
    """A row: what to accept of one data set, recipe, precision and batch.

    Attributes:
        key: what the runs share. The precision may be another than the one asked for, see `expected`.
        bleu: for the figure that a run reports at its end (`BLEU score`, `Final Train Accuracy`).
        greedy: for greedy decoding. The same as `bleu` for a recipe without a beam.
        machines: on which the runs were, such as "AMD EPYC".
        paths: of the logs, from the repository's root.
        measured: False if nothing was measured with the precision or batch asked for.
    """

    key: Key
    bleu: Range
    greedy: Range
    machines: tuple[str, ...]
    paths: tuple[str, ...]
    measured: bool = True


@dataclass
class _Runs:
    """The scores of a row's runs."""

    bleu: list[float] = field(default_factory=list)
    greedy: list[float] = field(default_factory=list)
    machines: list[str] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)


def range_of(values: list[float], deviation: float) -> Range:
    """The range of a row, by the rule at the top of this file.

    Args:
        values: BLEU of the row's runs, at least one.
        deviation: of one run.

    >>> range_of([30.0], 0.5)
    Range(low=27.8, high=32.2, mean=30.0, deviation=0.5, runs=1)
    >>> range_of([29.0, 30.0, 31.0], 0.5)
    Range(low=28.2, high=31.8, mean=30.0, deviation=0.5, runs=3)
    """
    mean = statistics.mean(values)
    reach = WIDTH * deviation * math.sqrt(1 + 1 / len(values))
    low, high = (math.floor((mean - reach) * 10) / 10, math.ceil((mean + reach) * 10) / 10)
    return Range(max(0.0, low), min(100.0, high), mean, deviation, len(values))


def machine_of(run: logs.Run, text: str) -> str:
    """Where a run was, from the comments at the top of its log and from its line `device:`."""
    found = re.search(r"AMD EPYC|Intel Xeon with AMX|Intel Xeon|H200", text.partition("\nrun: ")[0])
    return run.device if run.facts["device"] != "cpu" else found[0] if found else "CPU"


def runs_of(path: str) -> list[logs.Run]:
    """The runs of one log that count. The path is from the repository's root."""
    text = (ROOT / path).read_text(encoding="utf-8")
    return [run for _, run in logs.parts(text, PARTS[path])] if path in PARTS else [logs.parse(text)]


def collect(paths: dict[str, tuple[str, ...]]) -> dict[Key, _Runs]:
    """The scores of the logs' runs by what they share.

    Args:
        paths: of the logs, by the data.

    Raises:
        ValueError: a run is not scored, or two are the same run.
    """
    rows: dict[Key, _Runs] = {}
    seen = {}
    for data, its_paths in paths.items():
        for path in its_paths:
            text = (ROOT / path).read_text(encoding="utf-8")
            for run in runs_of(path):
                facts = run.facts
                key = Key(data, facts["recipe"], facts["precision"], int(facts["batch"]))
                own = run.bleus(DEFAULT_BEAM[key.recipe])
                if not own or not run.bleus("greedy"):
                    raise ValueError(f"{path}: no BLEU of the test pairs")
                losses = tuple(epoch.loss for epoch in run.epochs), own[0], run.bleus("greedy")[0]
                if losses in seen:
                    raise ValueError(f"{path}: the same run as in {seen[losses]}")
                seen[losses] = path
                row = rows.setdefault(key, _Runs())
                row.bleu.append(own[0])
                row.greedy.append(run.bleus("greedy")[0])
                row.machines.append(machine_of(run, text))
                row.paths.append(path)
    return rows


def ranges_of(rows: dict[Key, _Runs]) -> dict[Key, Accepted]:
    """The range of each row.

    Raises:
        statistics.StatisticsError: a recipe has one run alone.
    """
    accepted = {}
    for key, row in rows.items():
        alike = [runs for other, runs in rows.items() if (other.data, other.recipe) == (key.data, key.recipe)]
        own, greedy = (
            statistics.stdev(bleu for runs in alike for bleu in getattr(runs, name)) for name in ("bleu", "greedy")
        )
        accepted[key] = Accepted(
            key,
            range_of(row.bleu, own),
            range_of(row.greedy, greedy),
            tuple(dict.fromkeys(row.machines)),
            tuple(dict.fromkeys(row.paths)),
        )
    return accepted


@functools.cache
def ranges() -> dict[Key, Accepted]:
    """Every row that the logs in results/ give, in the order of the lists at the top of this file."""
    return ranges_of(collect({"multi30k": MULTI30K, "sample": SAMPLE}))


def expected(data: str, recipe: str, precision: str, batch: int | None = None) -> Accepted | None:
    """What to accept of a run.

    Args:
        data, recipe, precision: as in `Key`.
        batch: pairs a step over all devices. None takes the row with the most runs.

    Returns:
        The row that fits. If no run had that precision or batch, one range from the lowest end to the highest of the
        same data and recipe, with `measured` False: another precision may cost some BLEU, which nobody has measured.
        None if there is no run with the data and recipe at all.

    >>> expected("multi30k", "tuned", "float32/O0").measured
    True
    >>> expected("multi30k", "tuned", "float16/O3").measured
    False
    >>> expected("multi30k", "none", "float32/O0") is None
    True
    """
    of_recipe = [row for key, row in ranges().items() if (key.data, key.recipe) == (data, recipe)]
    fitting = [row for row in of_recipe if row.key.precision == precision and batch in (None, row.key.batch)]
    if fitting:
        return max(fitting, key=lambda row: row.bleu.runs)
    if not of_recipe:
        return None
    near = [row for row in of_recipe if row.key.batch == batch] or of_recipe
    return Accepted(
        Key(data, recipe, precision, batch or near[0].key.batch),
        _joined([row.bleu for row in near]),
        _joined([row.greedy for row in near]),
        tuple(dict.fromkeys(machine for row in near for machine in row.machines)),
        tuple(dict.fromkeys(path for row in near for path in row.paths)),
        measured=False,
    )


def _joined(parts: list[Range]) -> Range:
    """One range from the lowest end to the highest."""
    runs = sum(part.runs for part in parts)
    return Range(
        min(part.low for part in parts),
        max(part.high for part in parts),
        sum(part.mean * part.runs for part in parts) / runs,
        max(part.deviation for part in parts),
        runs,
    )


def sentence(row: Accepted) -> str:
    """One line about a row."""
    key, bleu = row.key, row.bleu
    found = f"{bleu.runs} run{'' if bleu.runs == 1 else 's'}, mean {bleu.mean:.2f}"
    guess = "" if row.measured else "; not measured itself, joined from other rows"
    return (
        f"{key.data} {key.recipe} {key.precision} batch {key.batch}: accept {bleu.low:.1f} to {bleu.high:.1f} BLEU "
        f"({found}{guess}); greedy {row.greedy.low:.1f} to {row.greedy.high:.1f}"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Which BLEU to accept from a device.", allow_abbrev=False)
    parser.add_argument("--data", choices=DATA, type=str.lower)
    parser.add_argument("--recipe", choices=RECIPES)
    parser.add_argument("--precision", help="as the log's first line says it, such as bfloat16/O2")
    parser.add_argument("--bleu", type=float, help="BLEU to judge, of the line `Final Train Accuracy`")
    args = parser.parse_args(arguments)
    rows = [
        row
        for key, row in ranges().items()
        if args.data in (None, key.data)
        and args.recipe in (None, key.recipe)
        and args.precision in (None, key.precision)
    ]
    if not rows and args.data and args.recipe and args.precision:
        guess = expected(args.data, args.recipe, args.precision)
        rows = [guess] if guess else []
    for row in rows:
        verdict = "" if args.bleu is None else "accepted: " if row.bleu.takes(args.bleu) else "NOT accepted: "
        print(verdict + sentence(row))
    return 0 if args.bleu is None or any(row.bleu.takes(args.bleu) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
