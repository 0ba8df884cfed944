"""What earlier runs left is kept: a new run moves it aside before it writes anything there.

A run whose best model is X leaves the files X, `X.state`, `X.toml`, `X.metrics.jsonl` and `X.curves.png`. When a new
run begins at X, all of them move together: to `X.previous`, `X.previous.state` and so on. What stood there moves to
`X.previous.1`, or to the next higher number, and keeps that name. Nothing is deleted. A run that goes on moves nothing.

The moves are renamings. They are written down first, beside X. So what a killed process has left undone, the next one
does (`finish`), and the files of a run stay together.
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from nmt.errors import UserError
from nmt.storage import (
    STATE_SUFFIX,
    InUse,
    Log,
    clear_partial,
    clear_unless_in_use,
    lock_path,
    locked,
    real,
    replacing,
    sync_folder,
)

# What a run leaves, behind the name of its best model. The state moves first: who finds it finds the rest too.
CONFIG, METRICS, CURVES = ".toml", ".metrics.jsonl", ".curves.png"
SUFFIXES = (STATE_SUFFIX, "", CONFIG, METRICS, CURVES)
PREVIOUS = ".previous"
LONGEST = f"{PREVIOUS}{METRICS}"  # behind the name, of what may be written there


@contextlib.contextmanager
def held(lock: Path, where: str | Path, flag: str) -> Iterator[None]:
    """Keeps a place for this process while the body runs. The lock file names it, and goes with it.

    Args:
        lock: the lock file.
        where: the place, for errors.
        flag: that names the place.

    Raises:
        UserError: io, another process has it, or it cannot be locked.
    """
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(locked(lock, None))
            file.truncate(0)
            file.write(f"{os.getpid()}\n".encode())
            file.flush()
        except InUse as error:
            todo = f"wait for it to end, or give {flag} another place"
            raise UserError("io", f"in use by pid {error}", str(where), todo) from error
        except OSError as error:
            todo = f"remove that file if no run uses it, or give {flag} another place"
            raise UserError("io", f"cannot lock: {error.strerror}", str(lock), todo) from error
        yield


def previous_of(base: str | Path) -> Path:
    """Where what the last run left at `base` is kept."""
    return Path(f"{real(base)}{PREVIOUS}")


def files_of(base: str | Path, suffixes: Sequence[str] = SUFFIXES) -> list[Path]:
    """The files that a run left at `base`."""
    return [path for path in paths_of(base, suffixes) if os.path.lexists(path)]


def paths_of(base: str | Path, suffixes: Sequence[str] = SUFFIXES) -> list[Path]:
    """The names that a run's files have at `base`."""
    return [Path(f"{real(base)}{suffix}") for suffix in suffixes]


def make_room(
    base: str | Path, log: Log, suffixes: Sequence[str] = SUFFIXES, *, copies: bool = False, overwrites: bool = False
) -> None:
    """Moves what an earlier run left at `base` to `previous_of(base)`, and says so in one line.

    Call this before a run's first file is opened. One process at a time may call it for a base.

    Args:
        base: the path of the best model, or what the names of other files begin with.
        log: takes the line.
        suffixes: what stands behind `base` in the names of the files.
        copies: whether the files stay where they are too, because the run goes on with some of them.
        overwrites: whether they are removed instead.

    Raises:
        UserError: io, they cannot be kept, or another run writes at the place where they would be.
    """
    base, kept = Path(real(base)), previous_of(base)
    of_a_run = list(dict.fromkeys([*SUFFIXES, *suffixes]))  # some of them may be moved alone, but not from a kept run
    try:
        finish(base)
        if not (found := files_of(base, suffixes)):
            return
        if overwrites:
            for path in found:
                path.unlink()
            log(f"note: --overwrite: what an earlier run left is removed: {names(found)}")
            return
        with locked(lock_path(kept), None):
            moved = files_of(kept, of_a_run)
            older = Path(f"{kept}.{1 + max(numbers(kept, of_a_run), default=0)}")
            pairs = [*zip(moved, renamed(moved, kept, older), strict=True)]
            targets = renamed(found, base, kept)
            if not copies:
                pairs += zip(found, targets, strict=True)
            move(base, pairs)
            for path, target in zip(found, targets, strict=True) if copies else ():
                with open(path, "rb") as file, replacing(target) as copy:
                    shutil.copyfileobj(file, copy)
    except InUse as error:
        todo = "wait for it to end, or give --ckptpath another file"
        raise UserError("io", f"in use by pid {error}", str(kept), todo) from error
    except OSError as error:
        what = f"cannot keep what an earlier run left: {error.strerror or error}"
        raise UserError("io", what, str(kept), "move it away, or give --ckptpath another file") from error
    log(f"note: {'; '.join(told(base, of_a_run, targets, older if moved else None))}")


