"""Parameters by name, and a module's evaluation mode for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeAlias

from torch import Tensor, nn

ParamDict: TypeAlias = dict[str, Tensor]
"""One tensor a parameter, by its name in ``named_parameters()``."""


def trainable(module: nn.Module) -> ParamDict:
    """Return the parameters of ``module`` that require a gradient, by name; a shared one once, by its first name.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> _ = layer.bias.requires_grad_(False)
        >>> list(trainable(layer))
        ['weight']
    """
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put ``module`` into evaluation mode, and give every submodule its own mode back, whatever happens.

    Example:
        >>> model = nn.Sequential(nn.Linear(1, 1), nn.Dropout().eval())  # the dropout is frozen in evaluation mode
        >>> with evaluating(model):
        ...     model.training
        False
        >>> model.training, model[1].training
        (True, False)
    """
    modes = [(submodule, submodule.training) for submodule in module.modules()]
    try:
        module.eval()
        yield
    finally:
        # Not `train(mode)`: it would speak for the submodules too.
        for submodule, mode in modes:
            submodule.training = mode
