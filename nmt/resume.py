"""The state of a run: all that training goes on from after a crash, a signal or the end of a time slot.

It is a file beside the best model, `CKPTPATH.state`. Rank 0 writes it by itself, between two steps, so saving needs no
other rank. It holds the weights, the optimizer, the average, the counters and the best score so far. It holds no random
generator: each step seeds the generators from the run's seed, the step and the rank (`train_8p.seed_step`). The order
of pairs follows from the seed and the epoch. So a position in an epoch is a number.

On a CPU a run that goes on computes what an uninterrupted one computes, bit for bit, if the data, the settings, the
number of processes, the threads and PyTorch's version are the same. `check_same` says what is not.
"""

import dataclasses
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from nmt import sealed
from nmt.checkpoint import is_plain
from nmt.errors import UserError, first_line
from nmt.flags import flag_of
from nmt.signals import Stopped, StopRequest
from nmt.storage import STATE_SUFFIX as SUFFIX
from nmt.storage import Log, clear_partial, state_path

FORMAT = 1
SHARE = 0.02  # of the time goes into saving at the ends of epochs, at most
MOST_SHOWN = 4  # settings in a message
MOST_CHARACTERS = 300  # of another's error
HOW = "to go on, add --resume auto to the command"


class Part(Protocol):
    """What has a state: the trainer, the average, the best file, the log of an epoch."""

    def state(self) -> dict[str, Any]:
        """Tensors, numbers and texts, from which `restore` makes the same again. Tensors may be the part's own."""

    def restore(self, state: dict[str, Any]) -> None:
        """Takes over what `state` of another process gave."""


@dataclass
class State:
    """A run between two steps.

    Attributes:
        run: a random name that the run has from its first step on.
        given: the flags of its command, by name.
        settings: all its settings that decide on the numbers.
        about: fingerprints of data and vocabularies, and what the numbers depend on beside the settings.
        step: steps that are done.
        epoch: from 0.
        position: steps that are done in the epoch. The epoch's validation is not done yet.
        parts: name → what `Part.state` gave.
    """

    run: str
    given: dict[str, Any]
    settings: dict[str, Any]
    about: dict[str, Any]
    step: int = 0
    epoch: int = 0
    position: int = 0
    parts: dict[str, Any] = field(default_factory=dict)


def load(path: Path) -> State:
    """Reads the state of a run.

    Raises:
        UserError: checkpoint, it is missing, damaged or something else.
    """
    if not path.exists():
        todo = f"give --resume auto, or the path of the state of a run, NAME{SUFFIX}"
        raise UserError("checkpoint", "no such file", str(path), todo)
    content = sealed.read(path)
    todo = "use an earlier copy, or train again"
    number = content.pop("state_format", None)
    if "state_dict" in content:
        what, todo = "a model, not the state of a run", f"give --resume {state_path(path)}, or auto"
        raise UserError("checkpoint", what, str(path), todo)
    if type(number) is not int or number != FORMAT:
        raise UserError("checkpoint", f"no state of a run of format {FORMAT}", str(path), todo)
    try:
        state = State(**content)
        kinds = {name: type(value) for name, value in vars(State("", {}, {}, {})).items()}
        wrong = [name for name, kind in kinds.items() if type(getattr(state, name)) is not kind]
        if wrong or min(state.step, state.epoch, state.position) < 0:
            raise ValueError(f"{', '.join(wrong) or 'a count'} has a wrong value")
        if any(type(part) is not dict for part in state.parts.values()):
            raise ValueError("a part is no dict")
        if not all(map(is_plain, (state.given, state.settings, state.about))):
            raise ValueError("it holds other things than numbers and text")
    except (TypeError, ValueError) as error:
        raise UserError("checkpoint", f"contradicts itself: {first_line(error)}", str(path), todo) from error
    return state


def check_same(state: State, now: State, path: Path, typed: Collection[str] = ()) -> list[str]:
    """Refuses to go on with other settings or data.

    Args:
        state: from the file `path`.
        now: what this command would begin with.
        typed: the flags that this command itself has, by name.

    Returns:
        What else differs. It keeps the run from being the same bit for bit.

    Raises:
        UserError: usage, a flag contradicts the run. Or checkpoint, the data or the vocabularies are others.
    """
    names = state.settings.keys() | now.settings.keys()
    others = sorted(name for name in names if state.settings.get(name) != now.settings.get(name))
    if others:
        guilty = [name for name in typed if name in others] or [name for name in typed if name in ("recipe", "amp")]
        shown = ([name for name in others if name in guilty] or others)[:MOST_SHOWN]
        what = "; ".join(f"{name} is {now.settings.get(name)}, in the run {state.settings.get(name)}" for name in shown)
        if len(others) > len(shown):
            what += f"; and {len(others) - len(shown)} more"
        if guilty:
            todo = f"leave {' and '.join(map(flag_of, guilty))} out"
        else:
            todo = "give " + " ".join(f"{flag_of(name)} {state.settings.get(name)}" for name in shown)
        todo += ", or start a new run with another --ckptpath"
        raise UserError("usage", f"the run has other settings: {what}", str(path), todo)
    for name in ("data", "vocabularies"):
        if state.about.get(name) != now.about.get(name):
            raise UserError(
                "checkpoint",
                f"the run was trained on other {name}: fingerprint {state.about.get(name)}, here {now.about.get(name)}",
                str(path),
                "give the same files with --data-dir, or start a new run with another --ckptpath",
            )
    return [
        f"{name}: {value}, in the run {state.about.get(name)}"
        for name, value in now.about.items()
        if state.about.get(name) != value
    ]


