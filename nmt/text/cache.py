"""Tokenised corpora on disk. Their arrays are mapped into memory and not read into it.

A cache folder holds one folder per corpus. Its name is a key, which stands for the texts and for all that decides what
is made of them. Each array is a file of raw numbers. `index.json` holds the rest, and the sha256 of every array. A
corpus appears under its name only when all of it is on the disk. `digests.json` remembers the sha256 of the text files,
so that finding the key needs no reading of them. Nothing is pickled.
"""

import concurrent.futures
import contextlib
import fcntl
import functools
import io
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from nmt.errors import UserError
from nmt.storage import (
    PARTIAL,
    Log,
    Unwritable,
    clear_partial,
    clear_unless_in_use,
    locked,
    new_folder,
    replacing,
    sha256,
    stream_sha256,
    write_synced,
    writing,
)
from nmt.text import files

import numpy as np

INDEX = "index.json"
DIGESTS = "digests.json"
RACY_NS = 2_000_000_000  # a file may change unnoticed if its last change was less than this before we read it
BLOCK = 1 << 20  # numbers that are in memory at a time


class Entry(NamedTuple):
    """A cached corpus: its arrays by name, and whatever else JSON can hold."""

    arrays: dict[str, np.ndarray]
    about: Any


class Writer:
    """Arrays that grow by appending. Each is a file of a folder, or stays in memory.

    Args:
        folder: where the files go. With None, the arrays stay in memory.

    Raises:
        Unwritable: from `append`, `translate` and `finish`.
    """

    def __init__(self, folder: Path | None):
        self._folder = folder
        self._files: dict[str, io.BufferedRandom | io.BytesIO] = {}
        self._dtypes: dict[str, str] = {}

    @writing()
    def append(self, name: str, values: np.ndarray) -> None:
        """Adds `values`, [n], at the end of the array `name`. All calls for one array have the same dtype."""
        if name not in self._files:
            self._files[name] = open(self._folder / name, "w+b") if self._folder else io.BytesIO()  # noqa: SIM115
            self._dtypes[name] = values.dtype.str
        self._files[name].write(np.ascontiguousarray(values).data)

    @writing()
    def translate(self, name: str, table: np.ndarray) -> None:
        """Replaces each number i of the array `name` by `table[i]`, which has the array's dtype."""
        file, place = self._files[name], 0
        file.seek(0)
        while block := file.read(BLOCK * table.itemsize):
            file.seek(place)
            place += file.write(table[np.frombuffer(block, table.dtype)])
            file.seek(place)

    def array(self, name: str) -> np.ndarray:
        """The array `name` as it is now. It may be a mapped file. Nobody may append to it while it is in use."""
        file = self._files[name]
        if isinstance(file, io.BytesIO):
            return np.frombuffer(file.getvalue(), self._dtypes[name])
        with writing():
            file.flush()
        return np.memmap(file.name, self._dtypes[name], "r") if file.tell() else np.zeros(0, self._dtypes[name])

    def drop(self, name: str) -> None:
        """Removes the array `name`."""
        with writing(), self._files.pop(name) as file:
            if isinstance(file, io.BufferedRandom):
                os.unlink(file.name)
        del self._dtypes[name]

    def in_memory(self) -> dict[str, np.ndarray]:
        """The arrays, if there is no folder."""
        return {
            name: np.frombuffer(file.getbuffer(), self._dtypes[name])
            for name, file in self._files.items()
            if isinstance(file, io.BytesIO)
        }

    @writing()
    def finish(self, about: Any) -> None:
        """Writes the index with `about` in it, and waits until all files are on the disk."""
        assert self._folder is not None
        with concurrent.futures.ThreadPoolExecutor() as threads:
            digests = threads.map(_settle, self._files.values())
        arrays = {name: [self._dtypes[name], digest] for name, digest in zip(self._files, digests, strict=True)}
        write_synced(self._folder / INDEX, _checked({"arrays": arrays, "about": about}))

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        """Closes the files. That may write what is left, and fail. Then an earlier error is the one to tell."""
        failure = None
        for file in self._files.values():
            try:
                file.close()
            except OSError as error:
                failure = error
        if failure and kind is None:
            raise Unwritable(str(failure)) from failure


def _settle(file: io.BufferedIOBase) -> str:
    """Waits until a file is on the disk, then reads it again for its sha256."""
    file.flush()
    os.fsync(file.fileno())
    file.seek(0)
    return stream_sha256(file)


Build = Callable[[Writer], Any]
_NAME_OF_STRAY = re.compile(r"[0-9a-f]{64}(?=\.(tmp|lock)$)")


def read(folder: Path | None, key: str, log: Log = lambda line: None, verify: bool = True) -> Entry | None:
    """The corpus of this key, or None if it is absent or damaged. Its arrays are mapped and cannot be written to.

    Args:
        folder: from `find_folder`.
        verify: whether to compare every array with its sha256, which reads all of it.
    """
    if folder is None or not (path := folder / key).exists():
        return None
    try:
        index = _read_checked(path / INDEX)
        # Read-only: the system counts writable pages as this process's memory, and may not have so many.
        arrays = {name: np.asarray(np.memmap(path / name, dtype, "r")) for name, (dtype, _) in index["arrays"].items()}
        if verify:
            with concurrent.futures.ThreadPoolExecutor() as threads:
                digests = list(threads.map(sha256, arrays.values()))
            if digests != [digest for _, digest in index["arrays"].values()]:
                raise ValueError("an array has another sha256 than it was written with")
    except (OSError, ValueError):  # ValueError: memmap raises it too, for a size that does not fit
        log(f"the cache {path} is damaged and is built again")
        return None
    return Entry(arrays, index["about"])


