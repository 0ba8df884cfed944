"""The figures of a run, for programs: JSON lines, and TensorBoard.

`metrics.jsonl` has one JSON object a line. It is strict JSON: a figure that is not finite is null. Each object has a
`kind` and a `time`, which is UTC. Epochs and steps count from 1, and steps count on over the whole run.

| kind | when | what |
|---|---|---|
| run | first | what the log's line `run:` says, the number of parameters, the steps of an epoch |
| resumed | where a run goes on | `steps_done` |
| step | at each step line | what the line says, the learning rate, the loss scale |
| epoch | after the steps of an epoch | pairs a second, the mean training loss |
| validation | after it | losses, perplexities, BLEU, whether it is the best so far |
| test | last | the final scores |

Rank 0 writes a line at a time, so a killed run leaves whole lines, and at most one torn one at the end. A run that goes
on drops that, and what it will do again. So no step stands there twice.
"""

import contextlib
import datetime
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from nmt import jsonlines, keeping
from nmt.errors import UserError, not_installed
from nmt.jsonlines import Entry
from nmt.log import StepLine
from nmt.storage import Log, probe, real, replacing

METRICS, CURVES = "metrics.jsonl", "curves.png"  # in a folder of --record
OF_THE_PLACE = ("kind", "time", "epoch", "step", "steps_done", "epoch_step", "epoch_steps", "is_best", "beam_size")


# ---------------------------------------------------------------- where it stands


def metrics_paths(ckptpath: str | None, folder: str | None) -> list[Path]:
    """The files that a run writes its figures to.

    Args:
        ckptpath: its best model. None: it has none.
        folder: of --record. None: there is none.
    """
    return _paths(ckptpath, keeping.METRICS, folder, METRICS)


def curves_paths(ckptpath: str | None, folder: str | None) -> list[Path]:
    """The pictures that a run draws at its end. The arguments are those of `metrics_paths`."""
    return _paths(ckptpath, keeping.CURVES, folder, CURVES)


def _paths(ckptpath: str | None, suffix: str, folder: str | None, name: str) -> list[Path]:
    own = [Path(f"{real(ckptpath)}{suffix}")] if ckptpath is not None else []
    return own + ([Path(folder) / name] if folder is not None else [])


def prepare(folders: dict[str, str | None]) -> None:
    """Makes the folders of flags, and makes sure that files can be written there.

    Args:
        folders: flag → folder, or None if the flag is left out.

    Raises:
        UserError: usage, TensorBoard is not installed. Or io, a folder cannot be used.
    """
    if folders.get("--tensorboard") is not None and (told := not_installed(["tensorboard"], "requirements-plots.txt")):
        raise told
    for flag, folder in folders.items():
        if folder is None:
            continue
        try:
            os.makedirs(folder, exist_ok=True)
            probe(Path(folder) / METRICS)
        except (OSError, ValueError) as error:
            what = f"cannot write into the folder: {getattr(error, 'strerror', None) or error}"
            raise UserError("io", what, f"{flag} {folder}", f"give {flag} a folder that you may write") from error


@contextlib.contextmanager
def claimed(folder: str | None) -> Iterator[None]:
    """Keeps the folder of --record for one run at a time. None: there is none.

    Raises:
        UserError: io, another run writes there, or it cannot be locked.
    """
    if folder is None:
        yield
        return
    with keeping.held(Path(folder) / ".lock", folder, "--record"):
        yield


def make_room(folder: str, run: str | None, log: Log, *, overwrites: bool) -> None:
    """Makes room in the folder of --record. A run that goes on keeps its own figures there.

    Args:
        folder: the folder.
        run: the name of the run that goes on. None: it begins.
        log, overwrites: as in `keeping.make_room`.

    Raises:
        UserError: io, what stands there cannot be kept.
    """
    is_own = run is not None and [entry.get("run") for entry in jsonlines.read(Path(folder) / METRICS)[:1]] == [run]
    if not is_own:
        for name in (METRICS, CURVES):
            stem, suffix = os.path.splitext(name)
            keeping.make_room(Path(folder) / stem, log, [suffix], overwrites=overwrites)


# ---------------------------------------------------------------- metrics.jsonl


