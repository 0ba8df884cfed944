"""Shared files: a lock keeps others out, a checksum tells two files apart, and a file or a folder is replaced whole."""

import errno
import fcntl
import hashlib
import io
import os
import signal
import stat
import subprocess
import sys

from nmt import storage

import numpy as np
import pytest
from conftest import REPOSITORY


@pytest.fixture
def path(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_bytes(b"old")
    return tmp_path / "folder" / "file"


def names(path):
    """What is beside `path`, itself too."""
    return sorted(other.name for other in path.parent.iterdir())


# ---------------------------------------------------------------- checksums


def test_checksum_is_that_of_the_parts_one_after_the_other():
    whole = hashlib.sha256(b"ab" + np.arange(3).tobytes()).hexdigest()
    assert storage.sha256(b"a", b"b", np.arange(3)) == whole
    assert storage.stream_sha256(io.BytesIO(b"ab" + np.arange(3).tobytes())) == whole


def test_checksum_of_a_stream_is_that_of_its_rest():
    file = io.BytesIO(b"skipped" + bytes(3 << 20))
    file.seek(7)
    assert storage.stream_sha256(file) == storage.sha256(bytes(3 << 20))


# ---------------------------------------------------------------- replacing a file


def test_old_file_stays_until_the_new_one_is_whole(path):
    with storage.replacing(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
        assert [name.startswith("file.partial-") for name in names(path)] == [False, True]
    assert path.read_bytes() == b"new"
    assert names(path) == ["file"]


def test_file_that_was_not_there_is_made(path):
    with storage.replacing(path.with_name("other")) as file:
        file.write(b"new")
    assert path.with_name("other").read_bytes() == b"new"


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_failed_write_leaves_the_old_file_and_no_other(path, error):
    with pytest.raises(type(error)), storage.replacing(path) as file:
        file.write(b"ne")
        raise error
    assert path.read_bytes() == b"old"
    assert names(path) == ["file"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_failed_end_of_a_write_leaves_the_old_file_and_no_other(path, monkeypatch, call):
    def full(*args):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(storage.os, call, full)
    with pytest.raises(OSError, match="Input/output error"), storage.replacing(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"old"
    assert names(path) == ["file"]


def test_killed_write_leaves_the_old_file_and_what_can_be_cleared(path):
    code = (
        "import os, pathlib, signal, sys; from nmt import storage\n"
        "with storage.replacing(pathlib.Path(sys.argv[1])) as file:\n"
        "    file.write(b'half'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=REPOSITORY)
    assert done.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    assert [name.startswith("file.partial-") for name in names(path)] == [False, True]
    path.with_name("file2.partial-0").touch()
    storage.clear_partial(path)
    assert names(path) == ["file", "file2.partial-0"]


def test_name_with_wildcards_clears_its_own_leftovers_alone(tmp_path):
    (tmp_path / "a.partial-1").touch()
    (tmp_path / "[ab].partial-1").touch()
    storage.clear_partial(tmp_path / "[ab]")
    assert [path.name for path in tmp_path.iterdir()] == ["a.partial-1"]


def test_new_file_is_on_the_disk_before_it_has_the_name(path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace

    def synced(descriptor):
        kind = "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
        calls.append((kind, os.fstat(descriptor).st_size if kind == "file" else None))
        fsync(descriptor)

    monkeypatch.setattr(storage.os, "fsync", synced)
    monkeypatch.setattr(storage.os, "replace", lambda *args: calls.append("replace") or replace(*args))
    with storage.replacing(path) as file:
        file.write(b"whole")
    assert calls == [("file", 5), "replace", ("folder", None)]


def test_mode_of_the_new_file_follows_the_umask_and_not_the_old_file(path):
    path.chmod(0o600)
    before = os.umask(0o027)
    try:
        with storage.replacing(path) as file:
            file.write(b"new")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640


def test_folder_that_cannot_be_synced_does_not_spoil_a_write(path, monkeypatch):
    fsync = os.fsync

    def unsupported(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(descriptor)

    monkeypatch.setattr(storage.os, "fsync", unsupported)
    with storage.replacing(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"


def test_folder_that_is_not_there_is_an_os_error(path):
    with pytest.raises(FileNotFoundError), storage.replacing(path.parent / "none" / "file"):
        raise AssertionError("the body does not run")


# ---------------------------------------------------------------- a new folder


def test_folder_appears_when_it_is_whole(tmp_path):
    path, temporary = tmp_path / "folder", tmp_path / "folder.tmp"
    temporary.mkdir()
    (temporary / "stray").touch()  # a killed process left it
    with storage.new_folder(path, temporary):
        (temporary / "file").write_bytes(b"new")
        assert not path.exists()
    assert names(path) == ["folder"]
    assert [file.name for file in path.iterdir()] == ["file"]


def test_failed_body_leaves_no_folder_and_raises_its_own_error(tmp_path):
    path, temporary = tmp_path / "folder", tmp_path / "folder.tmp"
    with pytest.raises(OSError, match="no more processes") as caught, storage.new_folder(path, temporary):
        raise OSError("no more processes")
    assert not isinstance(caught.value, storage.Unwritable)
    assert list(tmp_path.iterdir()) == []


def test_folder_with_something_in_it_is_not_replaced(path):
    temporary = path.parent.with_name("temporary")
    with pytest.raises(storage.Unwritable, match="not empty"), storage.new_folder(path.parent, temporary):
        (temporary / "file").write_bytes(b"new")
    assert path.read_bytes() == b"old"
    assert names(path.parent) == ["folder"]


# ---------------------------------------------------------------- locks


def test_lock_on_a_removed_file_lets_nobody_in(tmp_path):
    path, events, holders = tmp_path / "lock", [], []

    def hold():
        holders.append(os.open(path, os.O_CREAT | os.O_RDWR))
        fcntl.flock(holders[-1], fcntl.LOCK_EX)

    def log(line):
        events.append("waits")
        if len(events) == 1:  # the first holder's file goes, and another process is quicker with the next
            path.unlink()
            hold()
        os.close(holders[len(events) - 1])

    hold()
    with storage.locked(path, log):
        events.append("is in")
    assert events == ["waits", "waits", "is in"]
    assert list(tmp_path.iterdir()) == []


def test_lock_in_use_is_told_with_what_its_holder_wrote(tmp_path):
    with storage.locked(tmp_path / "lock", None) as file:
        file.write(b"holder 7\n")
        file.flush()
        with pytest.raises(storage.InUse, match="^holder 7$"), storage.locked(tmp_path / "lock", None):
            raise AssertionError("the body does not run")
    assert list(tmp_path.iterdir()) == []
