"""What a training process does with memory that tensors have freed."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

# Prints how many megabytes the process has gained by blocks that it has made and freed 40 times. Each is above 32 MB,
# the size up to which the C library may come to keep a freed block by itself.
PROGRAM = """
import os
from nmt import devices
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
        command = [sys.executable, "-c", PROGRAM.format(keep=keep)]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=60)
        gained[keep] = float(done.stdout)
    assert gained[False] < 75  # given back to the system
    assert 150 < gained[True] < 750  # kept, and not taken anew by each repetition