def told(base: Path, suffixes: Sequence[str], targets: list[Path], older: Path | None) -> list[str]:
    """What the line says: what is where, how its run can go on, and how much is kept."""
    kept = previous_of(base)
    parts = [f"what an earlier run left at {base} is now {names(targets)}"]
    if older is not None:
        parts.append(f"what stood there is now {older.name}")
    if (state := Path(f"{kept}.state")) in targets:
        parts.append(f"that run did not end: --resume {state} goes on with it")
    bases = [kept, *(Path(f"{kept}.{number}") for number in sorted(numbers(kept, suffixes)))]
    size = sum(path.stat().st_size for each in bases for path in files_of(each, suffixes))
    parts.append(f"{len(bases)} earlier {'run is' if len(bases) == 1 else 'runs are'} kept, {size / 1e6:.1f} MB")
    return parts


def names(paths: list[Path]) -> str:
    return ", ".join(sorted(path.name for path in paths))


def renamed(paths: list[Path], base: Path, other: Path) -> list[Path]:
    """The files of `base` as those of `other`."""
    return [Path(f"{other}{str(path).removeprefix(str(base))}") for path in paths]


def numbers(kept: Path, suffixes: Sequence[str] = SUFFIXES) -> set[int]:
    """The numbers of the runs that are kept as `KEPT.1`, `KEPT.2` and so on."""
    pattern = re.compile(rf"{re.escape(kept.name)}\.([0-9]{{1,9}})({'|'.join(map(re.escape, suffixes))})")
    found = (pattern.fullmatch(name) for name in os.listdir(kept.parent))
    return {int(match[1]) for match in found if match}


# ---------------------------------------------------------------- moving, which a kill may interrupt


def plan_path(base: Path) -> Path:
    """The file that says what is to be renamed, from before the first renaming until after the last."""
    return base.with_name(f".{base.name}.moving")


def move(base: Path, pairs: list[tuple[Path, Path]]) -> None:
    """Renames files in the folder of `base`, one after the other. A later call of `finish` completes it.

    Args:
        pairs: a file and its new name, which is free when its turn comes.

    Raises:
        OSError: a file cannot be renamed.
    """
    plan = plan_path(base)
    with replacing(plan) as file:
        file.write(json.dumps([[old.name, new.name] for old, new in pairs]).encode())
    finish(base)


def finish(base: Path) -> None:
    """Completes the moves that `move` was killed in, if it was.

    Raises:
        OSError: a file cannot be renamed.
    """
    plan = plan_path(base)
    try:
        pairs = json.loads(plan.read_bytes())
    except FileNotFoundError:
        return
    for old, new in pairs:
        source, target = base.with_name(old), base.with_name(new)
        if os.path.lexists(source) and not os.path.lexists(target):  # otherwise it was done before
            os.rename(source, target)
    sync_folder(base.parent)
    plan.unlink()


def finish_all(base: Path) -> None:
    """Completes what was interrupted at `base`, and clears what was half written there.

    If `base` is a kept run itself, what was interrupted where it came from is completed too.

    Raises:
        OSError: a file cannot be renamed.
    """
    finish(base)
    for path in (plan_path(base), *paths_of(base)):
        clear_partial(path)
    kept = previous_of(base)

    def clear_kept() -> None:
        for path in paths_of(kept):
            clear_partial(path)

    clear_unless_in_use(lock_path(kept), clear_kept)
    if origin := re.fullmatch(rf"(.+){re.escape(PREVIOUS)}(\.[0-9]+)?", base.name):
        source = base.with_name(origin[1])
        with contextlib.suppress(InUse), locked(lock_path(source), None):
            finish(source)
