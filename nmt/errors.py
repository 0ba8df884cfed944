"""Expected errors: one line for the user, an exit code for the program that started us.

Exit codes: 0 done, or nobody reads the output any more; 1 bug or out of memory; 2 usage; 3 data; 4 checkpoint;
5 I/O or network; 6 distributed; 7 diverged; 8 a wrapper's run has a lower BLEU than --accept_bleu; 130 Ctrl-C;
143 SIGTERM.
"""

import contextlib
import errno
import importlib.metadata
import io
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from nmt.signals import Stopped, StopRequest, in_main_thread

PACKAGES = ("torch", "numpy", "spacy", "torchtext", "sacrebleu", "tqdm")
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
EXIT_CODES = {"bug": 1, "memory": 1, "usage": 2, "data": 3, "checkpoint": 4, "io": 5, "distributed": 6, "diverged": 7}
EXIT_CODES |= {"accept": 8}
# What the messages of other people's errors say. Most are plain RuntimeErrors.
OF_MEMORY = ("out of memory", "allocate memory", "bad_alloc", "alloc_failed", "unable to allocate")
LOWER = "lower --batch-size, or --beam-size for the final score, or --hid-dim and --emb-dim"
# What collectives say when another rank has gone or does not answer. Their other errors are a rank's own.
OF_PEERS = (
    "broken pipe",
    "communicator was aborted",
    "connection closed by peer",
    "connection refused",
    "connection reset by peer",
    "hccl function error",
    "read error",
    "remote process exited",
    "socket closed",
    "timed out",
    "timeout",
    "write error",
)


class UserError(Exception):
    """An error that the user can mend. It says what is wrong, where, and what to do next.

    Args:
        kind: one of `EXIT_CODES`' names.
        what: the fault, with the wrong value and the expected one.
        where: the flag, file, line or rank.
        todo: the next thing to type or to look at.

    >>> str(UserError("data", "train.en has 3 lines, train.de 4", "corpus/", "make them equal"))
    'error[data]: train.en has 3 lines, train.de 4; corpus/; make them equal'
    """

    def __init__(self, kind: str, what: str, where: str, todo: str):
        super().__init__(kind, what, where, todo)
        self.kind = kind
        self.exit_code = EXIT_CODES[kind]

    def __str__(self) -> str:
        kind, what, where, todo = self.args
        return printable(f"error[{kind}]: {what}; {where}; {todo}")


