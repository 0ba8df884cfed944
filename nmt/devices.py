"""Devices and ranks: choosing npu, cuda or cpu, and what one process of several knows of the others.

PyTorch loads torch_npu by itself, and an installation of torch_npu without CANN then breaks `import torch`. So
`nmt/__init__.py` turns that off, and torch_npu is imported here, where a failure is kept for the user who asked for an
NPU.
"""

import ctypes
import datetime
import importlib
import os
import platform
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

from nmt.errors import UserError, first_line, printable

import torch
import torch.distributed as dist
from torch import Tensor, nn

KINDS = ("npu", "cuda", "cpu")  # in the order of preference
BACKENDS = {"npu": "hccl", "cuda": "nccl", "cpu": "gloo"}
NPU_VARIABLES = (  # those that the log shows where they are set
    "ASCEND_RT_VISIBLE_DEVICES",
    "HCCL_CONNECT_TIMEOUT",
    "HCCL_EXEC_TIMEOUT",
    "TASK_QUEUE_ENABLE",
    "CPU_AFFINITY_CONF",
)
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
CPU_PROCESSES = 8  # a CPU stands in for the published machine of eight devices


def import_torch_npu() -> str:
    """Imports torch_npu and returns why that did not work, or an empty string."""
    try:
        importlib.import_module("torch_npu")
    except Exception as error:  # a bad CANN path raises a plain Exception
        return first_line(error)
    return ""


NPU_IMPORT_ERROR = import_torch_npu()
NO_TORCH_NPU = "ModuleNotFoundError: No module named 'torch_npu'"


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def npu_count() -> tuple[int, str]:
    """How many NPUs torch_npu finds, and if there are none, why."""
    if NPU_IMPORT_ERROR:
        return 0, NPU_IMPORT_ERROR
    try:
        count = torch.npu.device_count()
    except Exception as error:  # of a driver or a variable that is not as torch_npu wants it
        return 0, first_line(error)
    return count, "" if count else f"torch_npu finds no NPU{visible_npus()}"


def visible_npus() -> str:
    """What may hide NPUs from the program, in brackets, if anything does."""
    visible = os.environ.get("ASCEND_RT_VISIBLE_DEVICES")
    return "" if visible is None else f" (ASCEND_RT_VISIBLE_DEVICES is {visible!r})"


def passed_over(kind: str) -> str:
    """Why a run on `kind` is not on an NPU, where torch_npu is installed; else an empty string."""
    return "" if kind == "npu" or NPU_IMPORT_ERROR.startswith(NO_TORCH_NPU) else npu_count()[1]


def device_count(kind: str) -> int:
    """How many devices of `kind` there are. On a CPU they are processes, and only their count matters."""
    if kind == "npu":
        return npu_count()[0]
    if kind == "cuda":
        return torch.cuda.device_count()
    return max(CPU_PROCESSES, cores())


def default_count(kind: str) -> int:
    """How many devices a run takes if nobody says: all of the machine's, on a CPU eight processes."""
    return CPU_PROCESSES if kind == "cpu" else device_count(kind)


def choose_kind(wanted: str) -> str:
    """The kind of device to run on.

    Args:
        wanted: "npu", "cuda", "cpu", or "auto" for the first of them that this machine has.

    Raises:
        UserError: usage, the kind is not there; with the reason.
    """
    if wanted == "auto":
        return next(kind for kind in KINDS if device_count(kind))
    if not device_count(wanted):
        reason, todo = npu_count()[1], "try --device cpu instead"
        if wanted == "cuda":
            built = torch.version.cuda is not None
            reason = "torch finds no CUDA device" if built else f"torch {torch.__version__} is built without CUDA"
        elif not reason.startswith(NO_TORCH_NPU):
            todo = f"source CANN's set_env.sh, see that its version, torch_npu's and torch's fit, or {todo}"
            if not NPU_IMPORT_ERROR and visible_npus():
                todo = (
                    "unset ASCEND_RT_VISIBLE_DEVICES, or list in it devices of the machine, ascending, without spaces"
                )
        raise UserError("usage", f"no {wanted} here: {reason}", f"--device {wanted}", todo)
    return wanted


def check_indices(kind: str, indices: list[int], flag: str) -> None:
    """Raises a usage UserError if this machine lacks one of the devices."""
    count = device_count(kind)
    for index in indices:
        if not 0 <= index < count:
            there = f"there is 0 to {count - 1}" if count > 1 else "there is only 0"
            if kind == "npu" and visible_npus():
                there += f", counted among those that are visible{visible_npus()}"
            raise UserError("usage", f"no {kind} {index} here", flag, there)


