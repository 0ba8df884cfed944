"""Ascend's fused optimizers by their names."""

from apex import amp

import torch


class NpuFusedAdamW(torch.optim.AdamW):
    def __init__(self, *arguments, **options):
        amp.calls.append("NpuFusedAdamW")
        super().__init__(*arguments, **options)
