"""Draws validation BLEU and losses over the epochs of full runs, from their logs.

    python bench/curves.py --out curves.png tuned=results/multi30k-tuned-seed2-cpu.log former=results/search/former.log

Needs matplotlib: requirements-plots.txt.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import NamedTuple

VALIDATION = re.compile(
    r"validation: epoch (?P<number>\d+)  train loss \S+  loss (?P<loss>\S+) \(.*?\)"
    r"  free-running loss (?P<free_running_loss>\S+) \(.*?\)  greedy BLEU (?P<bleu>\S+)  "
)


class Epoch(NamedTuple):
    """What a log says about one epoch: its number from 0, losses a target in nats, BLEU from 0 to 100."""

    number: int
    loss: float
    free_running_loss: float
    bleu: float


def read_log(path: Path) -> list[Epoch]:
    """The epochs of a run.

    Raises:
        ValueError: the log has no validation, or its epochs are not 0, 1, 2, ...: it is no log of one whole run.
    """
    found = filter(None, map(VALIDATION.match, path.read_text(encoding="utf-8").splitlines()))
    epochs = [Epoch(int(number), *map(float, values)) for number, *values in (match.groups() for match in found)]
    if not epochs or [epoch.number for epoch in epochs] != list(range(len(epochs))):
        raise ValueError(f"{path}: expected one run's lines 'validation: epoch 0', 'validation: epoch 1', ...")
    return epochs


def draw(runs: dict[str, list[Epoch]], out: Path) -> None:
    """Writes a picture: BLEU on the left, losses on the right, one colour a run."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(9, 3.6), layout="constrained")
    bleu, losses = figure.subplots(1, 2)
    for place, (name, epochs) in enumerate(runs.items()):
        ended = [epoch.number + 1 for epoch in epochs]
        color = f"C{place}"
        bleu.plot(ended, [epoch.bleu for epoch in epochs], "o-", color=color, label=name)
        for field, style in (("loss", "o-"), ("free_running_loss", "o:")):
            values = [getattr(epoch, field) for epoch in epochs]
            losses.plot(ended, values, style, color=color, label=f"{name}, {field.replace('_', ' ')}")
    for axes, title in ((bleu, "greedy BLEU"), (losses, "loss a target, nats")):
        axes.set(xlabel="epochs", title=f"{title}, validation pairs")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(out, dpi=120)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="NAME=LOG", help="a run's name in the picture, and its log")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the picture: .png, .svg or .pdf")
    args = parser.parse_args(argv)
    runs = {}
    for run in args.runs:
        name, equals, path = run.partition("=")
        if not equals:
            parser.error(f"expected NAME=LOG, not {run!r}")
        runs[name] = read_log(Path(path))
    draw(runs, args.out)


if __name__ == "__main__":
    main(sys.argv[1:])