def keep_freed_memory() -> None:
    """Has the C library keep the memory that tensors free, for the next ones, where it is glibc.

    Else it gives large blocks back to the system at once, and gets them back page by page: at batch 512 a tenth of a
    training step.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def set_hccl_timeouts(seconds: float) -> None:
    """Has HCCL wait so long for the other ranks, in what the user's environment leaves open.

    Left alone, HCCL gives up connecting after two minutes, and executing after 10 to 30, by its version.
    """
    connect, execute = f"{min(max(seconds, 120), 7200):.0f}", f"{max(seconds, 1):.0f}"  # what it allows
    for name, value in (("HCCL_CONNECT_TIMEOUT", connect), ("HCCL_EXEC_TIMEOUT", execute)):
        os.environ.setdefault(name, value)


def synchronize(device: torch.device) -> None:
    """Waits until the device has finished what it was given; a CPU always has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@dataclass(frozen=True)
class World:
    """What one process knows of all the processes.

    Attributes:
        rank: this process among all, from 0.
        size: number of processes on all nodes.
        nodes: number of nodes.
        local_size: number of processes on this node.
        kind: "npu", "cuda" or "cpu".
        index: this process's device.
    """

    rank: int = 0
    size: int = 1
    nodes: int = 1
    local_size: int = 1
    kind: str = "cpu"
    index: int = 0

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self.kind == "cpu" else torch.device(self.kind, self.index)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def start(self, *, backend: str | None = None, timeout: float = 600.0, store: dist.Store | None = None) -> None:
        """Takes this process's device and joins the process group.

        Args:
            backend: "hccl", "nccl", "gloo", or None for the device's own.
            timeout: seconds that one collective may take.
            store: where the ranks meet; without one, torchrun's environment says.

        Raises:
            UserError: distributed, the others did not come.
        """
        if self.kind == "cpu":
            keep_freed_memory()
            if "OMP_NUM_THREADS" not in os.environ:
                torch.set_num_threads(max(1, cores() // self.local_size))
        else:
            getattr(torch, self.kind).set_device(self.index)  # before the first collective, or all ranks take device 0
        if self.kind == "cuda":
            torch.backends.cudnn.allow_tf32 = False  # float32 is float32, in the GRUs too: TF32 has float16's digits
            # PyTorch lays a GRU's weights side by side for cuDNN in float16 and float32; in bfloat16 cuDNN does it.
            warnings.filterwarnings("ignore", message="RNN module weights are not part of single contiguous chunk")
        if self.size == 1:
            return
        if self.kind == "npu":
            set_hccl_timeouts(timeout)
        if self.nodes == 1 and sys.platform == "linux":
            # One node needs no other interface than loopback.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        where = {"store": store, "rank": self.rank, "world_size": self.size} if store else {"init_method": "env://"}
        backend = backend or BACKENDS[self.kind]
        if backend == "nccl":
            where["device_id"] = self.device  # it then connects here, and not in the first collective
        try:
            dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout), **where)
        except (RuntimeError, ValueError) as error:
            raise UserError(
                "distributed",
                f"the {self.size} ranks did not meet: {first_line(error)}",
                f"rank {self.rank}",
                "see that every node was started with the same --addr, port and --world-size",
            ) from error

    def describe(self, backend: str | None, timeout: float) -> str:
        """The device's name and how the ranks meet, for the log; the arguments are those of `start`."""
        if self.kind == "cpu":
            name = f"{platform.machine()} CPU, {cores()} cores, {torch.get_num_threads()} threads a process"
        else:
            name = getattr(torch, self.kind).get_device_name(self.index)
        parts = [name]
        if self.size > 1:
            parts.append(f"{self.size} ranks by {backend or BACKENDS[self.kind]}, timeout {timeout:g} s")
        if self.kind == "npu":
            parts += [f"{variable}={os.environ[variable]}" for variable in NPU_VARIABLES if variable in os.environ]
        return printable("; ".join(parts))

    def stop(self) -> None:
        """Leaves the process group."""
        if self.size > 1:
            dist.destroy_process_group()

    def parallel(self, module: nn.Module) -> nn.Module:
        """`module` with its gradients averaged over the ranks in each backward pass; itself where there is one rank."""
        if self.size == 1:
            return module
        devices = None if self.kind == "cpu" else [self.index]
        return nn.parallel.DistributedDataParallel(module, device_ids=devices)

    def sum(self, tensor: Tensor) -> Tensor:
        """`tensor`, of any shape, summed over the ranks in place; it must be contiguous, and not float64 on an NPU."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def copy_from_main(self, tensors: Iterable[Tensor]) -> None:
        """Gives all ranks rank 0's values, in place."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), 0)
