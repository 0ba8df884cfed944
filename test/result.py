"""What a wrapper does with the log of a run that has ended well: its result files, and the last lines on the screen.

    python3 test/result.py --kind=full --ranks=1 --network=NAME --seconds=321 --log=LOG --output=DIR --folder=DIR/RUN \
        --record=DIR/RUN

The files stand in the run's own folder, and in the output folder under the names that other tools read.
"""

import argparse
import contextlib
import json
import math
import os
import platform
import re
import shutil
import statistics
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import logs
from nmt import jsonlines
from nmt.errors import UserError, discard_output, prepare_output, printable
from nmt.jsonlines import Entry
from nmt.storage import replacing

CASES = {"full": "acc", "performance": "perf"}
UNKNOWN = "unknown"
NUMBER = re.compile(r"[0-9.]+([eE][+-]?[0-9]+)?")


class RunLog:
    """What the lines of a log say, once or after restarts.

    Attributes:
        facts: of the last line `run:`, by name.
        losses: of the step lines, as they stand there. A step that was done again after a restart has its second loss.
        rates: pairs a second, one for each line `* FPS@all`.
        bleu: of the last line `BLEU score`, or None.
        compile_time: seconds of the first two steps, as they stand there, or None.
        device_name: of the last line `device:`.
    """

    def __init__(self, text: str):
        runs = [match.group() for match in logs.RUN.finditer(text)]
        self.facts = logs.facts_of(runs[-1]) if runs else {}
        losses = {step.group("epoch", "step"): step["loss"] for step in logs.STEP.finditer(text)}
        self.losses = list(losses.values())
        self.rates = [float(match["rate"]) for match in logs.RATE.finditer(text)]
        self.bleu = {match["name"]: match["value"] for match in logs.FINAL_SCORE.finditer(text)}.get("BLEU score")
        self.device_name = ([match["device"] for match in logs.DEVICE.finditer(text)] or [""])[-1]
        first = logs.COMPILE_TIME.search(text)
        self.compile_time = first["seconds"] if first else None


