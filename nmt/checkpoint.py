"""The file that a trained model lives in: its weights and all that is needed to use them.

A checkpoint holds the fp32 weights under the names of `gru.py`'s state dict, both vocabularies, the sizes, the flags of
the run and its scores. A sha256 covers all of it, because PyTorch loads a tensor with a flipped bit without a word.
The file is written beside its place and then renamed. A run killed at any moment leaves the old file or the new one.
Only plain tensors, numbers and strings are ever read (`weights_only=True`), so a checkpoint cannot run code.
"""

import contextlib
import hashlib
import io
import json
import os
import pickle
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nmt.errors import UserError, first_line
from nmt.storage import InUse, Log, clear_partial, locked, replacing

import torch
from torch import Tensor

FORMAT = 1
# How the original trained and scored, as `train_8p.py` would say it. Its checkpoints do not.
ORIGINAL_FLAGS = {"fixed_length": 46, "beam_size": 1, "length_penalty": 1.0}


@dataclass
class Checkpoint:
    """A translator on disk.

    Attributes:
        state_dict: name → fp32 tensor on the CPU.
        sizes: input_dim, output_dim, emb_dim, hid_dim. Empty in a checkpoint of the original, which does not say them.
        src_vocab, trg_vocab: words by id. None in a checkpoint of the original, which held none.
        flags: the run's flags, recipe resolved.
        scores: the epoch's validation figures.
        about: languages, the data's fingerprint, versions.
    """

    state_dict: dict[str, Tensor]
    sizes: dict[str, int]
    src_vocab: list[str] | None = None
    trg_vocab: list[str] | None = None
    flags: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)

    def digest(self) -> str:
        """sha256 over everything that the checkpoint says."""
        said = [self.sizes, self.src_vocab, self.trg_vocab, self.flags, self.scores, self.about]
        hasher = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
        for name, tensor in sorted(self.state_dict.items()):
            hasher.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            hasher.update(tensor.contiguous().numpy().data)
        return hasher.hexdigest()


# ---------------------------------------------------------------- writing


class BestFile:
    """The best model of a run, on disk.

    Args:
        path: the file.
        log: takes the lines that say what was kept and written.

    Attributes:
        merit: of the model in the file, the higher the better. Its first number counts, the next ones decide ties.
            Empty before the first model.
    """

    def __init__(self, path: Path, log: Log):
        self._path, self._log = path, log
        self.merit: tuple[float, ...] = ()

    def replace(self, merit: tuple[float, ...], checkpoint: Checkpoint) -> None:
        """Writes a better model. The first one of a run sets the file of an earlier run aside.

        Raises:
            UserError: io.
        """
        if not self.merit and (previous := set_aside(self._path)):
            self._log(f"note: {self._path} was there already: the old one is now {previous.name}")
        self.merit = merit
        save(self._path, checkpoint)
        self._log(f"saved: {self._path} (the best so far)")


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Writes `checkpoint` to `path` in one step. A link stays, and the file that it leads to is written.

    Raises:
        UserError: io, with the old file untouched.
    """
    content = vars(checkpoint) | {"format": FORMAT, "sha256": checkpoint.digest()}
    buffer = io.BytesIO()
    torch.save(content, buffer)
    try:
        with replacing(followed(path)) as file:
            file.write(buffer.getbuffer())
    except OSError as error:
        what = f"cannot write the checkpoint: {error.strerror or error}"
        raise UserError("io", what, str(path), "make room there, or give --ckptpath") from error


def followed(path: Path) -> Path:
    """The file itself, where `path` is a link to it. Messages name the path as it was given."""
    return Path(os.path.realpath(path))


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Keeps `path` for one run, and makes sure before the training that it can be written.

    It clears what a killed run may have left half written. The lock is a file beside the checkpoint, and it goes with
    the process.

    Raises:
        UserError: io, if another run writes there, or if it cannot be written or locked.
    """
    check_writable(path)
    path = followed(path)
    lock = path.with_name(f".{path.name}.lock")
    with contextlib.ExitStack() as held:
        try:
            file = held.enter_context(locked(lock, None))
            file.truncate(0)
            file.write(f"{os.getpid()}\n".encode())
            file.flush()
        except InUse as error:
            todo = "wait for it to end, or give --ckptpath another file"
            raise UserError("io", f"in use by pid {error}", str(path), todo) from error
        except OSError as error:
            todo = "remove that file if no run uses it, or give --ckptpath a file elsewhere"
            raise UserError("io", f"cannot lock: {error.strerror}", str(lock), todo) from error
        clear_partial(path)
        yield


