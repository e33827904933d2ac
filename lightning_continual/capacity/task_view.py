"""A module as one task sees it, where one output layer serves all tasks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class OnlyOutputs(nn.Module):
    r"""An output layer with :math:`-\infty` at all outputs but some.

    Args:
        layer: A linear layer ``(B, *, O)``, or a convolution ``(B, O, *)``.
        outputs: The outputs that stay.

    Example:
        >>> OnlyOutputs(nn.Linear(1, 3), [1])(torch.ones(1, 1)).isinf()
        tensor([[ True, False,  True]])
    """

    others: Tensor

    def __init__(self, layer: nn.Module, outputs: Sequence[int]) -> None:
        super().__init__()
        self.layer = layer
        self.dim = -1 if isinstance(layer, nn.Linear) else 1
        weight = layer.get_parameter("weight")
        others = torch.ones(len(weight), dtype=torch.bool, device=weight.device)
        others[list(outputs)] = False
        self.register_buffer("others", others, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs of the layer, of its shape."""
        outputs: Tensor = self.layer(x)
        shape = [1] * outputs.ndim
        shape[self.dim] = -1
        return outputs.masked_fill(self.others.view(shape), float("-inf"))


@contextmanager
def only_outputs(module: nn.Module, name: str, outputs: Sequence[int]) -> Iterator[None]:
    """Let a module's output layer give only some outputs for a while; see `OnlyOutputs`.

    Args:
        module: The module.
        name: The name of its output layer.
        outputs: The outputs that stay.

    Example:
        >>> model = nn.Sequential(nn.ReLU(), nn.Linear(1, 2))
        >>> with only_outputs(model, "1", [0]):
        ...     model(torch.ones(1, 1)).isinf().tolist()
        [[False, True]]
    """
    own = module.get_submodule(name)
    parent, _, child = name.rpartition(".")
    try:
        setattr(module.get_submodule(parent), child, OnlyOutputs(own, outputs))
        yield
    finally:
        setattr(module.get_submodule(parent), child, own)
