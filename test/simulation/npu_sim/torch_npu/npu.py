"""torch.npu: what torch and users ask about the devices."""

import contextlib

import torch
from torch import Tensor

from . import _C
from . import amp as amp

Device = torch.device | str | int | None

current_stream = torch.accelerator.current_stream
empty_cache = torch.accelerator.empty_cache
max_memory_allocated = torch.accelerator.max_memory_allocated
max_memory_reserved = torch.accelerator.max_memory_reserved
memory_allocated = torch.accelerator.memory_allocated
memory_reserved = torch.accelerator.memory_reserved
reset_peak_memory_stats = torch.accelerator.reset_peak_memory_stats


def _index(device: Device) -> int:
    if device is None:
        return current_device()
    if isinstance(device, int):
        return device
    index = torch.device(device).index
    return current_device() if index is None else index


def is_available() -> bool:
    return _C.device_count() > 0


def device_count() -> int:
    return _C.device_count()


def current_device() -> int:
    _C.start()
    return _C.current_device()


def set_device(device: Device) -> None:
    _C.set_device(_index(device))


def device(device: Device) -> contextlib.AbstractContextManager:
    return torch.accelerator.device_index(_index(device))


def synchronize(device: Device = None) -> None:
    torch.accelerator.synchronize(_index(device))


def get_device_name(device: Device = None) -> str:
    return "Simulated NPU"


def is_initialized() -> bool:
    return _C.is_used() and not _C.is_forked()


def _lazy_init() -> None:
    _C.start()


def _is_in_bad_fork() -> bool:
    return _C.is_forked()


def manual_seed(seed: int) -> None:
    _C.default_generator(current_device()).manual_seed(seed)


def manual_seed_all(seed: int) -> None:
    for index in range(device_count()):
        _C.default_generator(index).manual_seed(seed)


def get_rng_state(device: Device = "npu") -> Tensor:
    return _C.default_generator(_index(device)).get_state()


def set_rng_state(new_state: Tensor, device: Device = "npu") -> None:
    _C.default_generator(_index(device)).set_state(new_state)


def get_amp_supported_dtype() -> list[torch.dtype]:
    _C.start()  # autocast, even where it is turned off, needs a device
    return [torch.float16, torch.bfloat16, torch.float32]
