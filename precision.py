"""Mixed precision: which numbers the forward and the backward pass use, and how the weights stay exact.

| level | weights that compute | products          | weights that the optimizer updates |
|-------|----------------------|-------------------|------------------------------------|
| O0    | fp32                 | fp32              | the same                           |
| O1    | fp32                 | half, by autocast | the same                           |
| O2    | half                 | half              | an fp32 master copy                |

The levels' names and meaning are NVIDIA apex's. "Half" is float16 on NPU and CUDA. On a CPU it is bfloat16, which has
float32's range and so needs no loss scale, and only where the processor computes in it: elsewhere float32 is faster.

The fp32 model is the model: it is what is initialised, optimised, validated and saved. O2's half copy only computes
gradients.
"""

import contextlib
import copy
import platform
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

# float16 gradients below 6e-8 vanish; a dynamic scale starts high and is halved until nothing overflows.
DYNAMIC_START = 65536.0
GROWTH_INTERVAL = 2000


def half_dtype(device: torch.device) -> torch.dtype | None:
    """The 16-bit format that `device` computes in; None for a CPU that has none."""
    if device.type == "cpu":
        return torch.bfloat16 if cpu_has_bfloat16() else None
    return torch.float16


def cpu_has_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the processor has bfloat16 products: AVX512-BF16, AMX, or Arm's."""
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        return False  # Apple's have them, but the CPU build of PyTorch does not use them there
    try:
        words = set(cpuinfo.read_text().split())
    except OSError:
        return False
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})


class Precision:
    """Runs a training step in the chosen precision.

    Args:
        model: the fp32 model, on its device.
        device: that device.
        level: "O0", "O1" or "O2".
        loss_scale: a number, or "dynamic".

    Attributes:
        working_model: the module to compute the loss with: `model` itself, or its half copy.
        name: what is in use, for the log.
    """

    def __init__(self, model: nn.Module, device: torch.device, level: str, loss_scale: float | str):
        dtype = half_dtype(device)
        if dtype is None or level == "O0":
            level, dtype = "O0", torch.float32
        self.name = "float32/O0" if level == "O0" else f"{str(dtype).removeprefix('torch.')}/{level}"
        self.model = model
        self.working_model = copy.deepcopy(model).to(dtype) if level == "O2" else model
        self._pairs = []  # (master, working) parameters
        if level == "O2":
            self._pairs = list(zip(model.parameters(), self.working_model.parameters(), strict=True))
        self._device = device
        self._autocast_dtype = dtype if level == "O1" else None
        self._static_scale = None if loss_scale == "dynamic" else float(loss_scale)
        self._scaler = torch.amp.GradScaler(
            device.type, init_scale=self._static_scale or DYNAMIC_START, growth_interval=GROWTH_INTERVAL
        )

    def forward_context(self) -> contextlib.AbstractContextManager:
        """The context of the forward pass: autocast under O1."""
        if self._autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, dtype=self._autocast_dtype)

    def backward(self, loss: Tensor) -> None:
        """Gradients of the scaled loss, in the working model's parameters."""
        self._scaler.scale(loss).backward()

    def step(self, optimizer: torch.optim.Optimizer, max_norm: float) -> None:
        """Unscales the gradients in fp32, clips their norm, updates the weights and drops the gradients.

        A step whose gradients are not all finite changes no weight, whether the scale is static or dynamic.

        Args:
            optimizer: over the fp32 model's parameters.
            max_norm: the largest norm of all gradients together; 0 does not clip.
        """
        for master, working in self._pairs:
            master.grad = working.grad.float()
            working.grad = None
        self._scaler.unscale_(optimizer)
        if max_norm > 0:
            nn.utils.clip_grad_norm_(self.model.parameters(), max_norm)
        self._scaler.step(optimizer)
        self._scaler.update(self._static_scale)
        optimizer.zero_grad()
        self._refresh_working_copy()

    @torch.no_grad()
    def _refresh_working_copy(self) -> None:
        if self._pairs:
            masters, working = zip(*self._pairs, strict=True)
            torch._foreach_copy_(list(working), list(masters))


def fused_available(device: torch.device) -> bool:
    """Whether PyTorch's own fused Adam runs there; with it the check for overflow needs no synchronisation."""
    return device.type in ("cpu", "cuda")


def make_optimizer(
    name: str, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float, device: torch.device
) -> torch.optim.Optimizer:
    """Adam (Kingma and Ba 2015, arXiv 1412.6980) or AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101).

    Args:
        name: "adam" or "adamw".
        parameters: the fp32 model's parameters.
        lr: peak learning rate.
        weight_decay: L2 penalty for Adam, decoupled decay for AdamW.
        device: where the parameters are.
    """
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]
    return kind(parameters, lr=lr, weight_decay=weight_decay, fused=fused_available(device))
