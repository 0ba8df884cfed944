"""Files that several processes share: locks, checksums, and contents that are on the disk before they are relied on."""

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

Log = Callable[[str], object]


def sha256(*parts) -> str:
    """The sha256 of bytes or arrays, one after the other, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def stream_sha256(file: BinaryIO) -> str:
    """The sha256 of what is left to read of `file`."""
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


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
    """Waits until the names in `folder` are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class InUse(Exception):
    """Another process holds a lock; the message is what it wrote into the lock file."""


@contextlib.contextmanager
def locked(path: Path, log: Log | None) -> Iterator[BinaryIO]:
    """Holds the lock file `path`, which goes with the lock; the system frees it when its holder dies.

    Args:
        log: is told before this waits for another holder; with None it does not wait.

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
                    raise InUse(file.read().decode().strip()) from error
                log(f"waiting for another process that prepares the same data ({path})")
                fcntl.flock(file, fcntl.LOCK_EX)
            # The holder before us removed the file that we waited for: then its lock keeps nobody out.
            if _is_file_at(path, file.fileno()):
                try:
                    yield file
                finally:
                    path.unlink(missing_ok=True)
                return


def _is_file_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
