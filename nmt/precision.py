"""Mixed precision: which numbers the forward and the backward pass use, and how the weights stay exact.

| level | weights that compute | products          | weights that the optimizer updates | loss scale   |
|-------|----------------------|-------------------|------------------------------------|--------------|
| O0    | fp32                 | fp32              | the same                           | as asked for |
| O1    | fp32                 | half, by autocast | the same                           | as asked for |
| O2    | half                 | half              | an fp32 master copy                | as asked for |
| O3    | half                 | half              | the same                           | none         |

The levels' names and meaning are NVIDIA apex's. "Half" is float16 on NPUs, whose GRU knows no bfloat16, and on CUDA
where nothing else is asked for. On a CPU it is bfloat16, which has float32's range and so needs no loss scale, and only
where the processor is faster in it or the user insists: elsewhere float32 is faster. Who insists gets float16 on a CPU
too, if it has AVX512-FP16.

`choose` decides, `start` makes what runs. The fp32 model is the model: it is what is initialised, validated and saved.
O2 and O3 have a half copy of it beside it, which computes the gradients.
"""

import contextlib
import copy
import importlib
import inspect
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

from nmt.errors import UserError, first_line

import torch
from torch import Tensor, nn

LEVELS = ("O0", "O1", "O2", "O3")
BACKENDS = ("auto", "apex", "native")
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
APEX_LEVELS = ("O2", "O3")  # its O1 replaces PyTorch's functions, and would not fill the `out=` of those in kernels.py
BFLOAT16_CAPABILITY = (8, 0)  # of the GPUs that compute in it: Ampere's
NO_APEX = "ModuleNotFoundError: No module named 'apex'"

# float16 gradients below 6e-8 vanish: hence a scale. A dynamic one starts high and is halved until nothing overflows.
STATIC_SCALE = 32.0
DYNAMIC_START = 65536.0
GROWTH_INTERVAL = 2000
SMALLEST_SCALE = 1.0  # below it, it is not the scale that makes gradients overflow
PATIENCE = 3  # steps in a row that change no weight before a static scale is given up
# Adam's in float16, where its usual 1e-8 is 0. Its mean of squared gradients is 0 there too, for gradients below about
# 5e-3, so that its steps are not Adam's: O3 in float16 shows how fast pure half is, and little more.
HALF_EPSILON = 1e-4


# ---------------------------------------------------------------- what is chosen


