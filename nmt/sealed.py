"""Files of tensors, numbers and text in which no byte can change without being noticed.

PyTorch loads a tensor with a flipped bit without a word. So a sealed file is what `torch.save` writes, followed by one
line with the sha256 of it:

    sha256 <64 hexadecimal digits> c

`torch.load` and unzip pass over that line. The last letter is the mark: `c` if what the file belongs to is completed,
`u` if it is unfinished. The letters differ in more than one bit, so a flipped bit makes neither into the other. The
mark is one byte, which can be changed in place: a process killed at that moment, or a power cut, leaves the old mark
or the new one.

A sealed file is written beside its place and then renamed. A process killed at any moment leaves the old file or the
new one. Only plain tensors, numbers and strings are read (`weights_only=True`), so no file can run code.
"""

import contextlib
import hashlib
import os
import pickle
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from nmt.errors import UserError
from nmt.keeping import previous_of
from nmt.storage import replacing, stream_sha256

import torch

SEAL = re.compile(rb"\nsha256 ([0-9a-f]{64}) ([cu])\n")
SEAL_SIZE = 75
INCOMPLETE = "incomplete, or no checkpoint at all"
OTHER_COPY = "use an earlier copy, or train again"


@dataclass(frozen=True)
class Seal:
    """The last line of a sealed file.

    Attributes:
        sha256: of all bytes before it.
        completed: the mark.
    """

    sha256: str
    completed: bool

    def __bytes__(self) -> bytes:
        return f"\nsha256 {self.sha256} {'c' if self.completed else 'u'}\n".encode()


# ---------------------------------------------------------------- writing


class _Hashing:
    """A file that hashes what is written to it."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.sha256 = hashlib.sha256()

    def write(self, block: memoryview) -> int:
        self.sha256.update(block)
        return self._file.write(block)

    def flush(self) -> None:
        """PyTorch calls this at the end."""


def write(path: str | Path, content: dict, *, completed: bool = True) -> None:
    """Writes `content` to `path` in one step. A link stays, and the file that it leads to is written.

    Args:
        path: the file.
        content: tensors, numbers, strings, None, and lists and dicts of such.
        completed: the mark.

    Raises:
        OSError: it cannot be written. The old file is untouched.
    """
    with replacing(Path(os.path.realpath(path))) as file:
        hashing = _Hashing(file)
        try:
            torch.save(content, cast(BinaryIO, hashing))
        except RuntimeError as error:
            # PyTorch closes its archive even then and fails again. That would hide a full disk, or Ctrl-C.
            raise error.__context__ or error from None
        file.write(bytes(Seal(hashing.sha256.hexdigest(), completed)))


def complete(path: str | Path) -> None:
    """Marks the sealed file at `path` as completed, in place.

    Raises:
        OSError: it cannot be written.
        UserError: checkpoint, it has no seal.
    """
    with open(path, "r+b") as file:
        if (seal := _seal_of(file)) is None:
            raise UserError("checkpoint", "it has no seal any more", str(path), OTHER_COPY)
        if not seal.completed:
            file.seek(-len(b"u\n"), os.SEEK_END)
            file.write(b"c")
            file.flush()
            os.fsync(file.fileno())


# ---------------------------------------------------------------- reading


def read(path: str | Path) -> dict:
    """Reads what `write` wrote. All bytes are checked before any of them is interpreted.

    Raises:
        UserError: checkpoint, the file is missing, unreadable, no sealed file or a damaged one, or it holds code.
    """
    with opened(path) as file:
        if verified(file, path) is None:
            raise UserError("checkpoint", INCOMPLETE, str(path), OTHER_COPY)
        content = parsed(file, path)
    if not isinstance(content, dict):
        raise UserError("checkpoint", f"holds a {type(content).__name__}, expected a dict", str(path), OTHER_COPY)
    return content


@contextlib.contextmanager
def opened(path: str | Path) -> Iterator[BinaryIO]:
    """The file, open for reading bytes.

    Raises:
        UserError: checkpoint, it is missing, no file, or cannot be read. The body's OSErrors count too.
    """
    where, todo = str(path), "give the path of a checkpoint"
    if os.path.isdir(path):
        raise UserError("checkpoint", "a folder, not a file", where, todo)
    if os.path.exists(path) and not os.path.isfile(path):  # opening a pipe would wait for ever
        raise UserError("checkpoint", "a device or a pipe, not a file", where, todo)
    try:
        with open(path, "rb") as file:
            yield file
    except FileNotFoundError as error:
        if (earlier := previous_of(path)).exists():
            todo += f"; that of the run before is {earlier}"
        raise UserError("checkpoint", "no such file", where, todo) from error
    except OSError as error:
        what = f"cannot be read: {error.strerror or error}"
        raise UserError("checkpoint", what, where, "check its permissions and its disk") from error


def verified(file: BinaryIO, where: str | Path) -> Seal | None:
    """The seal of an open file, after all bytes have been compared with it. None if the file has no seal.

    Args:
        where: the file's path, for errors.

    Raises:
        OSError: it cannot be read.
        UserError: checkpoint, the bytes are not those that were sealed.
    """
    if (seal := _seal_of(file)) is None:
        return None
    size = file.seek(0, os.SEEK_END) - SEAL_SIZE
    file.seek(0)
    actual = stream_sha256(file, size)
    if actual != seal.sha256:
        raise UserError("checkpoint", f"damaged: sha256 {actual}, expected {seal.sha256}", str(where), OTHER_COPY)
    return seal


def parsed(file: BinaryIO, where: str | Path) -> object:
    """What `torch.save` wrote into an open file, on the CPU.

    Args:
        where: the file's path, for errors.

    Raises:
        OSError: it cannot be read.
        UserError: checkpoint, it is damaged, or holds other things than tensors, numbers and strings.
    """
    file.seek(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on the way to an error PyTorch may warn, too
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        what = "damaged, or holds other things than tensors, numbers and strings; nothing of it was run"
        todo = "use a file that train_8p.py wrote, or a plain state dict"
        raise UserError("checkpoint", what, str(where), todo) from error
    except OSError:
        raise
    except Exception as error:  # a damaged file makes the reader trip over anything
        raise UserError("checkpoint", INCOMPLETE, str(where), OTHER_COPY) from error


def _seal_of(file: BinaryIO) -> Seal | None:
    """The seal at the end of an open file, if there is one."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - SEAL_SIZE))
    found = SEAL.fullmatch(file.read(SEAL_SIZE))
    return found and Seal(found[1].decode(), completed=found[2] == b"c")
