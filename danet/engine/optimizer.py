"""Optimizer factories: settings from which an optimizer for a network is made."""

import inspect
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from danet.errors import InputError
from danet.ops.attention import ChannelAttention, PositionAttention
from danet.plain import is_int

OptimizerFactory = Callable[[nn.Module], torch.optim.Optimizer]
"""Returns an optimizer over the parameters of a network."""


@dataclass
class SGD:
    """Stochastic gradient descent with momentum, the paper's optimizer (section 4.1.2).

    Args:
        lr: Base rate of the backbone.
        head_multiplier: Of the rate of all parameters outside the backbone, and of the pyramid that
            brings its last map to another stride; 10 in the paper's code.
        momentum, weight_decay, nesterov: As in torch.optim.SGD.
        decay_norm: Whether norms, biases and the scalars gamma decay as well; the paper's code
            decays everything.
        layer_decay: Ratio of a layer's rate to that of the layer after it (Clark et al., ELECTRA,
            2020): layer i of n in the backbone, from 0, has ``lr * layer_decay ** (n - i)``.
        gamma_multiplier: Of the rate of the gammas of position and channel attention, beside
            ``head_multiplier``.
    """

    lr: float
    head_multiplier: float = 10.0
    momentum: float = 0.9
    weight_decay: float = 1e-4
    nesterov: bool = False
    decay_norm: bool = True
    layer_decay: float = 1.0
    gamma_multiplier: float = 1.0

    def __post_init__(self) -> None:
        _check(self)
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum={self.momentum} is not in [0, 1)")

    def __call__(self, model: nn.Module) -> torch.optim.SGD:
        """Return the optimizer."""
        groups = parameter_groups(model, self)
        optimizer = torch.optim.SGD(
            groups, momentum=self.momentum, nesterov=self.nesterov, fused=_can_fuse(model)
        )
        if self.momentum:
            # Where float16 overflows in the very first step, torch's fused kernel does nothing and
            # would leave these as it found them: unwritten memory. From zeros the sums are equal.
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer


@dataclass
class AdamW:
    """Adam with decoupled weight decay, for training from random weights.

    ``betas`` are as in torch.optim.AdamW, all other arguments as in SGD.
    """

    lr: float
    head_multiplier: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    decay_norm: bool = False
    layer_decay: float = 1.0
    gamma_multiplier: float = 1.0

    def __post_init__(self) -> None:
        _check(self)
        if not (len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)):
            raise ValueError(f"betas={list(self.betas)} are not two numbers in [0, 1)")

    def __call__(self, model: nn.Module) -> torch.optim.AdamW:
        """Return the optimizer."""
        betas = (float(self.betas[0]), float(self.betas[1]))
        return torch.optim.AdamW(parameter_groups(model, self), betas=betas, fused=_can_fuse(model))


def _check(factory: SGD | AdamW) -> None:
    if not (math.isfinite(factory.lr) and factory.lr > 0):
        raise ValueError(f"lr={factory.lr} is not a finite number above 0")
    for name in ("head_multiplier", "gamma_multiplier", "weight_decay"):
        value = getattr(factory, name)
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name}={value} is not a finite number of at least 0")
    if not 0 < factory.layer_decay <= 1:
        raise ValueError(f"layer_decay={factory.layer_decay} is not in (0, 1]")


def _can_fuse(model: nn.Module) -> bool:
    # One kernel reads and writes each tensor once, and takes the overflow flag of float16 from the
    # device, so a step needs no wait.
    return all(p.device.type in ("cpu", "cuda") for p in model.parameters())


