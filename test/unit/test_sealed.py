"""A sealed file comes back as it was written, or is refused. No process that is killed leaves another one."""

import contextlib
import hashlib
import itertools
import os
import pickle
import random
import signal
import time
import tracemalloc
import zipfile
from pathlib import Path

from nmt import sealed, storage
from nmt.errors import UserError

import pytest
import torch
from conftest import refused

CONTENT = {"weights": torch.arange(600.0).reshape(20, 30), "step": 3, "words": ["a", "ä"], "nested": {"rate": 0.5}}


def with_seal(content: bytes) -> bytes:
    """What somebody writes who knows how to seal."""
    return content + bytes(sealed.Seal(hashlib.sha256(content).hexdigest(), completed=True))


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "file"
    sealed.write(path, CONTENT)
    return path


def same(one, other) -> bool:
    return torch.equal(one["weights"], other["weights"]) and all(
        one[name] == other[name] for name in CONTENT if name != "weights"
    )


def test_what_is_read_is_what_was_written(path):
    assert same(sealed.read(path), CONTENT)
    assert same(sealed.read(str(path)), CONTENT)
    assert [file.name for file in path.parent.iterdir()] == ["file"]


def test_the_seal_is_the_sha256_of_all_before_the_last_line_and_others_read_the_file_as_it_is(path):
    *_, line, end = path.read_bytes().rsplit(b"\n", 2)
    assert end == b""
    assert line.decode().split()[1] == hashlib.sha256(path.read_bytes()[: -sealed.SEAL_SIZE]).hexdigest()
    assert same(torch.load(path, weights_only=True), CONTENT)
    assert same(torch.load(path, weights_only=True, mmap=True), CONTENT)
    assert zipfile.ZipFile(path).testzip() is None


def test_what_a_link_leads_to_is_written(path):
    link = path.with_name("link")
    link.symlink_to("file")
    sealed.write(link, CONTENT | {"step": 4})
    assert link.is_symlink()
    assert sealed.read(path)["step"] == 4


def test_a_file_is_written_without_a_copy_in_memory(tmp_path):
    tracemalloc.start()
    sealed.write(tmp_path / "file", {"weights": torch.zeros(2_000_000)})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (tmp_path / "file").stat().st_size > 8_000_000
    assert peak < 1_000_000


# ---------------------------------------------------------------- what is refused


@contextlib.contextmanager
def flipping(path: Path, position: int, bit: int):
    """A context in which one bit of a file is another one."""
    with open(path, "r+b", buffering=0) as file:
        (before,) = os.pread(file.fileno(), 1, position)
        try:
            os.pwrite(file.fileno(), bytes([before ^ 1 << bit]), position)
            yield
        finally:
            os.pwrite(file.fileno(), bytes([before]), position)


def nothing_is_parsed(monkeypatch) -> None:
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was parsed"))


def test_no_flipped_bit_is_accepted_or_parsed(path, monkeypatch):
    """Row 14: every bit of the seal, of the archive's first bytes, of its directory and of its keys, and 200 others."""
    content, generator = path.read_bytes(), random.Random(1)
    size = len(content)
    positions = [*range(100), *range(size - sealed.SEAL_SIZE - 200, size)]
    for key in (b"weights", b"step", b"nested"):
        positions += range(content.index(key), content.index(key) + len(key))
    flips = list(itertools.product(positions, range(8)))
    flips += [(generator.randrange(size), generator.randrange(8)) for _ in range(200)]
    with flipping(path, content.index(CONTENT["weights"].numpy().tobytes()) + 2, 0):
        assert not same(torch.load(path, weights_only=True), CONTENT), "the fault must be real: PyTorch does not see it"
    nothing_is_parsed(monkeypatch)
    for position, bit in flips:
        with flipping(path, position, bit):
            refused("checkpoint", sealed.read, path, says=str(path))
    assert path.read_bytes() == content


