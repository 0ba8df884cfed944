"""An average of the weights over the last steps: the model that is validated and saved in place of the last step's.

Source: Polyak and Juditsky 1992, "Acceleration of Stochastic Approximation by Averaging", in the exponential form with
a window that grows with the run, as Shamir and Zhang 2013, arXiv 1212.1824, section 4, weigh the steps.
"""

import copy

import torch

from precision import Precision

EVERY = 4  # steps between two updates: each goes through all weights
WINDOW = 5  # early, the average covers about the last fifth of the steps, and not what the run began with


class WeightAverage:
    """The exponential moving average of a model's weights.

    Args:
        precise: what trains the model.
        decay: what the average keeps of itself in a step. 0: there is no average, and `model` is the trained one.

    Attributes:
        model: the fp32 model with the averaged weights.
    """

    def __init__(self, precise: Precision, decay: float):
        self._precise, self._decay = precise, decay
        self.model = copy.deepcopy(precise.model) if decay else precise.model

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the weights after a step, every `EVERY` steps.

        Args:
            step: the number of steps so far.
        """
        if not self._decay or step % EVERY:
            return
        self._precise.refresh_model()
        kept = min(self._decay, step / (step + WINDOW)) ** EVERY
        torch._foreach_lerp_(list(self.model.parameters()), list(self._precise.model.parameters()), 1 - kept)
