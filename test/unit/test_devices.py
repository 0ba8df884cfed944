"""Devices: which type is taken, what a CPU gains from, and how a process prepares to compute."""

import os
import platform
import subprocess
import sys
import warnings
from pathlib import Path

from nmt import devices, distributed

import pytest
import torch
from conftest import REPOSITORY, refused

# ---------------------------------------------------------------- what this machine has


def test_auto_takes_npu_else_cuda_else_cpu(monkeypatch):
    there = {"npu": 0, "cuda": 0, "cpu": 8}
    monkeypatch.setattr(devices, "device_count", there.__getitem__)
    assert devices.choose_device_type("auto") == "cpu"
    there["cuda"] = 1
    assert devices.choose_device_type("auto") == "cuda"
    there["npu"] = 1
    assert devices.choose_device_type("auto") == "npu"


def test_an_absent_npu_is_refused_with_the_imports_own_reason(monkeypatch):
    """Row 36."""
    monkeypatch.setattr(devices, "NPU_IMPORT_ERROR", "ImportError: libhccl.so: cannot open shared object file")
    message = refused("usage", devices.choose_device_type, "npu")
    assert "libhccl.so" in message
    assert "try --device cpu" in message


def test_an_absent_gpu_is_refused(monkeypatch):
    """Row 36."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert "try --device cpu" in refused("usage", devices.choose_device_type, "cuda")
    for flag, device_type in (("--gpu 3", "cuda"), ("--npu 3", "npu")):
        message = refused("usage", distributed.plan, **{flag[2:5]: 3})
        assert f"no {device_type} here: " in message
        assert f"; {flag}; try --device cpu in the place of {flag[:5]}, or neither" in message


def test_a_torch_npu_that_fails_to_import_leaves_its_reason_and_no_error(tmp_path):
    (tmp_path / "torch_npu.py").write_text("raise RuntimeError('no CANN here')")
    code = "from nmt import devices; print(devices.NPU_IMPORT_ERROR, devices.choose_device_type('auto'))"
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{REPOSITORY}", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout == "RuntimeError: no CANN here cpu\n", done.stderr


def test_an_index_beyond_the_visible_npus_is_refused_with_how_they_are_counted(monkeypatch):
    monkeypatch.setattr(devices, "npu_count", lambda: (4, ""))
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "4,5,6,7")
    said = refused("usage", devices.check_indices, "npu", [3, 4], "--npu")
    assert "0 to 3, counted among those that are visible (ASCEND_RT_VISIBLE_DEVICES is '4,5,6,7')" in said


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("vendor_id : AuthenticAMD\nflags : avx512f avx512_bf16", True),
        ("vendor_id : GenuineIntel\nflags : avx512f avx512_bf16 amx_bf16", True),
        ("vendor_id : GenuineIntel\nflags : avx512f avx512_bf16", False),
        ("Features : asimd bf16", True),
        ("vendor_id : AuthenticAMD\nflags : avx2", False),
    ],
)
def test_the_processor_tells_whether_bfloat16_is_faster(tmp_path, text, expected):
    (tmp_path / "cpuinfo").write_text(text)
    assert devices.cpu_gains_from_bfloat16(tmp_path / "cpuinfo") is expected
    assert devices.cpu_gains_from_bfloat16(tmp_path / "absent") is False


# ---------------------------------------------------------------- this process and its device


def test_a_gpu_is_taken_and_computes_without_tf32(monkeypatch):
    """As far as it can be seen without one."""
    taken = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    with warnings.catch_warnings(record=True) as caught:
        devices.prepare(torch.device("cuda", 1), processes=2)
        warnings.warn("RNN module weights are not part of single contiguous chunk of memory.", stacklevel=1)
    assert not torch.backends.cudnn.allow_tf32
    assert not caught
    assert taken == [1]


@pytest.mark.parametrize(("processes", "threads"), [(1, 8), (3, 2), (16, 1)])
def test_on_a_cpu_the_processes_share_the_cores_unless_the_user_has_decided(monkeypatch, processes, threads):
    asked = []
    monkeypatch.setattr(devices, "cores", lambda: 8)
    monkeypatch.setattr(devices, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    devices.prepare(torch.device("cpu"), processes)
    assert asked == []
    monkeypatch.delenv("OMP_NUM_THREADS")
    devices.prepare(torch.device("cpu"), processes)
    assert asked == [threads]


# Prints how many megabytes the process has gained by blocks that it has made and freed 40 times. Each is above 32 MB,
# the size up to which the C library may come to keep a freed block by itself.
MEMORY_PROGRAM = """
import os
from nmt import devices, distributed
import torch

def resident():
    pages = int(open("/proc/self/statm").read().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

if {keep}:
    devices.keep_freed_memory()
before = resident()
for repetition in range(40):
    blocks = [torch.empty(size * 1_000_000, dtype=torch.uint8).fill_(1) for size in (40, 50, 60)]
    del blocks
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc/self/statm here")
def test_freed_memory_is_kept_and_used_again():
    gained = {}
    for keep in (False, True):
        command = [sys.executable, "-c", MEMORY_PROGRAM.format(keep=keep)]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=60)
        gained[keep] = float(done.stdout)
    assert gained[False] < 75  # given back to the system
    assert 150 < gained[True] < 750  # kept, and not taken anew by each repetition


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "100000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_threads_wait_with_less_patience_unless_the_user_says_how(given, expected):
    """With a subprocess, because PyTorch's threads read the variable when they start."""
    env = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    code = "import nmt, os; print(os.environ.get('GOMP_SPINCOUNT'))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=env | given, cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == f"{expected}\n"