@dataclass(frozen=True)
class Choice:
    """The precision of a run.

    Attributes:
        level: "O0" to "O3".
        dtype: what "half" is; float32 in O0.
        loss_scale: a number, or "dynamic".
        backend: "native" or "apex".
        note: what the user should know about it, or an empty string.
    """

    level: str = "O0"
    dtype: torch.dtype = torch.float32
    loss_scale: float | str = 1.0
    backend: str = "native"
    note: str = ""

    @property
    def dtype_name(self) -> str:
        """`bfloat16`."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def name(self) -> str:
        """For the log: `bfloat16/O2`."""
        return f"{self.dtype_name}/{self.level}"


def choose(
    kind: str,
    level: str,
    *,
    dtype: str = "auto",
    loss_scale: float | str | None = None,
    backend: str = "auto",
    indices: Sequence[int] = (0,),
) -> Choice:
    """What a device of `kind` runs with.

    Args:
        kind: "npu", "cuda" or "cpu".
        level: "O0" to "O3".
        dtype: "float16", "bfloat16", or "auto" for what is fast on the device.
        loss_scale: a number, "dynamic", or None for what `dtype` needs.
        backend: "apex", "native", or "auto" for apex where it is installed and serves this device and level.
        indices: this node's devices.

    Raises:
        UserError: usage, there is no such precision here.
    """
    if level == "O0":
        return Choice(loss_scale=loss_scale or 1.0)
    half = DTYPES.get(dtype, torch.bfloat16 if kind == "cpu" else torch.float16)
    check_dtype(kind, level, half, indices)
    if level == "O3" and loss_scale not in (None, 1.0):
        todo = "leave it out: O3 has no float32 gradients to unscale into"
        raise UserError("usage", f"a loss scale, {loss_scale}, with O3", "--loss-scale", todo)
    backend, note = choose_backend(kind, level, half, backend)
    if kind == "cpu" and dtype == "auto" and not cpu_gains_from_bfloat16():
        note = "this CPU is no faster in bfloat16: --amp computes in float32; --amp-dtype bfloat16 insists"
        return Choice(loss_scale=loss_scale or 1.0, note=note)
    needed = STATIC_SCALE if half == torch.float16 and level != "O3" else 1.0
    return Choice(level, half, loss_scale or needed, backend, note)


def check_dtype(kind: str, level: str, half: torch.dtype, indices: Sequence[int]) -> None:
    """Raises a usage UserError if these devices of `kind` should not compute in `half`."""
    reason, todo = "", "leave the flag out: auto is right for every device"
    if kind == "npu" and half == torch.bfloat16:
        reason = "the NPU's GRU computes in float16 and float32 only"
    elif kind == "cpu" and half == torch.float16 and "avx512_fp16" not in words_about_cpu():
        reason = "float16 products take this CPU about ten times as long"
    elif kind == "cuda" and half == torch.bfloat16:
        old = [index for index in indices if torch.cuda.get_device_capability(index) < BFLOAT16_CAPABILITY]
        if old:
            reason = f"GPU {old[0]} has no bfloat16"
        elif level == "O1":
            reason, todo = "PyTorch's autocast computes a GRU in float16 on a GPU", "use --opt-level O2, or float16"
    if reason:
        raise UserError("usage", reason, "--amp-dtype", todo)


def choose_backend(kind: str, level: str, half: torch.dtype, wanted: str) -> tuple[str, str]:
    """Returns "apex" or "native", see `choose`, and what the user should know about it."""
    serves = kind != "cpu" and level in APEX_LEVELS and half == torch.float16
    if wanted == "native" or (wanted == "auto" and not serves):
        return "native", ""
    if not serves:
        asked = f"{level} in {str(half).removeprefix('torch.')} on {kind}"
        what = f"apex serves {' and '.join(APEX_LEVELS)} in float16 on NPUs and GPUs, not {asked}"
        raise UserError("usage", what, "--amp-backend", "use native")
    amp, reason = import_amp()
    if amp is None and wanted == "apex":
        todo = "install the apex that your device's vendor offers, or use native"
        raise UserError("usage", f"no apex.amp here: {reason}", "--amp-backend", todo)
    if amp is not None:
        return "apex", ""
    return "native", "" if reason.startswith(NO_APEX) else f"apex is installed, but not used: {reason}"


def import_amp() -> tuple[ModuleType | None, str]:
    """`apex.amp`, or None and the reason: NVIDIA's apex has had no `amp` since May 2025."""
    try:
        return importlib.import_module("apex.amp"), ""
    except Exception as error:  # it was built for some torch, and fails in many ways under another
        return None, first_line(error)


def cpu_gains_from_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the processor multiplies bfloat16 matrices faster than float32 ones.

    With AMX, Arm's instructions or AMD's AVX512-BF16 it does. Intel's AVX512-BF16 alone, as on a virtual machine that
    hides AMX, takes twice as long as float32 (bench/results/machine-without-amx.log; Cooper Lake was not tried).
    """
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        return False  # Apple's have them, but the CPU build of PyTorch does not use them there
    words = words_about_cpu(cpuinfo)
    return bool(words & {"amx_bf16", "bf16"}) or ("avx512_bf16" in words and "GenuineIntel" not in words)


def words_about_cpu(cpuinfo: Path = Path("/proc/cpuinfo")) -> set[str]:
    """What Linux says about the processor: its vendor and its instructions among other words; elsewhere nothing."""
    try:
        return set(cpuinfo.read_text().split())
    except OSError:
        return set()


# ---------------------------------------------------------------- what runs


@dataclass(frozen=True)
class OptimizerSettings:
    """Adam (Kingma and Ba 2015, arXiv 1412.6980) or AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101).

    Attributes:
        name: "adam" or "adamw".
        lr: peak learning rate.
        weight_decay: L2 penalty for Adam, decoupled decay for AdamW.
        eps: keeps the division from one by zero.
    """

    name: str
    lr: float
    weight_decay: float = 0.0
    eps: float = 1e-8

    def arguments(self) -> dict[str, float]:
        """As an optimizer's class takes them."""
        return {"lr": self.lr, "weight_decay": self.weight_decay, "eps": self.eps}