def number(text: str) -> float | None:
    """The number that `text` is, or None where it is none or not finite."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def main(argv: list[str]) -> None:
    """Writes the files of a run, prints its result, and compares it with what is wanted.

    Raises:
        UserError: bug, the log lacks a figure. Or io, a file cannot be written. Or accept, BLEU is too low.
    """
    parser = argparse.ArgumentParser(prog="result.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("--kind", choices=CASES, required=True)
    for name in ("ranks", "seconds"):
        parser.add_argument(f"--{name}", type=int, required=True)
    for name in ("network", "log", "output", "folder"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--record", required=True, help="the folder of metrics.jsonl")
    parser.add_argument("--accept", type=Decimal, help="the lowest BLEU that is a success")
    told = parser.parse_args(argv)
    run = RunLog(Path(told.log).read_text(encoding="utf-8", errors="surrogateescape"))
    values = results(run, told.kind, told.ranks, told.network, told.seconds, told.log)
    try:
        write(run, values, Path(told.output), Path(told.folder), Path(told.record) / "metrics.jsonl")
    except OSError as error:
        what = f"cannot write the results: {error.strerror}"
        raise UserError("io", what, str(error.filename or told.output), "is the disk full?") from error
    lines = ["------------------ Final result ------------------"]
    lines.append(f"Final Performance images/sec : {values['ActualFPS']}")
    if told.kind == "full":
        lines.append(f"Final Train Accuracy : {values['TrainAccuracy']}")
    lines.append(f"E2E Training Duration sec : {values['E2ETrainingTime']}")
    lines.append(f"results: {printable(told.folder)}")
    try:
        print(*lines, sep="\n", flush=True)
    except BrokenPipeError:  # nobody reads, but the exit code may count
        discard_output()
    if told.accept is not None and Decimal(values["TrainAccuracy"]) < told.accept:
        what = f"BLEU {values['TrainAccuracy']} is below {told.accept}"
        todo = "docs/results.md says what to expect of which recipe, precision and batch"
        raise UserError("accept", what, told.folder, todo)


def results(run: RunLog, kind: str, ranks: int, network: str, seconds: int, log: str) -> dict[str, str]:
    """What the result file says, in its order: first the ModelZoo's keys.

    Raises:
        UserError: bug, the log lacks a figure.
    """

    def missing(what: str) -> UserError:
        return UserError("bug", f"the run ended without {what}", log, "look there for what it did")

    if not {"batch", "processes"} <= run.facts.keys():
        raise missing("a line 'run: ... processes=N ... batch=N'")
    rate = statistics.median(run.rates) if run.rates else 0.0
    if not rate > 0:
        raise missing("a line '* FPS@all NUMBER'")
    if not run.losses:
        raise missing("a line of a step with its loss")
    if kind == "full" and (run.bleu is None or not NUMBER.fullmatch(run.bleu)):
        raise missing("a line 'BLEU score = NUMBER'")
    batch = int(run.facts["batch"])
    precision, _, level = run.facts.get("precision", "").partition("/")
    values = {
        "Network": network,
        "RankSize": run.facts["processes"],
        "BatchSize": str(batch),
        "DeviceType": platform.machine(),
        "CaseName": f"{network}_bs{batch}_{ranks}p_{CASES[kind]}",
        "ActualFPS": f"{rate:.2f}",
        "TrainingTime": f"{batch * 1000 / rate:.2f}",
        "ActualLoss": run.losses[-1],
    }
    if kind == "full":
        values["TrainAccuracy"] = str(run.bleu)
    values["E2ETrainingTime"] = str(seconds)
    values |= {"CompileTime": run.compile_time or UNKNOWN, "Precision": precision, "OptLevel": level}
    facts = {
        "Device": "device",
        "Recipe": "recipe",
        "Seed": "seed",
        "Epochs": "epochs",
        "DataFingerprint": "data",
        "Commit": "commit",
    }
    values |= {key: run.facts.get(fact, "") for key, fact in facts.items()}
    values["DeviceName"] = run.device_name
    return {key: value or UNKNOWN for key, value in values.items()}


def figures_by_epoch(metrics: Path) -> list[Entry]:
    """The figures of a run by epoch, from 1: what its metrics.jsonl says of each, and nothing if there is no such file.

    nmt/record.py says what the objects hold.
    """
    epochs: dict[int, Entry] = {}
    for entry in jsonlines.read(metrics):
        epoch = entry.get("epoch")
        if entry.get("kind") in ("epoch", "validation") and isinstance(epoch, int):
            figures = {name: value for name, value in entry.items() if name not in ("kind", "time")}
            epochs.setdefault(epoch, {}).update(figures)
    return [epochs[epoch] for epoch in sorted(epochs)]


TEXTS = ("Network", "DeviceType", "CaseName", "Precision", "OptLevel", "Device", "DeviceName", "Recipe")
TEXTS += ("DataFingerprint", "Commit")


def as_json(values: dict[str, str], epochs: list[Entry]) -> str:
    """The results as JSON: numbers as numbers, what is unknown or not finite as null, and the figures by epoch."""
    content: dict[str, Any] = {}
    for key, value in values.items():
        if value == UNKNOWN:
            content[key] = None
        elif key in TEXTS:
            content[key] = value
        else:
            content[key] = int(value) if re.fullmatch("[0-9]+", value) else number(value)
    content["FiguresByEpoch"] = epochs
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def write(run: RunLog, values: dict[str, str], output: Path, folder: Path, metrics: Path) -> None:
    """Writes the files into the run's folder, and has the output folder show them under their usual names.

    Args:
        run, values: what the log says, and what the result file says.
        output, folder: the output folder, and the run's own.
        metrics: the run's metrics.jsonl.
    """
    case = values["CaseName"]
    precision = values["Precision"] if re.fullmatch("[a-z0-9]+", values["Precision"]) else UNKNOWN
    losses, result = folder / f"train_{case}_loss.txt", folder / f"{case}_{precision}.log"
    texts = {
        losses: "".join(f"{loss}\n" for loss in run.losses),
        result: "".join(f"{key} = {value}\n" for key, value in values.items()),
        result.with_suffix(".json"): as_json(values, figures_by_epoch(metrics)),
    }
    for path, text in texts.items():
        with replacing(path) as file:
            file.write(text.encode("utf-8", "surrogateescape"))
    show(losses, output / losses.name)
    show(result, output / f"{case}.log")


def show(own: Path, shown: Path) -> None:
    """Gives a file a second name. Where the disk has no hard links, it gets a copy."""
    new = shown.with_name(f"{shown.name}.tmp")
    with contextlib.suppress(FileNotFoundError):
        new.unlink()
    try:
        os.link(own, new)
    except OSError:
        shutil.copyfile(own, new)
    os.replace(new, shown)


if __name__ == "__main__":
    # Not by `run_main`: the wrapper has turned signals off, so that the files are not left half done.
    prepare_output()
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
