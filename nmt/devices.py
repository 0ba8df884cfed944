"""Devices: which types there are, how many of each this machine has, and how a process prepares to compute on one.

Where torch_npu is installed without CANN, `import torch` would load it and fail. `nmt/__init__.py` turns that off.
This module imports torch_npu instead, and keeps the error for users who ask for an NPU.
"""

import ctypes
import importlib
import os
import platform
import warnings
from collections.abc import Sequence
from pathlib import Path

from nmt.errors import UserError, first_line

import torch

DEVICE_TYPES = ("npu", "cuda", "cpu")  # in the order of preference
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
CPU_PROCESSES = 8  # a CPU stands in for the published machine of eight devices


def import_torch_npu() -> str:
    """Imports torch_npu. Returns the error's first line if that failed, and an empty string if it worked."""
    try:
        importlib.import_module("torch_npu")
    except Exception as error:  # a bad CANN path raises a plain Exception
        return first_line(error)
    return ""


NPU_IMPORT_ERROR = import_torch_npu()
NO_TORCH_NPU = "ModuleNotFoundError: No module named 'torch_npu'"


# ---------------------------------------------------------------- what this machine has


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def npu_count() -> tuple[int, str]:
    """How many NPUs torch_npu finds. If there are none, the second value says why."""
    if NPU_IMPORT_ERROR:
        return 0, NPU_IMPORT_ERROR
    try:
        count = torch.npu.device_count()  # type: ignore[attr-defined]  # torch_npu adds torch.npu
    except Exception as error:  # torch_npu raises this for a bad driver or a bad environment variable
        return 0, first_line(error)
    return count, "" if count else f"torch_npu finds no NPU{visible_npus()}"


def visible_npus() -> str:
    """The value of ASCEND_RT_VISIBLE_DEVICES in brackets, or an empty string if it is not set."""
    visible = os.environ.get("ASCEND_RT_VISIBLE_DEVICES")
    return "" if visible is None else f" (ASCEND_RT_VISIBLE_DEVICES is {visible!r})"


def passed_over(device_type: str) -> str:
    """Why a run on `device_type` is not on an NPU although torch_npu is installed. Empty if there is nothing to say."""
    return "" if device_type == "npu" or NPU_IMPORT_ERROR.startswith(NO_TORCH_NPU) else npu_count()[1]


def device_count(device_type: str) -> int:
    """How many devices of this type there are. On a CPU they are processes, and only their number matters."""
    if device_type == "npu":
        return npu_count()[0]
    if device_type == "cuda":
        return torch.cuda.device_count()
    return max(CPU_PROCESSES, cores())


def default_count(device_type: str) -> int:
    """How many devices a run takes if nobody says: all of this machine, and on a CPU eight processes."""
    return CPU_PROCESSES if device_type == "cpu" else device_count(device_type)


def choose_device_type(wanted: str, flag: str = "") -> str:
    """The type of device to run on.

    Args:
        wanted: "npu", "cuda", "cpu", or "auto" for the first of them that this machine has.
        flag: the flag that asks for it, if that is not `--device`, for the error.

    Raises:
        UserError: usage, there is no such device here. The error gives the reason.
    """
    if wanted == "auto":
        return next(device_type for device_type in DEVICE_TYPES if device_count(device_type))
    if not device_count(wanted):
        reason, todo = npu_count()[1], "try --device cpu instead"
        if flag:
            todo = f"try --device cpu in the place of {flag.split()[0]}, or neither: a run takes the best device here"
        if wanted == "cuda":
            built = torch.version.cuda is not None
            reason = "torch finds no CUDA device" if built else f"torch {torch.__version__} is built without CUDA"
        elif not reason.startswith(NO_TORCH_NPU):
            todo = f"source CANN's set_env.sh, see that its version, torch_npu's and torch's fit, or {todo}"
            if not NPU_IMPORT_ERROR and visible_npus():
                todo = (
                    "unset ASCEND_RT_VISIBLE_DEVICES, or list in it devices of the machine, ascending, without spaces"
                )
        raise UserError("usage", f"no {wanted} here: {reason}", flag or f"--device {wanted}", todo)
    return wanted


def check_indices(device_type: str, indices: Sequence[int], flag: str) -> None:
    """Checks that this machine has all of these devices.

    Args:
        device_type: "npu", "cuda" or "cpu".
        indices: of the devices.
        flag: the flag that names them, for the error.

    Raises:
        UserError: usage, one of them is not there.
    """
    count = device_count(device_type)
    for index in indices:
        if not 0 <= index < count:
            there = f"there is 0 to {count - 1}" if count > 1 else "there is only 0"
            if device_type == "npu" and visible_npus():
                there += f", counted among those that are visible{visible_npus()}"
            raise UserError("usage", f"no {device_type} {index} here", flag, there)


def cpu_gains_from_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the processor multiplies bfloat16 matrices faster than float32 ones.

    It does with AMX, with Arm's instructions and with AMD's AVX512-BF16. Intel's AVX512-BF16 alone takes twice as long
    as float32. A virtual machine that hides AMX has that (bench/results/machine-without-amx.log). Nobody tried Cooper
    Lake.
    """
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        return False  # Apple's processors have the instructions, but PyTorch's CPU build does not use them there
    words = words_about_cpu(cpuinfo)
    return bool(words & {"amx_bf16", "bf16"}) or ("avx512_bf16" in words and "GenuineIntel" not in words)


def words_about_cpu(cpuinfo: Path = Path("/proc/cpuinfo")) -> set[str]:
    """All words of Linux's description of the processor, its vendor and its instructions among them. Elsewhere none."""
    try:
        return set(cpuinfo.read_text().split())
    except OSError:
        return set()


# ---------------------------------------------------------------- this process and its device


def prepare(device: torch.device, processes: int) -> None:
    """Makes this process ready to compute on its device. Call it before the process group is made.

    Args:
        device: of this process.
        processes: how many run on this machine. On a CPU each takes its part of the cores, unless the user has set
            OMP_NUM_THREADS.
    """
    if device.type == "cpu":
        keep_freed_memory()
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, cores() // processes))
    else:
        getattr(torch, device.type).set_device(device.index)  # before the first collective, or all ranks take device 0
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False  # TF32 has float16's digits, and float32 is to mean float32 in GRUs too
        # PyTorch lays a GRU's weights side by side for cuDNN in float16 and float32. In bfloat16 cuDNN does it.
        warnings.filterwarnings("ignore", message="RNN module weights are not part of single contiguous chunk")


def name(device: torch.device) -> str:
    """The device's own name. For a CPU its cores and threads."""
    if device.type == "cpu":
        return f"{platform.machine()} CPU, {cores()} cores, {torch.get_num_threads()} threads a process"
    return getattr(torch, device.type).get_device_name(device.index)


def synchronize(device: torch.device) -> None:
    """Waits until the device has finished its work. A CPU always has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def keep_freed_memory() -> None:
    """Tells the C library, if it is glibc, to keep memory that tensors free for the next tensors.

    By default glibc returns large blocks to the system at once, and gets them back page by page. At batch 512 that is
    a tenth of a training step.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
