"""Starts one process per device and watches over them: all finish, or none is left.

The parent holds the store in which the ranks meet. So no other program can take the port before they do. On one node
the store listens on loopback alone.
"""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple

from nmt.errors import UserError, is_expected, prepare_output

import torch.distributed as dist

GRACE = 5.0  # seconds between SIGTERM and SIGKILL
ROOT_CAUSE_WAIT = 1.0  # seconds in which the other ranks may report too: the first report is the cause


def host_store(addr: str, port: int, nodes: int) -> dist.TCPStore:
    """Opens the store on this node.

    Args:
        addr: the address that the ranks connect to.
        port: its port, or 0 for a free one.
        nodes: with 1, only this machine can connect.

    Raises:
        UserError: distributed, the port is taken.
    """
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((addr if nodes == 1 else "", port))
    except OSError as error:
        raise UserError(
            "distributed",
            f"cannot listen on port {port}: {error.strerror}",
            f"{addr}:{port}",
            "give another port with --dist-url or MASTER_PORT, or none to take a free one",
        ) from error
    listener.listen()
    port = listener.getsockname()[1]
    return dist.TCPStore(
        addr, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach(), use_libuv=True
    )


def join_store(addr: str, port: int, timeout: float) -> dist.TCPStore:
    """Connects a rank to the store.

    Raises:
        UserError: distributed, nobody answers there.
    """
    try:
        return dist.TCPStore(addr, port, is_master=False, timeout=timedelta(seconds=timeout))
    except (RuntimeError, ValueError) as error:
        raise UserError(
            "distributed", f"no answer within {timeout:g} s", f"{addr}:{port}", "see that node 0 has been started there"
        ) from error


@dataclass(frozen=True)
class Worker:
    """A child process, and the pipe on which it reports how its work ended."""

    process: multiprocessing.process.BaseProcess
    pipe: multiprocessing.connection.Connection

    def report(self) -> "Report | None":
        """The child's report, if it sent one."""
        with contextlib.suppress(EOFError):
            if self.pipe.poll():
                return self.pipe.recv()
        return None


class Report(NamedTuple):
    """How a child's work ended."""

    when: float  # on the machine's monotonic clock
    error: Exception | str | None  # an expected error as it is, another one in one line


def launch(worker: Callable, count: int, args: tuple, debug: bool = False) -> None:
    """Runs `worker(index, *args)` in `count` new processes and waits for all of them.

    Args:
        debug: whether a child shows the traceback of an expected error too. It always shows that of any other.

    Raises:
        UserError: the first failure's own, or distributed if a rank died or raised another error.
        OSError: the output has no reader or no room. `errors.run_main` handles it.
    """
    context = multiprocessing.get_context("spawn")
    workers = []
    previous = signal.signal(signal.SIGTERM, exit_on_sigterm)
    try:
        for index in range(count):
            pipe, child_end = context.Pipe(duplex=False)
            process = context.Process(target=run_worker, args=(worker, index, args, child_end, os.getpid(), debug))
            process.start()
            child_end.close()
            workers.append(Worker(process, pipe))
        supervise(workers)
    finally:
        stop([worker.process for worker in workers])
        signal.signal(signal.SIGTERM, previous)


def exit_on_sigterm(signum: int, frame) -> None:
    raise SystemExit(128 + signum)


def supervise(workers: list[Worker]) -> None:
    """Waits for the workers. Raises the error of the first one that fails."""
    running, reports = list(workers), {}
    while running:
        multiprocessing.connection.wait([worker.process.sentinel for worker in running])
        ended = [worker for worker in running if worker.process.exitcode is not None]
        for worker in ended:
            report = reports[worker] = worker.report()
            if report is None or report.error is not None:
                raise root_cause(workers, reports)
            running.remove(worker)


def root_cause(workers: list[Worker], reports: dict[Worker, Report | None]) -> Exception:
    """The error to show. The other ranks fail because one did, so the first report counts.

    A killed rank could not report. It comes before all ranks that could.

    Args:
        workers: all of them.
        reports: those that have been read. Each can be read once.
    """
    time.sleep(ROOT_CAUSE_WAIT)
    failed = []
    for rank, worker in enumerate(workers):
        report = reports[worker] if worker in reports else worker.report()
        exitcode = worker.process.exitcode
        if report is None and exitcode is not None:
            how = f"was killed by signal {-exitcode}" if exitcode < 0 else f"ended early with exit code {exitcode}"
            return rank_error(rank, how, "see the lines above for what it was doing")
        if report is not None and report.error is not None:
            failed.append((report.when, rank, report.error))
    _, rank, error = min(failed, key=lambda each: each[0])
    return error if isinstance(error, Exception) else rank_error(rank, f"failed: {error}", "see its traceback above")


def rank_error(rank: int, how: str, todo: str) -> UserError:
    return UserError("distributed", f"rank {rank} {how}", f"process {rank} of this node", todo)


def stop(processes: list) -> None:
    """Ends the processes that still run, after `GRACE` seconds by force."""
    alive = [process for process in processes if process.is_alive()]
    for process in alive:
        process.terminate()
    deadline = time.monotonic() + GRACE
    for process in alive:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()


def run_worker(worker: Callable, index: int, args: tuple, pipe, parent: int, debug: bool) -> None:
    """One child's life: it works, reports how that ended, and ends when its parent ends."""
    threading.Thread(target=follow_parent, args=(parent,), daemon=True).start()
    prepare_output()
    try:
        worker(index, *args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        os._exit(130)
    except Exception as error:
        expected = is_expected(error)
        if debug or not expected:
            traceback.print_exc()
        pipe.send(Report(time.monotonic(), error if expected else f"{type(error).__name__}: {error}"))
        # Not sys.exit: the interpreter would wait for collectives that no other rank will join.
        os._exit(1)
    pipe.send(Report(time.monotonic(), None))
    leave(0)


def leave(code: int) -> None:
    """Writes a rank's output and ends it at once. At a normal exit, threads of collectives can abort the process."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def follow_parent(parent: int) -> None:
    """Ends this process when its parent has ended, in whatever way."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)