class Precision:
    """Runs a training step in the chosen precision; see `start`.

    Attributes:
        model: the fp32 model.
        working_model: the module to compute the loss with: `model` itself, or its half copy.
        optimizer: whose learning rate the loop sets.
    """

    model: nn.Module
    working_model: nn.Module
    optimizer: torch.optim.Optimizer

    def forward_context(self) -> contextlib.AbstractContextManager:
        """The context of the forward pass."""
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Gradients of the scaled loss, in the working model's parameters."""
        raise NotImplementedError

    def step(self, max_norm: float) -> None:
        """Unscales the gradients in fp32, clips their norm, updates the weights and drops the gradients.

        Args:
            max_norm: the largest norm of all gradients together; 0 does not clip.
        """
        raise NotImplementedError

    def refresh_model(self) -> None:
        """Brings `model` up to date, where it is not what is optimised."""
        raise NotImplementedError

    def skipped_steps(self) -> int:
        """How many steps since this was last asked changed no weight, because their gradients overflowed.

        Waits for the device.

        Raises:
            UserError: diverged, and no later step would change that.
        """
        raise NotImplementedError


class NativePrecision(Precision):
    """The levels by PyTorch's own means.

    A step whose gradients are not all finite changes no weight, whether the scale is static or dynamic. O3 has no
    scale and no such check.
    """

    def __init__(self, choice: Choice, model: nn.Module, device: torch.device, settings: OptimizerSettings):
        self.model = model
        self.working_model = copy.deepcopy(model).to(choice.dtype) if choice.level in ("O2", "O3") else model
        optimised = self.working_model if choice.level == "O3" else model
        self.optimizer = make_optimizer(settings, optimised.parameters(), device)
        self._pairs = []  # (fp32, half) parameters
        if self.working_model is not model:
            self._pairs = list(zip(model.parameters(), self.working_model.parameters(), strict=True))
        self._has_masters = choice.level == "O2"
        self._autocast = (device.type, choice.dtype) if choice.level == "O1" else None
        self._static_scale = None if choice.loss_scale == "dynamic" else float(choice.loss_scale)
        self._scaler = make_scaler(device, self._static_scale or DYNAMIC_START, enabled=choice.level != "O3")
        self._steps = self._updates = 0  # both since, or at, the last call of `skipped_steps`
        self._in_vain = 0  # steps since the weights last changed, as far as those calls can tell

    def forward_context(self) -> contextlib.AbstractContextManager:
        """Autocast under O1."""
        return torch.autocast(*self._autocast) if self._autocast else super().forward_context()

    def backward(self, loss: Tensor) -> None:
        self._scaler.scale(loss).backward()

    def step(self, max_norm: float) -> None:
        if self._has_masters:
            for master, working in self._pairs:
                master.grad = working.grad.float()
                working.grad = None
        self._scaler.unscale_(self.optimizer)
        if max_norm > 0:
            nn.utils.clip_grad_norm_(self.optimizer.param_groups[0]["params"], max_norm)
        self._scaler.step(self.optimizer)
        self._scaler.update(self._static_scale)
        self.optimizer.zero_grad()
        self._steps += 1
        if self._has_masters:
            masters, working = zip(*self._pairs, strict=True)
            with torch.no_grad():
                torch._foreach_copy_(list(working), list(masters))

    @torch.no_grad()
    def refresh_model(self) -> None:
        if not self._has_masters:
            for parameter, working in self._pairs:
                parameter.copy_(working)

    def skipped_steps(self) -> int:
        state = next(iter(self.optimizer.state.values()), None)  # the optimizer counts its updates
        updates = int(state["step"]) if state else 0
        steps, skipped = self._steps, self._steps - (updates - self._updates)
        self._steps, self._updates = 0, updates
        self._in_vain = self._in_vain + steps if skipped == steps else 0
        is_static = self._static_scale is not None
        if (is_static and self._in_vain >= PATIENCE) or (not is_static and self.loss_scale < SMALLEST_SCALE):
            raise overflown(f"{skipped} of {steps} steps", self.loss_scale, f"after {updates} updates")
        return skipped

    @property
    def loss_scale(self) -> float:
        """The scale that the next step will have. Waits for the device."""
        return self._scaler.get_scale()