def parameter_groups(model: nn.Module, factory: SGD | AdamW) -> list[dict[str, Any]]:
    """Group parameters by rate and decay, without frozen ones; ``base_lr`` is before schedule."""
    factors = layer_factors(model, factory)
    kinds = PositionAttention, ChannelAttention
    gammas = {module.gamma for module in model.modules() if isinstance(module, kinds)}
    groups: dict[tuple[float, bool, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        in_head = not name.startswith("backbone.")
        # Norms, biases and gamma are the parameters of one dimension.
        decays = factory.decay_norm or parameter.ndim > 1
        factor = factory.head_multiplier if in_head else factors.get(name, 1.0)
        if in_head and parameter in gammas:
            factor *= factory.gamma_multiplier
        base_lr = factory.lr * factor
        weight_decay = factory.weight_decay if decays else 0.0
        # ``lr`` is overwritten in every step; torch keeps other keys.
        group = {"params": [], "lr": base_lr, "base_lr": base_lr, "weight_decay": weight_decay}
        groups.setdefault((factor, in_head, decays), group)["params"].append(parameter)
    return list(groups.values())


def layer_factors(model: nn.Module, factory: SGD | AdamW) -> dict[str, float]:
    """Return the factor of the rate for each parameter of the backbone, by name in the network.

    Parts of stage 5, which start from random weights, have that of the heads. A backbone that does
    not list its layers (see danet.models.finetuning) has none; raises InputError for it unless
    ``layer_decay`` is 1.
    """
    backbone: Any = getattr(model, "backbone", None)
    decay = factory.layer_decay
    if not inspect.ismethod(getattr(backbone, "layers", None)):
        if decay == 1:
            return {}
        raise InputError(
            f"optimizer.layer_decay={decay}: {type(backbone).__name__} has no method that lists "
            "its layers; set optimizer.layer_decay=1, or take another model/backbone"
        )
    layers = backbone.layers()
    depth = sum(layer.stage <= 4 for layer in layers)
    return {
        f"backbone.{name}": decay ** (depth - i) if layer.stage <= 4 else factory.head_multiplier
        for i, layer in enumerate(layers)
        for name in layer.parameters
    }


def state_of(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Any]:
    """Return the state dict of an optimizer, with the ``name`` and ``shape`` of each parameter."""
    known = _names_and_shapes(optimizer, model)
    # torch only numbers the states: momentum of layers that changed places would go unnoticed.
    content = optimizer.state_dict()
    return {**content, "state": {i: {**known[i], **x} for i, x in content["state"].items()}}


def misfit(factory: OptimizerFactory, model: nn.Module, saved: Mapping[str, Any]) -> str:
    """Return why a saved state is not that of an optimizer, as part of a message; "" if it is.

    Names and shapes, which ``state_of`` adds, may be missing.
    """
    # Fused kernels do not check sizes: a state of another shape is read and written out of bounds.
    # So states are compared with those after a step, here of tensors without values.
    twin = deepcopy(model).to("meta")
    optimizer = factory(twin)
    for parameter in twin.parameters():
        parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
    try:
        optimizer.step()
        is_known = True
    except (RuntimeError, NotImplementedError):  # it reads values, as Adafactor does
        is_known = False
    known, kind = _names_and_shapes(optimizer, twin), type(optimizer).__name__
    own = optimizer.state_dict()["state"]
    numbers = []
    with suppress(TypeError, KeyError):
        numbers = [number for group in saved["param_groups"] for number in group["params"]]
    states = saved.get("state")
    if not isinstance(states, dict) or numbers != list(range(len(known))):
        return f"it is not a state of {kind} over {len(known)} parameters"
    for index, state in states.items():
        # Texts out of the file are cut, since they may be of any length.
        if not (is_int(index) and index in range(len(known)) and isinstance(state, dict)):
            return f"state {str(index)[:20]!r} is of no parameter"
        added, name = known[index], known[index]["name"]
        found = {**added, **state}
        expected = {**(own.get(index, {}) if is_known else state), **added}
        if found.keys() != expected.keys():
            keys = [sorted(map(str, of.keys() - added)) for of in (found, expected)]
            return f"the state of {name} has {str(keys[0])[:99]}; {kind} has {keys[1]}"
        for key, value in found.items():
            if (text := _describe(value)) != (wanted := _describe(expected[key])):
                return f"state {index} is not of {name}: its {key} is {text[:99]}, not {wanted}"
    return ""


def _describe(value: Any) -> str:
    """Describe what must be equal in two states: of a tensor not its values, if they are finite."""
    if not isinstance(value, Tensor):
        return repr(value)
    # Other values would reach the weights in the first step.
    is_finite = value.is_meta or bool(value.isfinite().all())
    kind = "floating point" if value.is_floating_point() else str(value.dtype)
    return f"{kind if is_finite else 'NaN or infinite'} of shape {list(value.shape)}"


def restore(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Fill an optimizer from a state in which ``misfit`` found nothing; settings stay its own."""
    states = {
        index: {key: value for key, value in state.items() if key not in ("name", "shape")}
        for index, state in saved["state"].items()
    }
    # torch would also take the groups of the file, and with them the rate of the earlier run.
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": states, "param_groups": groups})
    # Fused kernels walk over memory and assume that states have the strides of their weights. A
    # checkpoint written in another memory format (a CPU's NCHW) would pair the wrong elements.
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and name != "step":
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _names_and_shapes(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[dict[str, Any]]:
    """Return name and shape of the parameters, in the order in which torch numbers their states."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return [{"name": names[p], "shape": list(p.shape)} for p in parameters]
