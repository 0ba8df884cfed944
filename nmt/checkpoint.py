"""The file that a trained model lives in: its weights and all that is needed to use them.

A checkpoint holds the fp32 weights under the names of `gru.py`'s state dict, both vocabularies, the sizes, the flags of
the run and its scores. It is a sealed file (`nmt/sealed.py`), whose mark says whether its run was completed. `load`
also takes the files of earlier versions, which had a digest in place of the seal, and those of the original.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nmt import flags, keeping, sealed
from nmt.errors import UserError, first_line
from nmt.storage import Log, lock_path, probe
from nmt.text import subwords
from nmt.text.vocabulary import SPECIALS, Vocabulary

import torch
from torch import Tensor

FORMAT = 2
PIECES_FORMAT = 3  # of models that earlier versions would misread: with pieces, or with another tokenizer than spaCy's
UNSEALED_FORMAT = 1  # of earlier versions
SIZES = ("input_dim", "output_dim", "emb_dim", "hid_dim")
LARGEST_SIZE = 1 << 28  # more does not fit PyTorch's counters
# How the original trained and scored, as `train_8p.py` would say it. Its checkpoints do not.
ORIGINAL_FLAGS = {"fixed_length": 46, "beam_size": 1, "length_penalty": 1.0}
# The flags of a checkpoint that a score reads, and what a flag must be.
USED_FLAGS = {
    "fixed_length": flags.zero_or_sentence_length,
    "beam_size": flags.positive_int,
    "length_penalty": flags.power,
    "case": flags.case,
    "tokenizer": flags.tokenizer,
}


# The flags that say where a run was, and those that may be paths where only the name matters.
OF_THE_MACHINE = (
    "data_dir",
    "cache_dir",
    "ckptpath",
    "config",
    "overwrite",
    "resume",
    "evaluate",
    "mirror",
    "addr",
    "dist_url",
    "write_split",
)
OF_ITS_FOLDERS = ("record", "tensorboard", "profile")
NAMES = ("train_name", "val_name", "test_name")


def portable(values: dict[str, Any]) -> dict[str, Any]:
    """A run's flags without what belongs to its machine.

    >>> portable({"data_dir": "a/b", "test_name": "c/test", "seed": 1})
    {'test_name': 'test', 'seed': 1}
    """
    kept = {name: value for name, value in values.items() if name not in OF_THE_MACHINE + OF_ITS_FOLDERS}
    return kept | {name: Path(kept[name]).name for name in NAMES if name in kept}


@dataclass
class Checkpoint:
    """A translator on disk.

    Attributes:
        state_dict: name → fp32 tensor on the CPU.
        sizes: input_dim, output_dim, emb_dim, hid_dim. Empty in a checkpoint of the original, which does not say them.
        src_vocab, trg_vocab: words or pieces by id. None in a checkpoint of the original, which held none.
        flags: the run's flags, recipe resolved.
        scores: the epoch's validation figures.
        about: languages, the fingerprints of the data and of the vocabularies, versions.
        completed: whether the run went to its end. Files of earlier versions do not say, and count as completed.
        shortlist: [source types, width] int32, the probable translations of each source word, see `nmt/shortlist.py`.
            None in files of earlier versions.
        src_subwords, trg_subwords: sentencepiece's models of the pieces, see `nmt/text/subwords.py`. None: whole words.
    """

    state_dict: dict[str, Tensor]
    sizes: dict[str, int]
    src_vocab: list[str] | None = None
    trg_vocab: list[str] | None = None
    flags: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    completed: bool = True
    shortlist: Tensor | None = None
    src_subwords: bytes | None = None
    trg_subwords: bytes | None = None

    def vocabularies(self, where: str | Path) -> tuple[Vocabulary, Vocabulary]:
        """What turns words into the model's ids, and back. The original's checkpoints have none.

        Args:
            where: the checkpoint's path, for errors.

        Raises:
            UserError: checkpoint, the pieces do not go with their models. Or usage, sentencepiece is not installed.
        """
        assert self.src_vocab is not None and self.trg_vocab is not None
        try:
            return subwords.of(self.src_vocab, self.src_subwords), subwords.of(self.trg_vocab, self.trg_subwords)
        except ValueError as error:
            raise damaged(str(error), str(where)) from error

    def digest(self) -> str:
        """sha256 over everything that the checkpoint says. Files of format 1 hold it."""
        said = [self.sizes, self.src_vocab, self.trg_vocab, self.flags, self.scores, self.about]
        hasher = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
        tensors = sorted(self.state_dict.items())
        if self.shortlist is not None:
            tensors.append(("shortlist", self.shortlist))
        for name, tensor in tensors:
            hasher.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            hasher.update(tensor.contiguous().numpy().data)
        return hasher.hexdigest()


SUBWORDS = ("src_subwords", "trg_subwords")
# The file's keys. It may have `shortlist` and `SUBWORDS` too, the latter as uint8 tensors.
CONTENT = [
    entry.name for entry in dataclasses.fields(Checkpoint) if entry.name not in ("completed", "shortlist", *SUBWORDS)
]


def vocabulary_digest(src_words: list[str], trg_words: list[str]) -> str:
    """The fingerprint of two vocabularies: sha256 over their words in the order of their ids."""
    return hashlib.sha256(json.dumps([src_words, trg_words]).encode()).hexdigest()


# ---------------------------------------------------------------- writing


class BestFile:
    """The best model of a run, on disk.

    While the run goes on, the file is marked as unfinished. So a run that ends early does not push out what a
    completed run left.

    Args:
        path: the file.
        run: the run's name, by which it knows its own file.
        log: takes the lines that say what was kept and written.
        shortlist: of the run's data, for each model.

    Attributes:
        merit: of the model in the file, the higher the better. Its first number counts, the next ones decide ties.
            Empty before the first model.
        epoch: of that model, from 0. -1 before the first one.
    """

    def __init__(self, path: Path, run: str, log: Log, shortlist: Tensor | None = None):
        self._path, self._run, self._log, self._shortlist = path, run, log, shortlist
        self._has_written = False
        self.merit: tuple[float, ...] = ()
        self.epoch = -1

    def state(self) -> dict[str, Any]:
        """What a run goes on from, see `nmt.resume.Part`."""
        return {"merit": list(self.merit)}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes over what `state` gave. The file may be newer than that, because it is written more often.

        Raises:
            UserError: checkpoint, the run's best model is not in its file any more.
        """
        self.merit = tuple(state["merit"])
        found = load_if_readable(self._path)
        if found is not None and found.about.get("run") == self._run:
            self.merit = max(self.merit, tuple(found.about.get("merit", ())))
            self.epoch = int(found.scores.get("epoch", -1))
        elif self.merit:
            what = "not the best model of the run that is to go on"
            todo = "give --ckptpath the path of that model"
            raise UserError("checkpoint", what, str(self._path), todo)

    def replace(self, merit: tuple[float, ...], checkpoint: Checkpoint) -> None:
        """Writes a better model. Before the first one of a run, a file that is not the run's own is moved aside.

        Raises:
            UserError: io.
        """
        if not self._has_written and os.path.exists(self._path) and run_of(self._path) != self._run:
            keeping.make_room(self._path, self._log, [""])
        about = checkpoint.about | {"run": self._run, "merit": list(merit)}
        save(self._path, dataclasses.replace(checkpoint, about=about, completed=False, shortlist=self._shortlist))
        self._has_written, self.merit, self.epoch = True, merit, int(checkpoint.scores.get("epoch", -1))
        self._log(f"saved: {self._path} (the best so far)")

    def complete(self) -> None:
        """Marks the file, if it is this run's, as that of a completed run. For rank 0, when the training has ended.

        Raises:
            UserError: io, or checkpoint if the file is no longer there.
        """
        if not self.merit:
            return
        try:
            sealed.complete(self._path)
        except OSError as error:
            what = f"cannot mark the checkpoint as that of a completed run: {error.strerror or error}"
            raise UserError("io", what, str(self._path), "the model in it is whole: keep a copy of it") from error


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Writes `checkpoint` to `path` in one step. A link stays, and the file that it leads to is written.

    Raises:
        UserError: io, with the old file untouched.
    """
    content = {name: getattr(checkpoint, name) for name in CONTENT}
    if checkpoint.shortlist is not None:
        content["shortlist"] = checkpoint.shortlist
    number = FORMAT
    if checkpoint.src_subwords is not None or checkpoint.flags.get("tokenizer", "spacy") != "spacy":
        number = PIECES_FORMAT
    for name in SUBWORDS:
        if (model := getattr(checkpoint, name)) is not None:
            content[name] = torch.frombuffer(bytearray(model), dtype=torch.uint8)
    weights = {name: tensor.detach().contiguous() for name, tensor in checkpoint.state_dict.items()}
    try:
        sealed.write(path, content | {"format": number, "state_dict": weights}, completed=checkpoint.completed)
    except OSError as error:
        what = f"cannot write the checkpoint: {error.strerror or error}"
        raise UserError("io", what, str(path), "make room there, or give --ckptpath") from error


def followed(path: Path) -> Path:
    """The file itself, where `path` is a link to it. Messages name the path as it was given."""
    return Path(os.path.realpath(path))


@contextlib.contextmanager
def claimed(path: str | Path) -> Iterator[None]:
    """Keeps `path` for one run, and makes sure before the training that it can be written.

    It clears what a killed run may have left half written. The lock is a file beside the checkpoint, and it goes with
    the process.

    Args:
        path: as the user gave it. A `Path` would lose a slash at its end.

    Raises:
        UserError: usage, if it is the name of a folder; io, if another run writes there, or if it cannot be written or
            locked.
    """
    check_writable(path)
    path = followed(Path(path))
    with keeping.held(lock_path(path), path, "--ckptpath"):
        try:
            keeping.finish_all(path)
            probe(Path(f"{path}{keeping.LONGEST}"))
        except OSError as error:
            todo = "give --ckptpath a file elsewhere, or one with a shorter name"
            raise UserError("io", f"cannot write the checkpoint: {error.strerror}", str(path), todo) from error
        yield


def check_writable(path: str | Path) -> None:
    """Raises a UserError if no checkpoint can be written to `path`: usage for the name of a folder, otherwise io."""
    if os.fspath(path).endswith((os.sep, f"{os.sep}.")) and not os.path.isdir(path):
        raise UserError("usage", "the name of a folder, and there is none", f"--ckptpath {path}", "name a file")
    path, where = Path(path), os.fspath(path)
    what, folder = None, followed(path).parent
    beside, kept = keeping.paths_of(path), keeping.paths_of(keeping.previous_of(path))
    # os.path's questions and not Path's, which raise where one may not look.
    if os.path.isdir(path):
        what = "a folder, not a file"
    elif os.path.exists(path) and not os.path.isfile(path):
        what = "a device or a pipe, not a file"
    elif not os.path.isdir(path.parent):  # `none/../model` is not there, although its folder is
        what = f"cannot write into {path.parent}"
    elif not os.access(folder, os.W_OK | os.X_OK):
        what = f"cannot write into {folder}"
    elif any(map(os.path.isdir, [*beside, *kept])):
        what = f"a folder, where a run keeps a file: {next(filter(os.path.isdir, [*beside, *kept]))}"
    elif any(not may_replace(file, folder) for file in [*beside, *kept] if os.path.exists(file)):
        what = f"another user's file, and only they may replace it in {folder}"
    if what:
        todo = "give --ckptpath a file in a folder that exists and can be written to"
        raise UserError("io", what, where, todo)


def may_replace(path: Path, folder: Path) -> bool:
    """Whether a file in a writable folder may be replaced: in a sticky one, such as /tmp, only its owner may."""
    user, about = os.geteuid(), os.stat(folder)
    return not about.st_mode & stat.S_ISVTX or user in (0, about.st_uid, os.stat(path).st_uid)


def load_if_readable(path: Path) -> Checkpoint | None:
    """The checkpoint at `path`. None if there is none that can be read."""
    try:
        return load(path)
    except UserError:
        return None


def run_of(path: Path) -> str | None:
    """The name of the run that wrote the checkpoint at `path`. None if there is none, or it has no name."""
    found = load_if_readable(path)
    return None if found is None else found.about.get("run")


# ---------------------------------------------------------------- reading


def load(path: str | Path) -> Checkpoint:
    """Reads a checkpoint of this program, or the original's bare state dict. What it holds has passed `check`.

    Raises:
        UserError: checkpoint, if the file is missing, broken, of another kind, contradicts itself, or holds code.
    """
    where = str(path)
    with sealed.opened(path) as file:
        seal = sealed.verified(file, where)
        content = sealed.parsed(file, where)
    try:
        if not isinstance(content, dict) or not set(content) & {*CONTENT, "format"} - {"state_dict"}:
            return read_original(content, where)
        return read_own(content, seal, where)
    except UserError:
        raise
    except Exception as error:  # what contradicts itself makes its reader trip over anything
        raise damaged(first_line(error), where) from error


def damaged(what: str, where: str) -> UserError:
    return UserError("checkpoint", f"damaged: {what}", where, sealed.OTHER_COPY)


def read_own(content: dict, seal: sealed.Seal | None, where: str) -> Checkpoint:
    """Reads a checkpoint of this program, of any version.

    Args:
        content: of the file.
        seal: that of the file, which has been verified.
        where: its path, for errors.
    """
    if "state_format" in content:
        what, todo = "the state of a run, not a model", f"give the model, {where.removesuffix('.state')}"
        raise UserError("checkpoint", what, where, todo)
    number = content.get("format")
    if type(number) is not int:
        raise damaged("it does not say its format", where)
    if number not in (UNSEALED_FORMAT, FORMAT, PIECES_FORMAT):
        todo = "use the version that wrote it"
        raise UserError("checkpoint", f"format {number}, expected at most {PIECES_FORMAT}", where, todo)
    if number != UNSEALED_FORMAT and seal is None:
        raise UserError("checkpoint", sealed.INCOMPLETE, where, sealed.OTHER_COPY)
    if missing := [name for name in CONTENT if name not in content]:
        raise damaged(f"it has no {missing[0]}", where)
    checkpoint = Checkpoint(**{name: content[name] for name in CONTENT}, shortlist=content.get("shortlist"))
    for name in SUBWORDS:
        if (model := content.get(name)) is not None:
            if (fault := fault_of_tensor(model, torch.uint8)) or model.dim() != 1:
                raise damaged(f"{name} {fault or 'is no row of bytes'}", where)
            setattr(checkpoint, name, model.numpy().tobytes())
    if (checkpoint.src_subwords is None) != (checkpoint.trg_subwords is None):
        raise damaged("one language has pieces, the other has words", where)
    check(checkpoint, where)
    if number == UNSEALED_FORMAT and (actual := checkpoint.digest()) != content.get("sha256"):
        raise damaged(f"sha256 {actual}, expected {content.get('sha256')}", where)
    return dataclasses.replace(checkpoint, completed=seal is None or seal.completed)


def read_original(content: object, where: str) -> Checkpoint:
    """Reads a state dict, bare or under `state_dict`, with or without DistributedDataParallel's `module.` prefix."""
    if isinstance(content, dict):
        content = content.get("state_dict", content)
    if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        todo = "give a file that train_8p.py wrote, or a plain state dict"
        raise UserError("checkpoint", "holds no state dict", where, todo)
    state = {}
    for name, tensor in content.items():
        if fault := fault_of_tensor(tensor.detach()):
            raise damaged(f"{name} {fault}", where)
        state[str(name).removeprefix("module.")] = tensor.detach().float().contiguous()
    if fault := next(faults_of_values(state), None):
        raise damaged(fault, where)
    return Checkpoint(state, sizes={}, flags=dict(ORIGINAL_FLAGS))


