"""Ascend's fused optimizers by their names."""

import torch

from apex import amp


class NpuFusedAdamW(torch.optim.AdamW):
    def __init__(self, *arguments, **options):
        amp.calls.append("NpuFusedAdamW")
        super().__init__(*arguments, **options)
