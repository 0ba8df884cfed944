"""Mixed precision: the numbers that the forward and the backward pass use, and how the weights stay exact.

| level | weights that compute | products          | weights that the optimizer updates | loss scale   |
|-------|----------------------|-------------------|------------------------------------|--------------|
| O0    | fp32                 | fp32              | the same                           | as asked for |
| O1    | fp32                 | half, by autocast | the same                           | as asked for |
| O2    | half                 | half              | an fp32 master copy                | as asked for |
| O3    | half                 | half              | the same                           | none         |

NVIDIA's apex gave the levels their names and meaning. "Half" depends on the device:

- On an NPU it is float16. The NPU's GRU knows no bfloat16.
- On CUDA it is float16, or bfloat16 if the user asks for that.
- On a CPU it is bfloat16. That has float32's range and needs no loss scale. Where the processor is not faster in
  bfloat16, `--amp` computes in float32, unless the user insists. float16 needs AVX512-FP16 and the user's wish.

`choose` decides on a `Choice`, and `make_trainer` makes the `Trainer` that carries it out. The fp32 model is the model:
it gets the first weights, and is validated and saved. O2 and O3 add a half copy that computes the gradients.
"""

import contextlib
import copy
import functools
import importlib
import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, Generic, TypeVar

from nmt import devices, flags
from nmt.errors import UserError, first_line

import torch
from torch import Tensor, nn

LEVELS = ("O0", "O1", "O2", "O3")
AMP_BACKENDS = ("auto", "apex", "native")
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
# apex's O1 replaces PyTorch's functions, and would ignore the `out=` of those in kernels.py.
APEX_LEVELS = ("O2", "O3")
BFLOAT16_CAPABILITY = (8, 0)  # GPUs compute in bfloat16 from Ampere on
NO_APEX = "ModuleNotFoundError: No module named 'apex'"

# float16 gradients below 6e-8 vanish: hence a scale. A dynamic one starts high and is halved until nothing overflows.
STATIC_SCALE = 32.0
DYNAMIC_START = 65536.0
GROWTH_INTERVAL = 2000
SMALLEST_SCALE = 1.0  # gradients that overflow below it do so for another reason
MAX_STEPS_IN_VAIN = 3  # so many steps in a row that change no weight end a run with a static scale
EPSILON = 1e-8  # keeps Adam's division from one by zero
# In float16 1e-8 is 0. There Adam's mean of squared gradients is 0 too for gradients below about 5e-3, and its steps
# are not Adam's. O3 in float16 shows how fast pure half is, and little more.
HALF_EPSILON = 1e-4


# ---------------------------------------------------------------- the choice