# ---------------------------------------------------------------- what a checkpoint must be


def check(checkpoint: Checkpoint, where: str) -> None:
    """Raises a checkpoint UserError unless all parts are what they should be and fit each other.

    Whether the weights are those of a model of these sizes, `gru.restore` says.
    """
    if fault := next(faults(checkpoint), None):
        raise damaged(fault, where)


def faults(checkpoint: Checkpoint) -> Iterator[str]:
    """What is wrong with a checkpoint of this program. A fault may rest on those before it, so read the first alone."""
    parts = {name: getattr(checkpoint, name) for name in ("state_dict", "sizes", "flags", "scores", "about")}
    for name, part in parts.items():
        if not isinstance(part, dict) or any(type(key) is not str for key in part):
            yield f"{name} is no dict with names"
    yield from faults_of_sizes(checkpoint.sizes)
    for side, words, size in (
        ("src_vocab", checkpoint.src_vocab, checkpoint.sizes["input_dim"]),
        ("trg_vocab", checkpoint.trg_vocab, checkpoint.sizes["output_dim"]),
    ):
        if fault := fault_of_words(words, size):
            yield f"{side} {fault}"
    assert checkpoint.src_vocab is not None and checkpoint.trg_vocab is not None
    for name in ("src_lang", "trg_lang"):
        if type(checkpoint.about.get(name)) is not str:
            yield f"about has no {name}"
    actual = vocabulary_digest(checkpoint.src_vocab, checkpoint.trg_vocab)
    if (expected := checkpoint.about.get("vocabularies", actual)) != actual:
        yield f"the fingerprint of its vocabularies is {actual}, expected {expected}"
    for name, value in checkpoint.scores.items():
        if type(value) not in (int, float) or not math.isfinite(value):
            yield f"the score {name} is no number"
    for name, part in (("flags", checkpoint.flags), ("about", checkpoint.about)):
        if not is_plain(part):
            yield f"{name} holds other things than numbers and text"
    yield from faults_of_flags(checkpoint.flags)
    for name, tensor in checkpoint.state_dict.items():
        if fault := fault_of_tensor(tensor):
            yield f"{name} {fault}"
        if tensor.dtype != torch.float32:
            yield f"{name} is of {tensor.dtype}, expected torch.float32"
        if tensor.requires_grad or not tensor.is_contiguous():
            yield f"{name} is no plain tensor"
    yield from faults_of_values(checkpoint.state_dict)
    if checkpoint.shortlist is not None:
        yield from faults_of_shortlist(checkpoint.shortlist, checkpoint.sizes)


