"""Draws full runs from their logs: validation BLEU and losses over the epochs, or the best BLEU over the batch.

    python -m bench.curves --out curves.png tuned=results/multi30k-tuned-seed2-cpu.log former=results/search/former.log
    python -m bench.curves --over batch --out batches.png 0.003=results/multi30k-tuned-seed{2,1234}-cpu.log

Over the epochs, each log is a line. Over the batch, the logs of one name and one batch make one point: their mean, with
the standard deviation of a run. Needs matplotlib: requirements-plots.txt.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from bench import logs

if TYPE_CHECKING:
    import matplotlib.figure


class Run(NamedTuple):
    """One line of the picture: its name here, pairs in a batch over all devices, the epochs."""

    name: str
    batch: int
    epochs: list[logs.Epoch]

    @property
    def bleu(self) -> float:
        """The best epoch's."""
        return max(epoch.bleu for epoch in self.epochs)


def read_log(name: str, path: Path) -> Run:
    """Reads the log of one full run.

    Raises:
        ValueError: this is not the log of one whole run: it has no validation, or the epochs are not 0, 1, 2, ...
    """
    try:
        run = logs.parse(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if "batch" not in run.facts or not run.epochs or [e.number for e in run.epochs] != list(range(len(run.epochs))):
        raise ValueError(f"{path}: expected one run's line 'run:', and 'validation: epoch N' of each epoch")
    return Run(name, int(run.facts["batch"]), run.epochs)


def draw_over_epochs(runs: list[Run], figure: "matplotlib.figure.Figure") -> None:
    """Draws BLEU on the left and losses on the right. Each run has a line and each name a colour."""
    bleu, losses = figure.subplots(1, 2)
    colors: dict[str, str] = {}
    for run in runs:
        first = run.name not in colors  # one label a name
        color = colors.setdefault(run.name, f"C{len(colors)}")
        ended = [epoch.number + 1 for epoch in run.epochs]
        bleu.plot(ended, [epoch.bleu for epoch in run.epochs], "o-", color=color, label=run.name if first else None)
        for field, style in (("loss", "o-"), ("free_running_loss", "o:")):
            values = [getattr(epoch, field) for epoch in run.epochs]
            label = f"{run.name}, {field.replace('_', ' ')}" if first else None
            losses.plot(ended, values, style, color=color, label=label)
    for axes, title in ((bleu, "greedy BLEU"), (losses, "loss a target, nats")):
        axes.set(xlabel="epochs", title=f"{title}, validation pairs")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")


def points(runs: list[Run]) -> dict[str, list[tuple[int, float, float]]]:
    """For each name its batches, smallest first: mean and standard deviation of the runs' best BLEU (0 for one run).

    >>> bleus = [(64, 23.0), (32, 19.0), (32, 20.0), (32, 21.0)]
    >>> runs = [Run("a", batch, [logs.Epoch(0, 2.5, 2.0, 7.4, 5.0, bleu)]) for batch, bleu in bleus]
    >>> points([*runs, runs[0]._replace(name="b")])
    {'a': [(32, 20.0, 1.0), (64, 23.0, 0.0)], 'b': [(64, 23.0, 0.0)]}
    """
    values: dict[str, dict[int, list[float]]] = {}
    for run in runs:
        values.setdefault(run.name, {}).setdefault(run.batch, []).append(run.bleu)
    return {
        name: [
            (batch, statistics.mean(bleus), statistics.stdev(bleus) if len(bleus) > 1 else 0.0)
            for batch, bleus in sorted(batches.items())
        ]
        for name, batches in values.items()
    }


def draw_over_batch(runs: list[Run], figure: "matplotlib.figure.Figure") -> None:
    """Draws the best epoch's BLEU, one curve a name."""
    axes = figure.subplots()
    for name, curve in points(runs).items():
        batches, bleus, deviations = zip(*curve, strict=True)
        axes.errorbar(batches, bleus, deviations, marker="o", capsize=3, label=name)
    axes.set_xscale("log", base=2)
    ticks = sorted({run.batch for run in runs})
    axes.set_xticks(ticks, map(str, ticks))
    axes.set(xlabel="pairs in a batch, over all devices", title="best epoch's greedy BLEU, validation pairs")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="NAME=LOG", help="a run's name in the picture, and its log")
    parser.add_argument(
        "--over", choices=["epochs", "batch"], default="epochs", help="what lies on the horizontal axis"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the picture: .png, .svg or .pdf")
    args = parser.parse_args(argv)
    runs = []
    for argument in args.runs:
        name, equals, path = argument.partition("=")
        if not equals:
            parser.error(f"expected NAME=LOG, not {argument!r}")
        try:
            runs.append(read_log(name, Path(path)))
        except (OSError, ValueError) as error:
            parser.error(str(error))

    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(9, 3.6), layout="constrained")
    draw = draw_over_batch if args.over == "batch" else draw_over_epochs
    draw(runs, figure)
    figure.savefig(args.out, dpi=120)


if __name__ == "__main__":
    main(sys.argv[1:])