@dataclass(frozen=True)
class Choice:
    """The precision of a run.

    Attributes:
        level: "O0" to "O3".
        dtype: the dtype of "half"; float32 in O0.
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
    device_type: str,
    level: str,
    *,
    dtype: str = "auto",
    loss_scale: float | str | None = None,
    backend: str = "auto",
    indices: Sequence[int] = (0,),
) -> Choice:
    """Decides on the precision of a run.

    Args:
        device_type: "npu", "cuda" or "cpu".
        level: "O0" to "O3".
        dtype: "float16", "bfloat16", or "auto" for the one that suits the device.
        loss_scale: a number, "dynamic", or None for what `dtype` needs.
        backend: "apex", "native", or "auto" for apex where it is installed and serves this device and level.
        indices: this node's devices.

    Raises:
        UserError: usage, there is no such precision here.
    """
    if level == "O0":
        return Choice(loss_scale=loss_scale or 1.0)
    half = DTYPES.get(dtype, torch.bfloat16 if device_type == "cpu" else torch.float16)
    check_dtype(device_type, level, half, indices)
    if level == "O3" and loss_scale not in (None, 1.0):
        todo = "leave it out: O3 has no float32 gradients to unscale into"
        raise UserError("usage", f"a loss scale, {loss_scale}, with O3", "--loss-scale", todo)
    backend, note = choose_backend(device_type, level, half, backend)
    if device_type == "cpu" and dtype == "auto" and not devices.cpu_gains_from_bfloat16():
        note = "this CPU is no faster in bfloat16: --amp computes in float32; --amp-dtype bfloat16 insists"
        return Choice(loss_scale=loss_scale or 1.0, note=note)
    needed = STATIC_SCALE if half == torch.float16 and level != "O3" else 1.0
    return Choice(level, half, loss_scale or needed, backend, note)


def choose_by_flags(
    device_type: str,
    indices: Sequence[int],
    *,
    amp: bool,
    opt_level: str,
    loss_scale: float | str | None,
    amp_dtype: str,
    amp_backend: str,
) -> Choice:
    """Decides as the flags of these names say. Its note names the flags that were given and have no effect.

    Args:
        device_type, indices: as in `choose`.
        amp: whether mixed precision was asked for. Without it the level is O0.
        opt_level, amp_dtype, amp_backend: a `flags.Default` is none that was given.
        loss_scale: as in `choose`.
    """
    level = str(opt_level) if amp else "O0"
    mixed = choose(device_type, level, dtype=amp_dtype, loss_scale=loss_scale, backend=amp_backend, indices=indices)
    if level != "O0":
        return mixed
    values = {"--amp-dtype": amp_dtype, "--amp-backend": amp_backend}
    if not amp and opt_level != "O0":
        values = {"--opt-level": opt_level} | values
    given = [flag for flag, value in values.items() if not isinstance(value, flags.Default)]
    if not given:
        return mixed
    verb = "have" if len(given) > 1 else "has"
    return replace(mixed, note=f"{' and '.join(given)} {verb} no effect {'in O0' if amp else 'without --amp'}")


def check_dtype(device_type: str, level: str, half: torch.dtype, indices: Sequence[int]) -> None:
    """Raises a usage UserError if these devices should not compute in `half`."""
    reason, todo = "", "leave the flag out: auto is right for every device"
    if device_type == "npu" and half == torch.bfloat16:
        reason = "the NPU's GRU computes in float16 and float32 only"
    elif device_type == "cpu" and half == torch.float16 and "avx512_fp16" not in devices.words_about_cpu():
        reason = "float16 products take this CPU about ten times as long"
    elif device_type == "cuda" and half == torch.bfloat16:
        old = [index for index in indices if torch.cuda.get_device_capability(index) < BFLOAT16_CAPABILITY]
        if old:
            reason = f"GPU {old[0]} has no bfloat16"
        elif level == "O1":
            reason, todo = "PyTorch's autocast computes a GRU in float16 on a GPU", "use --opt-level O2, or float16"
    if reason:
        raise UserError("usage", reason, "--amp-dtype", todo)


def choose_backend(device_type: str, level: str, half: torch.dtype, wanted: str) -> tuple[str, str]:
    """Returns "apex" or "native", see `choose`, and a note for the user or an empty string."""
    serves = device_type != "cpu" and level in APEX_LEVELS and half == torch.float16
    if wanted == "native" or (wanted == "auto" and not serves):
        return "native", ""
    if not serves:
        asked = f"{level} in {str(half).removeprefix('torch.')} on {device_type}"
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
    """Returns `apex.amp`, or None and the reason. NVIDIA's apex has had no `amp` since May 2025."""
    try:
        return importlib.import_module("apex.amp"), ""
    except Exception as error:  # apex was built for some torch, and fails in many ways under another
        return None, first_line(error)


# ---------------------------------------------------------------- the training step


Model = TypeVar("Model", bound=nn.Module)  # the class of the model that is trained