def faults_of_shortlist(shortlist: Any, sizes: dict[str, int]) -> Iterator[str]:
    """What is wrong with the probable translations of a model of these sizes."""
    if fault := fault_of_tensor(shortlist, torch.int32):
        yield f"shortlist {fault}"
    if shortlist.dim() != 2 or len(shortlist) != sizes["input_dim"] or not shortlist.is_contiguous():
        yield f"shortlist has shape {list(shortlist.shape)}, expected [{sizes['input_dim']}, a number of words]"
    if shortlist.numel() and not 0 <= int(shortlist.min()) <= int(shortlist.max()) < sizes["output_dim"]:
        yield "shortlist has an id that is no word's"


def faults_of_sizes(sizes: dict[str, Any]) -> Iterator[str]:
    if sorted(sizes) != sorted(SIZES):
        yield f"its sizes are {', '.join(sorted(sizes))}, expected {', '.join(sorted(SIZES))}"
    for name, size in sizes.items():
        if type(size) is not int or not 0 < size <= LARGEST_SIZE:
            yield f"{name} is no size"


def fault_of_words(words: Any, size: int) -> str | None:
    """What is wrong with a vocabulary that should have so many words."""
    if type(words) is not list or any(type(word) is not str for word in words):
        return "is no list of words"
    if len(words) != size:
        return f"has {len(words)} words, expected {size}"
    if words[: len(SPECIALS)] != SPECIALS:
        return f"does not begin with {' '.join(SPECIALS)}"
    if len(set(words)) != len(words):
        return "has a word twice"
    if any("\ud800" <= character <= "\udfff" for word in words for character in word):
        return "has a word that is no text"
    return None


