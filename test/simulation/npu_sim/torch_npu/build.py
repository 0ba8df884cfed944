"""Compiles the simulation, once for each state of its source, and for each torch and Python.

Nothing here imports torch, so that a test may build before it starts a process that does.
"""

import fcntl
import hashlib
import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

SOURCE = Path(__file__).resolve().parent
FOLDER = SOURCE.parent / ".build"
FLAGS = "-std=c++20 -O1 -g0 -fPIC -shared -w".split()
LIBRARIES = "-lc10 -ltorch_cpu -ltorch_python".split()


class BuildError(RuntimeError):
    """The simulation cannot be compiled here."""


def compiler() -> str | None:
    """The C++ compiler, if there is one."""
    return shutil.which("g++")


def target() -> Path:
    """Where the extension of this source, this torch and this Python is or will be."""
    key = hashlib.sha256()
    for path in sorted(SOURCE.glob("*.[ch]*")):
        key.update(path.read_bytes())
    for text in (importlib.metadata.version("torch"), sys.version, *FLAGS):
        key.update(text.encode())
    return FOLDER / f"_C-{key.hexdigest()[:16]}.so"


def ensure() -> Path:
    """The extension's file, compiled now if it is not there. Other processes wait for the one that compiles.

    Raises:
        BuildError: there is no g++, or it fails. The message has its output.
    """
    path = target()
    if path.exists():
        return path
    FOLDER.mkdir(exist_ok=True)
    with open(FOLDER / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            compile_to(path)
    return path


def compile_to(path: Path) -> None:
    """Compiles into `path`, which appears only when it is whole."""
    if compiler() is None:
        raise BuildError("the simulated NPU needs g++, and there is none here")
    torch = Path(importlib.util.find_spec("torch").origin).parent
    includes = [torch / "include", torch / "include/torch/csrc/api/include", sysconfig.get_paths()["include"]]
    partial = path.with_suffix(".partial")
    command = [compiler(), *FLAGS, *(f"-I{folder}" for folder in includes), str(SOURCE / "module.cpp")]
    command += ["-o", str(partial), f"-L{torch / 'lib'}", *LIBRARIES]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise BuildError(f"g++ failed:\n{result.stderr}")
    partial.replace(path)


if __name__ == "__main__":
    print(ensure())
