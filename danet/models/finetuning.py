"""Fine-tuning of a pretrained backbone: frozen stages, and batch norms that keep their statistics.

A backbone that can do it has a method ``layers``, which lists its parameters by depth. Its
constructor ends with ``freeze_stages``, and its ``train`` with ``keep_in_eval``.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

Freeze = Literal["none", "stem", 1, 2, 3, 4, "all"]
"""The last stage that is frozen; ``all`` is the same as 4."""


class Layer(NamedTuple):
    """Parameters of one depth: the stem, or one block of a stage."""

    stage: int
    """0 for the stem, 1 to 4 for a block; 5 for parts behind the pretrained network, such as a
    feature pyramid, which start from random weights and are never frozen."""
    parameters: tuple[str, ...]
    """Their names in the backbone."""


def freeze_stages(backbone: nn.Module, layers: Sequence[Layer], freeze: Freeze) -> None:
    """Set ``requires_grad`` to False for the parameters of all stages up to ``freeze``.

    From then on that means: a parameter without it is frozen, has no state in an optimizer, and
    no graph is recorded for a stage of such parameters, since its input has no gradient either.
    """
    choices = get_args(Freeze)
    if isinstance(freeze, bool) or freeze not in choices:  # True == 1
        raise ValueError(f"freeze={freeze!r} is not one of {', '.join(map(str, choices))}")
    last = min(choices.index(freeze) - 1, 4)
    for name in (name for layer in layers if layer.stage <= last for name in layer.parameters):
        backbone.get_parameter(name).requires_grad_(False)
    backbone.train()  # as new modules are, but for the frozen ones


def count_frozen(network: nn.Module) -> int:
    """Return how many numbers are in the frozen parameters of a network."""
    return sum(p.numel() for p in network.parameters() if not p.requires_grad)


def keep_in_eval(backbone: nn.Module, *, norm_eval: bool) -> None:
    """Put the frozen modules of a backbone in training mode back into eval mode.

    They neither update batch-norm statistics nor drop anything. With ``norm_eval`` all batch
    norms are in eval mode: they normalise with the statistics they started from, and only their
    weights and biases learn.
    """
    for module in backbone.modules():
        parameters = list(module.parameters())
        is_frozen = bool(parameters) and not any(p.requires_grad for p in parameters)
        if is_frozen or (norm_eval and isinstance(module, _BatchNorm)):
            module.eval()
