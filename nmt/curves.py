"""The picture of a run: its losses, perplexity, BLEU, learning rate and speed over the epochs."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from nmt.errors import first_line
from nmt.jsonlines import Entry, read
from nmt.storage import Log, replacing

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TRAIN, VALIDATION, FREE = "C0", "C1", "C2"  # matplotlib's colours
DENSE = 30  # points of a line: with more it has no marks
MOST_OF_A_SCALE = 20  # largest by smallest value: above it an axis is logarithmic


def series(entries: list[Entry], kind: str, name: str) -> tuple[list[float], list[float]]:
    """Where in the run, in epochs, and the values of a figure. A value that was not finite is left out.

    >>> entries = [{"kind": "step", "epoch": 2, "epoch_step": 1, "epoch_steps": 4, "loss": 3.5}]
    >>> series(entries, "step", "loss")
    ([1.25], [3.5])
    """
    points = [
        (entry["epoch"] - 1 + entry["epoch_step"] / entry["epoch_steps"] if kind == "step" else entry["epoch"], value)
        for entry in entries
        if entry.get("kind") == kind and (value := entry.get(name)) is not None
    ]
    return [place for place, _ in points], [value for _, value in points]


def plot(axes: "Axes", where: tuple[list[float], list[float]], label: str, color: str, **style: Any) -> None:
    """Draws a line, if there is anything to draw. One with few points has marks."""
    if where[0]:
        marker = "o" if len(where[0]) <= DENSE else ""
        axes.plot(*where, label=label, color=color, marker=marker, markersize=4, **style)


def finish(axes: "Axes", title: str, unit: str, **about: Any) -> None:
    """What all parts of the picture have. A part with several lines names them."""
    axes.set_title(title, fontsize="medium")
    axes.set_ylabel(unit)
    axes.grid(alpha=0.3)
    if about:
        axes.set(**about)
    lines = axes.get_lines()
    if len(lines) > 1:
        axes.legend(fontsize="small")
    values = [float(value) for line in lines for value in np.asarray(line.get_ydata())]
    if unit == "perplexity" and values and max(values) > MOST_OF_A_SCALE * min(values):
        from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())


def draw(entries: list[Entry], figure: "Figure") -> None:
    """Draws the entries of a metrics file. A run without validation has no perplexity and no BLEU."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    about = next((entry for entry in entries if entry.get("kind") == "run"), {})
    test = next((entry for entry in entries if entry.get("kind") == "test"), None)
    validated = any(entry.get("kind") == "validation" for entry in entries)
    figure.set_size_inches((12, 7) if validated else (12, 3.6))
    parts = list(figure.subplots(*((2, 3) if validated else (1, 3))).flat)

    loss, rate, speed = parts[0], parts[-3 if validated else -2], parts[-2 if validated else -1]
    plot(loss, series(entries, "step", "loss"), "training", TRAIN, alpha=0.8)
    plot(loss, series(entries, "validation", "loss"), "validation", VALIDATION)
    plot(loss, series(entries, "validation", "free_running_loss"), "validation, free-running", FREE)
    finish(loss, "loss" if validated else "training loss", "nats a target token")
    if validated:
        plot(parts[1], series(entries, "validation", "perplexity"), "validation", VALIDATION)
        plot(parts[1], series(entries, "validation", "free_running_perplexity"), "validation, free-running", FREE)
        finish(parts[1], "perplexity", "perplexity")
        plot(parts[2], series(entries, "validation", "bleu"), "validation, greedy", VALIDATION)
        plot(parts[2], series(entries, "validation", "cased_bleu"), "validation, greedy, cased", FREE)
        if test is not None and test.get("bleu") is not None:
            how = f"test, beam of {test['beam_size']}" if test.get("beam_size", 1) > 1 else "test, greedy"
            parts[2].axhline(test["bleu"], color="C3", linestyle="--", label=f"{how}: {test['bleu']:.2f}")
        finish(parts[2], "BLEU", "BLEU, 0 to 100")
        parts[2].set_ylim(0, max(1, parts[2].get_ylim()[1]))
        write_facts(parts[5], about, test)
    plot(rate, series(entries, "step", "learning_rate"), "learning rate", TRAIN)
    finish(rate, "learning rate", "learning rate")
    rate.set_ylim(bottom=0)
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    plot(speed, series(entries, "step", "pairs_per_second"), "since the line before", TRAIN, alpha=0.8)
    ends, speeds = series(entries, "epoch", "pairs_per_second")
    if ends:
        speed.step([ends[0] - 1, *ends], [speeds[0], *speeds], where="pre", label="whole epoch", color=VALIDATION)
    finish(speed, "speed", "sentence pairs a second")
    speed.set_ylim(bottom=0)
    speed.yaxis.set_major_formatter(EngFormatter(sep=""))

    epochs = max((entry["epoch"] for entry in entries if entry.get("kind") in ("step", "epoch")), default=1)
    for axes in parts[: 5 if validated else 3]:
        axes.set_xlabel("epochs")
        axes.set_xlim(0, epochs * 1.03)
        if epochs > 1:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(title_of(about))


def title_of(about: Entry) -> str:
    """What was run, in one line."""
    said = [f"recipe {about['recipe']}"] if "recipe" in about else []
    said += [f"batch {about['batch']}"] if "batch" in about else []
    said += [f"seed {about['seed']}"] if "seed" in about else []
    if "device" in about:
        said.append(f"{about.get('processes', 1)} × {about['device']}, {about.get('precision', '')}")
    return "GRU: " + ", ".join(said)


def write_facts(axes: "Axes", about: Entry, test: Entry | None) -> None:
    """The final scores, as text."""
    axes.axis("off")
    lines = [f"{about['parameters']:,} parameters"] if "parameters" in about else []
    if test is not None:
        lines += ["", "test pairs"]
        for name, label, digits in (
            ("bleu", "BLEU score", 2),
            ("sacrebleu", "sacreBLEU", 2),
            ("chrf", "chrF", 2),
            ("perplexity", "perplexity", 2),
        ):
            if test.get(name) is not None:
                lines.append(f"{label:<12}{test[name]:>8.{digits}f}")
    axes.text(0.05, 0.95, "\n".join(lines), va="top", family="monospace", transform=axes.transAxes)


def draw_run(metrics: Path, paths: list[Path], log: Log) -> None:
    """Draws a run from its metrics file. Whatever goes wrong is a note: the run is complete without a picture.

    Args:
        metrics: the file.
        paths: of the pictures.
        log: takes lines.
    """
    try:
        import matplotlib.figure
    except ImportError:
        log(f"note: no {paths[0].name}: matplotlib is not installed (requirements-plots.txt)")
        return
    try:
        figure = matplotlib.figure.Figure(layout="constrained")
        draw(read(metrics), figure)
        for path in paths:
            with replacing(path) as file:
                figure.savefig(file, dpi=110, format="png")
    except Exception as error:
        log(f"note: no {paths[0].name}: {first_line(error)}")
    else:
        log(f"curves: {' and '.join(map(str, paths))}")
