"""How weights move: optimizer, schedule of the learning rate, moving average of the weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from edgekd.types import TrainOptions

ONECYCLE_RISE = 0.25  # part of the steps in which the rate rises; torch's OneCycleLR takes 0.3; not tuned here


def optimizer(module: nn.Module, options: TrainOptions) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum, or AdamW; biases and the scales of normalisation layers do not decay.

    Gradients are not clipped: both optimizers with a warm-up train image classifiers without it, and a clipped
    divergence would only look like slow learning; a loss that is not finite stops the training instead.

    References: Sutskever, Martens, Dahl, Hinton, ICML 2013 (Nesterov); Loshchilov, Hutter, ICLR 2019 (AdamW).
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": options.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if options.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=options.learning_rate, fused=True)
    nesterov = options.momentum > 0
    made = torch.optim.SGD(groups, options.learning_rate, options.momentum, nesterov=nesterov, fused=True)
    if nesterov:  # torch's fused kernel takes a momentum of all or of none; a head of another task learns later
        made.state.update((p, {"momentum_buffer": torch.zeros_like(p)}) for p in trained)
    return made


def learning_rate(options: TrainOptions, step: int, steps: int, steps_per_epoch: int) -> float:
    """The learning rate of one step of `steps`.

    cosine: linear to the peak in `warmup_epochs`, then half a cosine down to 0 (Loshchilov, Hutter: SGDR, ICLR 2017).
    onecycle: a straight line up to the peak in the first quarter, a straight line down to 0 (Smith, Topin:
    Super-Convergence, 2018; straight lines as in Jordan 2024).
    """
    rise = ONECYCLE_RISE * steps if options.schedule == "onecycle" else options.warmup_epochs * steps_per_epoch
    rise = min(rise, 0.5 * steps)
    done = step + 0.5  # the middle of the step: neither the first nor the last one is wasted on a rate of 0
    if done < rise:
        return options.learning_rate * done / rise
    fall = (done - rise) / (steps - rise)
    part = 1 - fall if options.schedule == "onecycle" else 0.5 * (1 + math.cos(math.pi * fall))
    return options.learning_rate * part


class Average:
    """Exponential moving average of a module's state, which is what is kept when training ends.

    The decay of step t is min(decay, (1 + t) / (10 + t)) (as TensorFlow's ExponentialMovingAverage), so that a short
    training does not end on its first weights. (Polyak, Juditsky: Acceleration of Stochastic Approximation, 1992.)

    Args:
        module: what is averaged; its state is read at every step.
        decay: 0 turns it off.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._module, self._decay = module, decay
        # Running statistics of normalisation layers are averaged like the weights, not copied: the statistics of the
        # last step belong to the last weights, and beside averaged weights they would be those of another network.
        # What is not a float (a count of batches) has no mean: it is copied at the end.
        state = module.state_dict()
        self._mean = {name: value.clone() for name, value in state.items() if decay and value.is_floating_point()}

    def update(self, step: int) -> None:
        """Take in the weights after step `step`, counted from 0."""
        if self._mean:
            state = self._module.state_dict()  # asked for anew: a module may put new tensors in place of its buffers
            live = [state[name] for name in self._mean]
            torch._foreach_lerp_(list(self._mean.values()), live, 1 - min(self._decay, (1 + step) / (10 + step)))

    def kept(self) -> dict[str, Tensor]:
        """The averages by name, for a checkpoint."""
        return self._mean

    def restore(self, kept: dict[str, Tensor]) -> None:
        """Go on from what `kept` gave."""
        for name, mean in self._mean.items():
            mean.copy_(kept[name])

    def result(self) -> dict[str, Tensor]:
        """The whole state to keep: averages, and the last value of what is not averaged."""
        return self._module.state_dict() | self._mean
