"""Parameters by name, and a module's evaluation mode for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

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


@contextmanager
def computing_with(module: nn.Module, tensors: ParamDict) -> Iterator[None]:
    """Let ``module`` compute with other parameters and buffers, by name; what is shared stays shared.

    Unlike ``torch.func.functional_call`` it gives back the parameters of a module that is registered twice, too.

    Example:
        >>> import torch
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> with computing_with(layer, {"weight": torch.tensor([[2.0]])}):
        ...     layer(torch.tensor([[3.0]]))
        tensor([[6.]])
        >>> isinstance(layer.weight, nn.Parameter)
        True
    """
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    other = {id(value): tensors[name] for name, value in named.items() if name in tensors}
    entries: list[dict[str, Any]] = [values for one in module.modules() for values in (one._parameters, one._buffers)]
    own = [(values, dict(values)) for values in entries]
    try:
        for values, before in own:
            values.update({name: other.get(id(value), value) for name, value in before.items()})
        yield
    finally:
        for values, before in own:
            values.update(before)
