"""An average of the weights over the last steps: the model that is validated and saved in place of the last step's.

Source: Shamir and Zhang 2013, "Stochastic Gradient Descent for Non-smooth Optimization", arXiv 1212.1824, section 4,
polynomial-decay averaging: of the average before step t a part of (t - 1) / (t + eta) is kept. The first weights leave
it with the first step, and however long the run, it covers the same part of it: the later steps have the greater
weight, and the last 1 / (eta + 1) of them, the `part`, about two thirds of all (67% where it is 0.2).
"""

import copy
import math

from nmt.precision import Precision

import torch

EVERY = 4  # steps between two updates: each goes through all weights


class WeightAverage:
    """The running average of a model's weights.

    Args:
        precise: what trains the model.
        part: the last part of the steps so far that is to have most of the weight, above 0 and at most 1, which is
            the mean of all. 0: there is no average, and `model` is the trained one.

    Attributes:
        model: the fp32 model with the averaged weights.
    """

    def __init__(self, precise: Precision, part: float):
        self._precise, self._part = precise, part
        self._step = 0  # up to which the average has taken the weights in
        # `float` changes no number; it lays a GRU's weights side by side again, as cuDNN wants them.
        self.model = copy.deepcopy(precise.model).float() if part else precise.model

    def update(self, step: int) -> None:
        """Takes in the weights after a step, if `EVERY` steps have gone by since it last did.

        Args:
            step: the number of steps so far.
        """
        if step - self._step >= EVERY:
            self.catch_up(step)

    @torch.no_grad()
    def catch_up(self, step: int) -> None:
        """Takes in the weights after a step, once, for all steps since it last did.

        Args:
            step: the number of steps so far.
        """
        if not self._part:
            return
        self._precise.refresh_model()
        eta = 1 / self._part - 1
        kept = math.prod((t - 1) / (t + eta) for t in range(self._step + 1, step + 1))
        torch._foreach_lerp_(list(self.model.parameters()), list(self._precise.model.parameters()), 1 - kept)
        self._step = step
