"""Tokenised corpora on disk: arrays that are mapped into memory and not read into it, and what was seen of the files.

A cache folder holds one folder per corpus, named by a key that stands for the texts' contents and all that decides what
becomes of them. In it, each array is a file of raw numbers, and `index.json` tells the rest, with the sha256 of every
file. It appears under its name only when it is whole and on the disk. `digests.json` remembers the sha256 of the
text files, so that they need not be read to find the key. Nothing is pickled.
"""

import concurrent.futures
import contextlib
import fcntl
import io
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from nmt.storage import Log, locked, sha256, stream_sha256, sync_folder, write_synced
from nmt.text import files

import numpy as np

INDEX = "index.json"
DIGESTS = "digests.json"
RACY_NS = 2_000_000_000  # a file that was changed less than this before it was read may change again unnoticed
BLOCK = 1 << 20  # numbers that are in memory at a time


class Unwritable(Exception):
    """The cache folder is full or does not work; the message says what is wrong."""


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Unwritable(str(error)) from error


class Entry(NamedTuple):
    """What a cache holds: arrays by name, and anything that JSON can tell."""

    arrays: dict[str, np.ndarray]
    about: Any


class Writer:
    """Arrays that grow by appending, as files of a folder, or in memory.

    Args:
        folder: None for in memory.

    What writes raises `Unwritable`.
    """

    def __init__(self, folder: Path | None):
        self._folder = folder
        self._files: dict[str, BinaryIO] = {}
        self._dtypes: dict[str, str] = {}

    @_writing()
    def append(self, name: str, values: np.ndarray) -> None:
        """Adds `values`, [n], of the same dtype as before, at the end of the array `name`."""
        if name not in self._files:
            self._files[name] = open(self._folder / name, "w+b") if self._folder else io.BytesIO()  # noqa: SIM115
            self._dtypes[name] = values.dtype.str
        self._files[name].write(np.ascontiguousarray(values))

    @_writing()
    def translate(self, name: str, table: np.ndarray) -> None:
        """Replaces each number of the array `name` by what `table` has at its place; the dtypes are the same."""
        file, place = self._files[name], 0
        file.seek(0)
        while block := file.read(BLOCK * table.itemsize):
            file.seek(place)
            place += file.write(table[np.frombuffer(block, table.dtype)])
            file.seek(place)

    def in_memory(self) -> dict[str, np.ndarray]:
        return {name: np.frombuffer(file.getbuffer(), self._dtypes[name]) for name, file in self._files.items()}

    @_writing()
    def finish(self, about: Any) -> None:
        """Writes the index, and waits until all is on the disk."""
        with concurrent.futures.ThreadPoolExecutor() as threads:
            digests = threads.map(_settle, self._files.values())
        arrays = {name: [self._dtypes[name], digest] for name, digest in zip(self._files, digests, strict=True)}
        _write_checked(self._folder / INDEX, {"arrays": arrays, "about": about})
        sync_folder(self._folder)

    def close(self) -> None:
        for file in self._files.values():
            file.close()


def _settle(file: BinaryIO) -> str:
    """Waits until a file is on the disk; returns the sha256 of what the system then has for it."""
    file.flush()
    os.fsync(file.fileno())
    file.seek(0)
    return stream_sha256(file)


Build = Callable[[Writer], Any]


def read(folder: Path | None, key: str, log: Log = lambda line: None, verify: bool = True) -> Entry | None:
    """The corpus of this key, its arrays mapped from the disk, not to be written to; None if it is not there or not as
    it was written, which `verify` finds out by reading all of it."""
    if folder is None or not (path := folder / key).exists():
        return None
    try:
        index = _read_checked(path / INDEX)
        # Read-only: the system counts pages that could be written as this process's memory, and may not have so many.
        arrays = {name: np.asarray(np.memmap(path / name, dtype, "r")) for name, (dtype, _) in index["arrays"].items()}
        if verify:
            with concurrent.futures.ThreadPoolExecutor() as threads:
                digests = list(threads.map(sha256, arrays.values()))
            if digests != [digest for _, digest in index["arrays"].values()]:
                raise ValueError("an array has another sha256 than it was written with")
    except (OSError, ValueError):  # ValueError: from memmap too, for a size that is none
        log(f"the cache {path} is damaged and is built again")
        return None
    return Entry(arrays, index["about"])


