"""For tests that run something on the simulated NPU of `npu_sim`. Each runs it in a process of its own.

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
OWN_VARIABLES += ("NPU_SIM_WRONG", "NPU_SIM_SLOW", "NPU_SIM_LOST_RANK", "NPU_SIM_HUNG_RANK")


def environment(**extra: str) -> dict[str, str]:
    """The environment of a subprocess that has the simulated NPU: `import torch` finds it by itself.

    Args:
        extra: more variables. Those of `OWN_VARIABLES` come from nowhere else.
    """
    inherited = {name: value for name, value in os.environ.items() if name not in OWN_VARIABLES}
    path = os.pathsep.join([str(SIMULATION), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**inherited, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **extra}


def run(*command: object, cwd: Path | None = None, deadline: float = 180, **extra: str) -> subprocess.CompletedProcess:
    """Runs a command with the simulated NPU to its end.

    Args:
        command: the program and its arguments, as texts, paths or numbers.
        cwd: its folder.
        deadline: seconds after which it is killed.
        extra: more variables, as for `environment`.

    Raises:
        subprocess.TimeoutExpired: the deadline has passed.
    """
    words = [str(word) for word in command]
    return subprocess.run(
        words, cwd=cwd, env=environment(**extra), capture_output=True, text=True, timeout=deadline, check=False
    )


def start_building() -> None:
    """Starts the compiler in the background, once. `ensure_built` waits for it."""
    if shutil.which("g++"):
        subprocess.Popen([sys.executable, BUILD], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def ensure_built() -> None:
    """Compiles the simulation if that was not done yet. It takes half a minute. Without g++ the test is skipped."""
    if shutil.which("g++") is None:
        pytest.skip("the simulated NPU needs g++")
    spec = importlib.util.spec_from_file_location("npu_sim_build", BUILD)
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    build.ensure()
