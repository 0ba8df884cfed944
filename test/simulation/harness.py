"""For tests that run something on the simulated NPU of `npu_sim`: always in a process of its own.

PyTorch takes one such device a process and never gives it back. So `npu_sim` is on the path of subprocesses only.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SIMULATION = Path(__file__).resolve().parent / "npu_sim"
BUILD = SIMULATION / "torch_npu" / "build.py"
OWN_VARIABLES = ("ASCEND_RT_VISIBLE_DEVICES", "HCCL_CONNECT_TIMEOUT", "HCCL_EXEC_TIMEOUT", "TASK_QUEUE_ENABLE")
OWN_VARIABLES += ("CPU_AFFINITY_CONF", "NPU_SIM_DEVICES", "NPU_SIM_FAULT", "TORCH_DEVICE_BACKEND_AUTOLOAD")


def environment(**extra: str) -> dict[str, str]:
    """The environment of a subprocess that has the simulated NPU: `import torch` finds it by itself.

    Args:
        extra: more variables. Those of `OWN_VARIABLES` come from nowhere else.
    """
    inherited = {name: value for name, value in os.environ.items() if name not in OWN_VARIABLES}
    path = os.pathsep.join([str(SIMULATION), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**inherited, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **extra}


def start_building() -> None:
    """Compiles the simulation in the background, if that was not done yet; `ensure_built` waits for it and reports."""
    if shutil.which("g++"):
        subprocess.Popen([sys.executable, BUILD], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def ensure_built() -> None:
    """Compiles the simulation if that was not done yet, half a minute; skips the test where there is no g++."""
    if shutil.which("g++") is None:
        pytest.skip("the simulated NPU needs g++")
    spec = importlib.util.spec_from_file_location("npu_sim_build", BUILD)
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    build.ensure()
