"""Parameters by name, whole or sharded, drawn anew, and a module's evaluation mode for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
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


def redraw_(module: nn.Module, places: Mapping[str, Tensor], *, seed: int) -> None:
    """Draw entries of parameters and buffers anew, in place, as their layers do it (``reset_parameters``).

    All else stays, to the bit; so do the layers that cannot do it, see `not_redrawn`.

    Args:
        module: Any module.
        places: Which entries: bool, by the names of parameters and buffers.
        seed: Of the draw; the global random state is left alone.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> before = layer.weight.detach().clone()
        >>> redraw_(layer, {"weight": torch.tensor([[True, False]])}, seed=0)
        >>> layer.weight == before
        tensor([[False,  True]])
    """
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    devices = sorted({one.device.index for one in tensors.values() if one.device.type == "cuda"})
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        for prefix in dict.fromkeys(name.rpartition(".")[0] for name in places):
            layer = module.get_submodule(prefix)
            if (reset := _reset_of(layer)) is None:
                continue
            own = {f"{prefix}.{name}".lstrip("."): one for name, one in _tensors_of(layer)}
            saved = {name: one.detach().clone() for name, one in own.items()}
            reset()
            for name, one in own.items():
                one.copy_(torch.where(places[name], one, saved[name]) if name in places else saved[name])


def not_redrawn(module: nn.Module, names: Iterable[str]) -> list[str]:
    """Return the names of the layers of parameters that cannot draw them anew.

    Example:
        >>> not_redrawn(nn.Sequential(nn.Linear(1, 1), nn.PReLU()), ["0.weight", "1.weight"])
        []
    """
    layers = dict.fromkeys(name.rpartition(".")[0] for name in names)
    return [name for name in layers if _reset_of(module.get_submodule(name)) is None]


def _reset_of(layer: nn.Module) -> Callable[[], None] | None:
    # Attention layers of torch have the latter.
    return getattr(layer, "reset_parameters", None) or getattr(layer, "_reset_parameters", None)


def _tensors_of(layer: nn.Module) -> list[tuple[str, Tensor]]:
    return [*layer.named_parameters(), *layer.named_buffers()]


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
