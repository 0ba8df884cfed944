"""A simulated torch_npu for the tests. See the README.md beside this package."""

from .start import autoload as _autoload  # before torch, which looks for it while it is imported

# isort: split

import importlib.machinery
import importlib.util
import sys

import torch
import torch.distributed as dist

from . import build

__version__ = "2.13.0"
__all__ = ["_autoload", "npu"]


def _load_extension() -> None:
    name = f"{__name__}._C"
    loader = importlib.machinery.ExtensionFileLoader(name, str(build.ensure()))
    sys.modules[name] = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    loader.exec_module(sys.modules[name])


def _create_hccl(store, rank, size, timeout):
    gloo_options = dist.ProcessGroupGloo._Options()
    gloo_options._timeout = timeout
    gloo_options._devices = [dist.ProcessGroupGloo.create_device(interface="lo")]
    return npu._C.hccl(dist.ProcessGroupGloo(store, rank, size, gloo_options), rank, size)


torch.utils.rename_privateuse1_backend("npu")
_load_extension()

from . import npu  # noqa: E402  (it needs the extension)

torch._register_device_module("npu", npu)
torch.utils.generate_methods_for_privateuse1_backend(for_storage=True, for_packed_sequence=True)
dist.Backend.register_backend("hccl", _create_hccl, devices=["npu"])


def _foreach_devices() -> list[str]:
    npu.current_device()
    return ["cuda", "xpu", "npu"]


# Adam asks this in its default form, also for parameters on the CPU: where there is no NPU, that fails.
sys.modules["torch.optim.optimizer"]._get_foreach_kernels_supported_devices = _foreach_devices
