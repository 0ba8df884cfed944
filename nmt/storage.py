"""Files that several processes share: locks, checksums, and writing that leaves the old file or the new one."""

import contextlib
import fcntl
import glob
import hashlib
import io
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

Log = Callable[[str], object]
STATE_SUFFIX = ".state"  # behind the name of a run's best model
PARTIAL = ".partial-"  # stands in the name of a file that `replacing` has not finished


# ---------------------------------------------------------------- checksums


def sha256(*parts) -> str:
    """The sha256 of bytes or arrays, one after the other, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def stream_sha256(file: BinaryIO | io.BufferedIOBase, size: int = sys.maxsize) -> str:
    """The sha256 of the rest of `file`, from where it stands, or of its next `size` bytes."""
    digest = hashlib.sha256()
    while block := file.read(min(1 << 20, size)):
        digest.update(block)
        size -= len(block)
    return digest.hexdigest()


# ---------------------------------------------------------------- names


def state_path(ckptpath: str | Path) -> Path:
    """Where the state of a run stands whose best model is `ckptpath`."""
    return Path(f"{real(ckptpath)}{STATE_SUFFIX}")


def real(ckptpath: str | Path) -> str:
    """The path itself, or where it leads to if it is a link, as the model stands there."""
    return os.path.realpath(ckptpath) if os.path.islink(ckptpath) else os.fspath(ckptpath)


def lock_path(path: Path) -> Path:
    """The lock file beside `path`, for whoever writes there."""
    return path.with_name(f".{path.name}.lock")


# ---------------------------------------------------------------- writing


def write_synced(path: Path, *parts: bytes) -> None:
    """Writes a file and waits until it is on the disk.

    Raises:
        OSError: it cannot be written.
    """
    with open(path, "wb") as file:
        file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Waits until the names in `folder` are on the disk. Some file systems cannot do that: then it does not wait."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def beside(path: Path) -> Path:
    """A new name for a file that is to take the place of `path`, and that `clear_partial` finds if it never does."""
    return path.with_name(f"{path.name}{PARTIAL}{os.urandom(4).hex()}")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Writes a file that takes the place of `path` in one step, when all of it is on the disk.

    Until then it stands beside `path` as `NAME.partial-XXXXXXXX`. If the body or the writing raises, it is removed and
    the old file stays. A killed process leaves it behind, and `clear_partial` removes it later. The new file's mode
    follows the umask. If `path` is a link, the link itself is replaced.

    Yields:
        The file, open for writing bytes.

    Raises:
        OSError: it cannot be written.
    """
    temporary = beside(path)
    file = open(temporary, "xb")  # noqa: SIM115  (closed below)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def probe(path: Path) -> None:
    """Raises an OSError if `replacing` could not make its file beside `path`. Whether there is room it cannot say."""
    temporary = beside(path)
    open(temporary, "xb").close()
    temporary.unlink()


def clear_partial(path: Path) -> None:
    """Removes what killed processes left beside `path`, each in the middle of `replacing` it."""
    for stray in path.parent.glob(glob.escape(path.name + PARTIAL) + "*"):
        stray.unlink(missing_ok=True)


class Unwritable(OSError):
    """A disk is full or does not work. The message says what is wrong."""


@contextlib.contextmanager
def writing() -> Iterator[None]:
    """Turns the body's OSErrors into `Unwritable`, so that a caller can tell them from others."""
    try:
        yield
    except OSError as error:
        raise Unwritable(str(error)) from error


@contextlib.contextmanager
def new_folder(path: Path, temporary: Path) -> Iterator[None]:
    """Makes the folder `temporary`, which the body fills. Then the folder appears as `path`, in one step.

    If the body raises, the folder is removed. So is one that a killed process left: the caller holds a lock, and no
    other process uses `temporary` now.

    Raises:
        Unwritable: the folder cannot be made, or `path` is a file or a folder with something in it.
    """
    shutil.rmtree(temporary, ignore_errors=True)
    with writing():
        temporary.mkdir()
    try:
        yield
        sync_folder(temporary)
        with writing():
            os.rename(temporary, path)
        sync_folder(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# ---------------------------------------------------------------- locks


class InUse(Exception):
    """Another process holds a lock. The message is what that process wrote into the lock file."""


@contextlib.contextmanager
def locked(path: Path, log: Log | None) -> Iterator[BinaryIO]:
    """Holds the lock file `path`. The file is removed with the lock. If the holder dies, the system frees the lock.

    Args:
        log: is told before this waits for another holder. With None it does not wait.

    Yields:
        The file, to write into.

    Raises:
        InUse: there is another holder, and `log` is None.
        OSError: the file cannot be opened or locked.
    """
    while True:
        with open(path, "a+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                if log is None:
                    file.seek(0)
                    raise InUse(file.read().decode(errors="replace").strip() or "unknown") from error
                log(f"waiting for another process that prepares the same data ({path})")
                fcntl.flock(file, fcntl.LOCK_EX)
            # The holder before us may have removed the file that we waited for. Its lock keeps nobody out.
            if _is_file_at(path, file.fileno()):
                try:
                    yield file
                finally:
                    path.unlink(missing_ok=True)
                return


def clear_unless_in_use(lock: Path, clear: Callable[[], object]) -> None:
    """Calls `clear`, which removes what killed holders of `lock` left, unless a living process holds it.

    It does nothing either in a folder that cannot be written to, or with a lock of another user's.
    """
    with contextlib.suppress(InUse, OSError), locked(lock, None):
        clear()


def _is_file_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
