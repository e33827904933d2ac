"""Zeros that are held: the pin that holds them, and other copies of the weights that are to have them, too."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lightning_continual.constraints import Pin


def pinned_at_zero(pinned: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> Pin:
    """Return a pin at zero, which takes no memory for its values.

    Args:
        pinned: What is held (bool), by parameter name.
        like: Tensors of the weights' types, on their devices, by the same names.

    Returns:
        The pin.

    Example:
        >>> import torch
        >>> weight = torch.tensor([1.0, 2.0])
        >>> pinned_at_zero({"w": torch.tensor([True, False])}, {"w": weight}).put_back_({"w": weight})
        >>> weight
        tensor([0., 2.])
    """
    return Pin(dict(pinned), {name: like[name].new_zeros(()).expand(one.shape) for name, one in pinned.items()})


def put_zeros_(state_dict: dict[str, Tensor], pinned: Mapping[str, Tensor]) -> None:
    """Put zeros into a ``state_dict``, which may be that of an average of weights; tensors themselves do not change.

    Args:
        state_dict: Tensors by name; those that lack a zero are replaced.
        pinned: Where zeros belong (bool), by parameter name, of the tensors' shapes.

    Example:
        >>> import torch
        >>> state_dict = {"w": torch.tensor([1e-9, 2.0])}
        >>> put_zeros_(state_dict, {"w": torch.tensor([True, False])})
        >>> state_dict
        {'w': tensor([0., 2.])}
    """
    for name in pinned.keys() & state_dict.keys():
        mask = pinned[name].to(state_dict[name].device)
        if bool(state_dict[name][mask].any()):
            state_dict[name] = state_dict[name].masked_fill(mask, 0)
