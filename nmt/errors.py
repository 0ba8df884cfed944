"""Expected errors: one line for the user, an exit code for the program that started us.

Exit codes: 0 done, or nobody reads the output any more; 1 bug or out of memory; 2 usage; 3 data; 4 checkpoint;
5 I/O or network; 6 distributed; 7 diverged; 130 Ctrl-C; 143 SIGTERM.
"""

import errno
import importlib.metadata
import io
import os
import signal
import sys
import traceback
from pathlib import Path

PACKAGES = ("torch", "numpy", "spacy", "torchtext", "sacrebleu", "tqdm")
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
EXIT_CODES = {"usage": 2, "data": 3, "checkpoint": 4, "io": 5, "distributed": 6, "diverged": 7}


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


class Stopped(BaseException):
    """SIGTERM or Ctrl-C has ended the run. No `Exception`, so that no handler of errors takes it for one.

    Args:
        exit_code: 143 or 130.
        what: what became of the work, in one line.

    >>> str(Stopped(143, "the state is saved"))
    'stopped by SIGTERM: the state is saved'
    """

    def __init__(self, exit_code: int, what: str = ""):
        super().__init__(exit_code, what)
        self.exit_code = exit_code

    def __str__(self) -> str:
        exit_code, what = self.args
        name = "Ctrl-C" if exit_code == 130 else signal.Signals(exit_code - 128).name
        return printable(f"stopped by {name}" + (f": {what}" if what else ""))


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
    missing = []
    for package in PACKAGES:
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            missing.append(package)
    if missing:
        repository = Path(__file__).resolve().parent.parent
        own = repository / ".venv" / "bin" / "python"
        todo = f"run python3 -m pip install -r {repository / 'requirements.txt'}, or use the Python that has them"
        if own.exists():
            todo = f"run {own}, or {todo.removeprefix('run ')}"
        print(UserError("usage", f"not installed: {', '.join(missing)}", sys.executable, todo), file=sys.stderr)
        sys.exit(EXIT_CODES["usage"])


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
    try:
        main(argv)
        sys.stdout.flush()
    except UserError as error:
        if "--debug" in argv:
            traceback.print_exc()
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return stopped.exit_code
    except BrokenPipeError:
        # The reader of our output has gone (`| head`). The run is in order, and nobody is left to tell.
        discard_output()
        return 0
    except OSError as error:
        if not is_expected(error):
            raise
        discard_output()
        print(UserError("io", str(error.strerror), error.filename or "the output", "make room there"), file=sys.stderr)
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