class Trainer(Generic[Model]):
    """Runs the training steps in a precision. `make_trainer` makes one.

    The optimizer is Adam: Kingma and Ba 2015, arXiv 1412.6980.

    Attributes:
        model: the fp32 model.
        working_model: the module to compute the loss with. It is `model` itself, or its half copy.
        optimizer: updates the weights.
    """

    model: Model
    working_model: Model
    optimizer: torch.optim.Optimizer

    def forward_context(self) -> contextlib.AbstractContextManager:
        """The context of the forward pass."""
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Computes the gradients of the scaled loss, in the working model's parameters."""
        raise NotImplementedError

    def step(self, lr: float, *, max_norm: float) -> None:
        """Unscales the gradients in fp32, clips their norm, updates the weights and drops the gradients.

        Args:
            lr: the learning rate of this step.
            max_norm: the largest norm of all gradients together. 0 does not clip.
        """
        raise NotImplementedError

    def refresh_model(self) -> None:
        """Brings `model` up to date, if the optimizer updates other weights."""
        raise NotImplementedError

    def skipped_steps(self) -> int:
        """How many steps since the last call changed no weight, because their gradients overflowed.

        Waits for the device.

        Raises:
            UserError: diverged, and no later step would change that.
        """
        raise NotImplementedError

    @property
    def loss_scale(self) -> float:
        """The scale of the next step. Waits for the device."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """All that training goes on from, see `nmt.resume.Part`. `refresh_model` is called first."""
        self.refresh_model()
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes over what `state` gave, also into the weights that compute."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    def drop_gradients(self) -> None:
        """Forgets what `backward` has computed."""
        self.working_model.zero_grad()

    def _set_learning_rate(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr


class NativeTrainer(Trainer[Model]):
    """The levels by PyTorch's own means.

    A step changes no weight unless all its gradients are finite, with a static scale and with a dynamic one. O3 has no
    scale and no such check.
    """

    def __init__(self, choice: Choice, model: Model, device: torch.device):
        self.model = model
        self.working_model = copy.deepcopy(model).to(choice.dtype) if choice.level in ("O2", "O3") else model
        optimised = self.working_model if choice.level == "O3" else model
        self.optimizer = make_optimizer(choice, optimised.parameters(), device)
        self._pairs = []  # (fp32, half) parameters
        if self.working_model is not model:
            self._pairs = list(zip(model.parameters(), self.working_model.parameters(), strict=True))
        self._has_masters = choice.level == "O2"
        self._autocast = (device.type, choice.dtype) if choice.level == "O1" else None
        self._update = make_update(choice, self.optimizer, device)
        self._steps = 0  # since the last call of `skipped_steps`
        self._updates = 0  # at that call
        self._in_vain = 0  # steps since the weights last changed, as far as those calls can tell

    def forward_context(self) -> contextlib.AbstractContextManager:
        """Autocast in O1."""
        return torch.autocast(*self._autocast) if self._autocast else super().forward_context()

    def backward(self, loss: Tensor) -> None:
        self._update.scaled(loss).backward()

    @torch.no_grad()
    def step(self, lr: float, *, max_norm: float) -> None:
        self._set_learning_rate(lr)
        if self._has_masters:
            for master, half in self._pairs:
                assert half.grad is not None
                master.grad = half.grad.float()
                half.grad = None
        self._update.step(self.optimizer, max_norm)
        self.optimizer.zero_grad()
        self._steps += 1
        if self._has_masters:
            masters, halves = zip(*self._pairs, strict=True)
            torch._foreach_copy_(list(halves), list(masters))

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
        is_static = self._update.is_static
        if (is_static and self._in_vain >= MAX_STEPS_IN_VAIN) or (not is_static and self.loss_scale < SMALLEST_SCALE):
            raise overflown(f"{skipped} of {steps} steps", self.loss_scale, f"after {updates} updates")
        return skipped

    @property
    def loss_scale(self) -> float:
        return self._update.scale()

    def state(self) -> dict[str, Any]:
        counts = {"steps": self._steps, "updates": self._updates, "in_vain": self._in_vain}
        return super().state() | {"update": self._update.state(), "counts": counts}

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        for parameter, working in self._pairs:
            working.copy_(parameter)
        self._update.restore(state["update"])
        counts = state["counts"]
        self._steps, self._updates, self._in_vain = counts["steps"], counts["updates"], counts["in_vain"]


class FusedUpdate:
    """Scales the loss, unscales and clips the gradients and updates the weights, for a fused optimizer.

    The norm of the gradients tells whether all are finite, and whether they are too large for float32 to add up their
    squares: such a step is skipped too. The optimizer's kernel divides them by the scale and by what clipping asks for,
    so no pass over them is made for either. Nothing waits for the device.

    Args:
        device: where the weights are.
        scale: the loss scale. A dynamic one begins with it.
        is_static: whether the scale stays.
        checks: whether to look for gradients that are not finite.
    """

    def __init__(self, device: torch.device, scale: float, *, is_static: bool, checks: bool):
        self.is_static, self._checks = is_static, checks
        self._scale = torch.tensor(scale, device=device)
        self._clean_steps = torch.zeros((), device=device)  # since the scale was last changed

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss times the scale."""
        return loss * self._scale

    def scale(self) -> float:
        """The scale of the next step. Waits for the device."""
        return self._scale.item()

    def state(self) -> dict[str, Any]:
        """The scale, and how long it has been so. Waits for the device."""
        return {"scale": self._scale.item(), "clean_steps": self._clean_steps.item()}

    def restore(self, state: dict[str, Any]) -> None:
        self._scale.fill_(state["scale"])
        self._clean_steps.fill_(state["clean_steps"])

    def step(self, optimizer: torch.optim.Optimizer, max_norm: float) -> None:
        """Updates the weights, unless a gradient is not finite and that is looked for. See `Trainer.step`."""
        if not self._checks and max_norm == 0:
            optimizer.step()
            return
        parameters = optimizer.param_groups[0]["params"]
        gradients = [parameter.grad.float() for parameter in parameters if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients)  # of the scaled gradients
        divisor = self._scale
        if max_norm > 0:
            divisor = divisor * ((norm / self._scale + 1e-6) / max_norm).clamp(min=1)
        overflows = ~norm.isfinite() if self._checks else torch.zeros_like(norm)
        optimizer.grad_scale, optimizer.found_inf = divisor, overflows.float()  # type: ignore[attr-defined]
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
        if not self.is_static:
            self._clean_steps = torch.where(overflows, 0, self._clean_steps + 1)
            grows = self._clean_steps == GROWTH_INTERVAL
            self._scale = self._scale * torch.where(overflows, 0.5, torch.where(grows, 2.0, 1.0))
            self._clean_steps = torch.where(grows, 0, self._clean_steps)


