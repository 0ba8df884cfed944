"""`train_8p.py` as it is, except that the log has a hash of weights, optimizer and average after each epoch.

    python test/unit/hashing.py FLAGS

A spawned rank imports this file too, as its main module.
"""

import hashlib
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from nmt.signals import end_with_parent

if __name__ == "__main__" and "TORCHELASTIC_RUN_ID" in os.environ:
    end_with_parent(os.getppid())  # before the imports, which take seconds

import train_8p
from nmt import distributed, launch, resume
from nmt.errors import run_main

import torch


def digest(value: object) -> str:
    """sha256 over all tensors, numbers and texts in nested dicts and lists."""
    hasher = hashlib.sha256()

    def add(value: object) -> None:
        if isinstance(value, torch.Tensor):
            hasher.update(f"{value.dtype} {list(value.shape)}".encode())
            hasher.update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for key in value:
                hasher.update(repr(key).encode())
                add(value[key])
        elif isinstance(value, list | tuple):
            for each in value:
                add(each)
        else:
            hasher.update(repr(value).encode())

    add(value)
    return hasher.hexdigest()


def digest_of(run: resume.Run) -> str:
    """Of what is trained."""
    return digest({name: run._parts[name].state() for name in ("trainer", "average")})


def hashing_steps_done(run: resume.Run, step: int, epoch: int, position: int) -> None:
    if run._path is not None:  # rank 0
        print(f"hash: epoch {epoch} {digest_of(run)}", flush=True)
    steps_done(run, step, epoch, position)


if __name__ in ("__main__", "__mp_main__"):
    steps_done = resume.Run.steps_done
    resume.Run.steps_done = hashing_steps_done
if __name__ == "__main__":
    exit_code = run_main(train_8p.main, sys.argv[1:])
    if distributed.under_torchrun():
        launch.leave(exit_code)
    sys.exit(exit_code)
