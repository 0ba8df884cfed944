"""What comes before torch is imported: the entry point, and the bad installations that NPU_SIM_FAULT asks for."""

import os

FAULTS = {
    "no-cann": ImportError("libhccl.so: cannot open shared object file: No such file or directory"),
    "bad-home": Exception("the folder of ASCEND_HOME_PATH, /no/such/ascend-toolkit, does not exist"),
    "cuda-build": RuntimeError("torch_npu does not work with a CUDA build of torch: install the CPU build"),
    "other-version": ImportError(
        "libtorch_npu.so: undefined symbol: _ZN3c1017RegisterNPUBackendEv\n"
        "this torch_npu was built for another version of torch"
    ),
}


def autoload() -> None:
    """`import torch` calls this. Nothing is left to do: to find it, torch has imported the package."""


fault = os.environ.get("NPU_SIM_FAULT")
if fault:
    raise FAULTS.get(fault) or ValueError(f"NPU_SIM_FAULT is {fault!r}; there are {', '.join(FAULTS)}")