class ScalerUpdate:
    """The same for any optimizer, by the device's own loss scaler."""

    def __init__(self, scaler: torch.amp.GradScaler, scale: float, *, is_static: bool):
        self.is_static = is_static
        self._scaler, self._static_scale = scaler, scale if is_static else None

    def scaled(self, loss: Tensor) -> Tensor:
        return self._scaler.scale(loss)

    def scale(self) -> float:
        return self._scaler.get_scale()

    def state(self) -> dict[str, Any]:
        return self._scaler.state_dict()

    def restore(self, state: dict[str, Any]) -> None:
        if state:  # a scaler that is turned off has none
            self._scaler.load_state_dict(state)

    def step(self, optimizer: torch.optim.Optimizer, max_norm: float) -> None:
        self._scaler.unscale_(optimizer)
        if max_norm > 0:
            nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], max_norm)
        self._scaler.step(optimizer)
        self._scaler.update(self._static_scale)


class ApexTrainer(Trainer[Model]):
    """O2 and O3 by apex's `amp`: Ascend's fork, or a build of NVIDIA's from before May 2025.

    With a static scale apex checks for no overflow. With a dynamic one it skips such a step, and prints a line.
    """

    def __init__(self, choice: Choice, model: Model, device: torch.device):
        self._amp = importlib.import_module("apex.amp")
        self._is_dynamic = choice.loss_scale == "dynamic"
        self.model = model
        working = copy.deepcopy(model)
        fused = apex_fused_optimizer(self._amp, device)
        if fused is None:
            optimizer, extra = make_optimizer(choice, working.parameters(), device, fused=False), {}
        else:
            optimizer, extra = fused(working.parameters(), eps=epsilon(choice)), {"combine_grad": True}
        self.working_model, self.optimizer = self._amp.initialize(
            working, optimizer, opt_level=choice.level, loss_scale=choice.loss_scale, **extra
        )

    def backward(self, loss: Tensor) -> None:
        with self._amp.scale_loss(loss, self.optimizer) as scaled_loss:
            scaled_loss.backward()

    def step(self, lr: float, *, max_norm: float) -> None:
        self._set_learning_rate(lr)
        if max_norm > 0:
            nn.utils.clip_grad_norm_(self._amp.master_params(self.optimizer), max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()  # apex's takes no argument

    @torch.no_grad()
    def refresh_model(self) -> None:
        for parameter, master in zip(self.model.parameters(), self._amp.master_params(self.optimizer), strict=True):
            parameter.copy_(master)

    def drop_gradients(self) -> None:
        self.optimizer.zero_grad()  # it has laid them in one tensor

    def state(self) -> dict[str, Any]:
        return super().state() | {"amp": self._amp.state_dict()}

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        masters = list(self._amp.master_params(self.optimizer))
        for parameter, master, working in zip(
            self.model.parameters(), masters, self.working_model.parameters(), strict=True
        ):
            master.copy_(parameter)
            working.copy_(parameter)
        self._amp.load_state_dict(state["amp"])

    def skipped_steps(self) -> int:
        """0: apex reports them itself."""
        if self._is_dynamic and self.loss_scale < SMALLEST_SCALE:
            raise overflown("the last steps", self.loss_scale, "apex's lines above say when")
        return 0

    @property
    def loss_scale(self) -> float:
        return self._amp.state_dict()["loss_scaler0"]["loss_scale"]


def overflown(steps: str, scale: float, where: str) -> UserError:
    """The error of a run whose gradients go on to overflow."""
    what = f"the gradients of {steps} were not finite, at a loss scale of {scale:g}"
    lower = "lower --loss-scale or --lr" if scale > 1 else "lower --lr"
    todo = f"{lower}; or give --loss-scale dynamic, or leave --amp out, where they are not so already"
    return UserError("diverged", what, where, todo)


def make_trainer(choice: Choice, model: Model, device: torch.device) -> Trainer[Model]:
    """Makes the trainer of `model`. `DistributedDataParallel` may wrap its working model afterwards.

    Args:
        choice: from `choose`.
        model: the fp32 model, on its device.
        device: that device.
    """
    return {"native": NativeTrainer, "apex": ApexTrainer}[choice.backend](choice, model, device)


def make_update(choice: Choice, optimizer: torch.optim.Optimizer, device: torch.device) -> FusedUpdate | ScalerUpdate:
    """Makes what updates the weights: `FusedUpdate` for a fused optimizer, otherwise the device's loss scaler.

    On an NPU the scaler is torch_npu's. The float16 of the 910A saturates instead of becoming infinite. torch_npu's
    scaler sees that too, in the backward pass alone: it looks from `scaled` on.
    """
    is_static, checks = choice.loss_scale != "dynamic", choice.level != "O3"
    scale = float(choice.loss_scale) if is_static else DYNAMIC_START
    if optimizer.defaults.get("fused"):
        return FusedUpdate(device, scale, is_static=is_static, checks=checks)
    if device.type == "npu":
        make_scaler = torch.npu.amp.GradScaler  # type: ignore[attr-defined]  # torch_npu adds torch.npu
    else:
        make_scaler = functools.partial(torch.amp.GradScaler, device.type)
    scaler = make_scaler(init_scale=scale, growth_interval=GROWTH_INTERVAL, enabled=checks)
    return ScalerUpdate(scaler, scale, is_static=is_static)


def epsilon(choice: Choice) -> float:
    """The constant in Adam's denominator, large enough for the dtype that the optimizer computes in."""
    return HALF_EPSILON if (choice.level, choice.dtype) == ("O3", torch.float16) else EPSILON


def make_optimizer(
    choice: Choice, parameters: Iterable[nn.Parameter], device: torch.device, *, fused: bool = True
) -> torch.optim.Adam:
    """Makes PyTorch's own Adam, in its fastest form. `Trainer.step` gives it its learning rates.

    Args:
        choice: from `choose`.
        parameters: to optimise.
        device: where they are.
        fused: whether one kernel may update all parameters. On a CPU and on CUDA PyTorch has it, and then the check for
            overflow needs no synchronisation. On an NPU PyTorch has none.
    """
    # None instead of False: False would also turn off the loop over all parameters at once.
    is_fused = True if fused and device.type in ("cpu", "cuda") else None
    return torch.optim.Adam(parameters, eps=epsilon(choice), fused=is_fused)


def apex_fused_optimizer(amp: ModuleType, device: torch.device) -> type | None:
    """The class of Ascend's fused Adam, or None where there is none.

    It needs `combine_grad=True` of the same fork's `amp`: it lays all gradients in one tensor at its first step, and
    uses that tensor from then on. torch_npu's copy of it does the same. We do not use that one, because the masters of
    the native O2 get new gradient tensors at each step.
    """
    if device.type != "npu" or "combine_grad" not in inspect.signature(amp.initialize).parameters:
        return None
    try:
        optimizers = importlib.import_module("apex.optimizers")
    except Exception:  # built for another torch, as its `amp` may be; PyTorch's optimizer serves as well
        return None
    return getattr(optimizers, "NpuFusedAdam", None)
