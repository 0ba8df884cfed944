"""torch.npu.amp."""

import torch


class autocast(torch.amp.autocast):
    """torch.autocast("npu")."""

    def __init__(self, enabled: bool = True, dtype: torch.dtype = torch.float16, cache_enabled: bool = True):
        super().__init__("npu", enabled=enabled, dtype=dtype, cache_enabled=cache_enabled)


class GradScaler(torch.amp.GradScaler):
    """torch.amp.GradScaler("npu"), which prints a line of each step that it skips, on every rank, as the real one does.
    If it is not dynamic, its scale stays, and as in the real one nothing looks for an overflow."""

    def __init__(
        self,
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        dynamic: bool = True,
        enabled: bool = True,
    ):
        super().__init__("npu", init_scale, growth_factor, backoff_factor, growth_interval, enabled)
        self._dynamic = dynamic

    def step(self, optimizer: torch.optim.Optimizer, *args, **kwargs) -> float | None:
        done = []
        hook = optimizer.register_step_post_hook(lambda *_: done.append(True))
        result = super().step(optimizer, *args, **kwargs)
        hook.remove()
        if not done:
            print("Gradient overflow. Skipping step")
        return result

    def _unscale_grads_(self, *args, **kwargs) -> dict[torch.device, torch.Tensor]:
        found = super()._unscale_grads_(*args, **kwargs)
        return found if self._dynamic else {device: torch.zeros_like(flag) for device, flag in found.items()}

    def update(self, new_scale: float | torch.Tensor | None = None) -> None:
        if self._enabled and new_scale is None and not self._dynamic:
            new_scale = self._scale
        super().update(new_scale)
