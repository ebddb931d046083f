"""Optimizers as recipes: settings that make an optimizer for a network."""

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn


class Recipe(Protocol):
    """What the classes of this module are."""

    def __call__(self, model: nn.Module) -> torch.optim.Optimizer:
        """Returns an optimizer over the parameters of the model."""
        ...


@dataclass
class SGD:
    """Stochastic gradient descent with momentum, the paper's optimizer (section 4.1.2).

    Args:
        lr: Base rate of the backbone.
        head_multiplier: Of the rate of all parameters outside the backbone; 10 in the paper's code.
        momentum, weight_decay, nesterov: As in torch.optim.SGD.
        decay_norm: Whether norms, biases and the scalars gamma decay as well; the paper's code
            decays everything.
    """

    lr: float
    head_multiplier: float = 10.0
    momentum: float = 0.9
    weight_decay: float = 1e-4
    nesterov: bool = False
    decay_norm: bool = True

    def __post_init__(self) -> None:
        _check(self)
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum={self.momentum} is not in [0, 1)")

    def __call__(self, model: nn.Module) -> torch.optim.SGD:
        """Returns the optimizer."""
        groups = parameter_groups(model, self)
        optimizer = torch.optim.SGD(
            groups,
            lr=self.lr,
            momentum=self.momentum,
            nesterov=self.nesterov,
            fused=_can_fuse(model),
        )
        if self.momentum:
            # Where float16 overflows in the very first step, torch's fused kernel does nothing and
            # would leave these as it found them: unwritten memory. From zeros the sums are equal.
            for parameter in model.parameters():
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer


@dataclass
class AdamW:
    """Adam with decoupled weight decay, for training from random weights.

    Args:
        lr, head_multiplier, weight_decay, decay_norm: As in SGD.
        betas: As in torch.optim.AdamW.
    """

    lr: float
    head_multiplier: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    decay_norm: bool = False

    def __post_init__(self) -> None:
        _check(self)
        if not (len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)):
            raise ValueError(f"betas={list(self.betas)} are not two numbers in [0, 1)")

    def __call__(self, model: nn.Module) -> torch.optim.AdamW:
        """Returns the optimizer."""
        groups = parameter_groups(model, self)
        betas = (self.betas[0], self.betas[1])
        return torch.optim.AdamW(groups, lr=self.lr, betas=betas, fused=_can_fuse(model))


def _check(recipe: SGD | AdamW) -> None:
    if not (math.isfinite(recipe.lr) and recipe.lr > 0):
        raise ValueError(f"lr={recipe.lr} is not a finite number above 0")
    for name in ("head_multiplier", "weight_decay"):
        value = getattr(recipe, name)
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name}={value} is not a finite number of at least 0")


def _can_fuse(model: nn.Module) -> bool:
    """Tells whether torch updates all parameters in one kernel: one pass over each tensor."""
    return all(
        p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in model.parameters()
    )


def parameter_groups(model: nn.Module, recipe: SGD | AdamW) -> list[dict[str, Any]]:
    """Sorts parameters by rate (backbone or head) and decay; every parameter is in one group.

    ``base_lr`` of a group is its rate at factor 1 of the schedule.
    """
    groups: dict[tuple[bool, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        in_head = not name.startswith("backbone.")
        decays = recipe.decay_norm or parameter.ndim > 1
        base_lr = recipe.lr * (recipe.head_multiplier if in_head else 1.0)
        group = groups.setdefault(
            (in_head, decays),
            {
                "params": [],
                "lr": base_lr,
                "base_lr": base_lr,
                "weight_decay": recipe.weight_decay if decays else 0.0,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())