def read_or_build(folder: Path | None, key: str, build: Build, log: Log) -> Entry:
    """The corpus of this key, from the cache or new; of many processes one builds it and the others wait.

    Args:
        folder: from `find_folder`; without one, or if it cannot be written to, the corpus stays in memory.
        build: appends the arrays to the writer it is given, and returns the rest.
    """
    if folder is None:
        return _in_memory(build)
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(locked(folder / f"{key}.lock", log))
        except OSError as error:  # another user has the lock file
            log(f"not cached: {error}")
            return read(folder, key, log) or _in_memory(build)
        entry = read(folder, key, log)
        if entry is None:
            try:
                _write(folder / key, build)
            except Unwritable as error:
                log(f"not cached: {error}")
            entry = read(folder, key, log) or _in_memory(build)
        return entry


def _in_memory(build: Build) -> Entry:
    writer = Writer(None)
    about = build(writer)
    return Entry(writer.in_memory(), about)


def _write(path: Path, build: Build) -> None:
    temporary = path.with_name(f"{path.name}.tmp")  # one name is enough, we hold the lock
    shutil.rmtree(temporary, ignore_errors=True)  # what a killed run left
    with _writing():
        temporary.mkdir()
    try:
        with contextlib.closing(Writer(temporary)) as writer:
            writer.finish(build(writer))
        shutil.rmtree(path, ignore_errors=True)  # it is damaged
        with _writing():
            os.rename(temporary, path)
            sync_folder(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_checked(path: Path, content: Any) -> None:
    """JSON after a line with its sha256."""
    body = json.dumps(content).encode()
    write_synced(path, sha256(body).encode(), b"\n", body)


def _read_checked(path: Path) -> Any:
    """What `_write_checked` wrote.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged.
    """
    header, _, body = path.read_bytes().partition(b"\n")
    if header.decode("latin-1") != sha256(body):
        raise ValueError("its contents have another sha256 than its first line tells")
    return json.loads(body)


# ---------------------------------------------------------------- digests of the text files


def known_digests(folder: Path | None, paths: list[Path]) -> list[str] | None:
    """The files' `files.content_sha256`, without reading them; None unless all are known and unchanged."""
    known = _digests_in(folder)
    digests = []
    for path in paths:
        state, digest = known.get(os.path.realpath(path), (None, None))
        if state is None or state != _state(path):
            return None
        digests.append(digest)
    return digests


def read_digests(folder: Path | None, paths: list[Path], log: Log) -> list[str]:
    """The files' `files.content_sha256`, of which `folder` will know those that stay as they are.

    Raises:
        UserError: as reading the files.
    """
    begin, states = time.time_ns(), [_state(path) for path in paths]
    with concurrent.futures.ThreadPoolExecutor() as threads:
        digests = list(threads.map(files.content_sha256, paths))
    # As git does for its index: a file that has just been changed may be changed once more in the same tick of the
    # clock, and then has the state that it had.
    fresh = {
        os.path.realpath(path): [state, digest]
        for path, state, digest in zip(paths, states, digests, strict=True)
        if max(state[1:3]) + RACY_NS < begin and state == _state(path)
    }
    if folder is not None and fresh:
        temporary = folder / f"{DIGESTS}.tmp"
        try:
            with locked(folder / f"{DIGESTS}.lock", lambda line: None):
                known = {path: value for path, value in _digests_in(folder).items() if os.path.exists(path)}
                _write_checked(temporary, known | fresh)
                os.replace(temporary, folder / DIGESTS)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            log(f"the files' checksums are not remembered: {error}")
    return digests


def _digests_in(folder: Path | None) -> dict[str, list]:
    if folder is None:
        return {}
    try:
        return _read_checked(folder / DIGESTS)
    except (OSError, ValueError):
        return {}


def _state(path: Path) -> list[int]:
    """What changes with a file's contents, by all that is known of it without reading it."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev]


# ---------------------------------------------------------------- the folder


def find_folder(cache_dir: str | Path | None, log: Log) -> Path | None:
    """A folder that can be written: `cache_dir` or the user's, else one of our own among the temporary files."""
    wanted = cache_dir or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "gru-for-pytorch"
    try:
        return _check_writable(Path(wanted).expanduser())
    except (OSError, RuntimeError) as error:  # RuntimeError: this user has no home
        log(f"the cache folder cannot be used: {error}")
    spare = Path(tempfile.gettempdir()) / f"gru-for-pytorch-{os.getuid()}"
    try:
        spare.mkdir(mode=0o700, exist_ok=True)
        status = spare.lstat()
        if status.st_uid != os.getuid() or status.st_mode & 0o077:  # a link has all rights, too
            raise PermissionError(f"{spare} is not this user's alone")
        _check_writable(spare)
    except OSError as error:
        log(f"the data is not cached: {error}")
        return None
    log(f"caching in {spare} instead")
    return spare


def _check_writable(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
    return folder