class Run:
    """A run, whose state is kept on disk. It ends between two steps if it is asked to.

    Args:
        state: where the run stands: at its beginning, or as `load` gave it.
        parts: what is kept, by name. They take over what the state has of them.
        path: the file that it writes. None: it writes nothing.
        owns: whether the file at `path` is the one that `state` is from.
        minutes: between two times that it is written.
        stop: tells whether the run is to end. None: another rank decides.
        log: takes lines.

    Attributes:
        step, epoch: where the run began in this process, as in `State`.

    Raises:
        UserError: checkpoint, the state contradicts itself.
    """

    def __init__(
        self,
        state: State,
        parts: dict[str, Part],
        *,
        path: Path | None,
        owns: bool,
        minutes: float,
        stop: StopRequest | None,
        log: Log,
    ):
        self.step, self.epoch, self._position = state.step, state.epoch, state.position
        self._parts, self._log_part = parts, state.parts.get("log")
        self._path, self._interval, self._stop, self._log = path, 60 * minutes, stop, log
        if state.parts:
            for name, part in parts.items():
                self._restore(name, part, state.parts.get(name))
        self._state = dataclasses.replace(state, parts={})  # they are in memory once
        if path is not None:
            clear_partial(path)
        self._saved_step = state.step if owns else None
        self._saved = time.monotonic()
        self._cost = 0.0  # seconds of the last time

    def begin_epoch(self, log: Part) -> int:
        """Call this before the steps of an epoch.

        Args:
            log: of the epoch. It takes over what the state has of it.

        Returns:
            The position of the first step, 0 except in the epoch that a resumed run goes on with.
        """
        self._parts["log"] = log
        if self._position:
            self._restore("log", log, self._log_part)
        position, self._position = self._position, 0
        return position

    def step_done(self, step: int, epoch: int, position: int) -> None:
        """Call this after each step: writes the state if it is time, or if the run is to end.

        Args:
            step, epoch, position: as in `State`.

        Raises:
            Stopped: the run is to end, and the state is written if it can be.
        """
        stops = self._stop is not None and self._stop.signal is not None
        if self._path is not None and (stops or time.monotonic() >= self._saved + self._interval):
            self._save(step, epoch, position)
        self.end_if_asked()

    def steps_done(self, step: int, epoch: int, position: int) -> None:
        """Call this after the last step of an epoch: writes the state before the validation.

        The first epoch's is always written. Of short epochs not each is worth a file.
        """
        is_new = self._path is not None and step != self._saved_step
        if is_new and time.monotonic() >= self._saved + self._cost / SHARE:
            self._save(step, epoch, position)

    def end_if_asked(self) -> None:
        """Call this where the run may end without another save.

        Raises:
            Stopped: it is to end.
        """
        if self._stop is None or self._stop.signal is None:
            return
        raise Stopped(self._stop.exit_code, self._what_is_kept())

    def _what_is_kept(self) -> str:
        """What the run leaves where it stands, and how to go on. Nothing, if it writes nothing."""
        if self._path is None:
            return ""
        if self._saved_step is None:
            return "no step is saved: the same command begins anew"
        kept = f"step {self._saved_step} is saved; {HOW}"
        if getattr(self._parts.get("best"), "merit", ()):
            kept += f"; the best model so far is {str(self._path).removesuffix(SUFFIX)}"
        return kept

    def _restore(self, name: str, part: Part, state: Any) -> None:
        try:
            part.restore(state)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            said = " ".join(f"{type(error).__name__}: {error}".split())  # its first line may say little
            what = f"contradicts itself, or is of another model: {name}: {said[:MOST_CHARACTERS]}"
            todo = f"go on with the gru.py that the run began with, or {sealed.OTHER_COPY}"
            raise UserError("checkpoint", what, "the state of the run", todo) from error

    def _save(self, step: int, epoch: int, position: int) -> None:
        assert self._path is not None
        start = time.monotonic()
        parts = {name: part.state() for name, part in self._parts.items()}
        state = dataclasses.replace(self._state, step=step, epoch=epoch, position=position, parts=parts)
        try:
            sealed.write(self._path, vars(state) | {"state_format": FORMAT})
        except OSError as error:
            # The training itself is in order, and ending it would lose more than going on.
            self._log(f"warning: cannot save the run's state in {self._path}: {error.strerror or error}")
        else:
            self._saved_step = step
            self._log(f"state: step {step} is saved in {self._path}")
        self._saved = time.monotonic()
        self._cost = self._saved - start