def read_or_build(folder: Path | None, key: str, build: Build, log: Log) -> Entry:
    """The corpus of this key, from the cache or new. Of many processes one builds it, and the others wait.

    Args:
        folder: from `find_folder`. Without one, or if it cannot be written to, the corpus stays in memory.
        build: appends the arrays to the writer that it is given, and returns the rest.
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
    temporary = path.with_name(f"{path.name}.tmp")  # one name is enough, because we hold the lock
    with new_folder(path, temporary), Writer(temporary) as writer:
        writer.finish(build(writer))
        shutil.rmtree(path, ignore_errors=True)  # a damaged one


def _checked(content: Any) -> bytes:
    """JSON after a line with its sha256."""
    body = json.dumps(content).encode()
    return sha256(body).encode() + b"\n" + body


def _read_checked(path: Path) -> Any:
    """Reads a file that `_checked` made.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged.
    """
    header, _, body = path.read_bytes().partition(b"\n")
    if header.decode("latin-1") != sha256(body):
        raise ValueError("its contents have another sha256 than its first line says")
    return json.loads(body)


# ---------------------------------------------------------------- digests of the text files


def known_digests(folder: Path | None, paths: list[Path]) -> list[str] | None:
    """The files' `files.content_sha256`, without reading them. None unless all files are known and unchanged."""
    known = _digests_in(folder)
    digests: list[str] = []
    for path in paths:
        state, digest = known.get(os.path.realpath(path), (None, ""))
        if state is None or state != _state(path):
            return None
        digests.append(digest)
    return digests


def read_digests(folder: Path | None, paths: list[Path], log: Log) -> list[str]:
    """The files' `files.content_sha256`. They are remembered in `folder`, for `known_digests`.

    Raises:
        UserError: io or data, a file cannot be read.
    """
    begin, states = time.time_ns(), [_state(path) for path in paths]
    with concurrent.futures.ThreadPoolExecutor() as threads:
        digests = list(threads.map(files.content_sha256, paths))
    # As git does for its index: a file that has just changed is not remembered. It may change once more in the same
    # tick of the clock, and its state would be the same.
    fresh = {
        os.path.realpath(path): [state, digest]
        for path, state, digest in zip(paths, states, digests, strict=True)
        if max(state[1:3]) + RACY_NS < begin and state == _state(path)
    }
    if folder is not None and fresh:
        try:
            with locked(folder / f"{DIGESTS}.lock", lambda line: None):
                clear_partial(folder / DIGESTS)
                known = {path: value for path, value in _digests_in(folder).items() if os.path.exists(path)}
                with replacing(folder / DIGESTS) as file:
                    file.write(_checked(known | fresh))
        except OSError as error:
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
    """The numbers that the system keeps about a file, of which one at least changes when its contents change."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev]


# ---------------------------------------------------------------- the folder


def find_folder(cache_dir: str | Path | None, log: Log) -> Path | None:
    """A folder that can be written to, or None.

    It is `cache_dir`, by default the user's cache folder. If that fails, it is a private one among the temporary files.
    """
    wanted = cache_dir or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "gru-for-pytorch"
    try:
        return _check_writable(Path(wanted).expanduser())
    except (OSError, RuntimeError) as error:  # RuntimeError: this user has no home
        log(f"the cache folder cannot be used: {error}")
    spare = Path(tempfile.gettempdir()) / f"gru-for-pytorch-{os.getuid()}"
    try:
        spare.mkdir(mode=0o700, exist_ok=True)
        status = spare.lstat()
        if status.st_uid != os.getuid() or status.st_mode & 0o077:  # a link has all rights too
            raise PermissionError(f"{spare} is not this user's alone")
        _check_writable(spare)
    except OSError as error:
        log(f"the data is not cached: {error}")
        return None
    log(f"caching in {spare} instead")
    return spare


def check_usable(cache_dir: str | Path) -> None:
    """Raises an io UserError if the folder that the user wants cannot be the cache folder."""
    try:
        _check_writable(Path(cache_dir).expanduser())
    except (OSError, RuntimeError) as error:
        what = f"the cache folder cannot be used: {error.strerror if isinstance(error, OSError) else error}"
        todo = "name a folder that you may write with --cache-dir, or leave the flag out"
        raise UserError("io", what, str(cache_dir), todo) from error


def clear_strays(folder: Path | None) -> None:
    """Removes what killed builds left, of whatever corpus. What belongs to a living process stays: it holds the lock.

    Args:
        folder: from `find_folder`.
    """
    if folder is None:
        return
    names = os.listdir(folder)
    for key in {found.group() for name in names if (found := _NAME_OF_STRAY.match(name))}:
        half = folder / f"{key}.tmp"
        clear_unless_in_use(folder / f"{key}.lock", functools.partial(shutil.rmtree, half, ignore_errors=True))
    if any(name.startswith((f"{DIGESTS}.lock", f"{DIGESTS}{PARTIAL}")) for name in names):
        clear_unless_in_use(folder / f"{DIGESTS}.lock", functools.partial(clear_partial, folder / DIGESTS))


def _check_writable(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
    return folder