def now() -> str:
    """The time in UTC, such as 2026-11-26T21:42:42.123Z."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def before(entries: Iterable[Entry], step: int) -> Iterator[Entry]:
    """The entries that a run keeps which goes on after `step`. The end of an epoch may come after its last step."""
    for entry in entries:
        at = entry.get("steps_done", entry.get("step", 0))
        is_of_the_end = entry.get("kind") in ("epoch", "validation")
        if entry.get("kind") != "test" and isinstance(at, int) and at <= step - is_of_the_end:
            yield entry


class MetricsFile:
    """One metrics file, open at its end. A disk that is full costs lines, and one warning, and not the run."""

    def __init__(self, path: Path, log: Log):
        self._path, self._log = path, log
        try:
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115  (see `close`)
        except OSError as error:
            raise unwritable(path, error) from error
        self._has_warned = False

    def write(self, entry: Entry) -> None:
        """Appends a line, or nothing of it."""
        line, size = jsonlines.as_line(entry), self._file.tell()
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(size)
                self._file.seek(size)
            if not self._has_warned:
                self._log(f"warning: cannot write the figures to {self._path}: {error.strerror or error}")
            self._has_warned = True

    def close(self) -> None:
        self._file.close()


def unwritable(path: Path, error: OSError) -> UserError:
    what = f"cannot write the figures of the run: {error.strerror or error}"
    return UserError("io", what, str(path), "make room there, or move it away")


def begin(paths: Sequence[Path], run: str, about: Entry, step: int, log: Log) -> list[MetricsFile]:
    """Opens the metrics files of a run, which begins or goes on.

    A file of this run keeps what was done up to `step`. One that is not there yet gets that from another of `paths`.

    Args:
        paths: of the files.
        run: the run's name. A new run has a new one.
        about: the facts of the first object.
        step: steps that are done.
        log: takes warnings.

    Raises:
        UserError: io, a file cannot be written.
    """
    own = [
        [*before(entries, step)] for entries in map(jsonlines.read, paths) if entries and entries[0].get("run") == run
    ]
    kept = max(own, key=len, default=[])
    if kept:
        kept.append({"kind": "resumed", "time": now(), "steps_done": step})
    else:
        kept = [{"kind": "run", "time": now(), "run": run, "steps_done": step} | about]
    for path in paths:
        try:
            with replacing(path) as file:
                file.writelines(map(jsonlines.as_line, kept))
        except OSError as error:
            raise unwritable(path, error) from error
    return [MetricsFile(path, log) for path in paths]


# ---------------------------------------------------------------- TensorBoard


class Board:
    """Event files for TensorBoard: a folder each for train, validation and test, so that their curves share a chart.

    Args:
        folder: of --tensorboard.
        names: of the folders in it.
        step: steps that are done. TensorBoard drops what an earlier process has written of later ones, and all that a
            run has written there before which is another one.
        log: takes a warning.
    """

    def __init__(self, folder: Path, names: Iterable[str], step: int, log: Log):
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        # An epoch's validation may come after the state of its last step.
        first = {name: step + (name == "train") if step else 0 for name in names}
        self._writers = {name: SummaryWriter(str(folder / name), purge_step=first[name]) for name in names}
        self._folder, self._log, self._works = folder, log, True

    def add(self, name: str, step: int, scalars: Entry, texts: dict[str, str]) -> None:
        """Writes figures and texts of a step. A disk that is full costs what comes, and not the run."""
        if not self._works:
            return
        writer = self._writers[name]
        try:
            for tag, value in scalars.items():
                writer.add_scalar(tag, value, step)
            for tag, text in texts.items():
                writer.add_text(tag, text, step)
            writer.flush()
        except OSError as error:
            self._works = False
            self._log(f"warning: cannot write for TensorBoard to {self._folder}: {error.strerror or error}")

    def close(self) -> None:
        for writer in self._writers.values():
            with contextlib.suppress(OSError):  # `add` has told it
                writer.close()


def as_block(texts: Iterable[str]) -> str:
    r"""Lines of text that Markdown shows as they are.

    >>> as_block(["*a*", "b"])
    '    *a*\n    b'
    """
    return "\n".join(f"    {text}" for text in texts)


# ---------------------------------------------------------------- both


class Record:
    """All that takes the figures of a run. Without files and board, as on ranks other than 0, it takes nothing."""

    RUNS = {"step": "train", "validation": "validation", "test": "test"}

    def __init__(self, files: Sequence[MetricsFile] = (), board: Board | None = None):
        self._files, self._board = files, board

    def add(self, kind: str, step: int, figures: Entry, examples: Sequence[tuple[str, str, str]] = ()) -> None:
        """Writes an object.

        Args:
            kind: as in the table above.
            step: of the run, from 1.
            figures: what the object has.
            examples: source, reference and translation of some pairs, for TensorBoard.
        """
        entry = {"kind": kind, "time": now(), "step": step} | figures
        for file in self._files:
            file.write(entry)
        if self._board is None or kind not in self.RUNS:
            return
        scalars = {
            name: value for name, value in entry.items() if isinstance(value, int | float) and name not in OF_THE_PLACE
        }
        texts = {
            f"translation {number}": as_block(f"{name:9}  {text}" for name, text in zip(NAMES, example, strict=True))
            for number, example in enumerate(examples, start=1)
        }
        self._board.add(self.RUNS[kind], step, scalars, texts)

    def step(self, line: StepLine, step: int, learning_rate: float, loss_scale: float | None) -> None:
        """Writes what a step line says.

        Args:
            line: of the log.
            step: of the run, from 1.
            learning_rate: of that step.
            loss_scale: None in float32.
        """
        figures = vars(line) | {"epoch": line.epoch + 1, "epoch_step": line.step, "epoch_steps": line.steps}
        figures = {name: value for name, value in figures.items() if name not in ("step", "steps")}
        self.add("step", step, figures | {"learning_rate": learning_rate, "loss_scale": loss_scale})

    def close(self) -> None:
        for file in self._files:
            file.close()
        if self._board is not None:
            self._board.close()


NAMES = ("source", "reference", "model")


def add_scores(paths: Sequence[Path], board: str | None, figures: Entry, log: Log) -> None:
    """Adds the final scores of a run. Its training has closed the files, perhaps in another process.

    Args:
        paths: of the metrics files.
        board: the folder of --tensorboard.
        figures: the scores.
        log: takes warnings.
    """
    steps = [entry["step"] for entry in jsonlines.read(paths[0]) if entry.get("kind") == "epoch"]
    files = []
    for path in paths:
        try:
            files.append(MetricsFile(path, log))
        except UserError as error:  # the score is printed, and the model is whole
            log(f"warning: {error.args[1]}: {path}")
    record = Record(files, Board(Path(board), ["test"], 0, log) if board is not None else None)
    record.add("test", max(steps, default=0), figures)
    record.close()