def faults_of_flags(values: dict[str, Any]) -> Iterator[str]:
    """What is wrong with the flags that a score reads."""
    for name in sorted(USED_FLAGS.keys() & values.keys()):
        try:
            USED_FLAGS[name](str(values[name]))
        except argparse.ArgumentTypeError as error:
            yield f"the flag {name}: {error}"


def fault_of_tensor(tensor: Any, dtype: torch.dtype | None = None) -> str | None:
    """What makes a value no plain tensor that says as much as it takes up, of `dtype` or of floats."""
    if type(tensor) is not Tensor:
        return f"is of type {type(tensor).__name__}, expected a tensor"
    if vars(tensor):
        return "has attributes of its own"
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        return "is no plain tensor"
    if tensor.is_nested or tensor.is_quantized or tensor.is_neg():
        return "is no plain tensor"
    if tensor.dtype != dtype if dtype is not None else not tensor.is_floating_point():
        return f"is of {tensor.dtype}, expected {dtype or 'floats'}"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return "repeats its values"
    return None


def faults_of_values(state_dict: dict[str, Tensor]) -> Iterator[str]:
    for name, tensor in state_dict.items():
        if not tensor.isfinite().all():
            yield f"{name} holds NaN or infinity"


def is_plain(value: Any, depth: int = 4) -> bool:
    """Whether a value is None, a number, text, or lists and dicts of such, not nested deeply."""
    if type(value) is dict:
        return depth > 0 and all(type(key) is str and is_plain(inner, depth - 1) for key, inner in value.items())
    if type(value) is list:
        return depth > 0 and all(is_plain(inner, depth - 1) for inner in value)
    return value is None or type(value) in (bool, int, float, str)