class ApexPrecision(Precision):
    """O2 and O3 by apex's `amp`: Ascend's fork, or a build of NVIDIA's from before May 2025.

    Under a static scale apex checks for no overflow. Under a dynamic one it skips such a step, and prints a line.
    """

    def __init__(self, choice: Choice, model: nn.Module, device: torch.device, settings: OptimizerSettings):
        self._amp = importlib.import_module("apex.amp")
        self._is_dynamic = choice.loss_scale == "dynamic"
        self.model = model
        working = copy.deepcopy(model)
        fused = apex_fused_optimizer(self._amp, settings, device)
        if fused is None:
            optimizer, extra = make_optimizer(settings, working.parameters(), device, fused=False), {}
        else:
            optimizer = fused(working.parameters(), **settings.arguments())
            extra = {"combine_grad": True}
        self.working_model, self.optimizer = self._amp.initialize(
            working, optimizer, opt_level=choice.level, loss_scale=choice.loss_scale, **extra
        )

    def backward(self, loss: Tensor) -> None:
        with self._amp.scale_loss(loss, self.optimizer) as scaled_loss:
            scaled_loss.backward()

    def step(self, max_norm: float) -> None:
        if max_norm > 0:
            nn.utils.clip_grad_norm_(self._amp.master_params(self.optimizer), max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()  # apex's takes no argument

    @torch.no_grad()
    def refresh_model(self) -> None:
        for parameter, master in zip(self.model.parameters(), self._amp.master_params(self.optimizer), strict=True):
            parameter.copy_(master)

    def skipped_steps(self) -> int:
        """0: apex reports them itself."""
        scale = self._amp.state_dict()["loss_scaler0"]["loss_scale"]
        if self._is_dynamic and scale < SMALLEST_SCALE:
            raise overflown("the last steps", scale, "apex's lines above say when")
        return 0


def overflown(steps: str, scale: float, where: str) -> UserError:
    """The error of a run whose gradients go on to overflow."""
    what = f"the gradients of {steps} were not finite, at a loss scale of {scale:g}"
    lower = "lower --loss-scale or --lr" if scale > 1 else "lower --lr"
    todo = f"{lower}; or give --loss-scale dynamic, or leave --amp out, where they are not so already"
    return UserError("diverged", what, where, todo)


def start(choice: Choice, model: nn.Module, device: torch.device, settings: OptimizerSettings) -> Precision:
    """What trains `model` in the chosen precision. `DistributedDataParallel` may wrap the working model afterwards.

    Args:
        choice: from `choose`.
        model: the fp32 model, on its device.
        device: that device.
        settings: the optimizer's.
    """
    if (choice.level, choice.dtype) == ("O3", torch.float16):
        settings = replace(settings, eps=HALF_EPSILON)
    kind = {"native": NativePrecision, "apex": ApexPrecision}[choice.backend]
    return kind(choice, model, device, settings)


def make_scaler(device: torch.device, scale: float, *, enabled: bool = True) -> torch.amp.GradScaler:
    """The device's own loss scaler: on an NPU torch_npu's. That also sees where the 910A, whose float16 saturates
    instead of becoming infinite, does so in the backward pass; it looks from `scale` on."""
    if device.type == "npu":
        return torch.npu.amp.GradScaler(init_scale=scale, growth_interval=GROWTH_INTERVAL, enabled=enabled)
    return torch.amp.GradScaler(device.type, init_scale=scale, growth_interval=GROWTH_INTERVAL, enabled=enabled)


def make_optimizer(
    settings: OptimizerSettings, parameters: Iterable[nn.Parameter], device: torch.device, *, fused: bool = True
) -> torch.optim.Optimizer:
    """PyTorch's own, in its fastest form.

    Args:
        settings: which, and how.
        parameters: to optimise.
        device: where they are.
        fused: whether that may be one kernel for all. On a CPU and on CUDA it is, and then the check for overflow needs
            no synchronisation; on an NPU PyTorch has none.
    """
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[settings.name]
    # Left out rather than False, which would turn off the form that goes through all parameters at once, too.
    options = {"fused": True} if fused and device.type in ("cpu", "cuda") else {}
    return kind(parameters, **settings.arguments(), **options)


def apex_fused_optimizer(amp: ModuleType, settings: OptimizerSettings, device: torch.device) -> type | None:
    """The class of Ascend's fused optimizer, or None where there is none.

    It is right together with the `combine_grad=True` of the same fork's `amp`: it lays all gradients in one tensor once
    and goes on to use that. torch_npu's copy of it does so, too, and is not used: the gradients of the native O2's
    masters are new tensors at each step.
    """
    if device.type != "npu" or "combine_grad" not in inspect.signature(amp.initialize).parameters:
        return None
    try:
        optimizers = importlib.import_module("apex.optimizers")
    except Exception:  # built for another torch, as its `amp` may be; PyTorch's optimizer does as well
        return None
    return getattr(optimizers, {"adam": "NpuFusedAdam", "adamw": "NpuFusedAdamW"}[settings.name], None)
