"""`initialize`, `scale_loss` and `master_params`."""

import contextlib

import torch
from torch import nn

calls: list[str] = []
scales: dict[int, float] = {}  # by the optimizer's id
dynamic: set[int] = set()
delayed: set[int] = set()  # whose gradients are still scaled


def initialize(model, optimizer, opt_level="O1", loss_scale=None, combine_grad=False):
    """Casts `model` in place and puts masters into `optimizer`."""
    assert not isinstance(model, nn.parallel.DistributedDataParallel), "apex wants the model before DDP"
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters()), "apex wants a float32 model"
    scale = 65536.0 if loss_scale == "dynamic" else loss_scale
    calls.append(f"initialize {opt_level} loss_scale={loss_scale} combine_grad={combine_grad}")
    masters = {parameter: nn.Parameter(parameter.detach().clone()) for parameter in model.parameters()}
    half = torch.bfloat16 if next(model.parameters()).device.type == "cpu" else torch.float16
    model.to(half)
    halves = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if opt_level == "O2":
        for group in optimizer.param_groups:
            group["params"] = [masters[parameter] for parameter in group["params"]]
    scales[id(optimizer)] = scale
    if loss_scale == "dynamic":
        dynamic.add(id(optimizer))
    optimizer.skips = False
    own_step = optimizer.step

    def step():
        calls.append("step")
        if optimizer.skips:
            print("Gradient overflow.  Skipping step")
            return
        own_step()
        for parameter, master in zip(halves, master_params(optimizer), strict=True):
            parameter.data.copy_(master)

    def zero_grad():  # apex's takes no argument
        calls.append("zero_grad")
        for parameter in [*halves, *master_params(optimizer)]:
            parameter.grad = None

    optimizer.step, optimizer.zero_grad, optimizer.halves = step, zero_grad, halves
    return model, optimizer


@contextlib.contextmanager
def scale_loss(loss, optimizer, delay_unscale=False):
    """The scaled loss. On leaving, the unscaled gradients are in the masters, unless that is delayed.

    As in apex, gradients of before are dropped, unless the last call delayed.
    """
    calls.append("scale_loss delay_unscale" if delay_unscale else "scale_loss")
    scale = scales[id(optimizer)]
    if not delay_unscale and id(optimizer) not in delayed:
        for parameter in optimizer.halves:
            parameter.grad = None
    yield loss.float() * scale
    if delay_unscale:
        delayed.add(id(optimizer))
        return
    delayed.discard(id(optimizer))
    for parameter, master in zip(optimizer.halves, master_params(optimizer), strict=True):
        master.grad = (parameter.grad.float() / scale).to(master.dtype)
    finite = all(master.grad.isfinite().all() for master in master_params(optimizer))
    optimizer.skips = id(optimizer) in dynamic and not finite
    if optimizer.skips:
        scales[id(optimizer)] /= 2


def master_params(optimizer):
    """The parameters that are optimised."""
    for group in optimizer.param_groups:
        yield from group["params"]


def state_dict():
    """The loss scalers' state."""
    return {f"loss_scaler{i}": {"loss_scale": scale, "unskipped": 0} for i, scale in enumerate(scales.values())}


def load_state_dict(state):
    """Takes over what `state_dict` gave."""
    for number, optimizer in enumerate(scales):
        if (name := f"loss_scaler{number}") in state:
            scales[optimizer] = state[name]["loss_scale"]