def printable(text: str) -> str:
    r"""`text` on one line with its control characters escaped, so that data cannot control a terminal.

    >>> printable("a\x1b[31m\n")
    'a\\x1b[31m\\n'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def first_line(error: Exception) -> str:
    r"""One line about an error that other people's code raised.

    >>> first_line(ImportError("libhccl.so: cannot open shared object file\nand so on"))
    'ImportError: libhccl.so: cannot open shared object file'
    """
    return f"{type(error).__name__}: {error}".splitlines()[0]


def prepare_imports() -> None:
    """Ends the program with one line if a package is not installed, or at Ctrl-C during the imports.

    The imports take seconds, and `run_main` is not there yet to handle Ctrl-C.
    """
    report = sys.excepthook

    def in_one_line(kind, error, trace) -> None:
        if issubclass(kind, KeyboardInterrupt):
            print("interrupted", file=sys.stderr)  # the interpreter then ends as the signal does
        else:
            report(kind, error, trace)

    sys.excepthook = in_one_line
    exit_unless_installed(PACKAGES, "requirements.txt")


def exit_unless_installed(packages: Iterable[str], requirements: str) -> None:
    """Ends the program with one line if one of the packages is not installed. See `not_installed`."""
    if told := not_installed(packages, requirements):
        print(told, file=sys.stderr)
        sys.exit(told.exit_code)


def not_installed(packages: Iterable[str], requirements: str) -> UserError | None:
    """What to say if one of the packages is not installed.

    Args:
        packages: their names.
        requirements: the file of this repository that names their versions.
    """
    missing = []
    for package in packages:
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            missing.append(package)
    if not missing:
        return None
    repository = Path(__file__).resolve().parent.parent
    own = repository / ".venv" / "bin" / "python"
    is_own = own == Path(sys.executable)
    todo = f"run {own if is_own else 'python3'} -m pip install -r {repository / requirements}"
    if not is_own:
        todo += ", or use the Python that has them"
        if own.exists():
            todo = f"run {own}, or {todo.removeprefix('run ')}"
    return UserError("usage", f"not installed: {', '.join(missing)}", sys.executable, todo)


class LostPeer(UserError):
    """A distributed error of a rank that is in order, and waited for another one in vain. The cause is elsewhere."""


def lacks_memory(error: BaseException) -> bool:
    """Whether a device, or the machine, had no memory left.

    >>> lacks_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"))
    True
    """
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    text = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(sign in text for sign in OF_MEMORY)
    )


def lost_peer(error: BaseException) -> bool:
    """Whether a collective failed, because another rank had failed before."""
    if any(kind.__name__ == "DistError" for kind in type(error).__mro__):  # torch's, without importing it
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in OF_PEERS)


def in_one_line(error: Exception, where: str) -> Exception:
    """The `UserError` that says in one line what some errors of other people's code mean. Others stay as they are.

    Args:
        where: which rank or process this is.
    """
    if isinstance(error, UserError):
        return error
    if lacks_memory(error):
        return UserError("memory", without_memory(error), where, LOWER)
    if lost_peer(error):
        todo = "see what the other ranks say; the cause is there"
        return LostPeer("distributed", f"lost another rank: {first_line(error)}", where, todo)
    return error


def without_memory(error: Exception) -> str:
    """What went wrong, as the library says it."""
    said = first_line(error)
    return said if "out of memory" in said else f"out of memory ({said})"


@contextlib.contextmanager
def telling_memory(needs: Callable[[], str]) -> Iterator[None]:
    """Turns the body's lack of memory into a `UserError` that says what the memory was needed for.

    Args:
        needs: says it. It is called after the fact.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or not lacks_memory(error):
            raise
        raise UserError("memory", without_memory(error), needs(), LOWER) from error


def is_expected(error: Exception) -> bool:
    """Whether `run_main` shows no traceback: for a user's error, and if nobody reads the output or its disk is full."""
    return isinstance(error, UserError | BrokenPipeError) or (isinstance(error, OSError) and error.errno in NO_ROOM)


def run_main(main, argv: list[str]) -> int:
    """Calls `main(argv)` and turns its errors into an exit code. An expected error is one line on stderr.

    Args:
        main: takes the list of arguments, returns nothing.
        argv: the arguments. With `--debug` among them, expected errors show their traceback too.

    Returns:
        The exit code of the process.
    """
    prepare_output()
    # Without a handler, SIGTERM ends a process without a word, and process 1 of a container not at all.
    stop = StopRequest(raises=True) if in_main_thread() else contextlib.nullcontext()
    try:
        with stop:
            main(argv)
            sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Stopped as stopped:
        print(printable(str(stopped)), file=sys.stderr)
        return stopped.exit_code
    except BrokenPipeError:
        # The reader of our output has gone (`| head`). The run is in order, and nobody is left to tell.
        discard_output()
        return 0
    except Exception as error:
        told = in_one_line(error, f"rank {os.environ['RANK']}" if os.environ.get("RANK") else f"process {os.getpid()}")
        if not is_expected(told):
            raise
        if "--debug" in argv:
            traceback.print_exc()
        if isinstance(told, UserError):
            print(told, file=sys.stderr)
            return told.exit_code
        assert isinstance(told, OSError)
        discard_output()
        print(UserError("io", str(told.strerror), told.filename or "the output", "make room there"), file=sys.stderr)
        return EXIT_CODES["io"]
    return 0


def prepare_output() -> None:
    """Lets stdout take all text, whatever its encoding. A closed stream takes it and drops it. For each new process."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115  (to the end of the process)
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115  (or print would use stdout instead)
    assert isinstance(sys.stdout, io.TextIOWrapper)
    sys.stdout.reconfigure(errors="backslashreplace")


def discard_output() -> None:
    """Drops what stdout has not written yet."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
