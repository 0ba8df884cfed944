"""The average of the weights over the last steps. It is validated and saved instead of the last step's weights.

Source: Shamir and Zhang 2013, "Stochastic Gradient Descent for Non-smooth Optimization", arXiv 1212.1824, section 4,
polynomial-decay averaging. Step t keeps the part (t - 1) / (t + eta) of the average before it. So the first weights
leave it with the first step, and later steps have more weight. However long the run is, the average covers the same
part of it. The last 1 / (eta + 1) of the steps, the `part`, have about two thirds of the weight (67% for 0.2).
"""

import copy
import math
from typing import Any, Generic

from nmt.precision import Model, Trainer

import torch

EVERY = 4  # steps between two updates: each goes through all weights


class WeightAverage(Generic[Model]):
    """The running average of a model's weights.

    Args:
        trainer: trains the model.
        part: the last part of the steps so far, which gets most of the weight. Above 0 and at most 1, and 1 means the
            mean of all steps. With 0 there is no average, and `model` is the trained one.

    Attributes:
        model: the fp32 model with the averaged weights.
    """

    def __init__(self, trainer: Trainer[Model], part: float):
        self._trainer, self._part = trainer, part
        self._step = 0  # the last one that the average contains
        # `float` changes no number. It lays a GRU's weights side by side again, for cuDNN.
        self.model = copy.deepcopy(trainer.model).float() if part else trainer.model

    def update(self, step: int) -> None:
        """Takes in the weights after a step, if at least `EVERY` steps have passed since the last time.

        Args:
            step: the number of steps so far.
        """
        if step - self._step >= EVERY:
            self.catch_up(step)

    @torch.no_grad()
    def catch_up(self, step: int) -> None:
        """Takes in the weights after a step. They count for all steps since the last time.

        Args:
            step: the number of steps so far.
        """
        if not self._part:
            return
        self._trainer.refresh_model()
        eta = 1 / self._part - 1
        kept = math.prod((t - 1) / (t + eta) for t in range(self._step + 1, step + 1))
        torch._foreach_lerp_(list(self.model.parameters()), list(self._trainer.model.parameters()), 1 - kept)
        self._step = step

    def state(self) -> dict[str, Any]:
        """What a run goes on from, see `nmt.resume.Part`."""
        return {"step": self._step, "model": self.model.state_dict() if self._part else {}}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes over what `state` gave."""
        self._step = state["step"]
        if self._part:
            self.model.load_state_dict(state["model"])
