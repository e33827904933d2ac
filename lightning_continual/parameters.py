"""Parameters by name, whole or sharded, and a module's evaluation mode for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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


def is_sharded(tensor: Tensor) -> bool:
    """Return whether processes hold parts of a tensor: a ``DTensor``, as FSDP2 makes of parameters."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """Return a sharded tensor whole, a collective; any other as it is."""
    gather: Callable[[], Tensor] | None = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def sharded_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a tensor on the device of ``like`` and, where that is sharded, in the same parts.

    Every process must have the same whole tensor; nothing is sent.
    """
    if not is_sharded(like) or is_sharded(tensor):
        return tensor.to(like.device)
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


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