def check_writable(path: Path) -> None:
    """Raises an io UserError if no checkpoint can be written to `path`."""
    what, folder = None, followed(path).parent
    # os.path's questions and not Path's, which raise where one may not look.
    if os.path.isdir(path):
        what = "a folder, not a file"
    elif os.path.exists(path) and not os.path.isfile(path):
        what = "a device or a pipe, not a file"
    elif not os.access(folder, os.W_OK | os.X_OK):
        what = f"cannot write into {folder}"
    elif os.path.exists(path) and not may_replace(path, folder):
        what = f"another user's file, and only they may replace it in {folder}"
    if what:
        raise UserError("io", what, str(path), "give --ckptpath a file in a folder that exists and can be written to")


def may_replace(path: Path, folder: Path) -> bool:
    """Whether a file in a writable folder may be replaced: in a sticky one, such as /tmp, only its owner may."""
    user, about = os.geteuid(), os.stat(folder)
    return not about.st_mode & stat.S_ISVTX or user in (0, about.st_uid, os.stat(path).st_uid)


def set_aside(path: Path) -> Path | None:
    """Keeps an earlier run's checkpoint as `NAME.previous` too, because the next save takes its name.

    Returns:
        The path `NAME.previous`, or None if there is no earlier checkpoint.

    Raises:
        UserError: io.
    """
    path = followed(path)
    if not path.exists():
        return None
    previous = path.with_name(path.name + ".previous")
    try:
        previous.unlink(missing_ok=True)
        try:
            os.link(path, previous)
        except OSError:  # a file system without links
            shutil.copy2(path, previous)
    except OSError as error:
        raise UserError(
            "io", f"cannot keep the earlier checkpoint: {error}", str(previous), "move it away, or give --ckptpath"
        ) from error
    return previous


# ---------------------------------------------------------------- reading


def load(path: str | Path) -> Checkpoint:
    """Reads a checkpoint of this program, or the original's bare state dict.

    Raises:
        UserError: checkpoint, if the file is missing, broken, of another kind, or holds code.
    """
    where = str(path)
    if os.path.isdir(path):
        raise UserError("checkpoint", "a folder, not a file", where, "give the path of a checkpoint")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError("checkpoint", "no such file", where, "give the path of a checkpoint") from error
    except pickle.UnpicklingError as error:
        raise UserError(
            "checkpoint",
            "damaged, or holds other things than tensors, numbers and strings; nothing of it was run",
            where,
            "use a file that train_8p.py wrote, or a plain state dict",
        ) from error
    except PermissionError as error:
        raise UserError("checkpoint", f"cannot be read: {error.strerror}", where, "check its permissions") from error
    except Exception as error:  # a damaged file makes the reader trip over anything
        what = "incomplete, or no checkpoint at all"
        raise UserError("checkpoint", what, where, "use an earlier copy, or train again") from error
    if isinstance(content, dict) and "format" in content:
        return read_own(content, where)
    return read_original(content, where)


def read_own(content: dict, where: str) -> Checkpoint:
    """Checks the digest of one of our checkpoints."""
    if content["format"] != FORMAT:
        raise UserError(
            "checkpoint", f"format {content['format']!r}, expected {FORMAT}", where, "use the version that wrote it"
        )
    try:
        checkpoint = Checkpoint(**{name: content[name] for name in Checkpoint.__dataclass_fields__})
        actual = checkpoint.digest()
        expected = content["sha256"]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            "checkpoint", f"damaged ({first_line(error)})", where, "use an earlier copy, or train again"
        ) from error
    if actual != expected:
        raise UserError(
            "checkpoint", f"damaged: sha256 {actual}, expected {expected}", where, "use an earlier copy, or train again"
        )
    return checkpoint


def read_original(content: object, where: str) -> Checkpoint:
    """Reads a state dict, bare or under `state_dict`, with or without DistributedDataParallel's `module.` prefix."""
    if isinstance(content, dict):
        content = content.get("state_dict", content)
    if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        todo = "give a file that train_8p.py wrote, or a plain state dict"
        raise UserError("checkpoint", "holds no state dict", where, todo)
    state = {str(name).removeprefix("module."): tensor.float().contiguous() for name, tensor in content.items()}
    return Checkpoint(state, sizes={}, flags=dict(ORIGINAL_FLAGS))
