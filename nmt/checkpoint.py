"""The file that a trained model lives in: its weights and all that is needed to use them.

A checkpoint holds the fp32 weights under the names of `gru.py`'s state dict, both vocabularies, the sizes, the flags of
the run and its scores, with a sha256 over all of it: PyTorch itself loads a tensor with a flipped bit without a word.
It is written beside its place and then renamed, so that a run killed at any moment leaves the old one or the new one.
Only plain tensors, numbers and strings are ever read (`weights_only=True`): a checkpoint cannot run code.
"""

import contextlib
import glob
import hashlib
import io
import json
import os
import pickle
import shutil
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import gru
from nmt.errors import UserError, first_line
from nmt.storage import InUse, locked, sync_folder

import torch
from torch import Tensor

FORMAT = 1
TEMPORARY = ".partial-"


@dataclass
class Checkpoint:
    """A translator on disk.

    Attributes:
        state_dict: name → fp32 tensor on the CPU.
        sizes: input_dim, output_dim, emb_dim, hid_dim.
        src_vocab, trg_vocab: words by id; None in a checkpoint of the original, which held none.
        flags: the run's flags, recipe resolved.
        scores: the epoch's validation figures.
        about: languages, the data's fingerprint, versions.
    """

    state_dict: dict[str, Tensor]
    sizes: dict[str, int]
    src_vocab: list[str] | None = None
    trg_vocab: list[str] | None = None
    flags: dict = field(default_factory=dict)
    scores: dict = field(default_factory=dict)
    about: dict = field(default_factory=dict)

    def build_model(self, device: torch.device | str = "cpu") -> gru.Seq2Seq:
        """The model in fp32, ready to translate (dropout off)."""
        model = gru.build(**self.sizes, device=device)
        model.load_state_dict(self.state_dict)
        return model.eval()

    def digest(self) -> str:
        """sha256 over everything that the checkpoint says."""
        said = [self.sizes, self.src_vocab, self.trg_vocab, self.flags, self.scores, self.about]
        hasher = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
        for name, tensor in sorted(self.state_dict.items()):
            hasher.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            hasher.update(tensor.contiguous().numpy())
        return hasher.hexdigest()


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Writes `checkpoint` to `path` in one step; a link stays, and what it leads to is written.

    Raises:
        UserError: io, with the old file untouched.
    """
    content = vars(checkpoint) | {"format": FORMAT, "sha256": checkpoint.digest()}
    buffer = io.BytesIO()
    torch.save(content, buffer)
    target = Path(os.path.realpath(path))
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=target.name + TEMPORARY, delete=False) as file:
            temporary = Path(file.name)
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~current_umask())
        os.replace(temporary, target)
    except OSError as error:
        if temporary:
            temporary.unlink(missing_ok=True)
        raise UserError(
            "io",
            f"cannot write the checkpoint: {error.strerror or error}",
            str(path),
            "make room there, or give --ckptpath",
        ) from error
    with contextlib.suppress(OSError):  # not each file system can; the file is in place, and is on the disk itself
        sync_folder(target.parent)


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Keeps `path` for one run, and makes sure, before the training and not after it, that it can be written.

    Clears what a killed run may have left half written. The lock is a file beside `path`, or beside what it leads to if
    it is a link; it goes with the process.

    Raises:
        UserError: io; another run writes there, or it cannot be written to or locked.
    """
    check_writable(path)
    path = Path(os.path.realpath(path))
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
    what, folder = None, Path(os.path.realpath(path)).parent
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


def clear_partial(path: Path) -> None:
    """Removes what a run that was killed in a save left beside `path`."""
    for stray in path.parent.glob(glob.escape(path.name + TEMPORARY) + "*"):
        stray.unlink(missing_ok=True)


def set_aside(path: Path) -> Path | None:
    """Keeps an earlier run's checkpoint as `NAME.previous`, too: the next save takes its name.

    Returns:
        That path; None if there is no earlier checkpoint.

    Raises:
        UserError: io.
    """
    path = Path(os.path.realpath(path))
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


def load(path: str | Path) -> Checkpoint:
    """Reads a checkpoint of this program, or the original's bare state dict.

    Raises:
        UserError: checkpoint; the file is missing, broken, of another kind, or holds code.
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
    state = {}
    if isinstance(content, dict):
        state = {str(name).removeprefix("module."): tensor for name, tensor in content.items()}
    expected = gru.build(1, 1, emb_dim=1, hid_dim=1).state_dict()
    if state.keys() != expected.keys() or any(
        not isinstance(tensor, Tensor) or tensor.dim() != expected[name].dim() for name, tensor in state.items()
    ):
        raise UserError(
            "checkpoint", "holds no state dict of this model", where, f"expected the keys {', '.join(expected)}"
        )
    input_dim, emb_dim = state["encoder.embedding.weight"].shape
    sizes = {
        "input_dim": input_dim,
        "output_dim": len(state["decoder.embedding.weight"]),
        "emb_dim": emb_dim,
        "hid_dim": state["encoder.rnn.weight_hh_l0"].shape[1],
    }
    checkpoint = Checkpoint({name: tensor.float().contiguous() for name, tensor in state.items()}, sizes)
    fitting = gru.build(**sizes).state_dict()
    for name, tensor in checkpoint.state_dict.items():
        if tensor.shape != fitting[name].shape:
            raise UserError(
                "checkpoint",
                f"{name} has shape {list(tensor.shape)}, the other tensors ask for {list(fitting[name].shape)}",
                where,
                "use the file as it was written",
            )
    return checkpoint


def current_umask() -> int:
    """The process's umask, which can only be read by setting it."""
    umask = os.umask(0)
    os.umask(umask)
    return umask