def test_no_truncation_is_accepted_or_parsed(path, monkeypatch):
    """Row 12."""
    content = path.read_bytes()
    size = len(content)
    nothing_is_parsed(monkeypatch)
    for length in (0, 1, 100, size // 2, *range(size - sealed.SEAL_SIZE - 100, size)):
        path.write_bytes(content[:length])
        refused("checkpoint", sealed.read, path, says=["incomplete, or no checkpoint at all", str(path)])
    path.write_bytes(content + b"\n")
    refused("checkpoint", sealed.read, path, says="incomplete, or no checkpoint at all")


@pytest.mark.parametrize("content", [b"", b"hello\n", b"PK\x03\x04", bytes(1000), pickle.dumps({"step": 3})])
def test_what_is_no_archive_is_refused_with_a_seal_and_without(tmp_path, content):
    """Row 13."""
    path = tmp_path / "file"
    for whole in (content, with_seal(content)):
        path.write_bytes(whole)
        refused("checkpoint", sealed.read, path, says=str(path))


def test_what_is_not_there_or_no_file_is_refused(path, as_nobody):
    refused("checkpoint", sealed.read, path.with_name("absent"), says="no such file")
    refused("checkpoint", sealed.read, path.parent, says="a folder, not a file")
    refused("checkpoint", sealed.read, path / "below", says="cannot be read: Not a directory")
    os.mkfifo(path.with_name("pipe"))
    refused("checkpoint", sealed.read, path.with_name("pipe"), says="a device or a pipe")
    path.chmod(0)
    with as_nobody():
        refused("checkpoint", sealed.read, path, says="cannot be read: Permission denied")


def test_a_disk_that_fails_while_reading_is_told(path, monkeypatch):
    def broken(file, size):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(sealed, "stream_sha256", broken)
    refused("checkpoint", sealed.read, path, says=["cannot be read: Input/output error", str(path)])


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_code_in_a_sealed_file_does_not_run(path):
    """Row 16."""
    touched = path.with_name("touched")
    sealed.write(path, {"step": Harmful(touched)})
    torch.load(path, weights_only=False)
    assert touched.exists(), "the fault must be real"
    touched.unlink()
    refused("checkpoint", sealed.read, path, says=["nothing of it was run", str(path)])
    assert not touched.exists()


def test_what_holds_no_dict_is_refused(path):
    sealed.write(path, [1, 2])
    refused("checkpoint", sealed.read, path, says="holds a list, expected a dict")


# ---------------------------------------------------------------- the mark


def test_the_mark_is_one_byte_that_changes_in_place(path):
    sealed.write(path, CONTENT, completed=False)
    before, inode = path.read_bytes(), path.stat().st_ino
    for _ in range(2):
        sealed.complete(path)
    assert path.stat().st_ino == inode
    assert [(old, new) for old, new in zip(before, path.read_bytes(), strict=True) if old != new] == [(*b"u", *b"c")]
    with sealed.opened(path) as file:
        assert sealed.verified(file, path).completed
    assert same(sealed.read(path), CONTENT)


def test_no_flipped_bit_makes_one_mark_into_the_other(path):
    assert {ord("c") ^ 1 << bit for bit in range(8)}.isdisjoint({ord("u")})
    path.write_bytes(b"without a seal")
    refused("checkpoint", sealed.complete, path, says="no seal")
    assert path.read_bytes() == b"without a seal"


# ---------------------------------------------------------------- writing that fails or is killed


class Failing:
    """A file whose write number `number` fails."""

    def __init__(self, number: int, error: BaseException):
        self.writes, self.number, self.error = 0, number, error

    def write(self, block) -> int:
        self.writes += 1
        if self.writes == self.number:
            raise self.error
        return len(block)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), SystemExit(143)])
def test_a_write_that_fails_raises_its_own_error_and_keeps_the_old_file(path, monkeypatch, error):
    """Row 11, and Ctrl-C. PyTorch hides these behind an error of its own wherever it has written something before."""
    before, write = path.read_bytes(), sealed._Hashing.write
    counting = Failing(0, error)
    torch.save(CONTENT, sealed._Hashing(counting))
    hidden = 0
    for number in range(1, counting.writes + 1):
        try:
            torch.save(CONTENT, sealed._Hashing(Failing(number, error)))
        except BaseException as raised:
            hidden += raised is not error
        failing = Failing(number, error)
        monkeypatch.setattr(
            sealed._Hashing, "write", lambda self, block, failing=failing: failing.write(block) and write(self, block)
        )
        with pytest.raises(type(error)) as caught:
            sealed.write(path, CONTENT | {"step": 4})
        monkeypatch.undo()
        assert caught.value is error
        assert path.read_bytes() == before
        assert [file.name for file in path.parent.iterdir()] == ["file"]
    assert hidden, "the fault must be real"


def killed(life, generator: random.Random) -> bytes:
    """Runs `life(acknowledge)` in a process of its own, and kills it at a random moment after a few acknowledged lines.

    Returns:
        What it acknowledged.
    """
    reader, writer = os.pipe()
    if (pid := os.fork()) == 0:
        torch.set_num_threads(1)  # the threads of the parent are not here
        os.close(reader)
        try:
            os.write(writer, b"begun\n")
            life(lambda text: os.write(writer, text))
        finally:
            os._exit(1)
    os.close(writer)
    with open(reader, "rb") as acknowledged:
        assert acknowledged.readline() == b"begun\n"
        lines = [acknowledged.readline() for _ in range(generator.randrange(4))]
        time.sleep(generator.uniform(0, 0.03))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, "the fault must be real"
        return b"".join(lines) + acknowledged.read()


SWEEPS = [pytest.param(20, id="20"), pytest.param(200, id="200", marks=pytest.mark.slow)]


@pytest.mark.parametrize("kills", SWEEPS)
def test_a_killed_process_leaves_the_last_file_that_it_acknowledged_or_the_next(tmp_path, kills):
    """Row 10."""
    path, generator, strays = tmp_path / "file", random.Random(kills), 0
    weights, last = torch.zeros(100_000), 0
    sealed.write(path, {"weights": weights, "number": 0})

    def saves(acknowledge):
        for number in itertools.count(last + 1):
            sealed.write(path, {"weights": weights, "number": number})
            acknowledge(b"%d\n" % number)

    for _ in range(kills):
        last = int((killed(saves, generator).split() or [last])[-1])
        found = sealed.read(path)["number"]
        assert found in (last, last + 1)
        last = found
        strays += len(list(tmp_path.iterdir())) - 1
        storage.clear_partial(path)
        assert [file.name for file in tmp_path.iterdir()] == ["file"]
    assert last > 0
    assert kills < 200 or strays > 0, "some must have been killed while they wrote"


def test_random_bytes_are_refused_in_bounded_time(tmp_path):
    generator = random.Random(3)
    for _ in range(50):
        content = generator.randbytes(generator.randrange(2000))
        for whole in (content, with_seal(content), with_seal(b"PK\x03\x04" + content)):
            (tmp_path / "file").write_bytes(whole)
            with pytest.raises(UserError):
                sealed.read(tmp_path / "file")
